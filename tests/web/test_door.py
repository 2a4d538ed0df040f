"""Our own listener against hostile clients: requests meant to be read in two ways, and connections that only wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import structlog
from aiohttp import web

from dispatcher.web.api import build_api_app
from dispatcher.web.boundary import boundary
from dispatcher.web.door import Door
from dispatcher.web.parts import Web

PATIENCE_S = 20.0  # for what must happen; nothing here asserts how fast
SOON_S = 0.2  # of a door that soon loses its patience
GET = b"GET /v1/webhooks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n"
POST = GET.replace(b"GET", b"POST", 1) + b"Content-Type: application/json\r\n"
HIDDEN = b"DELETE /v1/webhooks/hidden HTTP/1.1\r\nHost: x\r\n\r\n"  # what a smuggler wants to be taken for a request


class Caller:
    """Speaks bytes to a listener on loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def statuses(self, said: bytes) -> list[int]:
        """What a connection that says this, and then no more, is answered with, until it is closed for being idle."""
        async with asyncio.timeout(PATIENCE_S), self.connected() as (reader, writer):
            writer.write(said)
            heard = await everything(reader)
        return list(map(int, re.findall(rb"HTTP/1\.[01] (\d{3}) ", heard)))


async def everything(reader: asyncio.StreamReader) -> bytes:
    heard = b""
    with contextlib.suppress(ConnectionError):
        while block := await reader.read(65_536):
            heard += block
    return heard


@pytest.fixture
async def key(parts: Web) -> bytes:
    return (await parts.accounts.create_key("acme"))[1].encode()


@pytest.fixture
async def asked() -> list[str]:
    """Every request that any handler got to see."""
    return []


@pytest.fixture
async def caller(parts: Web, asked: list[str]) -> AsyncIterator[Caller]:
    app = build_api_app(parts)

    @web.middleware
    async def note(request: web.Request, handler: Callable[..., Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path}")
        return await handler(request)

    app.middlewares.append(note)
    async with listening(app, idle_s=SOON_S) as (caller, _):
        yield caller


@contextlib.asynccontextmanager
async def listening(app: web.Application, **options: Any) -> AsyncIterator[tuple[Caller, Door]]:
    door = Door(app, shutdown_timeout=1.0, **options)
    await door.setup()
    await web.TCPSite(door, "127.0.0.1", 0).start()
    try:
        yield Caller(door.addresses[0][1]), door
    finally:
        await door.cleanup()


# ── smuggling ────────────────────────────────────────────────────────────────────────────────────────────────────────

CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = {
    "length and chunks": b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "chunks and length": CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN),
    "two lengths as one": b"Content-Length: 0, %d\r\n\r\n" % len(HIDDEN),
    "a signed length": b"Content-Length: +0\r\n\r\n",
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "a hexadecimal length": b"Content-Length: 0x0\r\n\r\n",
    "a length of blanks": b"Content-Length: 0 0\r\n\r\n",
    "a length with an underscore": b"Content-Length: 1_0\r\n\r\n",
    "a length beyond 64 bits": b"Content-Length: 18446744073709551616\r\n\r\n",
    "a blank before the colon": b"Content-Length : 0\r\n\r\n",
    "chunks with a blank before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "chunks by half a name": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunks, and then not": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunks behind a control": b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks twice": CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunks on a folded line": b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "chunks behind a bare return": b"X: y\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bare line feed": b"X: y\nContent-Length: 0\r\n\r\n",
    "a bare line feed at the end": b"Content-Length: 0\r\n\n",
    "a NUL": b"X: a\x00b\r\nContent-Length: 0\r\n\r\n",
    "no name": b": x\r\nContent-Length: 0\r\n\r\n",
    "no colon": b"Content-Length\r\n\r\n",
    "a chunk size that is none": CHUNKED + b"\r\n0x0\r\n\r\n",
    "a signed chunk size": CHUNKED + b"\r\n-1\r\n\r\n",
    "a chunk size beyond 64 bits": CHUNKED + b"\r\n10000000000000000\r\n",
    "a chunk longer than it says": CHUNKED + b"\r\n1\r\nabc\r\n0\r\n\r\n",
    "a chunk that ends with a bare line feed": CHUNKED + b"\r\n1\na\n0\n\n",
}  # fmt: skip


@pytest.mark.parametrize("rest", SMUGGLED.values(), ids=SMUGGLED)
async def test_a_request_that_could_be_read_in_two_ways_is_refused_with_all_that_follows(
    caller: Caller, asked: list[str], key: bytes, rest: bytes
) -> None:
    statuses = await caller.statuses(POST % key + rest + HIDDEN)
    assert statuses[:1] == [400], statuses
    assert len(statuses) == 1
    assert f"DELETE {'/v1/webhooks/hidden'}" not in asked


async def test_requests_in_a_row_are_read_apart(caller: Caller, asked: list[str], key: bytes) -> None:
    """The same bytes with nothing wrong about them do come through: the tests above see something."""
    statuses = await caller.statuses(POST % key + b"Content-Length: 2\r\n\r\n{}" + HIDDEN)
    assert statuses == [422, 401]
    assert asked == ["POST /v1/webhooks", "DELETE /v1/webhooks/hidden"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (GET + b"X: " + b"y" * 9000 + b"\r\n\r\n", 400),
        (GET + b"".join(b"X-%d: y\r\n" % number for number in range(1000)) + b"\r\n", 400),
        (b"GET /v1/" + b"y" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /v1/webhooks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + b"k" * 9000 + b"\r\n\r\n", 400),
        (b"G" * 10_000, 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"GET http://elsewhere.example/v1/webhooks HTTP/1.1\r\nHost: x\r\n\r\n", 401),  # a path, wherever it points
        (b"CONNECT db.internal:5432 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 401),
        (b"GET /v1/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 401),
        (b"TRACE /v1/webhooks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n\r\n", 401),
    ],
)
async def test_a_head_that_is_none_or_too_large_is_an_orderly_refusal(
    caller: Caller, key: bytes, head: bytes, status: int
) -> None:
    assert await caller.statuses(head.replace(b"%b", key)) == [status]


@pytest.mark.parametrize("given", [b"a b", b"x" * 65, b"a\tb", b"\xff", b"<script>", b"a;b", b'"'])
async def test_what_a_caller_says_of_itself_is_not_repeated_in_the_answer(
    caller: Caller, key: bytes, given: bytes
) -> None:
    """A request id comes back only if it could not be anything else."""
    async with asyncio.timeout(PATIENCE_S), caller.connected() as (reader, writer):
        writer.write(GET % key + b"X-Request-Id: " + given + b"\r\nConnection: close\r\n\r\n")
        heard = await everything(reader)
    assert b"X-Request-Id: req_" in heard
    assert given not in heard.partition(b"\r\n\r\n")[0].partition(b"X-Request-Id: ")[2][:80].partition(b"\r\n")[0]


@pytest.mark.parametrize(
    "rest", [b" : Bearer %b", b": Bea\x00rer %b", b": Bearer %b" + b"k" * 9000, b"\x01: Bearer %b"]
)
async def test_a_misspelt_header_leaves_its_key_in_no_answer_and_no_log(
    caller: Caller, key: bytes, rest: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    with structlog.testing.capture_logs() as lines:
        async with asyncio.timeout(PATIENCE_S), caller.connected() as (reader, writer):
            writer.write(b"GET /v1/webhooks HTTP/1.1\r\nAuthorization" + rest.replace(b"%b", key) + b"\r\n\r\n")
            heard = await everything(reader)
    assert b"application/problem+json" in heard
    assert b"aiohttp" not in heard
    for text in (heard, repr(lines).encode(), caplog.text.encode()):
        assert key[-12:] not in text
    assert [(line["event"], line["log_level"]) for line in lines] == [("request.malformed", "debug")]


@pytest.mark.parametrize("who", [b"nobody", b"somebody"])
async def test_a_body_nobody_can_read_ends_its_connection_and_fills_no_log(
    caller: Caller, key: bytes, who: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head = POST % (key if who == b"somebody" else b"tp_live_x")
    body = b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nab"
    assert len(await caller.statuses(head + body + HIDDEN)) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_no_path_forges_a_line_of_the_log(caller: Caller, key: bytes) -> None:
    with structlog.testing.capture_logs() as lines:
        await caller.statuses(
            b"GET /v1/x%0A2030-01-01%20[error]%20forged%1b[2J HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
    assert [line["event"] for line in lines] == ["request"]


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Slow:
    """A call that is being served until the test says so."""

    def __init__(self) -> None:
        self.asked, self.release = asyncio.Event(), asyncio.Event()

    async def answer(self, _: web.Request) -> web.Response:
        self.asked.set()
        await self.release.wait()
        return web.Response(text="ok")


@contextlib.asynccontextmanager
async def door(**options: Any) -> AsyncIterator[tuple[Caller, Door, Slow]]:
    """An application of one slow call and one quick one, behind a door of its own."""
    slow = Slow()

    async def quick(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application(middlewares=[boundary])
    app.add_routes([web.get("/quick", quick), web.get("/slow", slow.answer)])
    async with listening(app, **options) as (caller, runner):
        try:
            yield caller, runner, slow
        finally:
            slow.release.set()


QUICK = b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = QUICK.replace(b"quick", b"slow")


async def test_a_head_that_drips_is_cut_off_however_it_drips() -> None:
    async with door(head_s=SOON_S) as (caller, _, _), caller.connected() as (reader, writer):

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                for byte in b"GET /quick HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 4000:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(SOON_S / 20)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(PATIENCE_S):
            assert await everything(reader) == b""
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


@pytest.mark.parametrize("said", [b"", b"GET /quick HTTP/1.1\r\n", QUICK[:-1]])
async def test_who_asks_for_nothing_is_put_out(said: bytes) -> None:
    async with door(head_s=SOON_S) as (caller, _, _), caller.connected() as (reader, writer):
        writer.write(said)
        async with asyncio.timeout(PATIENCE_S):
            assert await everything(reader) == b""


async def test_a_second_head_that_drips_ends_with_the_idle_time() -> None:
    async with door(idle_s=SOON_S) as (caller, _, _), caller.connected() as (reader, writer):
        writer.write(QUICK + QUICK[:10])
        async with asyncio.timeout(PATIENCE_S):
            assert (await everything(reader)).count(b"HTTP/1.1 200") == 1


async def test_who_is_being_served_is_left_in_peace() -> None:
    options = {"head_s": SOON_S, "idle_s": SOON_S, "connections_max": 1}
    async with door(**options) as (caller, _, slow), caller.connected() as (reader, writer):
        writer.write(SLOW)
        async with asyncio.timeout(PATIENCE_S):
            await slow.asked.wait()
            for _ in range(3):  # there is nobody whose place they could have; and the patience of the door runs out
                async with caller.connected() as (other, _):
                    assert await everything(other) == b""
                await asyncio.sleep(SOON_S)
            slow.release.set()
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_of_too_many_those_that_kept_us_waiting_longest_make_room() -> None:
    async with door(connections_max=20) as (caller, runner, _), contextlib.AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(caller.connected()) for _ in range(60)]
        async with asyncio.timeout(PATIENCE_S):
            for reader, _ in idle[:40]:
                assert await everything(reader) == b""
            assert await caller.statuses(QUICK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) == [200]
            reader, writer = idle[-1]
            writer.write(QUICK)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert repr(runner) == "<Door 19 connections, 19 waiting>"  # the last caller went by itself


async def test_a_crowd_that_drips_keeps_nobody_out() -> None:
    async with door(connections_max=50) as (caller, _, _), contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            for _ in range(100):
                _, writer = await stack.enter_async_context(caller.connected())
                writer.write(b"GET /quick HTTP/1.1\r\nX: ")
            assert await caller.statuses(QUICK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) == [200]


async def test_connections_that_came_and_went_are_forgotten() -> None:
    async with door(idle_s=SOON_S / 10) as (caller, runner, _):
        for _ in range(30):
            assert await caller.statuses(QUICK) == [200]
        assert repr(runner) == "<Door 0 connections, 0 waiting>"
        assert runner._patience == {}
