"""Hostile receivers over real sockets: each request ends as an attempt, and the endpoint beside them is served."""

from __future__ import annotations

import asyncio
import functools
import itertools
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from arena import PATIENCE_S, TIMEOUT_S, Stage, read_request, say_nothing
from responses import LIES, OK, Lie

from dispatcher.core.backoff import RETRY_AFTER_S_MAX
from dispatcher.engine.dialer import Dialer
from dispatcher.model import Result

COMPLETE = {Result.OK, Result.REDIRECT, Result.CLIENT_ERROR, Result.SERVER_ERROR}
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Act = Callable[[Reader, Writer], Awaitable[None]]


async def tell(lie: Lie, reader: Reader, writer: Writer) -> None:
    """Say what the table says, as fast as the client reads."""
    await read_request(reader)
    for said in lie.says:
        writer.write(said)
        await writer.drain()
    while lie.endless:
        writer.write(lie.endless)
        await writer.drain()
    if lie.closes:
        writer.close()
        await writer.wait_closed()
    await say_nothing(reader, writer)


@pytest.mark.parametrize("lie", LIES, ids=str)
async def test_a_liar_gets_an_attempt_with_the_right_result(stage: Stage, lie: Lie) -> None:
    timeout_s = 1.0 if lie.result is Result.TIMEOUT else PATIENCE_S  # whoever is slow here, it is not the peer
    entry = await stage.only(await stage.against(functools.partial(tell, lie), timeout_s=timeout_s))
    assert entry.result is lie.result, entry
    assert lie.status in {None, entry.status}
    assert (entry.error == "") == (lie.result in COMPLETE)
    assert lie.words in entry.error
    assert lie.body is None or entry.body == lie.body
    assert len(entry.head) <= 4096
    assert len(entry.body) <= 4096


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
async def test_a_response_cut_off_at_each_byte_is_never_a_success(stage: Stage, is_reset: bool) -> None:
    cuts = iter(range(len(OK) + 1))

    async def cut_off(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        writer.write(OK[: next(cuts)])
        await writer.drain()
        if is_reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    # One at a time, so that each connection has its place in the row; and no streak of failures stops the others.
    webhook = await stage.against(cut_off, timeout_s=10.0, ordered=True)
    entries = []
    for _ in range(len(OK) + 1):
        stage.deliverer.lanes.revive(stage.deliverer.subscriber(webhook).lane)
        entries.append(await stage.only(webhook))
    assert entries[0].result is Result.CONNECT
    # A reset may overtake what was sent before it.
    allowed = {Result.PROTOCOL, Result.CONNECT} if is_reset else {Result.PROTOCOL}
    assert {entry.result for entry in entries[1:-1]} <= allowed
    assert is_reset or entries[-1].result is Result.OK


@pytest.mark.parametrize("beginning", [b"", OK[:20], OK[:-2]], ids=["head", "within the head", "body"])
async def test_a_drip_does_not_move_the_deadline(stage: Stage, beginning: bytes) -> None:
    async def drip(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        writer.write(beginning)
        for byte in itertools.chain(OK[len(beginning) : -1], itertools.repeat(None)):
            if byte is not None:
                writer.write(bytes([byte]))
                await writer.drain()
            await asyncio.sleep(TIMEOUT_S / 8)

    entry = await stage.only(await stage.against(drip))
    assert entry.result is Result.TIMEOUT
    assert entry.error == f"timed out after {TIMEOUT_S:g} s ({'body' if beginning == OK[:-2] else 'headers'})"


async def test_a_thousand_redirects_are_a_thousand_attempts_and_none_is_followed(stage: Stage) -> None:
    paths: list[bytes] = []

    async def redirect(reader: Reader, writer: Writer) -> None:
        while True:
            paths.append((await read_request(reader)).split(b" ")[1])
            writer.write(b"HTTP/1.1 307 X\r\nLocation: /%d\r\nContent-Length: 0\r\n\r\n" % len(paths))
            await writer.drain()

    entries = await stage.deliver(await stage.against(redirect, timeout_s=30.0), events=1000)
    assert {(entry.result, entry.status) for entry in entries} == {(Result.REDIRECT, 307)}
    assert paths == [b"/hook"] * 1000


@pytest.mark.parametrize("status", [200, 413])
async def test_an_answer_before_the_request_is_read_is_the_answer(stage: Stage, status: int) -> None:
    async def answer_first(reader: Reader, writer: Writer) -> None:
        await reader.readexactly(1)
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)
        await writer.drain()
        await asyncio.Event().wait()

    webhook = await stage.against(answer_first, options={"limit": 1}, timeout_s=10.0)
    entry = await stage.only(webhook, data='{"x":"%s"}' % ("y" * 250_000))
    assert entry.status == status


async def test_an_answer_to_no_question_is_no_success_of_a_later_one(stage: Stage) -> None:
    """Said as soon as the connection stands, it may meet the request or not. It never serves a second one."""

    async def answer_at_once(reader: Reader, writer: Writer) -> None:
        writer.write(OK * 3)
        await writer.drain()
        await say_nothing(reader, writer)

    host = await stage.host(answer_at_once)
    entries = await stage.deliver(stage.webhook(host.port, ordered=True, timeout_s=PATIENCE_S), events=4)
    assert {entry.result for entry in entries} <= {Result.OK, Result.CONNECT}
    assert host.connections == 4


async def test_a_peer_that_never_reads_holds_up_its_own_requests_until_their_deadline(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = Dialer._open_socket

    def open_narrow(dialer: Dialer, info: Any) -> socket.socket:  # or the system would take it all off our hands
        opened = opens(dialer, info)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return opened

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # inherited by what it accepts
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        monkeypatch.setattr(Dialer, "_open_socket", open_narrow)
        entries = await stage.deliver(
            stage.webhook(listener.getsockname()[1]), events=4, data='{"x":"%s"}' % ("y" * 260_000)
        )
    assert {(entry.result, entry.error) for entry in entries} == {(Result.TIMEOUT, "timed out after 0.4 s (send)")}


async def test_a_flood_of_endless_bodies_stays_within_its_connections(stage: Stage) -> None:
    lie = next(lie for lie in LIES if lie.name == "a body without end")
    host = await stage.host(functools.partial(tell, lie))
    entries = await stage.deliver(stage.webhook(host.port, timeout_s=30.0), events=200)
    assert {entry.result for entry in entries} == {Result.OK}


NOW_AND_THEN = [
    (b"inf", None),
    (b"-inf", None),
    (b"nan", None),
    (b"1e300", None),
    (b"0x10", None),
    (b"-1", None),
    (b"-99999999999999", None),
    (b"1.5", None),
    (b"\xd9\xa1\xd9\xa2", None),  # twelve, in Arabic digits
    (b"", None),
    (b"\x80\xff", None),
    (b"0", 0.0),
    (b"7200", 7200.0),
    (b"99999999999999", RETRY_AFTER_S_MAX),
    (b"9" * 4000, RETRY_AFTER_S_MAX),
    (b"Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    (b"Fri, 31 Dec 9999 23:59:59 GMT", RETRY_AFTER_S_MAX),
    (b"Fri, 31 Dec 9999 23:59:60 GMT", RETRY_AFTER_S_MAX),
    (b"Thu, 99 Foo 0000 99:99:99 GMT", None),
]


@pytest.mark.parametrize(("value", "asked_s"), NOW_AND_THEN, ids=[repr(value[:30]) for value, _ in NOW_AND_THEN])
async def test_retry_after_delays_by_a_day_at_most_and_never_hastens(
    stage: Stage, value: bytes, asked_s: float | None
) -> None:
    async def put_off(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 503 Later\r\nRetry-After: " + value + b"\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    webhook = await stage.against(put_off, schedule_s=(60.0,), timeout_s=10.0)
    entry = await stage.only(webhook)
    assert (entry.state, entry.status) == ("retrying", 503)
    (row,) = stage.shelf.rows.values()
    wait_s = row[7].timestamp() - row[4].timestamp()  # from the event, which is younger than this test
    assert max(60.0, asked_s or 0.0) <= wait_s <= max(60.0, asked_s or 0.0) + 30.0
