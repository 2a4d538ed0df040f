"""The client against scripted peers: bytes on a wire of our own for what a response may be, sockets for the rest.

What a response may not be, see tests/hostile.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme
import uvloop
from wire import GUARD, OK, REQUEST, TARGET, StillPipe, Wire, answer

from dispatcher.core.addresses import Guard, Target
from dispatcher.core.attempt import Attempt
from dispatcher.engine import transport as module
from dispatcher.engine.connection import Connection, Released, Request
from dispatcher.engine.dialer import DialFailed
from dispatcher.engine.transport import Origin, Transport, TransportSettings
from dispatcher.model import Result


def test_a_complete_response_is_an_attempt() -> None:
    wire = Wire()
    wire.submit("token", timeout_s=5.0)
    wire.loop.now += 0.25
    wire.feed(OK)
    ((token, attempt),) = wire.came
    assert token == "token"
    assert (attempt.result, attempt.status, attempt.error, attempt.retry_after) == (Result.OK, 200, None, None)
    assert (attempt.head, attempt.body) == (b"HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
    assert (attempt.sent_at, attempt.duration_s) == (1000.0, 0.25)
    assert wire.pipe.written == [REQUEST]
    assert wire.is_reusable
    assert wire.transport.attempts == 1


def test_what_the_socket_does_not_take_comes_before_what_follows() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for end in (ours, theirs):
            end.setblocking(False)
        wire = Wire()
        wire.pipe = StillPipe(ours)
        wire.connection = wire.open(wire.origin, wire.pipe)
        wire.submit()
        assert (theirs.recv(1 << 20), wire.pipe.written) == (REQUEST, [])
        wire.feed(OK)
        large = b"POST / HTTP/1.1\r\nContent-Length: 4000000\r\n\r\n" + bytes(range(256)) * 15_625
        wire.origin.submit(large, 30.0, wire.done, None)
        came = b""
        while len(came) < len(large) - len(wire.pipe.written[0]):
            came += theirs.recv(1 << 20)
        wire.feed(OK)  # early: some of the request still waits in the transport
        wire.submit()
        assert 0 < len(came) < len(large)
        assert came + b"".join(wire.pipe.written) == large + REQUEST
        with pytest.raises(BlockingIOError):
            theirs.recv(1)


def test_nothing_is_written_by_the_number_of_a_socket_that_may_be_anothers_by_now() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        wire = Wire()
        pipe = StillPipe(ours)
        connection = wire.open(wire.origin, pipe)
        pipe.abort()
        connection.send(Request(REQUEST, wire.loop.now, 30.0, wire.done, None), wire.loop.now)
        assert pipe.written == [REQUEST]  # the transport's to refuse
        with pytest.raises(BlockingIOError):
            theirs.recv(1)


RESPONSES = [
    (OK, 200, b"ok", True),
    (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    (
        b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: u\r\n\r\n",
        200,
        b"abcde",
        True,
    ),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 E\r\nLink: x\r\n\r\n" + OK, 200, b"ok", True),
    (b"\r\n\r\n" + OK, 200, b"ok", True),
    (b"HTTP/1.0 201 Made\r\nContent-Length: 1\r\n\r\nx", 201, b"x", False),
    (b"HTTP/1.0 201 Made\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nx", 201, b"x", True),
    (b"HTTP/1.1 500 No\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx", 500, b"x", False),
]


@pytest.mark.parametrize(("response", "status", "body", "reusable"), RESPONSES)
def test_a_response_means_the_same_wherever_it_is_split(
    response: bytes, status: int, body: bytes, reusable: bool
) -> None:
    splits: list[list[bytes]] = [[response[:at], response[at:]] for at in range(len(response))]
    splits.append([response[at : at + 1] for at in range(len(response))])
    for chunks in splits:
        wire = answer(*filter(None, chunks))
        assert (wire.attempt.status, wire.attempt.body, wire.is_reusable) == (status, body, reusable)
        assert wire.attempt.head.startswith(b"HTTP/1.")
        assert b"%d" % status in wire.attempt.head[:12]
        assert not wire.attempt.head.endswith(b"\r\n")


def test_a_body_without_length_ends_with_the_connection() -> None:
    for head in (b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"):
        wire = answer(head, b"until ", b"the end")
        assert wire.came == []
        wire.end()
        assert (wire.attempt.result, wire.attempt.body) == (Result.OK, b"until the end")
        assert wire.origin.idle == []


def test_a_body_without_length_cut_off_by_an_error_is_broken() -> None:
    wire = answer(b"HTTP/1.1 200 OK\r\n\r\nhal")
    wire.lose(ConnectionResetError())
    assert (wire.attempt.result, wire.attempt.status) == (Result.PROTOCOL, 200)


def test_chunks_that_end_early_are_broken_whatever_else_the_head_says() -> None:
    wire = answer(b"HTTP/1.1 200 OK\r\nX-Note: \r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\nab")
    wire.end()
    assert (wire.attempt.result, wire.attempt.status, wire.attempt.body) == (Result.PROTOCOL, 200, b"ab")


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (200, Result.OK),
        (299, Result.OK),
        (302, Result.REDIRECT),
        (410, Result.CLIENT_ERROR),
        (503, Result.SERVER_ERROR),
        (600, Result.PROTOCOL),
        (999, Result.PROTOCOL),
    ],
)
def test_the_status_class_is_the_result(status: int, result: Result) -> None:
    wire = answer(b"HTTP/1.1 %d X\r\nLocation: http://elsewhere.test/\r\nContent-Length: 0\r\n\r\n" % status)
    assert (wire.attempt.result, wire.attempt.status) == (result, status)
    assert wire.pipe.written == [REQUEST]


def test_retry_after_is_kept_as_it_came() -> None:
    for line, value in [
        (b"Retry-After: 17\r\n", b"17"),
        (b"retry-AFTER:  Fri, 31 Dec 1999 23:59:59 GMT \r\n", b"Fri, 31 Dec 1999 23:59:59 GMT"),
        (b"Retry-After: 1\r\nRetry-After: 2\r\n", b"1"),
        (b"X-Retry-After: 17\r\n", None),
        (b"X-Note: retry-after: 9\r\n", None),
        (b"X-Long: " + b"y" * 5000 + b"\r\nRetry-After: 3\r\n", b"3"),
    ]:
        wire = answer(b"HTTP/1.1 429 Slow\r\n" + line + b"Content-Length: 0\r\n\r\n")
        assert wire.attempt.retry_after == value


def test_any_bytes_of_a_body_are_kept_up_to_the_limit_and_as_they_came() -> None:
    body = bytes(range(256)) * 40
    head = b"HTTP/1.1 400 No\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    for chunks in ([head + body], [head, body], [head, *(body[at : at + 1000] for at in range(0, len(body), 1000))]):
        wire = answer(*chunks)
        assert wire.attempt.body == body[:4096]
        assert wire.attempt.result is Result.CLIENT_ERROR
        assert wire.is_reusable


def test_of_a_long_head_the_first_4_kib_are_kept() -> None:
    filler = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 100) for number in range(100))
    wire = answer(b"HTTP/1.1 200 OK\r\n" + filler + b"Content-Length: 0\r\n\r\n")
    assert wire.attempt.result is Result.OK
    assert wire.attempt.head == (b"HTTP/1.1 200 OK\r\n" + filler)[:4096]


def test_bytes_on_an_idle_connection_cost_the_connection() -> None:
    wire = answer(OK)
    wire.feed(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert wire.pipe.aborted
    assert wire.origin.idle == []
    wire.lose()
    wire.submit()
    assert len(wire.begun) == 1


def test_an_idle_connection_that_the_peer_closes_is_not_used_again() -> None:
    wire = answer(OK)
    wire.connection.eof_received()
    wire.submit()
    assert wire.pipe.written == [REQUEST]
    assert len(wire.begun) == 1


def test_the_connection_used_last_is_used_next() -> None:
    wire = answer(OK)
    second = StillPipe()
    wire.open(wire.origin, second)
    wire.submit()
    assert (len(wire.pipe.written), len(second.written)) == (1, 1)


def test_an_idle_connection_is_closed_after_its_time_and_the_clock_stops_with_the_last() -> None:
    wire = answer(OK, keepalive_s=60.0)
    wire.loop.advance(59.0)
    assert wire.is_reusable
    wire.loop.advance(1.5)
    assert wire.origin.idle == []
    assert wire.pipe.closed
    wire.lose()
    wire.loop.advance(1.0)
    assert wire.loop.timers == []


def test_of_too_many_idle_connections_the_oldest_are_closed() -> None:
    wire = answer(OK, idle_connections_max=2)
    pipes = [wire.pipe]
    for _ in range(3):
        wire.loop.now += 1.0
        pipes.append(StillPipe())
        wire.open(wire.transport.origin(TARGET), pipes[-1])
    wire.loop.advance(0.1)
    assert [pipe.closed for pipe in pipes] == [True, True, False, False]


def test_active_connections_do_not_count_as_idle() -> None:
    wire = Wire(idle_connections_max=1)
    wire.submit()
    other = StillPipe()
    wire.open(wire.transport.origin(TARGET), other)
    wire.loop.advance(0.2)
    assert not wire.pipe.is_closing()
    assert not other.is_closing()
    assert wire.transport.count_connections() == {"connecting": 0, "active": 1, "idle": 1}


@pytest.mark.parametrize(
    ("unsent_bytes", "chunks", "phase", "status"),
    [
        (100_000, [], "send", 0),
        (0, [], "headers", 0),
        (0, [b"HTTP/1.1 100 Continue\r\n\r\n"], "headers", 0),
        (0, [b"HTTP/1.1 200 OK\r\nContent-Le"], "headers", 0),
        (0, [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe"], "body", 200),
    ],
)
def test_a_timeout_names_its_phase(unsent_bytes: int, chunks: list[bytes], phase: str, status: int) -> None:
    wire = Wire(tick_s=0.1)
    wire.pipe.unsent_bytes = unsent_bytes
    wire.submit(timeout_s=5.0)
    wire.feed(*chunks)
    wire.loop.advance(4.9)
    assert wire.came == []
    wire.loop.advance(0.3)
    assert (wire.attempt.result, wire.attempt.status) == (Result.TIMEOUT, status)
    assert wire.attempt.error == f"timed out after 5 s ({phase})"
    assert 5.0 <= wire.attempt.duration_s <= 5.2
    assert wire.attempt.sent_at == 1000.0
    assert wire.pipe.aborted
    wire.lose()
    assert len(wire.came) == 1


def test_a_slow_drip_does_not_move_the_deadline() -> None:
    wire = Wire()
    wire.submit(timeout_s=5.0)
    wire.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    for _ in range(60):
        wire.feed(b"z")
        wire.loop.advance(0.1)
    assert (wire.attempt.result, wire.attempt.status) == (Result.TIMEOUT, 200)


def test_a_response_before_the_request_is_sent_counts_but_the_connection_is_done() -> None:
    wire = Wire()
    wire.submit()
    wire.connection.pause_writing()
    wire.feed(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
    assert wire.attempt.status == 413
    assert wire.pipe.aborted
    assert wire.origin.idle == []


def test_a_connection_that_took_the_request_late_is_reused() -> None:
    wire = Wire()
    wire.submit()
    wire.connection.pause_writing()
    wire.connection.resume_writing()
    wire.feed(OK)
    assert wire.is_reusable


def test_a_stale_connection_costs_a_dial_and_not_the_attempt() -> None:
    wire = answer(OK)
    wire.submit("second")
    wire.end()
    assert len(wire.came) == 1
    assert len(wire.begun) == 1
    fresh = StillPipe()
    wire.connection = wire.open(wire.origin, fresh)
    wire.pipe = fresh
    assert fresh.written == [REQUEST]
    wire.feed(OK)
    assert [token for token, _ in wire.came] == [None, "second"]
    assert wire.came[1][1].result is Result.OK


def test_a_request_is_sent_a_second_time_at_most() -> None:
    wire = answer(OK)
    wire.submit()
    wire.end()
    fresh = wire.open(wire.origin, StillPipe())
    fresh._reused = True
    fresh.connection_lost(ConnectionResetError())
    wire.loop.turn()
    assert wire.came[1][1].result is Result.CONNECT
    assert len(wire.begun) == 1


def test_a_request_is_not_sent_again_once_a_byte_came_back() -> None:
    wire = answer(OK)
    wire.submit()
    wire.feed(b"H")
    wire.end()
    assert wire.came[1][1].result is Result.PROTOCOL
    assert wire.begun == []


def test_a_fresh_connection_that_dies_is_an_attempt() -> None:
    wire = Wire()
    wire.submit()
    wire.lose(ConnectionResetError())
    assert wire.attempt.result is Result.CONNECT
    assert wire.attempt.error == "connection closed before any response"
    assert wire.begun == []


def test_a_peer_that_asks_for_a_certificate_after_the_handshake_failed_at_tls() -> None:
    alert = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required")
    alert.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    wire = Wire()
    wire.submit()
    wire.lose(alert)
    assert wire.attempt.result is Result.TLS
    assert wire.attempt.error == "TLS: tlsv13 alert certificate required"


def test_a_freed_connection_serves_a_waiting_request_but_not_one_that_needs_a_fresh_one() -> None:
    wire = answer(OK)
    wire.submit("first")
    wire.submit("waits")
    wire.feed(OK)
    assert wire.pipe.written == [REQUEST] * 3
    wire.lose()  # the one that waited was sent on a reused connection: once more
    other = wire.open(wire.transport.origin(TARGET), StillPipe())
    other._reused = True
    other._origin = wire.origin
    wire.origin.take_back(other, wire.loop.now)
    assert not other.is_active
    assert [request.token for request in wire.origin.waiting] == ["waits"]


def test_who_waits_behind_what_is_sent_once_more_gets_the_connection_that_comes_free() -> None:
    wire = answer(OK)
    other = wire.open(wire.origin, StillPipe())
    wire.submit("on the other")
    wire.submit("stale")
    wire.lose()
    wire.submit("waits")
    assert [request.token for request in wire.origin.waiting] == ["stale", "waits"]
    other.data_received(OK)
    assert other.is_active
    assert [request.token for request in wire.origin.waiting] == ["stale"]


def test_a_connection_that_ended_with_its_answer_is_not_given_to_who_waits() -> None:
    wire = answer(OK)
    wire.submit("ends")
    wire.submit("waits")
    wire.feed(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nbye")
    wire.end()
    assert [(token, attempt.result, attempt.body) for token, attempt in wire.came[1:]] == [("ends", Result.OK, b"bye")]
    assert [request.token for request in wire.origin.waiting] == ["waits"]
    assert wire.origin.idle == []


def test_a_connection_nobody_has_used_yet_may_have_been_closed_while_it_was_idle() -> None:
    wire = Wire()
    wire.loop.advance(1.0)
    wire.submit("first")
    wire.lose()
    assert wire.came == []
    assert [request.token for request in wire.origin.waiting] == ["first"]


@pytest.mark.parametrize("comes", ["dialled", "free"])
def test_what_waited_until_it_was_not_ours_to_send_is_given_up(comes: str) -> None:
    wire = answer(OK)
    wire.submit("on its way")
    wire.submit("waits")
    wire.origin.may_send = lambda: False
    if comes == "free":
        wire.feed(OK)
    else:
        other = wire.open(wire.origin, StillPipe())
        assert not other.is_active
    wire.loop.turn()
    token, released = wire.came[-1]
    assert (token, type(released), released.sent_at) == ("waits", Released, 0.0)
    assert not wire.origin.waiting


def test_a_write_to_a_connection_already_gone_dials_instead() -> None:
    wire = answer(OK)

    def refuse(data: bytes) -> None:
        raise RuntimeError("unable to perform operation; the handler is closed")

    wire.connection._write = refuse
    wire.submit("second")
    assert len(wire.begun) == 1
    wire.lose()
    assert [request.token for request in wire.origin.waiting] == ["second"]


def test_done_is_never_called_from_within_submit() -> None:
    wire = Wire()
    wire.origin.close()
    wire.submit()
    assert wire.came == []
    wire.loop.turn()
    assert isinstance(wire.attempt, Released)


def test_done_may_submit_the_next_request() -> None:
    wire = Wire()
    tokens: list[int] = []

    def done(token: int, attempt: Attempt) -> None:
        tokens.append(token)
        if token < 5:
            wire.origin.submit(REQUEST, 5.0, done, token + 1)

    wire.origin.submit(REQUEST, 5.0, done, 0)
    for _ in range(6):
        wire.feed(OK)
    assert tokens == [0, 1, 2, 3, 4, 5]
    assert wire.is_reusable


def test_a_waiting_request_times_out_in_the_phase_of_its_dial() -> None:
    wire = Wire()
    origin = wire.transport.origin(TARGET)
    origin.submit(REQUEST, 2.0, wire.done, None)
    wire.loop.advance(2.2)
    assert (wire.attempt.result, wire.attempt.error) == (Result.TIMEOUT, "timed out after 2 s (connect)")
    assert wire.attempt.sent_at == 0.0


@pytest.mark.interpreted
def test_a_request_without_a_dial_slot_is_released_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIALS_MAX", 1)
    wire = Wire()
    hanging, other = wire.transport.origin(TARGET), wire.transport.origin(TARGET)
    hanging.submit(REQUEST, 9.0, wire.done, None)
    other.submit(REQUEST, 2.0, wire.done, None)
    wire.loop.advance(2.2)
    assert isinstance(wire.attempt, Released)


@pytest.mark.interpreted
def test_one_origin_gets_its_share_of_dials_and_the_rest_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIALS_MAX", 40)
    wire = Wire()
    greedy = wire.transport.origin(TARGET)
    for _ in range(100):
        greedy.submit(REQUEST, 9.0, wire.done, None)
    assert len(greedy.dials) == module.DIALS_PER_ORIGIN_MAX
    others = [wire.transport.origin(TARGET) for _ in range(20)]
    for origin in others:
        for _ in range(10):
            origin.submit(REQUEST, 9.0, wire.done, None)
    assert len(wire.transport._dials) <= 40
    assert all(origin.dials for origin in others)  # each got one, though the first could have had all


def test_where_connections_are_few_the_one_idle_for_longest_makes_room() -> None:
    wire = Wire(connections_max=2)
    pipes = [StillPipe(), StillPipe()]
    wire.lose()
    for pipe in pipes:
        wire.loop.now += 1.0
        wire.open(wire.transport.origin(TARGET), pipe)
    wire.begun.clear()
    wire.transport.origin(TARGET).submit(REQUEST, 9.0, wire.done, None)
    assert wire.begun == []
    assert [pipe.is_closing() for pipe in pipes] == [True, False]
    oldest = next(iter(wire.transport.connections))
    oldest.connection_lost(None)
    assert len(wire.begun) == 1


def test_where_connections_are_few_and_none_is_idle_a_request_waits_for_one_to_close() -> None:
    wire = Wire(connections_max=1)
    wire.submit()
    wire.begun.clear()
    wire.transport.origin(TARGET).submit(REQUEST, 9.0, wire.done, None)
    assert wire.begun == []
    wire.lose()
    assert len(wire.begun) == 1


def test_a_failed_dial_ends_one_request_and_only_if_the_others_do_not_suffice() -> None:
    wire = Wire()
    origin = wire.transport.origin(TARGET)
    origin.submit(REQUEST, 9.0, wire.done, "first")
    origin.submit(REQUEST, 9.0, wire.done, "second")
    spare = origin.dials.pop()
    origin.disappoint(DialFailed(Result.CONNECT, "connection refused"))
    wire.loop.turn()
    assert [(token, attempt.result) for token, attempt in wire.came] == [("first", Result.CONNECT)]
    origin.dials.append(spare)
    origin.disappoint(DialFailed(Result.CONNECT, "connection refused"))
    wire.loop.turn()
    assert len(wire.came) == 1
    assert [request.token for request in origin.waiting] == ["second"]


def test_a_dial_that_fails_for_reasons_of_ours_releases(caplog: pytest.LogCaptureFixture) -> None:
    wire = Wire()
    for failure in (DialFailed(None, "too many open files"), KeyError("a bug")):
        origin = wire.transport.origin(TARGET)
        origin.submit(REQUEST, 9.0, wire.done, None)
        origin.dials.clear()
        origin.disappoint(failure)
    wire.loop.turn()
    assert [type(attempt) for _, attempt in wire.came] == [Released, Released]
    assert wire.came[0][1].error == "too many open files"
    assert "unforeseen" in caplog.text
    assert wire.transport.attempts == 0


def test_a_released_request_has_no_result_to_count() -> None:
    released = Released("shutdown", sent_at=3.0)
    with pytest.raises(AttributeError):
        _ = released.result
    assert repr(released) == "<Released shutdown>"
    assert released.sent_at == 3.0


def test_nothing_of_a_lost_connection_waits_for_the_collector() -> None:
    def alive() -> int:
        return sum(isinstance(thing, Connection) for thing in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()
    try:
        wire = answer(OK)
        wire.submit()
        wire.feed(b"HTTP/1.1 200")
        wire.lose()
        del wire.connection
        assert alive() == before
    finally:
        gc.enable()


def test_an_idle_connection_keeps_nothing_of_the_last_response() -> None:
    wire = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n" + b"z" * 50_000)
    assert wire.is_reusable
    assert (wire.connection._raw, wire.connection._body) == (b"", b"")


def test_while_a_body_drips_only_the_head_is_kept() -> None:
    wire = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + b"z" * 50_000)
    assert len(wire.connection._raw) < 100
    assert len(wire.connection._body) == 4096


def test_things_say_what_they_are() -> None:
    wire = answer(OK)
    assert repr(wire.connection) == "<Connection 127.0.0.1:9 idle, reused>"
    assert repr(wire.origin) == "<Origin http://127.0.0.1:9 1 idle, 0 waiting, 0 dialling>"
    assert repr(wire.transport) == "<Transport 1 origins, 0 connecting, 0 active, 1 idle>"


# Sockets, on both event loops.


def on_both_loops(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[Callable[[], Any]], None]:
    """Run a test on uvloop, which production uses, and on asyncio's own loop. Unhandled errors fail it."""

    async def watched() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        await test()
        gc.collect()
        await asyncio.sleep(0)
        assert complaints == []

    @pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
    def run(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(watched())

    run.__name__ = test.__name__
    return run


class Peer(asyncio.Protocol):
    """The receiver's end of one connection."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.server.peers.append(self)
        self.server.note()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.request_end()) is not None:
            self.server.requests.append(self.buffer[:end])
            self.buffer = self.buffer[end:]
            self.server.answer(self)
        self.server.note()

    def request_end(self) -> int | None:
        head, blank, _ = self.buffer.partition(b"\r\n\r\n")
        if not blank:
            return None
        end = len(head) + 4 + int(head.rpartition(b"Content-Length: ")[2])
        return end if len(self.buffer) >= end else None

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.lost += 1
        self.server.note()

    def say(self, data: bytes) -> None:
        self.transport.write(data)

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Server:
    """A receiver that does what its script says, and remembers what came."""

    def __init__(self, script: Callable[[Peer], None]) -> None:
        self.answer = script
        self.peers: list[Peer] = []
        self.requests: list[bytes] = []
        self.lost = 0
        self.port = 0
        self._changed = asyncio.Event()

    def note(self) -> None:
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def target(self, scheme: str = "http", host: str = "127.0.0.1") -> Target:
        return GUARD.check_url(f"{scheme}://{host}:{self.port}/hook")


@asynccontextmanager
async def serving(script: Callable[[Peer], None], **options: Any) -> AsyncIterator[Server]:
    server = Server(script)
    listener = await asyncio.get_running_loop().create_server(lambda: Peer(server), "127.0.0.1", 0, **options)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for peer in server.peers:
            peer.transport.abort()
        await asyncio.sleep(0)


@asynccontextmanager
async def sending(**settings: Any) -> AsyncIterator[Transport]:
    """A transport that must leave nothing behind."""
    transport = Transport(settings=TransportSettings(**{"tick_s": 0.02, **settings}), guard=GUARD)
    try:
        yield transport
    finally:
        await transport.close()
        assert not transport.connections
        assert transport._dials == {}
        assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


class Outcome:
    """What one submission came to."""

    def __init__(self, origin: Origin, request: bytes = REQUEST, timeout_s: float = 10.0) -> None:
        self._future: asyncio.Future[Attempt] = asyncio.get_running_loop().create_future()
        origin.submit(request, timeout_s, self.done, self)

    def done(self, token: Any, attempt: Attempt) -> None:
        assert token is self
        self._future.set_result(attempt)  # which raises if called twice

    @property
    def is_known(self) -> bool:
        return self._future.done()

    def __await__(self) -> Generator[Any, None, Attempt]:
        return self._future.__await__()


def say_ok(peer: Peer) -> None:
    peer.say(OK)


@on_both_loops
async def test_requests_in_a_row_share_a_connection_and_arrive_as_they_are() -> None:
    async with serving(say_ok) as server, sending() as transport:
        origin = transport.origin(server.target())
        attempts = [await Outcome(origin) for _ in range(5)]
        assert [attempt.result for attempt in attempts] == [Result.OK] * 5
        assert all(attempt.sent_at > 0 for attempt in attempts)
        assert server.requests == [REQUEST] * 5
        assert len(server.peers) == 1
        assert transport.attempts == 5
        assert transport.count_connections() == {"connecting": 0, "active": 0, "idle": 1}


@on_both_loops
async def test_requests_at_once_get_a_connection_each_and_origins_share_none() -> None:
    async with serving(lambda peer: None) as server, sending() as transport:
        origins = [transport.origin(server.target()) for _ in range(2)]
        outcomes = [Outcome(origin) for origin in origins for _ in range(4)]
        await server.until(lambda: len(server.requests) == 8)
        assert len(server.peers) == 8
        assert transport.count_connections() == {"connecting": 0, "active": 8, "idle": 0}
        for peer in server.peers:
            peer.say(OK)
        for outcome in outcomes:
            assert (await outcome).result is Result.OK
        assert [len(origin.idle) for origin in origins] == [4, 4]


@on_both_loops
async def test_a_connection_closed_while_idle_costs_nothing() -> None:
    async with serving(say_ok) as server, sending() as transport:
        origin = transport.origin(server.target())
        await Outcome(origin)
        server.peers[0].transport.close()
        await server.until(lambda: server.lost == 1)
        assert (await Outcome(origin)).result is Result.OK
        assert len(server.peers) == 2


@on_both_loops
async def test_a_connection_closed_just_as_it_is_reused_costs_nothing() -> None:
    def script(peer: Peer) -> None:
        if len(server.requests) == 2:
            peer.reset()
        else:
            peer.say(OK)

    async with serving(script) as server, sending() as transport:
        origin = transport.origin(server.target())
        assert (await Outcome(origin)).result is Result.OK
        assert (await Outcome(origin)).result is Result.OK
        assert len(server.requests) == 3
        assert len(server.peers) == 2
        assert transport.attempts == 2


@on_both_loops
async def test_a_peer_that_always_closes_gets_a_request_twice_at_most() -> None:
    def script(peer: Peer) -> None:
        if len(server.requests) == 1:
            peer.say(OK)
        else:
            peer.transport.close()

    async with serving(script) as server, sending() as transport:
        origin = transport.origin(server.target())
        await Outcome(origin)
        attempt = await Outcome(origin)
        assert attempt.result is Result.CONNECT
        assert len(server.requests) == 3


@on_both_loops
async def test_a_peer_that_closes_at_once_is_an_attempt() -> None:
    for close in (Peer.reset, lambda peer: peer.transport.close()):
        async with serving(close) as server, sending() as transport:
            attempt = await Outcome(transport.origin(server.target()))
            assert attempt.result is Result.CONNECT
            assert attempt.sent_at > 0
            assert len(server.requests) == 1


@on_both_loops
async def test_a_large_request_waits_for_a_slow_reader() -> None:
    body = bytes(range(256)) * 4096
    request = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with serving(say_ok) as server, sending() as transport:
        origin = transport.origin(server.target())
        await Outcome(origin)
        server.peers[0].transport.pause_reading()
        outcome = Outcome(origin, request)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not outcome.is_known
        assert origin.idle == []
        server.peers[0].transport.resume_reading()
        assert (await outcome).result is Result.OK
        assert server.requests == [REQUEST, request]
        assert (await Outcome(origin)).result is Result.OK
        assert len(server.peers) == 1


@on_both_loops
async def test_an_early_refusal_of_a_large_request_is_its_response() -> None:
    request = b"POST / HTTP/1.1\r\nContent-Length: 16000000\r\n\r\n" + bytes(16_000_000)
    async with serving(say_ok) as server, sending() as transport:
        origin = transport.origin(server.target())
        await Outcome(origin)
        server.peers[0].transport.pause_reading()
        outcome = Outcome(origin, request)
        server.peers[0].say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        assert (await outcome).status == 413
        assert origin.idle == []


@on_both_loops
async def test_nobody_there_is_a_failed_connect() -> None:
    async with serving(say_ok) as server:
        target = server.target()
    async with sending() as transport:
        attempt = await Outcome(transport.origin(target))
        assert (attempt.result, attempt.error, attempt.sent_at) == (Result.CONNECT, "connection refused", 0.0)


AUTHORITY = trustme.CA()


@asynccontextmanager
async def secured(script: Callable[[Peer], None], **settings: Any) -> AsyncIterator[tuple[Server, Transport]]:
    """A receiver and a transport that trusts it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("127.0.0.1").configure_cert(context)
    with AUTHORITY.cert_pem.tempfile() as ca_file:
        async with serving(script, ssl=context) as server, sending(ca_file=ca_file, **settings) as transport:
            yield server, transport


@on_both_loops
async def test_over_tls_all_is_the_same() -> None:
    body = bytes(range(256)) * 4096
    large = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with secured(say_ok) as (server, transport):
        origin = transport.origin(server.target("https"))
        for request in (REQUEST, large, REQUEST):
            assert (await Outcome(origin, request)).result is Result.OK
        assert server.requests == [REQUEST, large, REQUEST]
        assert len(server.peers) == 1
        server.peers[0].transport.close()
        await server.until(lambda: server.lost == 1)
        assert (await Outcome(origin)).result is Result.OK


@on_both_loops
async def test_a_body_that_ends_with_the_connection_is_complete() -> None:
    def close(peer: Peer) -> None:
        peer.say(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
        peer.transport.close()

    async with serving(close) as server, sending() as transport:
        attempt = await Outcome(transport.origin(server.target()))
        assert (attempt.result, attempt.body) == (Result.OK, b"until the end")
    async with secured(close) as (server, transport):
        attempt = await Outcome(transport.origin(server.target("https")))
        assert (attempt.result, attempt.body) == (Result.OK, b"until the end")


@on_both_loops
async def test_over_tls_a_body_may_end_without_a_close_notify() -> None:
    def cut(peer: Peer) -> None:
        peer.say(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
        peer.transport.abort()

    async with secured(cut) as (server, transport):
        attempt = await Outcome(transport.origin(server.target("https")))
        assert (attempt.result, attempt.body) == (Result.OK, b"until the end")


@on_both_loops
async def test_an_idle_tls_connection_is_closed_after_its_time() -> None:
    async with secured(say_ok, keepalive_s=0.05) as (server, transport):
        await Outcome(transport.origin(server.target("https")))
        await server.until(lambda: server.lost == 1)
        assert not transport.connections


@on_both_loops
async def test_a_handshake_without_end_is_a_timeout() -> None:
    async with serving(lambda peer: None) as server, sending() as transport:
        attempt = await Outcome(transport.origin(server.target("https")), timeout_s=0.1)
        assert (attempt.result, attempt.error) == (Result.TIMEOUT, "timed out after 0.1 s (tls)")
        await server.until(lambda: server.lost == 1)


@on_both_loops
async def test_a_silent_peer_is_a_timeout() -> None:
    async with serving(lambda peer: None) as server, sending() as transport:
        attempt = await Outcome(transport.origin(server.target()), timeout_s=0.1)
        assert (attempt.result, attempt.error) == (Result.TIMEOUT, "timed out after 0.1 s (headers)")
        await server.until(lambda: server.lost == 1)


class Stuck:
    """A resolver that never answers."""

    async def resolve(self, host: str) -> Sequence[str]:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def close(self) -> None:
        pass


@on_both_loops
async def test_the_deadline_covers_the_resolver() -> None:
    async with sending() as transport:
        transport._dialer._resolver = Stuck()
        origin = transport.origin(GUARD.check_url("http://receiver.test/"))
        outcomes = [Outcome(origin, timeout_s=0.1) for _ in range(12)]
        for outcome in outcomes:
            attempt = await outcome
            assert (attempt.result, attempt.error) == (Result.TIMEOUT, "timed out after 0.1 s (dns)")


@on_both_loops
async def test_a_request_waiting_for_a_dial_takes_the_connection_that_is_free_first() -> None:
    async with serving(lambda peer: None) as server, sending() as transport:
        origin = transport.origin(server.target())
        first = Outcome(origin)
        await server.until(lambda: len(server.requests) == 1)

        async def never(*args: Any) -> Connection:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        transport._dialer.dial = never  # type: ignore[method-assign,assignment]
        second = Outcome(origin)
        server.peers[0].say(OK)
        await first
        await server.until(lambda: len(server.requests) == 2)
        server.peers[0].say(OK)
        assert (await second).result is Result.OK
        assert len(origin.dials) == 1


@on_both_loops
async def test_a_closed_origin_finishes_what_is_active_and_takes_no_more() -> None:
    async with serving(lambda peer: None) as server, sending() as transport:
        origin = transport.origin(server.target())
        idle, active = Outcome(origin), Outcome(origin)
        await server.until(lambda: len(server.requests) == 2)
        server.peers[0].say(OK)
        while not (idle.is_known or active.is_known):
            await asyncio.sleep(0)
        origin.close()
        await server.until(lambda: server.lost == 1)
        refused = await Outcome(origin)
        assert isinstance(refused, Released)
        server.peers[1].say(OK)
        assert (await idle).result is Result.OK
        assert (await active).result is Result.OK
        await server.until(lambda: server.lost == 2)
        assert not transport.connections


@on_both_loops
async def test_closing_ends_every_request_exactly_once() -> None:
    async with serving(lambda peer: None) as server:
        transport = Transport(settings=TransportSettings(), guard=GUARD)
        answered = transport.origin(server.target())
        served = Outcome(answered)
        await server.until(lambda: len(server.requests) == 1)
        server.peers[0].say(OK)
        await served
        active = [Outcome(transport.origin(server.target())) for _ in range(5)]
        await server.until(lambda: len(server.requests) == 6)
        connecting = [Outcome(transport.origin(server.target())) for _ in range(5)]
        transport._dialer._resolver = Stuck()
        stuck = transport.origin(GUARD.check_url("http://receiver.test/"))
        resolving = [Outcome(stuck) for _ in range(20)]
        await asyncio.gather(transport.close(), transport.close())
        late = Outcome(answered)
        await transport.close()
        for outcome in [*active, *connecting, *resolving, late]:
            assert isinstance(await outcome, Released)
        assert transport.attempts == 1
        assert not transport.connections
        assert [attempt.sent_at > 0 for attempt in [await outcome for outcome in active]] == [True] * 5
        await server.until(lambda: server.lost == len(server.peers))


@on_both_loops
async def test_draining_waits_for_what_is_out() -> None:
    async with serving(lambda peer: None) as server, sending() as transport:
        outcome = Outcome(transport.origin(server.target()))
        await server.until(lambda: len(server.requests) == 1)
        closing = asyncio.create_task(transport.close(drain_s=10.0))
        await asyncio.sleep(0)
        assert not outcome.is_known
        server.peers[0].say(OK)
        await closing
        assert (await outcome).result is Result.OK


@on_both_loops
async def test_a_lack_of_descriptors_is_our_fault() -> None:
    async with serving(say_ok) as server, sending() as transport:
        origin = transport.origin(server.target())
        opens = transport._dialer._open_socket

        def exhausted(info: Any) -> socket.socket:
            raise OSError(errno.EMFILE, "too many open files")

        transport._dialer._open_socket = exhausted  # type: ignore[method-assign]
        released = await Outcome(origin)
        assert isinstance(released, Released)
        assert released.error == "too many open files"
        transport._dialer._open_socket = opens  # type: ignore[method-assign]
        assert (await Outcome(origin)).result is Result.OK
        assert transport.attempts == 1


@on_both_loops
async def test_a_refused_address_is_blocked() -> None:
    async with sending() as transport:
        attempt = await Outcome(transport.origin(Guard(allow=["0.0.0.0/0"]).check_url("https://10.0.0.1/")))
        assert attempt.result is Result.BLOCKED
        assert attempt.error is not None
        assert "private" in attempt.error


@on_both_loops
async def test_many_requests_from_callbacks_all_end() -> None:
    async with serving(say_ok) as server, sending() as transport:
        origins = [transport.origin(server.target()) for _ in range(10)]
        ended = asyncio.Event()
        results: list[Result] = []

        def done(origin: Origin, attempt: Attempt) -> None:
            results.append(attempt.result)
            if len(results) < 500:
                origin.submit(REQUEST, 10.0, done, origin)
            elif len(results) == 539:
                ended.set()

        for origin in origins * 4:
            origin.submit(REQUEST, 10.0, done, origin)
        await ended.wait()
        assert results == [Result.OK] * 539
        assert len(server.peers) <= 40
