from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notations import REFUSED_HOSTS

from dispatcher.core import addresses
from dispatcher.core.addresses import REFUSED, Guard
from dispatcher.errors import AddressRefused

REFUSED_URLS = [
    ("", "invalid_url"),
    ("example.com/hook", "invalid_url"),
    ("//example.com/hook", "invalid_url"),
    ("https:example.com", "invalid_url"),
    ("https:/example.com", "invalid_url"),
    ("https:\\\\example.com", "invalid_url"),
    ("https://example.com\\@127.0.0.1/", "invalid_url"),
    ("https:///hook", "invalid_host"),
    ("https://?x", "invalid_host"),
    (" https://example.com/", "invalid_url"),
    ("https://example.com/ ", "invalid_url"),
    ("https://exam ple.com/", "invalid_url"),
    ("https://example.com/\r\nX-Evil: 1", "invalid_url"),
    ("https://example.com/\n", "invalid_url"),
    ("ht\ttps://example.com/", "invalid_url"),
    ("https://example.com/\x00", "invalid_url"),
    ("https://example.com/\x7f", "invalid_url"),
    ("https://example.com/\x85", "invalid_url"),
    ("https://example.com/\u2028", "invalid_url"),
    ("https://example.com/\u3000", "invalid_url"),
    ("https://example.com/über", "invalid_url"),
    ("https://example.com/?q=ü", "invalid_url"),
    ("https://example.com/#top", "fragment_in_url"),
    ("https://example.com#", "fragment_in_url"),
    ("https://user@example.com/", "credentials_in_url"),
    ("https://user:secret@example.com/", "credentials_in_url"),
    ("https://@example.com/", "credentials_in_url"),
    ("https://example.com:443@127.0.0.1/", "credentials_in_url"),
    ("https://example.com:0/", "invalid_port"),
    ("https://example.com:65536/", "invalid_port"),
    ("https://example.com:000443/", "invalid_port"),
    ("https://example.com:4 43/", "invalid_url"),
    ("https://example.com:-1/", "invalid_url"),
    ("https://example.com:https/", "invalid_url"),
    ("https://example.com:４４３/", "invalid_url"),
    ("https://example.com:1:2/", "invalid_url"),
    ("http://example.com/", "not_https"),
    ("HTTP://example.com/", "not_https"),
    ("ftp://example.com/", "not_https"),
    ("file:///etc/passwd", "not_https"),
    ("javascript:alert(1)", "invalid_url"),
    ("data:text/plain,x", "invalid_url"),
    ("gopher://127.0.0.1:6379/_x", "not_https"),
    ("https://example.com/" + "a" * 2029, "url_too_long"),
    ("https://example.com/" + "|" * 1000, "url_too_long"),
]

# URL → (host, port, path, normalised URL, Host header)
ACCEPTED_URLS = [
    ("https://example.com", "example.com", 443, "/", "https://example.com/", "example.com"),
    ("HTTPS://Example.COM:443/a", "example.com", 443, "/a", "https://example.com/a", "example.com"),
    ("https://example.com:/", "example.com", 443, "/", "https://example.com/", "example.com"),
    ("https://example.com:8443/", "example.com", 8443, "/", "https://example.com:8443/", "example.com:8443"),
    ("https://example.com:65535", "example.com", 65535, "/", "https://example.com:65535/", "example.com:65535"),
    ("https://example.com:80/", "example.com", 80, "/", "https://example.com:80/", "example.com:80"),
    ("https://example.com.:0443/", "example.com", 443, "/", "https://example.com/", "example.com"),
    ("https://example.com?a=b", "example.com", 443, "/?a=b", "https://example.com/?a=b", "example.com"),
    ("https://a.example/x%20y%2Fz?q=@:/?", "a.example", 443, "/x%20y%2Fz?q=@:/?", None, "a.example"),
    ("https://a.example/{id}|<x>", "a.example", 443, "/%7Bid%7D%7C%3Cx%3E", None, "a.example"),
    ("https://a.example/%zz%7b[0]'~!$&()*+,;=", "a.example", 443, "/%zz%7b[0]'~!$&()*+,;=", None, "a.example"),
    ("https://a.example//../b/", "a.example", 443, "//../b/", None, "a.example"),
    ("https://a_b.example-c.com/", "a_b.example-c.com", 443, "/", None, "a_b.example-c.com"),
    ("https://bücher.example/", "xn--bcher-kva.example", 443, "/", None, "xn--bcher-kva.example"),
    ("https://BÜCHER。example/", "xn--bcher-kva.example", 443, "/", None, "xn--bcher-kva.example"),
    ("https://straße.example/", "xn--strae-oqa.example", 443, "/", None, "xn--strae-oqa.example"),
    ("https://_dmarc.bücher.example/", "_dmarc.xn--bcher-kva.example", 443, "/", None, "_dmarc.xn--bcher-kva.example"),
    ("https://b%C3%BCcher.example/", "xn--bcher-kva.example", 443, "/", None, "xn--bcher-kva.example"),
    ("https://xn--bcher-kva.example/", "xn--bcher-kva.example", 443, "/", None, "xn--bcher-kva.example"),
    ("https://1.2.3.4.nip.io/", "1.2.3.4.nip.io", 443, "/", None, "1.2.3.4.nip.io"),
    ("https://0x7f.example/", "0x7f.example", 443, "/", None, "0x7f.example"),
    ("https://localhost.example/", "localhost.example", 443, "/", None, "localhost.example"),
    ("https://x.mylocal/", "x.mylocal", 443, "/", None, "x.mylocal"),
    ("https://8.8.8.8/", "8.8.8.8", 443, "/", "https://8.8.8.8/", "8.8.8.8"),
    ("https://134744072/", "8.8.8.8", 443, "/", "https://8.8.8.8/", "8.8.8.8"),
    ("https://0x08.010.2056:99/", "8.8.8.8", 99, "/", "https://8.8.8.8:99/", "8.8.8.8:99"),
    ("https://[2606:4700:0::1111]/", "2606:4700::1111", 443, "/", None, "[2606:4700::1111]"),
    ("https://[2A00:1450:4001::8.8.8.8]:8443/h", "2a00:1450:4001::808:808", 8443, "/h", None, None),
]

PUBLIC_ADDRESSES = [
    *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
    *("128.0.0.0", "168.63.129.17", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0"),
    *("191.255.255.255", "192.0.1.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0"),
    *("203.0.112.255", "203.0.114.0", "223.255.255.255", "104.21.0.1", "172.64.0.1"),
    *("2001:200::1", "2001:4860:4860::8888", "2003::1", "2400:cb00::1", "2606:4700::1111", "2a00:1450:4001::1"),
    *("2001:db7:ffff::1", "2001:db9::1", "2620:4f:7fff::1", "2620:4f:8001::1", "3ffe:ffff::1"),
]


def code_of(guard: Guard, url: str) -> str:
    with pytest.raises(AddressRefused) as refused:
        guard.check_url(url)
    assert str(refused.value)
    assert str(refused.value).isascii()
    return refused.value.code


def passes(guard: Guard, address: str | addresses.IPAddress, scheme: str = "https") -> bool:
    try:
        guard.check_address(address, scheme)
    except AddressRefused:
        return False
    return True


@pytest.mark.parametrize(("host", "code"), REFUSED_HOSTS, ids=[ascii(host)[:60] for host, _ in REFUSED_HOSTS])
def test_a_refused_host_is_refused_in_every_notation(host: str, code: str) -> None:
    assert code_of(Guard(), f"https://{host}/hook") == code
    assert code_of(Guard(), f"https://{host}:8443?x=1") == code


@pytest.mark.parametrize(("url", "code"), REFUSED_URLS, ids=[ascii(url)[:60] for url, _ in REFUSED_URLS])
def test_a_malformed_url_is_refused_with_its_reason(url: str, code: str) -> None:
    assert code_of(Guard(), url) == code


@pytest.mark.parametrize("case", ACCEPTED_URLS, ids=[ascii(case[0]) for case in ACCEPTED_URLS])
def test_a_good_url_is_spelled_in_one_way(case: tuple[str, str, int, str, str | None, str | None]) -> None:
    given_url, host, port, path, url, host_header = case
    target = Guard().check_url(given_url)
    assert (target.scheme, target.host, target.port, target.path) == ("https", host, port, path)
    assert url is None or target.url == url
    assert host_header is None or target.host_header == host_header
    assert Guard().check_url(target.url) == target


def test_a_target_knows_whether_its_host_is_an_address() -> None:
    assert Guard().check_url("https://134744072/").address == IPv4Address("8.8.8.8")
    assert Guard().check_url("https://[2606:4700::1111]/").address == IPv6Address("2606:4700::1111")
    assert Guard().check_url("https://example.com/").address is None


def test_the_longest_url_is_accepted() -> None:
    url = "https://example.com/" + "a" * 2028
    assert len(url) == 2048
    assert Guard().check_url(url).url == url


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses_pass(address: str) -> None:
    Guard().check_address(address)
    Guard().check_address(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "text", ["", "example.com", "127.1", "2130706433", "127.0.0.01", "１.1.1.1", "1.1.1.1 ", "[::1]"]
)
def test_the_check_at_connect_reads_canonical_addresses_only(text: str) -> None:
    with pytest.raises(AddressRefused) as refused:
        Guard(allow=["0.0.0.0/0", "::/0"]).check_address(text)
    assert refused.value.code == "invalid_host"


def test_an_address_with_a_zone_is_judged_without_it() -> None:
    with pytest.raises(AddressRefused) as refused:
        Guard().check_address("fe80::1%eth0")
    assert refused.value.code == "link_local_address"
    Guard(allow=["fe80::/10"]).check_address("fe80::1%eth0")
    assert not passes(Guard(allow=["fd00::/8"]), "fd00:ec2::254%eth0")


def test_a_refusal_says_what_and_why() -> None:
    with pytest.raises(AddressRefused, match=r"^127\.0\.0\.1 is a loopback address \(127\.0\.0\.0/8\)$"):
        Guard().check_url("https://0x7f.1/")


def test_every_edge_of_every_refused_network_is_refused() -> None:
    for network, code, _ in addresses._ROWS:
        for edge in (network[0], network[-1]):
            assert not passes(Guard(), str(edge)), (network, edge)
            assert not passes(Guard(), edge, "http"), (network, edge)
        assert code.endswith("_address")


def test_the_table_refuses_whatever_the_standard_library_calls_special() -> None:
    """One way only: its lists are shorter, and change from release to release."""
    guard = Guard()
    for network, _, _ in addresses._ROWS:
        for neighbour in (int(network[0]) - 1, int(network[-1]) + 1):
            if 0 <= neighbour < 2**network.max_prefixlen:
                address = type(network[0])(neighbour)
                if passes(guard, str(address)):
                    assert address.is_global, address
                    assert not address.is_multicast, address


def test_refusals_are_repeated_from_memory_and_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "VERDICTS_MAX", 8)
    guard = Guard()
    for _ in range(2):
        for number in range(40):
            assert passes(guard, f"8.8.8.{number}")
            assert not passes(guard, f"127.0.0.{number}")
            assert not passes(guard, f"127.0.0.{number}")
            assert len(guard._verdicts) <= 8


# What the operator opens


def test_an_opened_network_opens_itself_and_nothing_else() -> None:
    guard = Guard(allow=["127.0.0.0/8"])
    assert guard.check_url("https://127.1:8443/x").url == "https://127.0.0.1:8443/x"
    assert guard.check_url("https://localhost/").host == "localhost"
    assert guard.check_url("https://a.localhost/").host == "a.localhost"
    assert code_of(guard, "https://[::1]/") == "loopback_address"
    assert code_of(guard, "https://10.0.0.1/") == "private_address"
    assert code_of(guard, "https://128.0.0.1:99999/") == "invalid_port"
    guard.check_address("8.8.8.8")


def test_localhost_needs_a_loopback_network_opened() -> None:
    assert code_of(Guard(allow=["10.0.0.0/8"]), "https://localhost/") == "loopback_address"
    for opened in ("::1", "::1/128", "127.0.0.1", "0.0.0.0/0"):
        assert Guard(allow=[opened]).check_url("https://localhost/").host == "localhost"


def test_the_ipv6_loopback_and_unspecified_addresses_open_by_themselves() -> None:
    guard = Guard(allow=["::1", "::"], allow_http=True)
    for address in ("::1", "::"):
        assert passes(guard, address, "http")
    assert not passes(guard, "::2")
    assert not passes(guard, "0.0.0.1")


def test_private_names_need_any_network_opened() -> None:
    assert Guard(allow=["10.0.0.0/8"]).check_url("https://db/").host == "db"
    assert Guard(allow=["10.0.0.0/8"]).check_url("https://api.corp.internal/").host == "api.corp.internal"


def test_a_metadata_service_opens_by_its_own_address_only() -> None:
    wide = Guard(allow=["169.254.0.0/16", "fd00::/8", "100.64.0.0/10", "0.0.0.0/0"])
    for address in ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "::ffff:169.254.169.254"):
        assert not passes(wide, address)
    assert passes(wide, "169.254.169.253")
    assert code_of(wide, "https://metadata.google.internal/") == "metadata_address"
    narrow = Guard(allow=["169.254.169.254"])
    assert narrow.check_url("https://metadata.google.internal/").host == "metadata.google.internal"
    assert narrow.check_url("https://2852039166/").host == "169.254.169.254"


def test_a_mapped_address_is_open_where_its_ipv4_address_is() -> None:
    guard = Guard(allow=["127.0.0.0/8"])
    assert guard.check_url("https://[::ffff:127.0.0.1]/").url == "https://127.0.0.1/"
    assert passes(guard, "::ffff:127.0.0.1")
    assert not passes(guard, "::ffff:10.0.0.1")
    assert not passes(guard, "::127.0.0.1")
    assert not passes(guard, "64:ff9b::127.0.0.1")


@pytest.mark.parametrize(
    ("opened", "public", "inside"),
    [
        ("64:ff9b::/96", "64:ff9b::8.8.8.8", "64:ff9b::169.254.169.254"),
        ("2002::/16", "2002:808:808::1", "2002:7f00:1::1"),
        ("::ffff:0:0/96", "::ffff:8.8.8.8", "::ffff:10.0.0.1"),
        ("::/0", "64:ff9b::8.8.8.8", "::10.0.0.1"),
    ],
)
def test_an_opened_translation_still_judges_the_address_inside(opened: str, public: str, inside: str) -> None:
    guard = Guard(allow=[opened], allow_http=True)
    assert passes(guard, public)
    assert not passes(guard, public, "http")
    assert not passes(guard, inside)
    assert passes(Guard(allow=[opened, "10.0.0.0/8", "127.0.0.0/8", "169.254.169.254"]), inside)


def test_plain_http_goes_to_opened_networks_only() -> None:
    guard = Guard(allow=["127.0.0.0/8"], allow_http=True)
    assert guard.check_url("http://127.0.0.1:8080/x").url == "http://127.0.0.1:8080/x"
    assert guard.check_url("http://localhost:80/").url == "http://localhost/"
    assert guard.check_url("http://localhost:443/").host_header == "localhost:443"
    assert guard.check_url("http://name.example/").port == 80
    assert code_of(guard, "http://8.8.8.8/") == "not_https"
    assert code_of(guard, "http://10.0.0.1/") == "private_address"
    assert code_of(guard, "ftp://127.0.0.1/") == "not_https"
    assert passes(guard, "127.0.0.1", "http")
    assert passes(guard, "8.8.8.8")
    assert not passes(guard, "8.8.8.8", "http")


@pytest.mark.parametrize("guard", [Guard(), Guard(allow_http=True), Guard(allow=["127.0.0.0/8"])], ids=repr)
def test_plain_http_needs_both_the_switch_and_a_network(guard: Guard) -> None:
    assert code_of(guard, "http://localhost/") == "not_https"
    assert code_of(guard, "http://127.0.0.1/") == "not_https"
    assert not passes(guard, "127.0.0.1", "http")


@pytest.mark.parametrize("entry", ["localhost", "10.0.0.1/8", "10.0.0.0/33", ""])
def test_a_mistaken_network_is_an_error(entry: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Guard(allow=[entry])


def test_a_guard_says_what_it_opens() -> None:
    assert repr(Guard()) == "<Guard nothing opened>"
    assert repr(Guard(["10.0.0.0/8", "::1"], allow_http=True)) == "<Guard 10.0.0.0/8, ::1/128 opened, http too>"


# Properties

REFUSED_V4 = [IPv4Network(text) for _, _, texts in REFUSED for text in texts if ":" not in text]
PUBLIC_V6 = [ipaddress.IPv6Network(text) for text in ("2400::/12", "2600::/14", "2800::/12", "2a00::/12", "2c00::/12")]


def addresses_of(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> st.SearchStrategy[int]:
    return st.integers(int(network[0]), int(network[-1]))


refused_v4 = st.sampled_from(REFUSED_V4).flatmap(addresses_of).map(IPv4Address)
any_v4 = st.integers(0, 2**32 - 1).map(IPv4Address)
number_formats = st.sampled_from(["{:d}", "0x{:x}", "0X{:X}", "0x000{:x}", "0{:o}", "000{:o}"])


@st.composite
def notations(draw: st.DrawFn, source: st.SearchStrategy[IPv4Address]) -> tuple[IPv4Address, str]:
    """An address and one of the countless ways of writing it."""
    address = draw(source)
    parts = draw(st.integers(1, 4))
    octets = address.packed
    numbers = [*octets[: parts - 1], int.from_bytes(octets[parts - 1 :], "big")]
    written = [draw(number_formats).format(number) for number in numbers]
    if draw(st.booleans()):
        written = [text.translate({ord("0") + digit: 0xFF10 + digit for digit in range(10)}) for text in written]
    text = draw(st.sampled_from([".", "。", "%2e"])).join(written)
    return address, text + draw(st.sampled_from(["", "."]))


@given(notations(refused_v4))
def test_no_notation_of_a_refused_address_gets_through(written: tuple[IPv4Address, str]) -> None:
    assert code_of(Guard(), f"https://{written[1]}/").endswith("_address")


@given(notations(any_v4))
def test_every_notation_means_the_address_it_was_made_from(written: tuple[IPv4Address, str]) -> None:
    address, text = written
    guard = Guard(allow=["0.0.0.0/0"])
    if passes(guard, str(address)):
        assert guard.check_url(f"https://{text}/").host == str(address)


@given(refused_v4)
def test_no_ipv6_clothing_makes_a_refused_address_acceptable(address: IPv4Address) -> None:
    high, low = divmod(int(address), 65536)
    for text in (f"::ffff:{address}", f"::{address}", f"::ffff:0:{address}", f"64:ff9b::{address}"):
        assert code_of(Guard(), f"https://[{text}]/")
        assert not passes(Guard(), text)
    assert not passes(Guard(), f"2002:{high:x}:{low:x}::1")


@given(any_v4)
def test_an_ipv4_address_passes_exactly_if_no_row_holds_it(address: IPv4Address) -> None:
    expected = not any(address in network for network in REFUSED_V4)
    assert passes(Guard(), str(address)) == expected
    assert address.is_global or not expected


@given(st.sampled_from(PUBLIC_V6).flatmap(addresses_of).map(IPv6Address))
def test_allocated_ipv6_space_passes(address: IPv6Address) -> None:
    assert passes(Guard(), str(address))
    assert Guard().check_url(f"https://[{address}]/").host == str(address)


@given(st.integers(0, 2**128 - 1).filter(lambda number: number >> 125 != 1).map(IPv6Address))
def test_ipv6_outside_the_assigned_range_never_passes(address: IPv6Address) -> None:
    assert not passes(Guard(), str(address))


@given(any_v4, st.integers(1, 32), any_v4)
def test_opening_a_network_changes_nothing_outside_it(base: IPv4Address, prefix: int, other: IPv4Address) -> None:
    network = IPv4Network((int(base), prefix), strict=False)
    guard = Guard(allow=[str(network)])
    metadata = base in addresses._METADATA
    assert passes(guard, str(base)) == (not metadata or prefix == 32)
    if other not in network:
        assert passes(guard, str(other)) == passes(Guard(), str(other))


@given(st.text())
def test_any_text_is_either_a_target_or_a_refusal(text: str) -> None:
    for url in (text, f"https://{text}", f"https://{text}.example/", f"https://[{text}]/", f"https://a.example/{text}"):
        try:
            target = Guard().check_url(url)
        except AddressRefused:
            continue
        assert target.url.isascii()
        assert target.url.isprintable()
        assert Guard().check_url(target.url) == target
