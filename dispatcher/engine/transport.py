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
`close` do.

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
from collections.abc import Callable, Set
from operator import attrgetter
from typing import Any, Final

from dispatcher.core.addresses import Guard, Target
from dispatcher.core.attempt import Attempt
from dispatcher.engine.connection import Connection, Done, KnownAnswer, Released, Request, timed_out
from dispatcher.engine.dialer import Dialer, DialFailed, DnsResolver, Phase, Resolver
from dispatcher.model import Result

log = logging.getLogger(__name__)

CLOSE_S: Final = 5.0  # what aborted connections get to be gone; the event loop takes one turn

# A dial holds a descriptor, a task and, in the handshake, ≈ 100 KiB and 0.5 ms of CPU: all of them, ≈ 100 MiB.
# A dial that hangs costs little but its slot, so there are as many slots as half of all requests in flight by default:
# hosts that hang in droves meet their lanes' windows and that limit first.
DIALS_MAX: Final = 1024
# Of these for one endpoint: half its default concurrency, because a request freed meanwhile serves a second one sooner
# than a second handshake does. When half of all are taken, most of them hang, and everybody gets one.
DIALS_PER_ORIGIN_MAX: Final = 8

_deadline: Final = attrgetter("deadline")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """Bounds and routes of the client. Sizes in bytes, times in seconds."""

    keepalive_s: float = 60.0  # an idle connection is closed after that
    idle_connections_max: int = 1000  # over all endpoints: 50 MiB if all are TLS (50 KiB each, a plain one 2.3)
    connections_max: int = 100_000  # idle, active and being dialled: a descriptor each, and there may be few
    response_bytes_max: int = 65_536  # read of one response, head included, give or take the last read
    body_kept_bytes: int = 4096
    head_bytes_max: int = 32_768  # interim responses included
    tick_s: float = 0.1  # how late a deadline may be noticed
    ca_file: str | None = None  # instead of the system's trust store
    proxy: str | None = None  # http:// or https://, asked to CONNECT
    source_address: str | None = None  # local address to connect from


def _always() -> bool:
    return True


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

    __slots__ = (
        "client", "closed", "dials", "idle", "keepalive_s", "known_answer", "may_send", "queued", "surprises", "target",
        "time", "waiting",
    )  # fmt: skip

    def __init__(self, client: Transport, target: Target, may_send: Callable[[], bool]) -> None:
        self.client = client
        self.may_send = may_send
        self.time = client.time
        self.keepalive_s = client.settings.keepalive_s
        self.target = target
        self.idle: list[Connection] = []  # the one used last is used next
        self.waiting: collections.deque[Request] = collections.deque()
        self.dials: list[Dial] = []  # oldest first
        self.queued = False  # for a dial
        self.closed = False
        self.known_answer: KnownAnswer | None = None
        self.surprises = 0  # successes since the last that looked like it

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
        self._check_waiting()
        fresh = next((n for n, request in enumerate(self.waiting) if not request.resent), None)
        if fresh is not None:  # what is sent once more goes over a new one
            self._serve(connection, fresh)
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
        self._check_waiting()
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
                self.settle(request, Attempt(Result.TIMEOUT, error=f"{timed_out(request)} ({self.dials[0].phase})"))
            else:
                self.settle(request, Released("no dial could be begun in time: too many are under way"))

    def release_waiting(self, reason: str) -> None:
        """Give up the requests that wait, for a reason of ours."""
        while self.waiting:
            self.settle(self.waiting.popleft(), Released(reason))

    def _check_waiting(self) -> None:
        """What waited for so long that it is not ours to send any more is given up."""
        if self.waiting and not self.may_send():
            self.release_waiting("the lease may be another's by now")

    def _serve(self, connection: Connection, place: int = 0) -> None:
        """Give a request, the oldest, to `connection`. It leaves the queue last, so that no error can lose it."""
        connection.send(self.waiting[place], self.time())
        del self.waiting[place]

    def _wait(self, request: Request) -> None:
        if self.closed:
            self.settle(request, Released("the endpoint was closed"))
        else:
            self.waiting.append(request)
            self.client.want_dial(self)


class Transport:
    """All origins, their connections and dials, and the clock that ends them.

    `attempts` counts the requests that came to an Attempt (a Released is none). `clock` shows the loop's time, finer:
    uvloop's own goes in milliseconds and stands still for a turn.
    """

    def __init__(
        self,
        *,
        settings: TransportSettings,
        guard: Guard,
        loop: asyncio.AbstractEventLoop | None = None,
        resolver: Resolver | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.settings = settings
        self.loop = loop or asyncio.get_running_loop()
        self.time = clock or self.loop.time
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
        self._made_room = False  # since the last sweep
        self._closed = False  # to new requests
        self._released = False  # and the old ones were given up
        self._quiet = asyncio.Event()  # closed, and nothing is left

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in self.count_connections().items())
        return f"<Transport {len(self.origins)} origins, {counts}{', closed' if self._closed else ''}>"

    def origin(self, target: Target, may_send: Callable[[], bool] = _always) -> Origin:
        """Return a new pool for one endpoint. Connections are never shared between endpoints.

        `may_send` is asked again about what had to wait for a connection.
        """
        origin = Origin(self, target, may_send)
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
        """Whether another connection may be opened. If not, those idle for longest make room, in a later turn.

        Finding them is a walk over all connections, so it happens once between two sweeps, for all that wait.
        """
        if len(self._dials) + len(self.connections) < self.settings.connections_max:
            return True
        if not self._made_room:
            self._made_room = True
            self._retire_idle(len(self._dial_queue))
        return False

    def _retire_idle(self, most: int) -> None:
        """Close connections, those idle for longest first."""
        idle = [connection for connection in self.connections if connection.is_idle]
        for connection in heapq.nsmallest(most, idle, key=_deadline):
            connection.retire()

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
        self._made_room = False
        self._dial_on()
        self._arm()

    def _trim_idle(self) -> None:
        """Between two sweeps more may be idle, but never more than were active."""
        limit = self.settings.idle_connections_max
        if len(self.connections) > limit:
            idle = sum(connection.is_idle for connection in self.connections)
            self._retire_idle(idle - limit)

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
