"""Dialling: from a webhook's host name to a connection that may carry a request.

Resolve, judge, connect, verify. The guard judges every address a name resolves to, and the connection goes to one of
the judged addresses itself, never through the name again: an answer that changes in between (DNS rebinding) changes
nothing. TLS then checks the certificate against the name.

A dial that comes to nothing raises `DialFailed`, which says whose fault it was: the endpoint's (`result` is the
attempt's) or ours (`result` is None: no descriptor or port left, the proxy does not answer, a broken resolver library).
Nothing else is raised but cancellation, and a cancelled dial leaves no socket behind.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import errno
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from enum import StrEnum
from ipaddress import ip_address
from typing import Any, Final, Protocol, TypeVar, cast
from urllib.parse import SplitResult, unquote, urlsplit

import aiodns
import aiohappyeyeballs
import aiohappyeyeballs.types
import uvloop

from dispatcher.core.addresses import Guard, Target
from dispatcher.errors import AddressRefused, DispatcherError
from dispatcher.model import Result

TTL_MIN_S: Final = 1.0  # a TTL of 0 still serves the dials of one burst
TTL_MAX_S: Final = 300.0  # a move to another address is noticed within five minutes, whatever the record claims
NEGATIVE_TTL_S: Final = 5.0  # spares the resolver a dead name's burst, yet sees a mended one at the first retry
NAMES_MAX: Final = 10_000  # ≈ 5 MiB of answers
QUERY_TIMEOUT_S: Final = 2.0  # per server, doubled at each of
QUERY_TRIES: Final = 3  # these: about 14 s until a silent server ends a lookup

ADDRESSES_MAX: Final = 8  # of one name; an answer with a thousand would otherwise be a port scan by our hand
HAPPY_EYEBALLS_DELAY_S: Final = 0.25  # RFC 8305 §5
TUNNEL_ANSWER_BYTES_MAX: Final = 8192  # head of a proxy's answer to CONNECT

# c-ares errors that say nothing about the name: no memory, no file, the library was shut down.
_RESOLVER_FAULTS: Final = frozenset(
    {aiodns.error.ARES_ENOMEM, aiodns.error.ARES_EFILE, aiodns.error.ARES_ECANCELLED, aiodns.error.ARES_EDESTRUCTION}
)
# Socket errors that say nothing about the endpoint: no descriptor, memory or local port, a source address not ours.
_LOCAL_FAULTS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EADDRINUSE}
)


class Receiving(Protocol):
    """Whoever owns a transport: an asyncio.Protocol, with that base class or without."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...  # noqa: D102
    def data_received(self, data: bytes) -> None: ...  # noqa: D102
    def eof_received(self) -> bool | None: ...  # noqa: D102
    def connection_lost(self, exc: Exception | None) -> None: ...  # noqa: D102
    def pause_writing(self) -> None: ...  # noqa: D102
    def resume_writing(self) -> None: ...  # noqa: D102


P = TypeVar("P", bound=Receiving)


class Phase(StrEnum):
    """How far a request has come. A timeout names it."""

    DNS = "dns"
    CONNECT = "connect"
    TLS = "tls"
    SEND = "send"
    HEADERS = "headers"
    BODY = "body"


class DialFailed(DispatcherError):
    """A dial came to nothing. `result` is the attempt's; None when the fault is ours, not the endpoint's."""

    def __init__(self, result: Result | None, message: str) -> None:
        super().__init__(message)
        self.result = result


class Resolver(Protocol):
    """Turns a host name into addresses."""

    async def resolve(self, host: str) -> Sequence[str]:
        """Return the addresses of `host`, best first, at least one. Raises DialFailed."""

    async def close(self) -> None:
        """Give back whatever is held."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a lookup found: addresses, or why there are none."""

    addresses: tuple[str, ...]
    expires_at: float  # loop time
    failure: str = ""
    ours: bool = False  # the failure is our resolver's, not the name's

    def unwrap(self) -> tuple[str, ...]:
        """Return the addresses. Raises DialFailed if there are none."""
        if not self.addresses:
            raise DialFailed(None if self.ours else Result.DNS, self.failure)
        return self.addresses


class DnsResolver:
    """c-ares behind a cache that honours the records' TTL. Reads the hosts file; one lookup per name at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._channel: aiodns.DNSResolver | None = None  # made at the first name: it owns a thread
        self._answers: dict[str, Answer] = {}
        self._lookups: dict[str, asyncio.Task[Answer]] = {}

    def __repr__(self) -> str:
        return f"<DnsResolver {len(self._answers)} names known, {len(self._lookups)} asked>"

    async def resolve(self, host: str) -> Sequence[str]:
        """Return the addresses of `host`, in the order of RFC 6724. Raises DialFailed."""
        answer = self._answers.get(host)
        if answer is None or answer.expires_at <= self._loop.time():
            lookup = self._lookups.get(host)
            if lookup is None:
                lookup = self._lookups[host] = self._loop.create_task(self._look_up(host), name=f"dns {host}")
            # Whoever asked first may give up; the others still want the answer.
            answer = await asyncio.shield(lookup)
        return answer.unwrap()

    async def close(self) -> None:
        """End what is being looked up."""
        lookups = list(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _look_up(self, host: str) -> Answer:
        try:
            answer = await self._ask(host)
        finally:
            del self._lookups[host]
        if not answer.ours:
            self._remember(host, answer)
        return answer

    async def _ask(self, host: str) -> Answer:
        try:
            if self._channel is None:
                self._channel = aiodns.DNSResolver(loop=self._loop, timeout=QUERY_TIMEOUT_S, tries=QUERY_TRIES)
            found = await self._channel.getaddrinfo(host, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
        except aiodns.error.DNSError as error:
            code, words = error.args
            return self._failure(f"{host}: {words}", NEGATIVE_TTL_S, ours=code in _RESOLVER_FAULTS)
        # A name is the c-ares library's to refuse, and it has more ways to refuse one than errors of its own.
        except (OSError, ValueError, RuntimeError) as error:
            return self._failure(f"{host}: {error}", 0.0, ours=True)
        addresses = tuple(dict.fromkeys(node.addr[0].decode() for node in found.nodes))
        if not addresses:
            return self._failure(f"{host}: no address", NEGATIVE_TTL_S, ours=False)
        ttl_s = min([node.ttl for node in found.nodes] + [alias.ttl for alias in found.cnames])
        return Answer(addresses, self._loop.time() + min(max(ttl_s, TTL_MIN_S), TTL_MAX_S))

    def _failure(self, words: str, ttl_s: float, *, ours: bool) -> Answer:
        return Answer((), self._loop.time() + ttl_s, words, ours)

    def _remember(self, host: str, answer: Answer) -> None:
        self._answers.pop(host, None)
        if len(self._answers) >= NAMES_MAX:
            del self._answers[next(iter(self._answers))]  # the one looked up longest ago
        self._answers[host] = answer


class Dialer:
    """Opens connections to targets: directly or through a proxy, in the clear or with TLS.

    `ca_file` replaces the system's trust store. `proxy` is http:// or https://, with optional user:password; it is
    asked to CONNECT to the judged address. `source_address` is the local IP address to connect from.

    Raises OSError or ssl.SSLError if `ca_file` cannot be read, ValueError if `proxy` or `source_address` cannot be
    understood.
    """

    def __init__(
        self,
        *,
        guard: Guard,
        resolver: Resolver,
        loop: asyncio.AbstractEventLoop | None = None,
        ca_file: str | None = None,
        proxy: str | None = None,
        source_address: str | None = None,
    ) -> None:
        self.guard = guard
        self._resolver = resolver
        self._loop = loop or asyncio.get_running_loop()
        self._context = _tls_context(ca_file)
        self._proxy = None if proxy is None else _Proxy(proxy)
        self._source = None if source_address is None else str(ip_address(source_address))

    async def dial(
        self, target: Target, make: Callable[[], P], progress: Callable[[Phase], None] = lambda phase: None
    ) -> P:
        """Open a connection to `target` and return the protocol from `make` that owns it, already `connection_made`.

        `progress` hears of each phase as it begins. Raises DialFailed.
        """
        progress(Phase.DNS)
        addresses = await self._judged(target)
        progress(Phase.CONNECT)
        if self._proxy is None and target.scheme == "http":
            return await self._adopt(await self._connect(addresses, target.port), make)
        if self._proxy is None:
            opening = await self._adopt(await self._connect(addresses, target.port), _Opening)
        else:
            opening = await self._tunnel(self._proxy, addresses, target.port)
        if target.scheme == "http":
            return opening.hand_over(make())
        progress(Phase.TLS)
        return await self._secure(opening, target.host, make)

    async def _judged(self, target: Target) -> list[str]:
        """Return the addresses of `target` that the guard lets through, best first."""
        found = [str(target.address)] if target.address is not None else await self._resolver.resolve(target.host)
        judged: list[str] = []
        refusal: AddressRefused | None = None
        for address in found:
            try:
                self.guard.check_address(address, target.scheme)
            except AddressRefused as error:
                refusal = error
            else:
                judged.append(address)
        if not judged:
            raise DialFailed(Result.BLOCKED, str(refusal))
        return judged[:ADDRESSES_MAX]

    async def _connect(self, addresses: Sequence[str], port: int) -> socket.socket:
        """Return a socket connected to whichever address answers first."""
        infos = [_address_info(address, port) for address in addresses]
        if self._source is not None:
            family = _address_info(self._source, 0)[0]
            infos = [info for info in infos if info[0] == family]
            if not infos:
                raise DialFailed(Result.CONNECT, f"no address of the family that {self._source} can reach")
        try:
            if len(infos) == 1:
                return await self._connect_to(infos[0])
            return await aiohappyeyeballs.start_connection(
                infos,
                happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY_S,
                interleave=1,
                loop=self._loop,
                socket_factory=self._open_socket,
            )
        except (OSError, RuntimeError) as error:  # uvloop reports some failures as RuntimeError
            raise _connect_failure(error) from error

    async def _connect_to(self, info: aiohappyeyeballs.types.AddrInfoType) -> socket.socket:
        opened, address = self._open_socket(info), info[4]
        try:
            opened.setblocking(False)
            if isinstance(self._loop, uvloop.Loop):
                await _connected(self._loop, opened, address)
            else:
                await self._loop.sock_connect(opened, address)
        except BaseException:
            opened.close()
            raise
        return opened

    def _open_socket(self, info: aiohappyeyeballs.types.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, _ = info
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._source is not None:
                opened.bind(_address_info(self._source, 0)[4])
        except OSError:
            opened.close()
            raise
        return opened

    async def _adopt(self, connected: socket.socket, make: Callable[[], P]) -> P:
        """Give a connected socket to a transport.

        Shielded, and undone afterwards if need be: uvloop, cancelled in the one turn this takes, closes the descriptor
        and leaves the socket object to close the same number once more, by then perhaps somebody else's.
        """
        made: Callable[[], Any] = make
        adoption = self._loop.create_task(self._loop.create_connection(made, sock=connected), name="adopt a socket")
        try:
            adopted: tuple[Any, P] = await asyncio.shield(adoption)
        except asyncio.CancelledError:
            adoption.add_done_callback(_abort_adopted)
            raise
        except OSError as error:
            with contextlib.suppress(OSError):
                connected.close()
            raise _connect_failure(error) from error
        return adopted[1]

    async def _secure(self, opening: _Opening, host: str, make: Callable[[], P]) -> P:
        """Upgrade to TLS, verified against `host` (a name by SNI and DNS name, a literal by the address's SAN)."""
        if opening.received:
            opening.transport.abort()
            raise DialFailed(Result.TLS, "TLS: the server spoke first, so it does not speak TLS on this port")
        try:
            return await self._start_tls(opening, host, make)
        except ssl.SSLError as error:
            raise DialFailed(Result.TLS, tls_reason(error)) from error
        except (OSError, RuntimeError) as error:
            raise DialFailed(Result.TLS, f"TLS: {_os_reason(error, 'connection lost')} during the handshake") from error

    async def _start_tls(self, opening: _Opening, host: str, make: Callable[[], P]) -> P:
        raw, protocol = opening.transport, make()
        try:
            secured = await self._loop.start_tls(raw, _base(protocol), self._context, server_hostname=host)
        except BaseException:
            raw.abort()
            raise
        if secured is None:  # asyncio's way to say that the connection went away meanwhile
            raise DialFailed(Result.TLS, "TLS: connection lost during the handshake")
        protocol.connection_made(secured)
        return protocol

    async def _tunnel(self, proxy: _Proxy, addresses: Sequence[str], port: int) -> _Opening:
        """Return a connection through the proxy to the first address that it can reach."""
        failure: DialFailed | None = None
        for address in addresses:
            opening = await self._reach_proxy(proxy)
            try:
                await opening.connect_through(proxy, address, port, self._loop)
            except DialFailed as error:
                opening.transport.abort()
                if error.result is None:
                    raise
                failure = error
            except BaseException:
                opening.transport.abort()
                raise
            else:
                return opening
        assert failure is not None
        raise failure

    async def _reach_proxy(self, proxy: _Proxy) -> _Opening:
        """Connect to the proxy. The guard has no say: the operator chose it. Whatever fails here is our fault."""
        try:
            with contextlib.suppress(ValueError):
                return await self._open_proxy(proxy, [str(ip_address(proxy.host))])
            return await self._open_proxy(proxy, await self._resolver.resolve(proxy.host))
        except DialFailed as error:
            raise DialFailed(None, f"proxy: {error}") from error

    async def _open_proxy(self, proxy: _Proxy, addresses: Sequence[str]) -> _Opening:
        opening = await self._adopt(await self._connect(addresses, proxy.port), _Opening)
        if proxy.secure:
            return await self._secure(opening, proxy.host, _Opening)
        return opening


def _base(protocol: Receiving) -> asyncio.BaseProtocol:
    return cast("asyncio.BaseProtocol", protocol)


class _Proxy:
    """A proxy's URL, read once."""

    __slots__ = ("authorization", "host", "port", "secure")

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"a proxy is http://host:port or https://host:port, not {_without_password(parts)!r}")
        self.secure = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if self.secure else 80)
        self.authorization = b""
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self.authorization = b"Proxy-Authorization: Basic " + base64.b64encode(pair) + b"\r\n"

    def __repr__(self) -> str:
        return f"<_Proxy {'https' if self.secure else 'http'}://{self.host}:{self.port}>"


class _Opening(asyncio.Protocol):
    """Holds a transport that is not yet fit for requests: before TLS, and while a proxy answers CONNECT."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.received = b""
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport, but behave as one

    def data_received(self, data: bytes) -> None:
        self.received += data
        complete = b"\r\n\r\n" in self.received
        if not complete and len(self.received) > TUNNEL_ANSWER_BYTES_MAX:
            self.transport.abort()
        elif complete and self._answer is not None and not self._answer.done():
            self._answer.set_result(self.received)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(DialFailed(None, "proxy: connection closed instead of an answer to CONNECT"))

    def hand_over(self, protocol: P) -> P:
        self.transport.set_protocol(_base(protocol))
        protocol.connection_made(self.transport)
        return protocol

    async def connect_through(self, proxy: _Proxy, address: str, port: int, loop: asyncio.AbstractEventLoop) -> None:
        """Ask the proxy for a tunnel (RFC 9110 §9.3.6) to `address`. Raises DialFailed."""
        authority = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._answer = loop.create_future()
        self.transport.write(
            b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (authority.encode(), authority.encode(), proxy.authorization)
        )
        answer = await self._answer
        status_line, _, _ = answer.partition(b"\r\n")
        if not status_line.startswith(b"HTTP/1.") or not status_line[9:12].isdigit():
            raise DialFailed(None, "proxy: the answer to CONNECT is not HTTP")
        status = int(status_line[9:12])
        if status == 407:
            raise DialFailed(None, "proxy: 407, it does not accept our credentials")
        if not 200 <= status < 300:
            raise DialFailed(Result.CONNECT, f"the proxy answered {status} to CONNECT {authority}")
        if not answer.endswith(b"\r\n\r\n"):
            raise DialFailed(Result.CONNECT, "the tunnel spoke before it was asked anything")
        self.received = b""


def tls_reason(error: ssl.SSLError) -> str:
    """Say in a few words why TLS failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message.rstrip('.')}"
    if error.reason == "WRONG_VERSION_NUMBER":
        return "TLS: the server does not speak TLS on this port"
    return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])  # some servers speak HTTP/2 to whoever does not say
    return context


def _address_info(address: str, port: int) -> aiohappyeyeballs.types.AddrInfoType:
    if ":" in address:
        return (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0))
    return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))


async def _connected(loop: asyncio.AbstractEventLoop, opened: socket.socket, address: Any) -> None:
    """Connect as uvloop's `sock_connect` does, which has a thread look even numbers up: half of a dial's cost."""
    code = opened.connect_ex(address)
    if code == errno.EINPROGRESS:
        writable: asyncio.Future[None] = loop.create_future()
        loop.add_writer(opened, _ring, writable)
        try:
            await writable
        finally:
            loop.remove_writer(opened)
        code = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _ring(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _connect_failure(error: OSError | RuntimeError) -> DialFailed:
    code = error.errno if isinstance(error, OSError) else None
    return DialFailed(None if code in _LOCAL_FAULTS else Result.CONNECT, _os_reason(error, "connection failed"))


def _os_reason(error: OSError | RuntimeError, otherwise: str) -> str:
    """The system's words for an error; asyncio's own embed addresses and source locations."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error) or otherwise


def _abort_adopted(adoption: asyncio.Task[tuple[asyncio.Transport, asyncio.Protocol]]) -> None:
    if not adoption.cancelled() and adoption.exception() is None:
        adoption.result()[0].abort()


def _without_password(parts: SplitResult) -> str:
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
