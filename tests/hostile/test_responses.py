"""Every hostile response on a wire of our own: whole, and one byte at a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from responses import LIES, OK, Lie
from wire import Wire

from dispatcher.engine.transport import TransportSettings
from dispatcher.model import Result

COMPLETE = {Result.OK, Result.REDIRECT, Result.CLIENT_ERROR, Result.SERVER_ERROR}
BOUNDS = TransportSettings()
READ_BYTES_MAX = 70_000  # of one response: the bound, and the read that crosses it
SINGLY_BYTES_MAX = 3000  # longer ones are not split into single bytes


def told(lie: Lie, *, singly: bool, behind: bytes = b"") -> Wire:
    """What a request comes to whose peer tells this, on a connection that had an answer before if one is given."""
    wire = Wire()
    if behind:
        wire.submit()
        wire.feed(behind)
        wire.came.clear()
    wire.submit(timeout_s=5.0)
    for said in lie.says:
        wire.feed(*(said[at : at + 1] for at in range(len(said))) if singly else (said,))
    endless = itertools.repeat(lie.endless) if lie.endless else ()
    for said in itertools.takewhile(lambda _: not wire.came, endless):
        wire.feed(said)
        assert wire.pipe.is_closing() or wire.connection._received <= READ_BYTES_MAX, "it reads on and on"
    if not wire.came and lie.closes:
        wire.end()
    wire.loop.advance(6.0)
    return wire


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_hostile_response_is_an_attempt_with_the_right_result(lie: Lie) -> None:
    for singly in {False, sum(map(len, lie.says)) <= SINGLY_BYTES_MAX}:
        wire = told(lie, singly=singly)
        attempt = wire.attempt
        assert attempt.result is lie.result
        assert lie.status in {None, attempt.status}
        assert (attempt.error is None) == (lie.result in COMPLETE)
        assert lie.words in (attempt.error or "")
        assert lie.body is None or attempt.body == lie.body
        assert len(attempt.head) <= 4096
        assert len(attempt.body) <= BOUNDS.body_kept_bytes


@pytest.mark.parametrize("behind", [OK, b"HTTP/1.1 200 OK\r\nX-Request-Id: 1\r\nContent-Length: 2\r\n\r\nok"])
@pytest.mark.parametrize("lie", [lie for lie in LIES if any(lie.says) or lie.endless], ids=str)
def test_it_is_the_same_on_a_connection_that_had_an_answer_before(lie: Lie, behind: bytes) -> None:
    fresh, used = told(lie, singly=False), told(lie, singly=False, behind=behind)
    seen = [
        (a.result, a.status, a.error, a.head, a.body, wire.origin.idle == [], wire.pipe.is_closing())
        for wire in (fresh, used)
        for a in [wire.attempt]
    ]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie.result not in COMPLETE], ids=str)
def test_the_connection_of_a_liar_is_not_used_again(lie: Lie) -> None:
    wire = told(lie, singly=False)
    assert wire.origin.idle == []
    assert wire.pipe.aborted or lie.closes


def test_a_response_cut_off_anywhere_is_never_taken_for_complete() -> None:
    head_bytes = len(OK) - 2
    for cut in range(len(OK)):
        attempt = told(Lie("cut", (OK[:cut],) if cut else (), Result.PROTOCOL), singly=False).attempt
        if cut == 0:
            assert (attempt.result, attempt.status) == (Result.CONNECT, 0)
        else:
            assert (attempt.result, attempt.status) == (Result.PROTOCOL, 200 if cut >= head_bytes else 0)
        assert attempt.error is not None
        assert "closed" in attempt.error


FRAGMENTS = st.sampled_from(
    [
        OK,
        *(said for lie in LIES for said in lie.says if len(said) < 500),
        *(lie.endless[:200] for lie in LIES if lie.endless),
        b"HTTP/1.1 ",
        b"200 OK\r\n",
        b"503 \r\nRetry-After: 1\r\n",
        b"Content-Length: 2\r\n",
        b"Content-Length: 70000\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"\r\n",
        b"2\r\nok\r\n",
        b"0\r\n\r\n",
        b"zzzzzzzzzz",
    ]
)


@given(
    st.lists(st.tuples(FRAGMENTS | st.binary(max_size=40), st.sampled_from([1, 1, 1, 2, 7000])), max_size=12),
    st.lists(st.integers(1, 400), max_size=30),
    st.booleans(),
)
def test_whatever_a_peer_sends_a_request_ends_once_and_memory_is_bounded(
    fragments: list[tuple[bytes, int]], cuts: list[int], clean: bool
) -> None:
    stream = b"".join(fragment * times for fragment, times in fragments)
    wire = Wire()
    wire.submit()
    at = 0
    for size in [*cuts, *[65_536] * (len(stream) // 65_536 + 1)]:
        wire.feed(*filter(None, [stream[at : at + size]]))
        at += size
        assert wire.pipe.is_closing() or len(wire.connection._raw) <= BOUNDS.head_bytes_max + 4
        assert len(wire.connection._body) <= BOUNDS.body_kept_bytes
    if clean:
        wire.end()
    else:
        wire.lose(ConnectionResetError())
    attempt = wire.attempt
    assert isinstance(attempt.result, Result)
    assert len(attempt.head) <= 4096
    assert len(attempt.body) <= BOUNDS.body_kept_bytes
    assert (attempt.error is None) == (attempt.result in COMPLETE)
    assert wire.origin.idle == []
    assert not wire.transport.connections
