"""An answer that looks like the last one is not parsed, and nothing can be told from that."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wire import OK, Wire

HEADS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 201 Made\r\ncontent-length: 2\r\nConnection: close\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 401 Who\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 101 Switching\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n",
    b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n",
    b"HTTP/1.1 200 OK\nContent-Length: 2\n\n",
)
BODIES = (
    b"ok",
    b"no",
    b"",
    b"o",
    b"2\r\nok\r\n0\r\n\r\n",
    b"0\r\n\r\n",
    b"x\r\nok\r\n0\r\n\r\n",
    b"okHTTP/1.1 200 OK\r\n",
    b"ok\r\n\r\n",
    b"\r\n\r\n",
)


def played(conversation: list[tuple[bytes, list[int]]], *, forgets: bool) -> list[object]:
    """What each answer of a conversation came to, on a connection each as long as one lasts."""
    wire = Wire()
    seen: list[object] = []
    for answer, splits in conversation:
        if forgets:
            wire.origin.known_answer = None
        if not wire.is_reusable:
            known = wire.origin.known_answer
            wire = Wire()
            wire.origin.known_answer = known
        wire.came.clear()
        wire.submit()
        cuts = sorted({0, len(answer), *(at % (len(answer) + 1) for at in splits)})
        wire.feed(*(answer[a:b] for a, b in itertools.pairwise(cuts)))
        attempts = [
            (a.result, a.status, a.error, a.retry_after, a.head, a.body, a.sent_at, a.duration_s) for _, a in wire.came
        ]
        seen.append((attempts, wire.is_reusable, wire.pipe.is_closing(), wire.transport.attempts > 0))
    return seen


def conversations(head: bytes) -> st.SearchStrategy[list[tuple[bytes, list[int]]]]:
    """Mostly of answers with one head."""
    heads = st.one_of(st.just(head), st.just(head), st.just(head), st.sampled_from(HEADS))
    answers = st.builds(bytes.__add__, heads, st.sampled_from(BODIES))
    splits = st.one_of(st.just([]), st.just([]), st.lists(st.integers(0, 200), max_size=2))
    return st.lists(st.tuples(answers, splits), min_size=2, max_size=12)


@given(st.sampled_from(HEADS).flatmap(conversations))
@example([(b"\r\n" + OK, []), (OK[:-2] + b"okay", [])])  # as long, and two bytes too many
@example([(OK, []), (OK + b"HTTP/1.1 200 OK\r\n", []), (OK[:-1], [])])
def test_whoever_remembers_answers_sees_what_one_sees_that_parses_them_all(
    conversation: list[tuple[bytes, list[int]]],
) -> None:
    assert played(conversation, forgets=False) == played(conversation, forgets=True)


@pytest.mark.parametrize("answer", [OK, b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nok"])
def test_the_same_answer_is_not_parsed_again(answer: bytes) -> None:
    wire = Wire()
    wire.submit()
    wire.feed(answer)
    first = wire.came[-1][1]
    wire.connection._feed = None  # type: ignore[assignment]
    for body in (b"ok", b"no"):
        wire.submit()
        wire.feed(answer[:-2] + body)
        attempt = wire.came[-1][1]
        assert attempt.body == body
        assert attempt.head == answer[:-6]
        assert (attempt.result, attempt.status, attempt.retry_after) == (first.result, first.status, first.retry_after)
    assert wire.is_reusable
    assert wire.transport.attempts == 3


def test_answers_that_are_all_different_are_remembered_less_and_less() -> None:
    wire = Wire()
    learnt = set()
    for n in range(100):
        wire.submit()
        wire.feed(b"HTTP/1.1 200 OK\r\nX-Request-Id: %d\r\nContent-Length: 0\r\n\r\n" % n)
        assert wire.origin.known_answer is not None
        learnt.add(wire.origin.known_answer.head)
    assert len(learnt) == 7  # the 1st, 2nd, 4th, … 64th
