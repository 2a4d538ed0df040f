from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core import addresses
from dispatcher.core.addresses import REFUSED, Guard
from dispatcher.errors import AddressRefused

# Host as written in a URL → the code it is refused with.
REFUSED_HOSTS = [
    # Loopback, in every notation inet_aton and browsers read
    ("127.0.0.1", "loopback_address"),
    ("127.0.0.0", "loopback_address"),
    ("127.255.255.255", "loopback_address"),
    ("127.1", "loopback_address"),
    ("127.0.1", "loopback_address"),
    ("127.65535", "loopback_address"),
    ("2130706433", "loopback_address"),
    ("2147483647", "loopback_address"),
    ("0x7f000001", "loopback_address"),
    ("0X7F000001", "loopback_address"),
    ("0x7F.1", "loopback_address"),
    ("0x7f.0.0.1", "loopback_address"),
    ("0x7f.0x0.0x0.0x1", "loopback_address"),
    ("0x000000000000007f.1", "loopback_address"),
    ("017700000001", "loopback_address"),
    ("0177.0.0.1", "loopback_address"),
    ("0177.0x0.0.1", "loopback_address"),
    ("00000177.0.0.1", "loopback_address"),
    ("127.0.0.0x1", "loopback_address"),
    ("127.0.0.01", "loopback_address"),
    ("127.0x1", "loopback_address"),
    ("127.0.0.1.", "loopback_address"),
    ("127.1.", "loopback_address"),
    ("2130706433.", "loopback_address"),
    ("127.0x.0.1", "loopback_address"),
    ("１２７.０.０.１", "loopback_address"),
    ("１２７。０。０。１", "loopback_address"),
    ("127．0．0．1", "loopback_address"),
    ("127｡0｡0｡1", "loopback_address"),
    ("①②⑦.⓪.⓪.①", "loopback_address"),
    ("𝟏𝟐𝟕.𝟎.𝟎.𝟏", "loopback_address"),
    ("¹²⁷.0.0.1", "loopback_address"),
    ("0ｘ7ｆ.1", "loopback_address"),
    ("127.0.0.１。", "loopback_address"),
    ("127\u00ad.0.0.1", "loopback_address"),
    ("127.0.0.\u200b1", "loopback_address"),
    ("%31%32%37.0.0.1", "loopback_address"),
    ("127%2e0%2E0%2e1", "loopback_address"),
    ("%EF%BC%91%EF%BC%92%EF%BC%97.0.0.1", "loopback_address"),
    ("[::1]", "loopback_address"),
    ("[0:0:0:0:0:0:0:1]", "loopback_address"),
    ("[0000:0000:0000:0000:0000:0000:0000:0001]", "loopback_address"),
    ("[::0.0.0.1]", "loopback_address"),
    ("localhost", "loopback_address"),
    ("LOCALHOST", "loopback_address"),
    ("localhost.", "loopback_address"),
    ("ｌｏｃａｌｈｏｓｔ", "loopback_address"),
    ("loc%61lhost", "loopback_address"),
    ("deep.under.localhost", "loopback_address"),
    # This network, unspecified, broadcast
    ("0.0.0.0", "unspecified_address"),
    ("0", "unspecified_address"),
    ("0x", "unspecified_address"),
    ("00", "unspecified_address"),
    ("0x0.0", "unspecified_address"),
    ("[::]", "unspecified_address"),
    ("0.0.0.1", "reserved_address"),
    ("0.255.255.255", "reserved_address"),
    ("1", "reserved_address"),
    ("255.255.255.255", "broadcast_address"),
    ("4294967295", "broadcast_address"),
    ("0xffffffff", "broadcast_address"),
    ("037777777777", "broadcast_address"),
    # Private and carrier-grade NAT
    ("10.0.0.0", "private_address"),
    ("10.255.255.255", "private_address"),
    ("10.1", "private_address"),
    ("012.1", "private_address"),
    ("167772161", "private_address"),
    ("172.16.0.1", "private_address"),
    ("172.31.255.255", "private_address"),
    ("0xac100001", "private_address"),
    ("192.168.0.1", "private_address"),
    ("192.168.257", "private_address"),
    ("3232235521", "private_address"),
    ("0300.0250.1", "private_address"),
    ("100.64.0.0", "cgnat_address"),
    ("100.127.255.255", "cgnat_address"),
    ("[fc00::]", "unique_local_address"),
    ("[fd12:3456:789a::1]", "unique_local_address"),
    ("[fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]", "unique_local_address"),
    ("[fec0::1]", "site_local_address"),
    ("[feff::1]", "site_local_address"),
    # Link-local and metadata
    ("169.254.0.1", "link_local_address"),
    ("169.254.255.255", "link_local_address"),
    ("[fe80::1]", "link_local_address"),
    ("[febf:ffff::1]", "link_local_address"),
    ("169.254.169.254", "metadata_address"),
    ("2852039166", "metadata_address"),
    ("0xa9fea9fe", "metadata_address"),
    ("0xA9.0xFE.0xA9.0xFE", "metadata_address"),
    ("0251.0376.0251.0376", "metadata_address"),
    ("025177524776", "metadata_address"),
    ("169.254.43518", "metadata_address"),
    ("169.16689662", "metadata_address"),
    ("１６９.254.１６９.254", "metadata_address"),
    ("169.254.170.2", "metadata_address"),
    ("169.254.170.23", "metadata_address"),
    ("169.254.42.42", "metadata_address"),
    ("100.100.100.200", "metadata_address"),
    ("192.0.0.192", "metadata_address"),
    ("168.63.129.16", "metadata_address"),
    ("[fd00:ec2::254]", "metadata_address"),
    ("[FD00:0EC2:0:0::0254]", "metadata_address"),
    ("[fd00:ec2::23]", "metadata_address"),
    ("[fd20:ce::254]", "metadata_address"),
    ("metadata.google.internal", "metadata_address"),
    ("METADATA.google.internal.", "metadata_address"),
    ("metadata.goog", "metadata_address"),
    # Multicast, reserved, benchmarking, documentation
    ("224.0.0.1", "multicast_address"),
    ("239.255.255.255", "multicast_address"),
    ("[ff02::1]", "multicast_address"),
    ("[ff0e::1]", "multicast_address"),
    ("240.0.0.1", "reserved_address"),
    ("255.255.255.254", "reserved_address"),
    ("192.0.0.1", "reserved_address"),
    ("192.0.0.170", "reserved_address"),
    ("192.31.196.1", "reserved_address"),
    ("192.52.193.1", "reserved_address"),
    ("192.175.48.1", "reserved_address"),
    ("198.18.0.1", "benchmark_address"),
    ("198.19.255.255", "benchmark_address"),
    ("[2001:2::1]", "benchmark_address"),
    ("192.0.2.1", "documentation_address"),
    ("198.51.100.1", "documentation_address"),
    ("203.0.113.255", "documentation_address"),
    ("[2001:db8::1]", "documentation_address"),
    ("[3fff::1]", "documentation_address"),
    ("[3fff:fff:ffff::1]", "documentation_address"),
    # An IPv4 address inside an IPv6 one, public or not
    ("[::ffff:127.0.0.1]", "mapped_address"),
    ("[::ffff:7f00:1]", "mapped_address"),
    ("[0:0:0:0:0:FFFF:7F00:0001]", "mapped_address"),
    ("[::ffff:a9fe:a9fe]", "mapped_address"),
    ("[::ffff:8.8.8.8]", "mapped_address"),
    ("[::127.0.0.1]", "compatible_address"),
    ("[::7f00:1]", "compatible_address"),
    ("[::8.8.8.8]", "compatible_address"),
    ("[::ffff:0:127.0.0.1]", "translated_address"),
    ("[64:ff9b::127.0.0.1]", "nat64_address"),
    ("[64:ff9b::a9fe:a9fe]", "nat64_address"),
    ("[64:ff9b::8.8.8.8]", "nat64_address"),
    ("[64:ff9b:1::a00:1]", "nat64_address"),
    ("[2002:7f00:1::]", "6to4_address"),
    ("[2002:a9fe:a9fe::1]", "6to4_address"),
    ("[2002:808:808::1]", "6to4_address"),
    ("192.88.99.1", "6to4_address"),
    ("[2001::1]", "teredo_address"),
    ("[2001:0:4136:e378:8000:63bf:3fff:fdd2]", "teredo_address"),
    # The rest of the IPv6 registry, and what was never assigned
    ("[2001:10::1]", "orchid_address"),
    ("[2001:20::1]", "orchid_address"),
    ("[2001:1::1]", "reserved_address"),
    ("[2001:1ff::1]", "reserved_address"),
    ("[2620:4f:8000::1]", "reserved_address"),
    ("[5f00::1]", "reserved_address"),
    ("[100::1]", "discard_address"),
    ("[100:0:0:1::1]", "discard_address"),
    ("[200::1]", "reserved_address"),
    ("[1fff::1]", "reserved_address"),
    ("[4000::1]", "reserved_address"),
    ("[e000::1]", "reserved_address"),
    # Names that only a private network knows
    ("intranet", "local_name"),
    ("db", "local_name"),
    ("printer.local", "local_name"),
    ("vault.service.internal", "local_name"),
    ("router.home.arpa", "local_name"),
    ("nas.lan.", "local_name"),
    # No host at all
    ("[fe80::1%25eth0]", "invalid_host"),
    ("[fe80::1%eth0]", "invalid_host"),
    ("[::1%25lo]", "invalid_host"),
    ("[::ffff:127.1]", "invalid_host"),
    ("[::ffff:0177.0.0.1]", "invalid_host"),
    ("[127.0.0.1]", "invalid_host"),
    ("[v1.fe80::a]", "invalid_host"),
    ("[]", "invalid_host"),
    ("[:::1]", "invalid_host"),
    ("[１::1]", "invalid_host"),
    ("::1", "invalid_url"),
    ("[::1", "invalid_url"),
    ("::1]", "invalid_url"),
    ("[::1]a", "invalid_url"),
    ("127.0.0.1..", "invalid_host"),
    ("127..1", "invalid_host"),
    (".127.0.0.1", "invalid_host"),
    ("127.0.0.0.1", "invalid_host"),
    ("256.0.0.1", "invalid_host"),
    ("127.0.0.256", "invalid_host"),
    ("4294967296", "invalid_host"),
    ("18446744071562067969", "invalid_host"),
    ("08.1", "invalid_host"),
    ("0x7g.1", "invalid_host"),
    ("1_0.1", "invalid_host"),
    ("+127.1", "invalid_host"),
    ("example.127", "invalid_host"),
    ("1" * 200, "invalid_host"),
    ("", "invalid_host"),
    (".", "invalid_host"),
    ("a..b.example", "invalid_host"),
    (".example.com", "invalid_host"),
    ("exa*mple.com", "invalid_host"),
    ("example.com%00.evil.example", "invalid_host"),
    ("example.com%2f.evil.example", "invalid_host"),
    ("evil.example%20x", "invalid_host"),
    ("%ff.example", "invalid_host"),
    ("a℀b.example", "invalid_host"),
    ("a\uff0fb.example", "invalid_host"),
    ("a\uff20b.example", "invalid_host"),
    ("\u202eexample.com", "invalid_host"),
    ("x\ud800.example", "invalid_host"),
    ("a" * 64 + ".example", "invalid_host"),
    ("ü" * 64 + ".example", "invalid_host"),
    (".".join(["a" * 60] * 5), "invalid_host"),
]

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


def test_the_table_of_notations_is_long_and_says_nothing_twice() -> None:
    hosts = [host for host, _ in REFUSED_HOSTS]
    assert len(hosts) == len(set(hosts)) >= 150


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
