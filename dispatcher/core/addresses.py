"""The guard: which URLs a webhook may have, and which addresses a connection may go to.

A webhook's URL is chosen by a customer and requested by us, from inside our network: without a guard it is a key to
whatever listens there (server-side request forgery). So a URL is judged twice. When it is saved, `Guard.check_url`
reads it as strictly as RFC 3986 allows and its host as leniently as anything that resolves names would: every notation
that `inet_aton` or the WHATWG URL standard takes for an IPv4 address is an address here, and judged as one. At every
connect, `Guard.check_address` judges the address really connected to, so a name that resolves to something else than
yesterday gains nothing. Names are therefore refused early only as a courtesy; the second check is the one that holds.

What is refused comes from the IANA special-purpose registries (RFC 6890 and its updates) and from the clouds' metadata
services, written out below: `ipaddress.is_private` and `is_global` answer differently from one Python release to the
next. IPv6 outside 2000::/3, the only range ever assigned to the public network, is refused whole.

Nothing here resolves a name or opens a socket.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

import idna  # UTS 46 as browsers do it; the standard library's codec is IDNA 2003 and sends straße.de to strasse.de

from dispatcher.errors import AddressRefused

URL_LENGTH_MAX: Final = 2048  # what every proxy, server and database index on the way takes
HOST_LENGTH_MAX: Final = 253  # RFC 1035, without the root's dot
VERDICTS_MAX: Final = 4096  # ≈ 1 MiB; more addresses than a busy installation connects to in an hour
DEFAULT_PORTS: Final = {"https": 443, "http": 80}

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

# Code, words, networks. The first row that holds an address names the reason, so the narrower ones stand first.
REFUSED: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    (
        "metadata_address",
        "a cloud metadata service",
        (
            "169.254.169.254/32",  # AWS, Azure, Google, OpenStack and most others
            "169.254.170.2/32",  # AWS: credentials of ECS tasks
            "169.254.170.23/32",  # AWS: credentials of EKS pods
            "169.254.42.42/32",  # Scaleway
            "168.63.129.16/32",  # Azure's host agent, inside public space
            "100.100.100.200/32",  # Alibaba
            "192.0.0.192/32",  # Oracle, the older one
            "fd00:ec2::254/128",  # AWS
            "fd00:ec2::23/128",  # AWS: credentials of EKS pods
            "fd20:ce::254/128",  # Google
            "fd00:42::42/128",  # Scaleway
        ),
    ),
    ("unspecified_address", "the unspecified address", ("0.0.0.0/32", "::/128")),
    ("loopback_address", "a loopback address", ("127.0.0.0/8", "::1/128")),
    ("private_address", "a private address", ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")),
    ("cgnat_address", "a carrier-grade NAT address", ("100.64.0.0/10",)),
    ("link_local_address", "a link-local address", ("169.254.0.0/16", "fe80::/10")),
    ("multicast_address", "a multicast address", ("224.0.0.0/4", "ff00::/8")),
    ("broadcast_address", "the broadcast address", ("255.255.255.255/32",)),
    ("benchmark_address", "a benchmarking address", ("198.18.0.0/15", "2001:2::/48")),
    (
        "documentation_address",
        "a documentation address",
        ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20"),
    ),
    ("mapped_address", "an IPv4-mapped address", ("::ffff:0:0/96",)),
    ("translated_address", "an IPv4-translated address", ("::ffff:0:0:0/96",)),
    ("compatible_address", "an IPv4-compatible address", ("::/96",)),
    ("nat64_address", "a NAT64 address", ("64:ff9b::/96", "64:ff9b:1::/48")),
    ("6to4_address", "a 6to4 address", ("2002::/16", "192.88.99.0/24")),
    ("teredo_address", "a Teredo address", ("2001::/32",)),
    ("orchid_address", "an ORCHID, not a routable address", ("2001:10::/28", "2001:20::/28")),
    ("unique_local_address", "a unique local (private) address", ("fc00::/7",)),
    ("site_local_address", "a site-local (private) address", ("fec0::/10",)),
    ("discard_address", "an address whose traffic is discarded", ("100::/64", "100:0:0:1::/64")),
    (
        "reserved_address",
        "a reserved address",
        (
            "0.0.0.0/8",  # this network
            "192.0.0.0/24",  # IETF protocol assignments
            "192.31.196.0/24",  # AS112: a sink for stray DNS queries
            "192.52.193.0/24",  # automatic multicast tunnelling
            "192.175.48.0/24",  # AS112
            "240.0.0.0/4",
            "2001::/23",  # IETF protocol assignments
            "2620:4f:8000::/48",  # AS112
            "5f00::/16",  # segment routing identifiers
        ),
    ),
)

# Known only inside somebody's network (RFC 6762, RFC 8375, ICANN's reservation of .internal and its collision list).
LOCAL_SUFFIXES: Final = (
    ".corp",
    ".home",
    ".home.arpa",
    ".internal",
    ".intranet",
    ".lan",
    ".local",
    ".localdomain",
    ".private",
)
METADATA_NAMES: Final = frozenset({"metadata.google.internal", "metadata.goog", "instance-data.ec2.internal"})

_ROWS: Final = tuple((ip_network(text), code, words) for code, words, texts in REFUSED for text in texts)
_METADATA: Final = frozenset(network.network_address for network, code, _ in _ROWS if code == "metadata_address")
_METADATA_SERVICE: Final = IPv4Address("169.254.169.254")
_LOOPBACKS: Final = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")

# The 96 leading bits of the forms that carry an IPv4 address in their last 32: compatible, mapped, translated, NAT64.
_CARRIER_PREFIXES: Final = frozenset({0, 0xFFFF, 0xFFFF_0000, 0x0064_FF9B << 64})

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?")
_AUTHORITY: Final = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(?::([0-9]*))?")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x20\x7f-\xa0]|\s")
_LABEL: Final = re.compile(r"[a-z0-9_-]{1,63}")  # with underscores: no host name, but a DNS name, and in use
_NUMERIC_LABEL: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NUMBER: Final = re.compile(r"0x([0-9a-f]*)|(0[0-7]*)|([1-9][0-9]*)")


class Refusal(NamedTuple):
    """Why something is refused: a stable code for programs, a sentence for people."""

    code: str
    message: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a webhook's requests go: its URL, read once and spelled in one way."""

    scheme: str  # "https" or "http"
    host: str  # ASCII, lower case, no brackets, no trailing dot: for DNS, SNI and the certificate
    port: int
    path: str  # the request target: path and query, percent-encoding as given
    url: str
    host_header: str  # with brackets, and with the port unless it is the scheme's own
    address: IPAddress | None  # the host, if it is an address and not a name


class Guard:
    """Judges URLs and addresses by the table above and by what the operator has opened.

    `allow` holds networks ("127.0.0.0/8", "fd12:3456::/32") or single addresses; each opens itself and nothing more:

    - A metadata service inside an opened network stays closed unless an entry names exactly its address: who opens
      fd00::/8 means the data centre, not the machine's credentials.
    - Opening a translation prefix (64:ff9b::/96, 2002::/16, …) opens the translation; the IPv4 address inside still has
      to pass. An IPv4-mapped address is open where its IPv4 address is.

    `allow_http` admits plain http, to opened networks only. Raises ValueError for an `allow` entry that is no network.
    """

    def __init__(self, allow: Sequence[str] = (), allow_http: bool = False) -> None:
        self._opened: tuple[IPNetwork, ...] = tuple(ip_network(text) for text in allow)
        self._allow_http = allow_http
        self._verdicts: dict[str | IPAddress, tuple[Refusal | None, bool]] = {}

    def __repr__(self) -> str:
        opened = ", ".join(map(str, self._opened)) or "nothing"
        return f"<Guard {opened} opened{', http too' if self._allow_http else ''}>"

    def check_address(self, address: str | IPAddress, scheme: str = "https") -> None:
        """Judge an address right before connecting to it. Raises AddressRefused.

        `scheme` is the URL's: plain http goes to opened networks only. Text is read as the one canonical notation of
        `ipaddress`, which is what resolvers answer with; anything else is refused.
        """
        verdict = self._verdicts.get(address)
        if verdict is None:
            if len(self._verdicts) >= VERDICTS_MAX:
                self._verdicts.clear()
            verdict = self._verdicts[address] = self._judge(address)
        refusal, opened = verdict
        if refusal is not None:
            raise AddressRefused(*refusal)
        if scheme == "http" and not (opened and self._allow_http):
            raise AddressRefused("not_https", f"{address} takes https only: plain http is not opened for it")

    def check_url(self, url: str) -> Target:
        """Read and judge a webhook's URL when it is saved. Raises AddressRefused.

        Codes: invalid_url, url_too_long, not_https, credentials_in_url, fragment_in_url, invalid_host, invalid_port,
        local_name, and those of `REFUSED`.
        """
        scheme, authority, path = _split(url)
        if scheme != "https":
            self._check_plain(scheme)
        host_text, port = _split_authority(authority, DEFAULT_PORTS[scheme])
        host = _read_host(host_text)
        if isinstance(host, str):
            self._check_name(host)
        else:
            self.check_address(host, scheme)
        return _target(scheme, host, port, path)

    def _judge(self, given: str | IPAddress) -> tuple[Refusal | None, bool]:
        """Why this address is refused, if it is; whether the operator opened it."""
        try:
            address = ip_address(given)
        except ValueError:
            return Refusal("invalid_host", f"{_shown(str(given))} is not an IP address"), False
        if isinstance(address, IPv6Address):
            address = IPv6Address(int(address))  # without its zone, which comparisons would mind
            inner = _embedded(address)
            if inner is not None and self._opens(address):
                return self._judge(inner)
            if inner is not None and inner == address.ipv4_mapped and self._opens(inner):
                return None, True
        opened = self._opens(address)
        return (None if opened else _refusal(address)), opened

    def _opens(self, address: IPAddress) -> bool:
        if address in _METADATA:
            return any(address in network and network.num_addresses == 1 for network in self._opened)
        return any(address in network for network in self._opened)

    def _check_plain(self, scheme: str) -> None:
        if scheme != "http":
            raise AddressRefused("not_https", f"a webhook URL starts with https://, this one with {_shown(scheme)}://")
        if not (self._allow_http and self._opened):
            raise AddressRefused("not_https", "a webhook URL starts with https://; plain http is not accepted")

    def _check_name(self, host: str) -> None:
        """Refuse at once the names that can only lead where the connect will be refused anyway."""
        if host == "localhost" or host.endswith(".localhost"):
            if not any(_overlap(network, loopback) for network in self._opened for loopback in _LOOPBACKS):
                raise AddressRefused("loopback_address", f"{host} is this machine itself")
        elif host in METADATA_NAMES:
            if not self._opens(_METADATA_SERVICE):
                raise AddressRefused("metadata_address", f"{host} is a cloud metadata service")
        elif not self._opened and ("." not in host or host.endswith(LOCAL_SUFFIXES)):
            raise AddressRefused("local_name", f"{host} is a name of a private network, not of the public internet")


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address inside a mapped, translated, compatible, NAT64 or 6to4 address; never that of :: and ::1."""
    number = int(address)
    if number >> 112 == 0x2002:
        return IPv4Address(number >> 80 & 0xFFFF_FFFF)
    if number > 1 and number >> 32 in _CARRIER_PREFIXES:
        return IPv4Address(number & 0xFFFF_FFFF)
    return None


def _refusal(address: IPAddress) -> Refusal | None:
    for network, code, words in _ROWS:
        if address in network:
            return Refusal(code, f"{address} is {words} ({network})")
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return Refusal("reserved_address", f"{address} is a reserved address (outside {_GLOBAL_UNICAST})")
    return None


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return one.version == other.version and one.overlaps(other)


def _split(url: str) -> tuple[str, str, str]:
    """Scheme in lower case, authority as given, request target."""
    if len(url) > URL_LENGTH_MAX:
        raise AddressRefused("url_too_long", f"a URL has at most {URL_LENGTH_MAX} characters, this one has {len(url)}")
    if _UNPRINTABLE.search(url):
        raise AddressRefused("invalid_url", "a URL holds no spaces, line breaks or control characters")
    if "\\" in url:
        raise AddressRefused("invalid_url", "a URL holds no backslashes")
    parts = _URL.fullmatch(url)
    if parts is None:
        raise AddressRefused("invalid_url", "a webhook URL looks like https://example.com/path")
    scheme, authority, path, query, fragment = parts.groups(default="")
    if fragment:
        raise AddressRefused("fragment_in_url", "the part from # on is never sent: leave it out")
    target = (path or "/") + query
    if not target.isascii():
        raise AddressRefused("invalid_url", "percent-encode the non-ASCII characters of the path and query")
    # What RFC 3986 does not let stand raw is encoded, as browsers do; what is encoded already stays as it is.
    return scheme.lower(), authority, quote(target, safe="!#$%&'()*+,/:;=?@[]~")


def _split_authority(authority: str, default_port: int) -> tuple[str, int]:
    if "@" in authority:
        raise AddressRefused(
            "credentials_in_url",
            "a URL holds no user name or password: send them as an Authorization header by the webhook's `headers`",
        )
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise AddressRefused("invalid_url", f"{_shown(authority)} is not a host with an optional port")
    host, port_digits = parts.groups(default="")
    if not host:
        raise AddressRefused("invalid_host", "the URL has no host")
    if not port_digits:
        return host, default_port
    if len(port_digits) > 5 or not 1 <= int(port_digits) <= 65535:
        raise AddressRefused("invalid_port", f"a port is a number from 1 to 65535, not {_shown(port_digits)}")
    return host, int(port_digits)


def _read_host(text: str) -> str | IPAddress:
    """A name in its one spelling, or the address that the text is in whatever notation.

    The steps of the WHATWG host parser: percent-decoding, Unicode mapping (full-width digits, dots of other scripts),
    and then any host whose last label is a number is an IPv4 address or an error, so that no numeric notation can ever
    reach a resolver that understands more of them than we do.
    """
    if text.startswith("["):
        return _read_ipv6(text[1:-1])
    host = _to_ascii(text)
    labels = host.split(".")
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        return _read_ipv4(host)
    if len(host) > HOST_LENGTH_MAX or not all(map(_LABEL.fullmatch, labels)):
        raise AddressRefused("invalid_host", f"{_shown(text)} is not a host name")
    return host


def _read_ipv6(text: str) -> IPv6Address:
    if "%" in text:
        raise AddressRefused("invalid_host", "an address with a zone (%eth0) means something on one machine only")
    try:
        return IPv6Address(text)
    except ValueError:
        raise AddressRefused("invalid_host", f"[{_shown(text)}] is not an IPv6 address") from None


def _to_ascii(text: str) -> str:
    try:
        host = unquote(text, errors="strict")
        if not host.isascii():
            mapped = idna.uts46_remap(host, std3_rules=False)
            host = ".".join(part if part.isascii() else idna.alabel(part).decode() for part in mapped.split("."))
    except UnicodeError:
        raise AddressRefused("invalid_host", f"{_shown(text)} is not a host name that DNS can hold") from None
    return host.lower().removesuffix(".")


def _read_ipv4(host: str) -> IPv4Address:
    """As `inet_aton` does: one to four numbers, decimal, octal or hexadecimal, the last filling what is left."""
    numbers = [_read_number(part) for part in host.split(".")]
    *head, last = numbers
    if len(numbers) > 4 or any(number > 255 for number in head) or last >= 256 ** (5 - len(numbers)):
        raise AddressRefused("invalid_host", f"{_shown(host)} is not an IPv4 address")
    return IPv4Address(last + sum(number << 24 - 8 * place for place, number in enumerate(head)))


def _read_number(text: str) -> int:
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > 64:
        raise AddressRefused("invalid_host", f"{_shown(text)} is not a part of an IPv4 address")
    hexadecimal, octal, decimal = match.groups()
    if decimal is not None:
        return int(decimal)
    return int(octal, 8) if octal is not None else int(hexadecimal or "0", 16)


def _target(scheme: str, given: str | IPAddress, port: int, path: str) -> Target:
    if isinstance(given, IPv6Address):
        given = given.ipv4_mapped or given  # a mapped one that passed is a connection to the IPv4 address
    host, address = str(given), None if isinstance(given, str) else given
    host_header = f"[{host}]" if isinstance(address, IPv6Address) else host
    if port != DEFAULT_PORTS[scheme]:
        host_header = f"{host_header}:{port}"
    url = f"{scheme}://{host_header}{path}"
    if len(url) > URL_LENGTH_MAX:
        raise AddressRefused("url_too_long", f"percent-encoded, the URL has more than {URL_LENGTH_MAX} characters")
    return Target(scheme=scheme, host=host, port=port, path=path, url=url, host_header=host_header, address=address)


def _shown(text: str) -> str:
    """What was given, fit for a message: short, and ASCII so that nobody is fooled by look-alikes."""
    return ascii(text if len(text) <= 64 else f"{text[:61]}...")[1:-1]
