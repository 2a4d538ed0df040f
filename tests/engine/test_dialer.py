"""Dialling: names, the guard, TLS in good and bad shape, proxies; and that a dial given up leaves nothing open."""

from __future__ import annotations

import asyncio
import base64
import errno
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiodns
import aiodns.error
import pycares
import pytest
import trustme

from dispatcher.core.addresses import Guard, Target
from dispatcher.engine import dialer as module
from dispatcher.engine.dialer import Dialer, DialFailed, DnsResolver, Phase
from dispatcher.model import Result

module._tls_context = functools.cache(module._tls_context)  # reading the system's trust store takes 20 ms

GUARD = Guard(allow=["127.0.0.0/8"], allow_http=True)
AUTHORITY = trustme.CA()


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trust") / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(path)
    return str(path)


class Names:
    """A resolver that knows a few names, and counts how often it is asked. Each further answer is the next one."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {name.replace("_", "."): list(answer) for name, answer in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        answers = self.answers[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def close(self) -> None:
        pass


def target(port: int, host: str = "receiver.test", scheme: str = "http") -> Target:
    return GUARD.check_url(f"{scheme}://{host}:{port}/hook")


class Link(asyncio.Protocol):
    """What a dial is made for: keeps what it hears."""

    def __init__(self) -> None:
        self.heard = b""
        self.changed = asyncio.Event()
        self.transport: Any = None
        self.lost = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard += data
        self.changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.changed.set()

    async def exchange(self, data: bytes) -> bytes:
        self.transport.write(data)
        async with asyncio.timeout(10):
            while b"\n" not in self.heard and not self.lost:
                self.changed.clear()
                await self.changed.wait()
        return self.heard


@asynccontextmanager
async def listening(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], **options: Any
) -> AsyncIterator[int]:
    """Serve on loopback, yield the port, and wait until every handler has ended."""
    handlers: set[asyncio.Task[Any]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            await handle(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(run, "127.0.0.1", 0, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        async with asyncio.timeout(10):
            await asyncio.gather(*handlers)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(b"echo " + line)


@asynccontextmanager
async def dialling(resolver: Any = None, guard: Guard = GUARD, **options: Any) -> AsyncIterator[Dialer]:
    yield Dialer(guard=guard, resolver=resolver or Names(receiver_test=[["127.0.0.1"]]), **options)
    for _ in range(3):
        await asyncio.sleep(0)


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


# Addresses.


async def test_a_dial_goes_through_its_phases_to_a_connection() -> None:
    phases: list[Phase] = []
    async with listening(echo) as port, dialling() as dialer:
        link = await dialer.dial(target(port), Link, phases.append)
        assert await link.exchange(b"hello\n") == b"echo hello\n"
        assert phases == [Phase.DNS, Phase.CONNECT]
        assert link.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        link.transport.abort()


async def test_a_literal_address_needs_no_resolver() -> None:
    names = Names()
    async with listening(echo) as port, dialling(names) as dialer:
        link = await dialer.dial(target(port, "127.0.0.1"), Link)
        assert await link.exchange(b"hello\n") == b"echo hello\n"
        link.transport.abort()
    assert names.asked == []


async def test_the_connection_goes_to_the_address_that_was_judged() -> None:
    names = Names(receiver_test=[["127.0.0.1"], ["10.0.0.1"]])
    async with listening(echo) as port, dialling(names) as dialer:
        link = await dialer.dial(target(port), Link)
        assert link.transport.get_extra_info("peername")[0] == "127.0.0.1"
        assert names.asked == ["receiver.test"]
        link.transport.abort()
        with pytest.raises(DialFailed) as failed:  # the answer has changed
            await dialer.dial(target(port), Link)
        assert failed.value.result is Result.BLOCKED


async def test_of_several_addresses_only_the_permitted_are_tried() -> None:
    names = Names(receiver_test=[["169.254.169.254", "10.0.0.1", "127.0.0.1", "::1"]])
    async with listening(echo) as port, dialling(names) as dialer:
        tried: list[str] = []
        opens = dialer._open_socket

        def note(info: Any) -> socket.socket:
            tried.append(info[4][0])
            return opens(info)

        dialer._open_socket = note  # type: ignore[method-assign]
        link = await dialer.dial(target(port), Link)
        assert tried == ["127.0.0.1"]
        link.transport.abort()


async def test_plain_http_goes_to_opened_networks_only() -> None:
    names = Names(receiver_test=[["93.184.216.34"]])
    async with dialling(names) as dialer:
        with pytest.raises(DialFailed, match="https only") as failed:
            await dialer.dial(target(80), Link)
        assert failed.value.result is Result.BLOCKED


async def test_an_address_that_refuses_gives_way_to_the_next() -> None:
    names = Names(receiver_test=[["127.0.0.77", "127.0.0.1"]])
    async with listening(echo) as port, dialling(names) as dialer:
        link = await dialer.dial(target(port), Link)
        assert await link.exchange(b"hello\n") == b"echo hello\n"
        link.transport.abort()


async def test_a_thousand_addresses_are_not_a_thousand_connections() -> None:
    names = Names(receiver_test=[[f"127.1.{number // 250}.{1 + number % 250}" for number in range(1000)]])
    async with listening(echo) as port, dialling(names) as dialer:
        tried: list[str] = []

        def refuse(info: Any) -> socket.socket:
            tried.append(info[4][0])
            raise OSError(errno.ECONNREFUSED, "connection refused")

        dialer._open_socket = refuse  # type: ignore[method-assign]
        with pytest.raises(DialFailed, match="connection refused"):
            await dialer.dial(target(port), Link)
        assert len(tried) == module.ADDRESSES_MAX


async def test_the_source_address_is_where_connections_come_from() -> None:
    async with listening(echo) as port, dialling(source_address="127.0.0.9") as dialer:
        link = await dialer.dial(target(port), Link)
        assert link.transport.get_extra_info("sockname")[0] == "127.0.0.9"
        link.transport.abort()


async def test_a_source_address_that_is_not_ours_is_our_fault() -> None:
    async with listening(echo) as port, dialling(source_address="192.0.2.1") as dialer:
        with pytest.raises(DialFailed) as failed:
            await dialer.dial(target(port), Link)
        assert failed.value.result is None


async def test_an_address_of_another_family_than_the_source_is_out_of_reach() -> None:
    names = Names(receiver_test=[["::1"]])
    async with dialling(names, Guard(allow=["::1"], allow_http=True), source_address="127.0.0.9") as dialer:
        with pytest.raises(DialFailed, match="family") as failed:
            await dialer.dial(target(80), Link)
        assert failed.value.result is Result.CONNECT


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL])
async def test_what_this_machine_lacks_is_our_fault(code: int) -> None:
    async with dialling() as dialer:

        def lack(info: Any) -> socket.socket:
            raise OSError(code, "lacking")

        dialer._open_socket = lack  # type: ignore[method-assign]
        with pytest.raises(DialFailed) as failed:
            await dialer.dial(target(80), Link)
        assert failed.value.result is None


@pytest.mark.parametrize("url", ["ftp://proxy.test", "proxy.test:3128", "http://"])
async def test_a_proxy_that_is_none_is_refused_and_its_password_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="a proxy is"):
        Dialer(guard=GUARD, resolver=Names(), proxy=url)
    with pytest.raises(ValueError, match="a proxy is") as error:
        Dialer(guard=GUARD, resolver=Names(), proxy="socks5://me:secret@proxy.test")
    assert "secret" not in str(error.value)


# TLS.


async def test_tls_is_verified_against_the_name(ca_file: str) -> None:
    phases: list[Phase] = []
    context = server_context(AUTHORITY.issue_cert("receiver.test"))
    asked: list[str | None] = []
    context.sni_callback = lambda connection, name, context: asked.append(name)  # type: ignore[assignment,return-value]
    async with listening(echo, ssl=context) as port, dialling(ca_file=ca_file) as dialer:
        link = await dialer.dial(target(port, scheme="https"), Link, phases.append)
        assert await link.exchange(b"hello\n") == b"echo hello\n"
        assert phases == [Phase.DNS, Phase.CONNECT, Phase.TLS]
        assert asked == ["receiver.test"]
        assert link.transport.get_extra_info("cipher")
        link.transport.abort()


async def test_tls_to_an_address_is_verified_against_the_address(ca_file: str) -> None:
    right, wrong = (server_context(AUTHORITY.issue_cert(address)) for address in ("127.0.0.1", "127.0.0.2"))
    async with dialling(ca_file=ca_file) as dialer:
        async with listening(echo, ssl=right) as port:
            link = await dialer.dial(target(port, "127.0.0.1", "https"), Link)
            assert await link.exchange(b"hello\n") == b"echo hello\n"
            link.transport.abort()
        async with listening(echo, ssl=wrong) as port:
            with pytest.raises(DialFailed, match="IP address mismatch"):
                await dialer.dial(target(port, "127.0.0.1", "https"), Link)


# Dials given up.


async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say nothing until the other side is gone."""
    while await reader.read(4096):
        pass


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_dial_given_up_at_any_turn_leaves_nothing_open(ca_file: str) -> None:
    context = server_context(AUTHORITY.issue_cert("receiver.test"))
    names = Names(receiver_test=[["127.0.0.1", "127.0.0.77"]])
    async with (
        listening(echo) as plain,
        listening(echo, ssl=context) as secure,
        listening(never) as silent,
        dialling(names, ca_file=ca_file) as dialer,
    ):
        for port, scheme in [(plain, "http"), (secure, "https"), (silent, "https")]:
            before = descriptors()
            for turns in range(12):
                dial = asyncio.create_task(dialer.dial(target(port, scheme=scheme), Link))
                for _ in range(turns):
                    await asyncio.sleep(0)
                dial.cancel()
                (outcome,) = await asyncio.gather(dial, return_exceptions=True)
                if isinstance(outcome, Link):
                    outcome.transport.abort()
            async with asyncio.timeout(10):
                while descriptors() > before:
                    await asyncio.sleep(0)


# Proxies.


class ScriptedProxy:
    """An HTTP proxy that tunnels to wherever it is told to, or answers what its test says."""

    def __init__(self, answer: bytes | None = None) -> None:
        self.answer = answer
        self.heads: list[bytes] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        if self.answer is not None:
            writer.write(self.answer)
            await writer.drain()
            return
        host, _, port = head.split()[1].decode().rpartition(":")
        inner_reader, inner_writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        back = asyncio.create_task(pump(inner_reader, writer))
        await pump(reader, inner_writer)
        inner_writer.transport.abort()
        await back


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
    except OSError:
        pass


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("proxy_scheme", ["http", "https"])
async def test_a_proxy_is_asked_for_the_judged_address_and_the_name_is_verified(
    scheme: str, proxy_scheme: str, ca_file: str
) -> None:
    names = Names(receiver_test=[["10.0.0.1", "127.0.0.1"]], proxy_test=[["127.0.0.1"]])
    proxy = ScriptedProxy()
    secure = {"ssl": server_context(AUTHORITY.issue_cert("receiver.test"))} if scheme == "https" else {}
    shield = {"ssl": server_context(AUTHORITY.issue_cert("proxy.test"))} if proxy_scheme == "https" else {}
    async with listening(echo, **secure) as port, listening(proxy.handle, **shield) as proxy_port:
        url = f"{proxy_scheme}://me:p%40ss@proxy.test:{proxy_port}"
        async with dialling(names, ca_file=ca_file, proxy=url) as dialer:
            link = await dialer.dial(target(port, scheme=scheme), Link)
            assert await link.exchange(b"hello\n") == b"echo hello\n"
            link.transport.abort()
    (head,) = proxy.heads
    assert head.startswith(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % (port, port))
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"me:p@ss") + b"\r\n" in head


async def test_a_certificate_behind_a_proxy_is_verified_too(ca_file: str) -> None:
    context = server_context(AUTHORITY.issue_cert("other.test"))
    async with (
        listening(echo, ssl=context) as port,
        listening(ScriptedProxy().handle) as proxy_port,
        dialling(ca_file=ca_file, proxy=f"http://127.0.0.1:{proxy_port}") as dialer,
    ):
        with pytest.raises(DialFailed, match="Hostname mismatch") as failed:
            await dialer.dial(target(port, scheme="https"), Link)
        assert failed.value.result is Result.TLS


async def test_the_guard_judges_behind_a_proxy_too() -> None:
    proxy = ScriptedProxy()
    async with listening(proxy.handle) as proxy_port:
        names = Names(receiver_test=[["10.0.0.1"]])
        async with dialling(names, proxy=f"http://127.0.0.1:{proxy_port}") as dialer:
            with pytest.raises(DialFailed) as failed:
                await dialer.dial(target(80), Link)
            assert failed.value.result is Result.BLOCKED
    assert proxy.heads == []


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", Result.CONNECT),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", Result.CONNECT),
        (b"HTTP/1.1 200 Fine\r\n\r\nand more", Result.CONNECT),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", None),
        (b"SSH-2.0\r\n\r\n", None),
        (b"HTTP/1.1 200 Fi", None),
        (b"HTTP/1.1 200 Fine\r\nX: " + b"y" * 20_000, None),
        (b"", None),
    ],
)
async def test_what_a_proxy_answers_is_the_endpoints_fault_or_ours(answer: bytes, result: Result | None) -> None:
    proxy = ScriptedProxy(answer)
    async with (
        listening(proxy.handle) as proxy_port,
        dialling(proxy=f"http://127.0.0.1:{proxy_port}") as dialer,
    ):
        with pytest.raises(DialFailed) as failed:
            await dialer.dial(target(80), Link)
        assert failed.value.result is result


async def test_a_second_address_is_tried_through_the_proxy() -> None:
    names = Names(receiver_test=[["127.0.0.77", "127.0.0.1"]])

    async def choosy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" if b"127.0.0.1:" in head else b"HTTP/1.1 504 Timeout\r\n\r\n")
        await echo(reader, writer)

    async with listening(choosy) as proxy_port, dialling(names, proxy=f"http://127.0.0.1:{proxy_port}") as dialer:
        link = await dialer.dial(target(80), Link)
        assert await link.exchange(b"hello\n") == b"echo hello\n"
        link.transport.abort()


async def test_a_proxy_that_is_not_there_is_our_fault() -> None:
    async with listening(echo) as port:
        pass
    async with dialling(proxy=f"http://127.0.0.1:{port}") as dialer:
        with pytest.raises(DialFailed, match=r"^proxy: connection refused") as failed:
            await dialer.dial(target(80), Link)
        assert failed.value.result is None


async def test_a_tunnel_given_up_at_any_turn_leaves_nothing_open() -> None:
    async with listening(never) as silent, dialling(proxy=f"http://127.0.0.1:{silent}") as dialer:
        before = descriptors()
        for turns in range(12):
            dial = asyncio.create_task(dialer.dial(target(80), Link))
            for _ in range(turns):
                await asyncio.sleep(0)
            dial.cancel()
            await asyncio.gather(dial, return_exceptions=True)
        async with asyncio.timeout(10):
            while descriptors() > before:
                await asyncio.sleep(0)


# Names.


class Channel:
    """Stands for aiodns: answers when told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.futures: list[asyncio.Future[Any]] = []

    def getaddrinfo(self, host: str, **options: Any) -> asyncio.Future[Any]:
        self.asked.append(host)
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    def answer(self, *addresses: str, ttl_s: int = 60) -> None:
        nodes = [
            pycares.AddrInfoNode(ttl=ttl_s, flags=0, family=2, socktype=1, protocol=6, addr=(address.encode(), 0))
            for address in addresses
        ]
        self.futures[-1].set_result(pycares.AddrInfoResult(cnames=[], nodes=nodes))

    def fail(self, code: int) -> None:
        self.futures[-1].set_exception(aiodns.error.DNSError(code, pycares.errno.strerror(code)))

    async def close(self) -> None:
        pass


class Clock:
    """The running loop, with a clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def create_task(self, coroutine: Any, name: str) -> asyncio.Task[Any]:
        return asyncio.create_task(coroutine, name=name)


class Asked:
    """A resolver on a channel and a clock of our own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.resolver = DnsResolver(self.clock)  # type: ignore[arg-type]
        self.channel = Channel()
        self.resolver._channel = self.channel  # type: ignore[assignment]

    async def begin(self, host: str = "receiver.test") -> asyncio.Task[Sequence[str]]:
        asking = asyncio.create_task(self.resolver.resolve(host))
        for _ in range(3):
            await asyncio.sleep(0)
        return asking  # type: ignore[return-value]


@pytest.mark.parametrize(("ttl_s", "kept_s"), [(60, 60.0), (0, 1.0), (100_000, 300.0)])
async def test_an_answer_is_kept_for_its_ttl_within_bounds(ttl_s: int, kept_s: float) -> None:
    asked = Asked()
    first = await asked.begin()
    asked.channel.answer("127.0.0.1", "::1", "127.0.0.1", ttl_s=ttl_s)
    assert await first == ("127.0.0.1", "::1")
    asked.clock.now += kept_s - 0.5
    assert await asked.resolver.resolve("receiver.test") == ("127.0.0.1", "::1")
    assert len(asked.channel.asked) == 1
    asked.clock.now += 1.0
    again = await asked.begin()
    asked.channel.answer("127.0.0.2")
    assert await again == ("127.0.0.2",)
    assert len(asked.channel.asked) == 2


async def test_a_name_that_does_not_exist_is_asked_for_again_soon() -> None:
    asked = Asked()
    first = await asked.begin()
    asked.channel.fail(aiodns.error.ARES_ENOTFOUND)
    with pytest.raises(DialFailed, match=r"^receiver\.test: Domain name not found") as failed:
        await first
    assert failed.value.result is Result.DNS
    with pytest.raises(DialFailed, match="not found"):
        await asked.resolver.resolve("receiver.test")
    assert len(asked.channel.asked) == 1
    asked.clock.now += module.NEGATIVE_TTL_S + 0.5
    again = await asked.begin()
    asked.channel.answer("127.0.0.1")
    assert await again == ("127.0.0.1",)


async def test_an_empty_answer_is_a_failure() -> None:
    asked = Asked()
    first = await asked.begin()
    asked.channel.answer()
    with pytest.raises(DialFailed, match="no address"):
        await first


async def test_a_fault_of_our_resolver_is_ours_and_not_kept() -> None:
    asked = Asked()
    first = await asked.begin()
    asked.channel.fail(aiodns.error.ARES_ENOMEM)
    with pytest.raises(DialFailed) as failed:
        await first
    assert failed.value.result is None
    again = await asked.begin()
    asked.channel.answer("127.0.0.1")
    assert await again == ("127.0.0.1",)


async def test_one_question_serves_all_who_ask_even_if_the_first_gives_up() -> None:
    asked = Asked()
    askers = [await asked.begin() for _ in range(5)]
    askers[0].cancel()
    asked.channel.answer("127.0.0.1")
    assert await asyncio.gather(*askers[1:]) == [("127.0.0.1",)] * 4
    assert askers[0].cancelled()
    assert len(asked.channel.asked) == 1


async def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NAMES_MAX", 3)
    asked = Asked()
    for number in range(5):
        asking = await asked.begin(f"{number}.test")
        asked.channel.answer("127.0.0.1")
        await asking
    assert list(asked.resolver._answers) == ["2.test", "3.test", "4.test"]
    assert repr(asked.resolver) == "<DnsResolver 3 names known, 0 asked>"


async def test_closing_ends_what_is_being_looked_up() -> None:
    asked = Asked()
    asking = await asked.begin()
    await asked.resolver.close()
    (outcome,) = await asyncio.gather(asking, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError)
    assert asked.resolver._lookups == {}


async def test_names_of_the_hosts_file_are_known() -> None:
    resolver = DnsResolver()
    try:
        assert "127.0.0.1" in await resolver.resolve("localhost")
    finally:
        await resolver.close()


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".test", "receiver.invalid"])
async def test_a_name_that_cannot_be_is_a_failed_lookup(host: str) -> None:
    resolver = DnsResolver()
    try:
        with pytest.raises(DialFailed) as failed:
            await resolver.resolve(host)
        assert failed.value.result is Result.DNS
    finally:
        await resolver.close()
