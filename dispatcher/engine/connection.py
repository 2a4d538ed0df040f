"""One connection to a subscriber: a request out, a response in, whatever the peer makes of it.

**Rule.** With a connection at hand a request costs one write, one read and two callbacks: no task, no future, no timer.
httptools parses; the few header fields that matter are looked up in the raw head, and only when they matter.

**Rule, at once.** A plain request is written to the socket itself: uvloop's `write` collects what is written and sends
it when the turn of the loop ends, behind all else that the turn has to do. What the socket does not take is the
transport's, and so is all that follows on that connection.

**Rule, the same answer again.** Most answers of an endpoint are the last one with another body of the same length, if
that. An answer that came whole, was a success, was framed by its Content-Length and kept the connection is remembered
by its head. A next one that begins with that head and is as long needs no parser: it would find the same.

**Invariant.** A request given to `send` is settled once: finished, broken, released, or handed back to be sent again
on a fresh connection. Nothing a peer sends raises, or is kept beyond `head_bytes_max` + `body_kept_bytes`.

**Edge.** The status line decides: once a final head is in, a body that runs beyond `response_bytes_max` in all is cut
off with the connection and its status stands. A body that ends too early is a broken response (PROTOCOL) with the
status on record. Nothing is decompressed. Interim (1xx) responses are skipped, up to a number.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import httptools

from dispatcher.core.attempt import Attempt
from dispatcher.engine.dialer import Phase, tls_reason
from dispatcher.model import Result

if TYPE_CHECKING:
    from dispatcher.engine.transport import Origin

HEAD_KEPT_BYTES: Final = 4096  # of a response's head, for the log
HEADERS_MAX: Final = HEAD_KEPT_BYTES // 4  # a header takes 4 bytes at least: only longer heads need counting
INTERIMS_MAX: Final = 16  # 1xx responses before the final one; 100 and 103 once each is what exists

_END: Final = b"\r\n\r\n"
_BY_CLASS: Final = {2: Result.OK, 3: Result.REDIRECT, 4: Result.CLIENT_ERROR, 5: Result.SERVER_ERROR}
_RESULTS: Final = tuple(_BY_CLASS.get(status // 100, Result.PROTOCOL) for status in range(1000))
_OK: Final = Result.OK
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: |\r|$)").match
_write_now: Final = os.write


class Released(Attempt):
    """Not an attempt at all: our shutdown or our fault (descriptors, ports, the proxy), never the endpoint's.

    It is handed to `done` in an Attempt's place and says why in `error`; `sent_at` tells whether bytes had gone out. It
    has no `result`: reading it raises AttributeError, so that nobody counts it against an endpoint by oversight.
    """

    __slots__ = ()

    def __init__(self, error: str, *, sent_at: float = 0.0, duration_s: float = 0.0) -> None:
        super().__init__(Result.CONNECT, error=error, sent_at=sent_at, duration_s=duration_s)
        del self.result

    def __repr__(self) -> str:
        return f"<Released {self.error}>"


Done = Callable[[Any, Attempt], None]
"""Called as done(token, attempt) with what came of a request; an Attempt or a Released. It must not raise."""


class Request:
    """One submission, until `done` was called."""

    __slots__ = ("data", "deadline", "done", "resent", "submitted_at", "token")

    def __init__(self, data: bytes, submitted_at: float, timeout_s: float, done: Done, token: Any) -> None:
        self.data = data
        self.submitted_at = submitted_at
        self.deadline = submitted_at + timeout_s
        self.done = done
        self.token = token
        self.resent = False  # its first connection turned out stale: it waits for a fresh one


class KnownAnswer:
    """An answer that an endpoint has given: what begins with `start` and has `answer_bytes` in all is one more."""

    __slots__ = ("answer_bytes", "head", "result", "retry_after", "start", "status")

    def __init__(self, result: Result, status: int, retry_after: bytes | None, head: bytes, answer_bytes: int) -> None:
        self.result = result
        self.status = status
        self.retry_after = retry_after
        self.head = head  # without its empty line
        self.start = head + _END
        self.answer_bytes = answer_bytes


class Connection:
    """One connection to one origin: idle, or carrying one request.

    An asyncio.Protocol in all but its base class: what has a base that is not compiled with it is compiled poorly.
    Dense on purpose: every delivery runs through `send`, `data_received`, the parser's callbacks and `_finish`. No
    callback takes headers (two objects and a call for each): the few that matter are looked up in the raw head, and
    only when they matter.
    """

    __slots__ = (
        "_body",
        "_body_kept_bytes",
        "_complete",
        "_fd",
        "_feed",
        "_interims",
        "_keep_alive",
        "_origin",
        "_parser",
        "_paused",
        "_raw",
        "_received",
        "_request",
        "_reused",
        "_sent_at",
        "_status",
        "_surplus",
        "_transport",
        "_write",
        "deadline",
    )

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._body_kept_bytes = origin.client.settings.body_kept_bytes
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._write: Callable[[bytes], None] = _write_nothing
        self._request: Request | None = None
        self._reused = False
        self._fd = -1  # of the socket, for as long as nothing waits in the transport's buffer; -1 with TLS
        self._paused = False  # bytes of the request wait in our own buffer
        self._sent_at = 0.0
        self.deadline = math.inf  # of the request; while idle, when to close
        self._reset()

    def _reset(self) -> None:
        """Forget the last response."""
        self._raw = self._body = b""  # of the wire, until the head is complete; of the body, as much as is kept
        self._received = 0  # bytes of this response
        self._interims = 0  # 1xx heads before the final one
        self._status = 0  # the final one, once its head is complete
        self._complete = self._keep_alive = False
        self._surplus = False  # more came than one response

    def __repr__(self) -> str:
        state = "active" if self._request is not None else "idle" if self.is_open else "closed"
        return f"<Connection {self._origin.target.host_header} {state}{', reused' if self._reused else ''}>"

    @property
    def origin(self) -> Origin:
        """Whose it is."""
        return self._origin

    @property
    def is_open(self) -> bool:
        """A request can be written to it."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def is_active(self) -> bool:
        """It carries a request."""
        return self._request is not None

    @property
    def is_idle(self) -> bool:
        """It is in its origin's pool."""
        return self._request is None and self.deadline < math.inf

    # What the origin asks for.

    def send(self, request: Request, now: float) -> None:
        """Write `request`, which is then this connection's to settle. Raises RuntimeError if it is closed already."""
        data, fd = request.data, self._fd
        if fd >= 0 and self.is_open:
            try:
                sent = _write_now(fd, data)
            except OSError:  # full or broken: the transport meets the same and says so
                sent = 0
            if sent < len(data):
                self._fd = -1
                self._write(data[sent:])
        else:
            self._write(data)
        if not self._reused and self.deadline < now + self._origin.keepalive_s:
            self._reused = True  # nobody has used it yet, but it has been idle since an earlier turn
        self._request = request
        self._sent_at = now
        self.deadline = request.deadline

    def expire(self) -> None:
        """The deadline passed: the request's, or that of being idle."""
        request = self._request
        if request is not None:
            self._break(request, Result.TIMEOUT, f"{timed_out(request)} ({self._phase})")
        else:
            self.retire()

    def retire(self) -> None:
        """Close an idle connection: with TLS the peer gets its close_notify, but we do not wait for its own."""
        self._origin.forget(self)
        if self._transport is not None:
            self._transport.close()
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        self.deadline = math.inf
        if self._transport is not None:
            self._transport.abort()

    def release(self, reason: str) -> None:
        """Give the request up, if there is one, for a reason of ours, and close."""
        request, self._request = self._request, None
        self.abort()
        if request is not None:
            self._origin.settle(request, Released(reason, sent_at=self._sent_at))

    # What the event loop says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open: with TLS, verified too."""
        self._transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport, but behave as one
        is_tls = transport.get_extra_info("sslcontext") is not None
        socket = transport.get_extra_info("socket")
        self._fd = -1 if is_tls or socket is None else socket.fileno()
        self._write = transport.write  # type: ignore[attr-defined]
        self._parser = httptools.HttpResponseParser(self)
        self._feed: Callable[[bytes], None] = self._parser.feed_data
        self._origin.client.opened(self)

    def data_received(self, data: bytes) -> None:
        """Parse, finish if complete, else check the bounds."""
        request = self._request
        if request is None:  # nobody asked
            self._origin.forget(self)
            self.abort()
            return
        if not self._received:
            origin = self._origin
            known = origin.known_answer
            if known is not None and len(data) == known.answer_bytes and data.startswith(known.start):
                self._finish_as(known, request, data)
                return
        self._received += len(data)
        if not self._status:
            self._raw = self._raw + data if self._raw else data
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._surplus = True
            if not self._complete:
                self._note_status(is_sound=False)
                self._break(request, Result.PROTOCOL, f"not HTTP/1.1: {error}")
                return
        if self._complete:
            self._finish(request)
        else:
            self._check_bounds(request)

    def eof_received(self) -> None:
        """The peer sends no more, so nothing can come of what we might still send."""
        self._origin.forget(self)
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone: the end of some bodies, of a stale connection, or of all hope for the request."""
        origin, request = self._origin, self._request
        # Parser and connection hold each other, as do the transport and its bound method: part them here, so that
        # nothing of a connection waits for the garbage collector.
        self._parser = self._transport = None
        self._fd = -1
        self._write = self._feed = _write_nothing
        origin.client.lost(self)
        if request is None:
            origin.forget(self)
        elif self._reused and not self._received and not request.resent:
            self._request = None
            origin.resend(request)
        elif exc is None and self._status and not _is_framed(self._head()):
            self._finish(request)
        else:
            self._break(request, *self._loss(exc))

    def pause_writing(self) -> None:
        """More of the request waits than the socket takes."""
        self._paused = True

    def resume_writing(self) -> None:
        """The socket has taken most of it."""
        self._paused = False

    # What the parser says. Interim responses complete too, and so may a second response that nobody asked for.

    def on_message_begin(self) -> None:
        """A first byte; after a complete response, one too many."""
        if self._complete:
            self._surplus = True

    def on_body(self, chunk: bytes) -> None:
        """Keep the beginning."""
        room_bytes = self._body_kept_bytes - len(self._body)
        if room_bytes > 0 and not self._complete:
            self._body += chunk[:room_bytes]

    def on_message_complete(self) -> None:
        """The response is complete, if it is the final one."""
        if self._complete:
            return
        status = self._parser.get_status_code()  # type: ignore[union-attr]
        if 100 <= status < 200 and status != 101:  # which would be final, had anybody asked for another protocol
            self._interims += 1
        else:
            self._status = status
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()  # type: ignore[union-attr]  # only valid in here

    # How a request ends.

    def _finish_as(self, known: KnownAnswer, request: Request, data: bytes) -> None:
        """The response is the known one, but for its body."""
        origin = self._origin
        now = origin.time()
        body = data[len(known.start) :]
        attempt = Attempt(
            known.result, known.status, None, known.retry_after, known.head, body, self._sent_at,
            now - request.submitted_at,
        )  # fmt: skip
        self._request = None
        origin.surprises = 0
        if self._paused:
            self.abort()
        else:
            self._reused = True
            if origin.waiting or origin.closed:
                origin.take_back(self, now)
            else:
                self.deadline = now + origin.keepalive_s
                origin.idle.append(self)
        origin.client.attempts += 1
        request.done(request.token, attempt)

    def _finish(self, request: Request) -> None:
        """The response is in, as far as we read it: judge it, give the connection back, tell."""
        raw = self._raw
        status = self._status
        end = raw.find(_END)
        if 0 < end <= HEAD_KEPT_BYTES and not self._interims and 200 <= status < 600 and raw.startswith(b"HTTP/1."):
            head = raw[:end]
        else:
            head = self._head()
            flaw = self._flaw(head)
            if flaw is not None:
                self._break(request, Result.PROTOCOL, flaw)
                return
            head = head[:HEAD_KEPT_BYTES]
        origin = self._origin
        now = origin.time()
        result = _RESULTS[status]
        retry_after = None if result is _OK else _field(self._head(), b"retry-after")
        attempt = Attempt(
            result, status, None, retry_after, head, self._body, self._sent_at, now - request.submitted_at
        )
        self._request = None
        if self._keep_alive and not self._surplus and not self._paused and self.is_open:
            self._learn_answer(raw, end, attempt)
            self._reused = True
            self._raw = self._body = b""  # as in _reset; what stays is as it was
            self._received = self._interims = self._status = 0
            self._complete = self._keep_alive = False
            if origin.waiting or origin.closed:
                origin.take_back(self, now)
            else:
                self.deadline = now + origin.keepalive_s
                origin.idle.append(self)
        else:
            self.abort()
        origin.client.attempts += 1
        request.done(request.token, attempt)

    def _learn_answer(self, raw: bytes, end: int, attempt: Attempt) -> None:
        """Remember an answer by its head, if a parser would find the same behind that head whatever the body is.

        Where every answer has a head of its own, a request's number in it say, that is given up more and more.
        """
        origin = self._origin
        origin.surprises = count = origin.surprises + 1
        if count & (count - 1):
            return
        # As many bytes behind the head as the body has: nothing else framed it than a length (RFC 9112 §6.3).
        if len(raw) == self._received == end + len(_END) + len(attempt.body) and raw[:end] == attempt.head:
            origin.known_answer = KnownAnswer(
                attempt.result, attempt.status, attempt.retry_after, attempt.head, len(raw)
            )

    def _break(self, request: Request, result: Result, error: str) -> None:
        """The exchange failed: close, tell what there is to tell."""
        self._request = None
        self.abort()
        head = self._head()[:HEAD_KEPT_BYTES]
        attempt = Attempt(result, status=self._status, error=error, head=head, body=self._body, sent_at=self._sent_at)
        self._origin.settle(request, attempt)

    def _check_bounds(self, request: Request) -> None:
        """More is to come: go on reading?"""
        settings = self._origin.client.settings
        if self._interims > INTERIMS_MAX:
            self._break(request, Result.PROTOCOL, f"more than {INTERIMS_MAX} interim responses")
            return
        self._note_status()
        if len(self._raw) > settings.head_bytes_max + len(_END):
            self._break(request, Result.PROTOCOL, f"response head longer than {settings.head_bytes_max} bytes")
        elif self._received > settings.response_bytes_max:
            self._finish(request)  # the status stands; the rest is cut off with the connection

    def _note_status(self, *, is_sound: bool = True) -> None:
        """Take the status as soon as the final head is complete, and then no more of the wire than that head.

        A parser that failed may still have the status of the response before.
        """
        if not self._status:
            head, end, _ = self._after_interims().partition(_END)
            if not end:
                return
            status = self._parser.get_status_code() if is_sound else _status_of(head)  # type: ignore[union-attr]
            if status >= 200:
                self._status = status
                self._raw = head + end
                self._interims = 0

    def _head(self) -> bytes:
        """The raw head of the final response without its empty line; before it is complete, what came so far."""
        return self._after_interims().partition(_END)[0]

    def _after_interims(self) -> bytes:
        """What came of the final response: the parser skips interim ones, and empty lines before any."""
        raw = self._raw.lstrip(b"\r\n")
        for _ in range(self._interims):
            raw = raw.partition(_END)[2].lstrip(b"\r\n")
        return raw

    def _flaw(self, head: bytes) -> str | None:
        """What is wrong with a complete head that the parser let pass."""
        if not head.startswith(b"HTTP/1."):
            return "not HTTP/1.1: another protocol or version"
        if not 200 <= self._status < 600:
            return f"not HTTP/1.1: {self._status} as the final status"
        if self._interims > INTERIMS_MAX:
            return f"more than {INTERIMS_MAX} interim responses"
        settings = self._origin.client.settings
        if len(head) > settings.head_bytes_max:
            return f"response head longer than {settings.head_bytes_max} bytes"
        if head.count(b"\r\n") > HEADERS_MAX:
            return f"more than {HEADERS_MAX} response headers"
        return None

    def _loss(self, exc: Exception | None) -> tuple[Result, str]:
        """What it means that the connection is gone before the response is complete."""
        if self._status:
            return Result.PROTOCOL, "connection closed within the response body"
        if self._received:
            return Result.PROTOCOL, "connection closed within the response head"
        if isinstance(exc, ssl.SSLError):  # a TLS 1.3 peer may say only now what it dislikes about the handshake
            return Result.TLS, tls_reason(exc)
        return Result.CONNECT, "connection closed before any response"

    @property
    def _phase(self) -> Phase:
        if self._status:
            return Phase.BODY
        if not self._received and self._transport is not None and self._transport.get_write_buffer_size():
            return Phase.SEND
        return Phase.HEADERS


def timed_out(request: Request) -> str:
    """What to say of a request whose deadline passed."""
    return f"timed out after {request.deadline - request.submitted_at:g} s"


def _is_framed(head: bytes) -> bool:
    """The body ends by its own length or its last chunk, and not with the connection (RFC 9112 §6.3)."""
    coding = _field(head, b"transfer-encoding")
    if coding is not None:
        return coding.lower().endswith(b"chunked")
    return _field(head, b"content-length") is not None


def _status_of(head: bytes) -> int:
    """What a head's first line says, if that is the line of a response; else 0."""
    found = _STATUS_LINE(head)
    return int(found[1]) if found else 0


def _field(head: bytes, name: bytes) -> bytes | None:
    """The raw value of the first header field called `name` (lower case)."""
    start = head.lower().find(b"\r\n" + name + b":")
    if start < 0:
        return None
    start += len(name) + 3
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else None].strip()


def _write_nothing(_: bytes) -> None:
    raise RuntimeError("the connection is closed")
