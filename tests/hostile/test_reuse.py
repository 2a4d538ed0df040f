"""Conversations on connections that are used again: every attempt carries the answer to its own request, and one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st
from wire import StillPipe, Wire

from dispatcher.core.attempt import Attempt
from dispatcher.engine.connection import Connection

AT_ONCE: Final = 3
READ: Final = 70_000  # of one response: the bound, and the read that crosses it
LARGE: Final = b"y" * (READ + 10)


def _head(token: int, *fields: bytes, status: bytes = b"200 OK", version: bytes = b"1.1") -> bytes:
    return b"\r\n".join([b"HTTP/%s %s" % (version, status), b"X-Token: %d" % token, *fields, b"", b""])


# What a peer says, and whether it closes behind it.
ANSWERS: Final[dict[str, Callable[[int], tuple[bytes, bool]]]] = {
    "by its length": lambda token: (_head(token, b"Content-Length: 3") + b"abc", False),
    "with a head like all others": lambda token: (
        b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\nX-Token: %07d" % token,
        False,
    ),
    "an error": lambda token: (_head(token, b"Content-Length: 2", status=b"503 Busy") + b"no", False),
    "no content": lambda token: (_head(token, status=b"204 None"), False),
    "in chunks": lambda token: (_head(token, b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n", False),
    "with trailers": lambda token: (
        _head(token, b"Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\nX-T: 1\r\n\r\n",
        False,
    ),
    "large": lambda token: (_head(token, b"Content-Length: %d" % len(LARGE)) + LARGE, False),
    "large in chunks": lambda token: (
        _head(token, b"Transfer-Encoding: chunked") + b"%x\r\n" % len(LARGE) + LARGE + b"\r\n0\r\n\r\n",
        False,
    ),
    "large, another answer within": lambda token: (
        _head(token, b"Content-Length: %d" % (2 * len(LARGE))) + LARGE + b"HTTP/1.1 200 OK\r\nX-Token: 9999\r\n\r\n",
        False,
    ),
    "until it closes": lambda token: (_head(token) + b"bye", True),
    "until it closes, which it says": lambda token: (_head(token, b"Connection: close") + b"bye", True),
    "and closes": lambda token: (_head(token, b"Connection: close", b"Content-Length: 2") + b"ok", True),
    "of HTTP/1.0": lambda token: (
        _head(token, b"Connection: keep-alive", b"Content-Length: 1", version=b"1.0") + b"q",
        False,
    ),
    "behind an interim one": lambda token: (
        b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + _head(token, b"Content-Length: 3") + b"abc",
        False,
    ),
    "twice": lambda token: ((_head(token, b"Content-Length: 3") + b"abc") * 2, False),
    "half": lambda token: (_head(token, b"Content-Length: 30") + b"abc", True),
    "with a head too long": lambda token: (_head(token, b"X: " + b"a" * 40_000), False),
    "not HTTP": lambda token: (b"SSH-2.0-X-Token: %d\r\n\r\n" % token, False),
    "not at all": lambda token: (b"", True),
}


class Peer:
    """The other end of every connection of one origin."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.wire.pipe.abort()
        self.wire.connection.connection_lost(None)
        self.open: list[tuple[Connection, StillPipe]] = []
        self.unsaid: dict[Connection, bytes] = {}  # of the answer before: on its way still
        self.asked: Counter[int] = Counter()
        self.came: list[tuple[int, Attempt]] = []

    def submit(self, token: int) -> None:
        request = b"POST / HTTP/1.1\r\nHost: receiver.test\r\nX-Token: %d\r\nContent-Length: 2\r\n\r\n{}" % token
        self.wire.origin.submit(request, 30.0, self.done, token)

    def done(self, token: Any, attempt: Attempt) -> None:
        self.came.append((token, attempt))

    def connect(self) -> None:
        """Let every dial come to a connection, as far as somebody waits."""
        while self.wire.origin.waiting:
            pipe = StillPipe()
            self.open.append((self.wire.open(self.wire.origin, pipe), pipe))

    def answer(self, kind: str, cut: int) -> None:
        """Answer whatever request is out on the oldest connection that has one."""
        for connection, pipe in self.open:
            if pipe.written and not pipe.is_closing():
                token = int(re.search(rb"X-Token: ([0-9]+)", pipe.written.pop())[1])  # type: ignore[index]
                self.asked[token] += 1
                said, closes = ANSWERS[kind](token)
                for part in (self.unsaid.pop(connection, b""), said[:cut], said[cut:READ]):
                    if part and not pipe.is_closing():
                        connection.data_received(part)
                if said[READ:]:
                    self.unsaid[connection] = said[READ:]
                if closes and not pipe.is_closing():
                    connection.eof_received()
                break
        self.settle()

    def settle(self) -> None:
        """The loop's next turn: what was closed is lost."""
        self.wire.loop.turn()
        lost = [connection for connection, pipe in self.open if pipe.is_closing()]
        self.open = [each for each in self.open if each[0] not in lost]
        for connection in lost:
            connection.connection_lost(None)
        self.wire.loop.turn()
        self.connect()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(ANSWERS)), st.integers(0, 120)), min_size=1, max_size=40))
def test_every_attempt_carries_the_answer_to_its_own_request(conversation: list[tuple[str, int]]) -> None:
    peer, submitted = Peer(), 0
    answers = iter(conversation)
    while len(peer.came) < len(conversation):
        while submitted < min(len(conversation), len(peer.came) + AT_ONCE):
            peer.submit(submitted)
            submitted += 1
        before = len(peer.came), sum(peer.asked.values())
        peer.connect()
        peer.answer(*next(answers, ("by its length", 0)))
        assert (len(peer.came), sum(peer.asked.values())) > before, "nothing happens any more"
    assert Counter(token for token, _ in peer.came) == Counter(range(len(conversation))), "done is called once for each"
    for token, attempt in peer.came:
        named = re.search(rb"X-Token: 0*([0-9]+)", attempt.head + attempt.body)
        assert attempt.error is not None or (named is not None and int(named[1]) == token), attempt
    assert max(peer.asked.values()) <= 2, "a request goes out once more at most"
