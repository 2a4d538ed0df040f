"""The HTTP/1.1 client: POSTs to subscribers, many at once, and tells for each what came of it.

**Problem.** A general client spends 60–150 µs of CPU on a request that the network does in 6: pools shared by all
hosts, a task, a future and a timer per request, header objects nobody reads. And it trusts its peer, which here is
anybody's handler: it hangs, lies about lengths, answers a megabyte, never stops sending headers.

**Rule.** One pool per endpoint, a stack, so that the connections least used are those that expire. A request takes an
idle connection or a new one is dialled; nobody waits for a free one, since the lanes bound how many requests are out.
Where there are fewer descriptors than endpoints, the connection idle for longest is closed for the new one.
With an idle connection a request costs one write, one read and two callbacks: no task, no future, no timer. One
deadline covers everything from submission to the last byte; a sweep over all connections enforces it every `tick_s`,
and the same sweep expires idle connections and holds their number down.

A reused connection that closes before it answers was most likely closed while idle: its request goes out once more,
at once, on a fresh one. Never after a byte came back, never twice (RFC 9110 §9.2.2 lets no client repeat a POST on its
own otherwise; here the receiver knows event ids, and delivery is at least once).

**Invariant.** `done` is called exactly once per `submit`, never from within it, whatever the peer, the resolver or
`close` do; and nothing a peer sends raises, or is kept beyond `head_bytes_max` + `body_kept_bytes`.

**Edge.** The status line decides: once a final head is in, a body that runs beyond `response_bytes_max` in all is cut
off with the connection and its status stands. A body that ends too early is a broken response (PROTOCOL) with the
status on record. Nothing is decompressed. Interim (1xx) responses are skipped, up to a number.

Our own faults are no attempts: see `Released`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import heapq
import logging
import math
import ssl
from collections.abc import Callable, Set
from operator import attrgetter
from typing import Any, Final

import httptools

from dispatcher.core.addresses import Guard, Target
from dispatcher.engine.dialer import Dialer, DialFailed, DnsResolver, Phase, Resolver, tls_reason
from dispatcher.model import Attempt, Result

log = logging.getLogger(__name__)

HEAD_KEPT_BYTES: Final = 4096  # of a response's head, for the log
HEADERS_MAX: Final = HEAD_KEPT_BYTES // 4  # a header takes 4 bytes at least: only longer heads need counting
CLOSE_S: Final = 5.0  # what aborted connections get to be gone; the event loop takes one turn
INTERIMS_MAX: Final = 16  # 1xx responses before the final one; 100 and 103 once each is what exists

# A dial holds a descriptor, a task and, in the handshake, ≈ 100 KiB and 0.5 ms of CPU: all of them, ≈ 100 MiB.
# A dial that hangs costs little but its slot, so there are as many slots as half of all requests in flight by default:
# hosts that hang in droves meet their lanes' windows and that limit first.
DIALS_MAX: Final = 1024
# Of these for one endpoint: half its default concurrency, because a request freed meanwhile serves a second one sooner
# than a second handshake does. When half of all are taken, most of them hang, and everybody gets one.
DIALS_PER_ORIGIN_MAX: Final = 8

_END: Final = b"\r\n\r\n"
_BY_CLASS: Final = {2: Result.OK, 3: Result.REDIRECT, 4: Result.CLIENT_ERROR, 5: Result.SERVER_ERROR}
_RESULTS: Final = tuple(_BY_CLASS.get(status // 100, Result.PROTOCOL) for status in range(1000))
_OK: Final = Result.OK
_deadline: Final = attrgetter("deadline")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """Bounds and routes of the client. Sizes in bytes, times in seconds."""

    keepalive_s: float = 60.0  # an idle connection is closed after that
    idle_connections_max: int = 1000  # over all endpoints: 50 MiB if all are TLS (50 KiB each, a plain one 2.3)
    connections_max: int = 10_000  # idle, active and being dialled: a descriptor each, and there may be few
    response_bytes_max: int = 65_536  # read of one response, head included, give or take the last read
    body_kept_bytes: int = 4096
    head_bytes_max: int = 32_768  # interim responses included
    tick_s: float = 0.1  # how late a deadline may be noticed
    ca_file: str | None = None  # instead of the system's trust store
    proxy: str | None = None  # http:// or https://, asked to CONNECT
    source_address: str | None = None  # local address to connect from


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


class Connection(asyncio.Protocol):
    """One connection to one origin: idle, or carrying one request.

    Dense on purpose: every delivery runs through `send`, `data_received`, the parser's callbacks and `_finish`. No
    callback takes headers (two objects and a call for each): the few that matter are looked up in the raw head, and
    only when they matter.
    """

    __slots__ = (
        "_body",
        "_body_kept_bytes",
        "_complete",
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
        self._write(request.data)
        self._request = request
        self._sent_at = now
        self.deadline = request.deadline

    def expire(self) -> None:
        """The deadline passed: the request's, or that of being idle."""
        request = self._request
        if request is not None:
            self._break(request, Result.TIMEOUT, f"{_timed_out(request)} ({self._phase})")
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
        self._received += len(data)
        if not self._status:
            self._raw = self._raw + data if self._raw else data
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._surplus = True
            if not self._complete:
                self._note_status()
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
        if self._keep_alive and not self._surplus and not self._paused:
            self._reused = True
            self._raw = self._body = b""  # as in _reset; what stays is as it was
            self._received = self._interims = self._status = 0
            self._complete = False
            if origin.waiting or origin.closed:
                origin.take_back(self, now)
            else:
                self.deadline = now + origin.keepalive_s
                origin.idle.append(self)
        else:
            self.abort()
        origin.client.attempts += 1
        request.done(request.token, attempt)

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

    def _note_status(self) -> None:
        """Take the status as soon as the final head is complete, and then no more of the wire than that head."""
        if not self._status:
            head, end, _ = self._after_interims().partition(_END)
            if end and (status := self._parser.get_status_code()) >= 200:  # type: ignore[union-attr]
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


class Dial:
    """A connection in the making, for one origin."""

    __slots__ = ("deadline", "phase", "task")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline  # of the request that it was begun for
        self.phase = Phase.DNS
        self.task: asyncio.Task[Connection] | None = None

    def __repr__(self) -> str:
        return f"<Dial {self.phase}>"

    def enter(self, phase: Phase) -> None:
        """Note how far it has come."""
        self.phase = phase

    def cancel(self) -> None:
        """Give up."""
        if self.task is not None:
            self.task.cancel()


class Origin:
    """Where one endpoint's requests go: its pool, its dials, and the requests that wait for a connection.

    Requests and dials are not tied to each other: whatever connection comes first takes the oldest request.
    """

    __slots__ = ("client", "closed", "dials", "idle", "keepalive_s", "queued", "target", "time", "waiting")

    def __init__(self, client: Transport, target: Target) -> None:
        self.client = client
        self.time = client.time
        self.keepalive_s = client.settings.keepalive_s
        self.target = target
        self.idle: list[Connection] = []  # the one used last is used next
        self.waiting: collections.deque[Request] = collections.deque()
        self.dials: list[Dial] = []  # oldest first
        self.queued = False  # for a dial
        self.closed = False

    def __repr__(self) -> str:
        counts = f"{len(self.idle)} idle, {len(self.waiting)} waiting, {len(self.dials)} dialling"
        return f"<Origin {self.target.scheme}://{self.target.host_header} {counts}{', closed' if self.closed else ''}>"

    def submit(self, request: bytes, timeout_s: float, done: Done, token: Any) -> None:
        """Send `request` (head and body) and call `done(token, attempt)` once, later, within about `timeout_s`."""
        now = self.time()
        submission = Request(request, now, timeout_s, done, token)
        if self.idle:
            try:
                self.idle.pop().send(submission, now)
            except RuntimeError:
                pass  # closed within this turn of the loop; nothing was written
            else:
                return
        self._wait(submission)

    def close(self) -> None:
        """The endpoint is gone, or its URL is another: close what is idle now, and what is active when it is done."""
        self.closed = True
        self.client.origins.pop(self, None)
        for connection in list(self.idle):
            connection.retire()
        for dial in self.dials[len(self.waiting) :]:
            dial.cancel()

    # What connections say.

    def take_back(self, connection: Connection, now: float) -> None:
        """`connection` is free again, and fit for another request."""
        if self.waiting and not self.waiting[0].resent:
            self._serve(connection)
        elif self.closed:
            connection.retire()
        else:
            connection.deadline = now + self.keepalive_s
            self.idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """`connection` is not to be used again."""
        if connection in self.idle:
            self.idle.remove(connection)

    def resend(self, request: Request) -> None:
        """The connection was stale: once more, on a fresh one."""
        request.resent = True
        self._wait(request)

    def settle(self, request: Request, attempt: Attempt) -> None:
        """Tell what came of `request`, in the next turn of the loop: whoever is told may submit, or raise."""
        client = self.client
        attempt.duration_s = client.time() - request.submitted_at
        client.attempts += not isinstance(attempt, Released)
        client.loop.call_soon(request.done, request.token, attempt)

    # What the transport says.

    def lacks_dial(self, share: int) -> bool:
        """Another connection would serve a waiting request, and `share` allows another dial."""
        return len(self.dials) < min(share, len(self.waiting))

    def welcome(self, connection: Connection) -> None:
        """A dial made `connection`."""
        if not connection.is_open:
            self.disappoint(DialFailed(Result.CONNECT, "connection closed before the request was sent"))
        elif self.waiting:
            self._serve(connection)
        else:
            self.take_back(connection, self.time())

    def disappoint(self, failure: BaseException) -> None:
        """A dial came to nothing. The oldest request shares its fate, unless the other dials suffice for all."""
        if len(self.waiting) > len(self.dials):
            self.settle(self.waiting.popleft(), _attempt_of(failure))

    def expire(self, now: float) -> None:
        """End the waiting requests whose deadline has passed."""
        for request in [request for request in self.waiting if request.deadline < now]:
            self.waiting.remove(request)
            if self.dials:
                self.settle(request, Attempt(Result.TIMEOUT, error=f"{_timed_out(request)} ({self.dials[0].phase})"))
            else:
                self.settle(request, Released("no dial could be begun in time: too many are under way"))

    def release_waiting(self, reason: str) -> None:
        """Give up the requests that wait, for a reason of ours."""
        while self.waiting:
            self.settle(self.waiting.popleft(), Released(reason))

    def _serve(self, connection: Connection) -> None:
        """Give the oldest request to `connection`. It leaves the queue last, so that no error can lose it."""
        connection.send(self.waiting[0], self.time())
        self.waiting.popleft()

    def _wait(self, request: Request) -> None:
        if self.closed:
            self.settle(request, Released("the endpoint was closed"))
        else:
            self.waiting.append(request)
            self.client.want_dial(self)


class Transport:
    """All origins, their connections and dials, and the clock that ends them.

    `attempts` counts the requests that came to an Attempt (a Released is none).
    """

    def __init__(
        self,
        *,
        settings: TransportSettings,
        guard: Guard,
        loop: asyncio.AbstractEventLoop | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        self.settings = settings
        self.loop = loop or asyncio.get_running_loop()
        self.time = self.loop.time
        self.attempts = 0
        self.origins: dict[Origin, None] = {}
        self.connections: dict[Connection, None] = {}  # in the order they were opened
        self._resolver = resolver or DnsResolver(self.loop)
        self._dialer = Dialer(
            guard=guard,
            resolver=self._resolver,
            loop=self.loop,
            ca_file=settings.ca_file,
            proxy=settings.proxy,
            source_address=settings.source_address,
        )
        self._dials: dict[Dial, Origin] = {}
        self._dial_queue: collections.deque[Origin] = collections.deque()  # round robin
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False  # to new requests
        self._released = False  # and the old ones were given up
        self._quiet = asyncio.Event()  # closed, and nothing is left

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in self.count_connections().items())
        return f"<Transport {len(self.origins)} origins, {counts}{', closed' if self._closed else ''}>"

    def origin(self, target: Target) -> Origin:
        """Return a new pool for one endpoint. Connections are never shared between endpoints."""
        origin = Origin(self, target)
        origin.closed = self._closed
        if not self._closed:
            self.origins[origin] = None
        return origin

    def use_guard(self, guard: Guard) -> None:
        """Judge the addresses of connections made from now on by this guard."""
        self._dialer.guard = guard

    def count_connections(self) -> dict[str, int]:
        """How many connections are connecting, active and idle. Walks over all of them: once a second, not more."""
        active = sum(connection.is_active for connection in self.connections)
        return {"connecting": len(self._dials), "active": active, "idle": len(self.connections) - active}

    async def close_origins(self, origins: Set[Origin]) -> None:
        """Close these at once and release their requests. When it returns every `done` of theirs was called."""
        for origin in origins:
            origin.release_waiting("shutdown")
            origin.close()
        for connection in [c for c in self.connections if c.origin in origins]:
            connection.release("shutdown")
        await asyncio.sleep(0)  # what was settled is told in the next turn

    async def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests; wait up to `drain_s` for those that are out; release the rest; close everything.

        When it returns every `done` was called and no connection is left. Calling it again does no harm.
        """
        self._closed = True
        for origin in list(self.origins):
            origin.close()
        self._note_quiet()
        await self._until_quiet(drain_s)
        self._release_all("shutdown")
        await self._until_quiet(CLOSE_S)
        if self._timer is not None:
            self._timer.cancel()
        await self._resolver.close()

    async def _until_quiet(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._quiet.wait(), timeout_s)
        await asyncio.sleep(0)  # what was settled is told in the next turn

    def _release_all(self, reason: str) -> None:
        self._released = True
        for origin in self._short_origins():
            origin.release_waiting(reason)
        self._dial_queue.clear()
        for dial in self._dials:
            dial.cancel()
        for connection in list(self.connections):
            connection.release(reason)

    # What origins and connections say.

    def want_dial(self, origin: Origin) -> None:
        """`origin` has requests waiting: dial as soon as there is a slot for it."""
        if not origin.queued and origin.lacks_dial(self._dial_share):
            origin.queued = True
            self._dial_queue.append(origin)
        self._dial_on()
        if self._timer is None:
            self._arm()

    def opened(self, connection: Connection) -> None:
        """`connection` is there."""
        if not self._released:  # else its dial was given up at the last moment, and the dialer will close it
            self.connections[connection] = None

    def lost(self, connection: Connection) -> None:
        """`connection` is gone."""
        self.connections.pop(connection, None)
        self._dial_on()
        self._note_quiet()

    # Dials.

    def _dial_on(self) -> None:
        while self._dial_queue and len(self._dials) < DIALS_MAX and self._has_room():
            self._dial_next()

    def _has_room(self) -> bool:
        """Whether another connection may be opened. If not, the one idle for longest makes room, in a later turn."""
        if len(self._dials) + len(self.connections) < self.settings.connections_max:
            return True
        idle = (connection for connection in self.connections if connection.is_idle)
        if (oldest := min(idle, key=_deadline, default=None)) is not None:
            oldest.retire()
        return False

    @property
    def _dial_share(self) -> int:
        return DIALS_PER_ORIGIN_MAX if len(self._dials) < DIALS_MAX // 2 else 1

    def _dial_next(self) -> None:
        """Begin a dial for the origin that has waited longest, and queue it again if it wants more."""
        origin = self._dial_queue.popleft()
        origin.queued = False
        share = self._dial_share
        if origin.lacks_dial(share):
            self._begin_dial(origin)
        if origin.lacks_dial(share):
            origin.queued = True
            self._dial_queue.append(origin)

    def _begin_dial(self, origin: Origin) -> None:
        dial = Dial(origin.waiting[len(origin.dials)].deadline)
        dialling = self._dialer.dial(origin.target, functools.partial(Connection, origin), dial.enter)
        dial.task = self.loop.create_task(dialling, name=f"dial {origin.target.host_header}")
        dial.task.add_done_callback(functools.partial(self._end_dial, dial))
        self._dials[dial] = origin
        origin.dials.append(dial)

    def _end_dial(self, dial: Dial, task: asyncio.Task[Connection]) -> None:
        dial.task = None
        origin = self._dials.pop(dial)
        origin.dials.remove(dial)
        if not task.cancelled():
            failure = task.exception()
            if failure is None:
                origin.welcome(task.result())
            else:
                origin.disappoint(failure)
        self.want_dial(origin)
        self._note_quiet()

    def _short_origins(self) -> dict[Origin, None]:
        """The origins that may have requests waiting: such an origin dials or is queued for it."""
        return dict.fromkeys((*self._dials.values(), *self._dial_queue))

    # The clock. It runs while there is a connection or a dial, and costs 20 ns a connection and tick.

    def _arm(self) -> None:
        busy = self.connections or self._dials or self._dial_queue
        self._timer = self.loop.call_later(self.settings.tick_s, self._sweep) if busy else None

    def _sweep(self) -> None:
        """End what is past its deadline: requests, dials, idle connections; and the oldest idle ones in excess."""
        now = self.time()
        for connection in [connection for connection in self.connections if connection.deadline < now]:
            connection.expire()
        for origin in self._short_origins():
            origin.expire(now)
        for dial in [dial for dial in self._dials if dial.deadline < now]:
            dial.cancel()
        self._trim_idle()
        self._arm()

    def _trim_idle(self) -> None:
        """Between two sweeps more may be idle, but never more than were active."""
        limit = self.settings.idle_connections_max
        if len(self.connections) > limit:
            idle = [connection for connection in self.connections if connection.is_idle]
            for connection in heapq.nsmallest(len(idle) - limit, idle, key=_deadline):
                connection.retire()

    def _note_quiet(self) -> None:
        if self._closed and not self.connections and not self._dials and not self._dial_queue:
            self._quiet.set()


def _attempt_of(failure: BaseException) -> Attempt:
    """What a request comes to whose dial failed."""
    if isinstance(failure, DialFailed):
        if failure.result is None:
            return Released(str(failure))
        return Attempt(failure.result, error=str(failure))
    log.error("a dial failed in an unforeseen way", exc_info=failure)
    return Released(f"internal error: {failure!r}")


def _timed_out(request: Request) -> str:
    return f"timed out after {request.deadline - request.submitted_at:g} s"


def _is_framed(head: bytes) -> bool:
    """The body ends by its own length or its last chunk, and not with the connection (RFC 9112 §6.3)."""
    coding = _field(head, b"transfer-encoding")
    if coding is not None:
        return coding.lower().endswith(b"chunked")
    return _field(head, b"content-length") is not None


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
