"""The outbox reader: every committed event once, in pages, and asleep when there is nothing to do.

**Problem.** `id > last` loses events (a sequence runs before the transaction commits), claiming rows costs an UPDATE
each, and NOTIFY at every INSERT serialises the producers over the WAL flush.

**Rule, reading.** By the difference of two snapshots (`store/outbox.py`). Each first page brings the version of the
webhook registry from its own snapshot; when that changed, the registry is loaded before the page is routed. So a
webhook whose creation committed before an event committed receives it, and an event that had committed before the
webhook's creation is none of its business: the endpoint remembers the snapshot it was born in.

**Rule, overlap.** While a page is routed the next one of the same difference is read, and between two slices of a page
the loop has a turn: answers that have come in free slots, and do not wait for all of it.

**Rule, waking.** Asleep means holding a shared advisory lock; a producer's trigger notifies only then. Under light
load the reader stays asleep and is told of every commit; when commits come fast, or several are under way all the time,
it wakes, lets go of the lock and polls. Commits count, not rows: a transaction notifies once, whatever it wrote.

**Falling asleep without losing a wake-up.** A producer may probe the lock at its INSERT, find everybody awake, stay
silent and commit after our last poll. So: linger; take the lock; take an own transaction id X as barrier; poll until
the oldest running transaction of the poll's own snapshot is younger than X. Proof: let T have stayed silent and
unseen. Its probe came before our lock, and its id before its probe (it is a default of the outbox's row), so id(T) <
X. The barrier falls only with a snapshot whose xmin > X; in it T had ended, and the rows of that same poll show it.
Advisory locks are not MVCC, so isolation levels do not matter. While only the barrier keeps us up we poll gently;
NOTIFY works all the while.

**Edge.** A jittered safety poll covers what no trigger sees (rows copied into a partition, replication). After a
take-over, pages are checked against attempts and pending rows until a difference that ended after it has been read.
After a restore into another cluster transaction ids mean nothing: everything unsettled is held, by the clock, and the
cursor anchored anew.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from itertools import repeat
from typing import Any, Final

from dispatcher.core.routing import Registry
from dispatcher.engine.channels import REGISTRY
from dispatcher.engine.deliverer import Deliverer
from dispatcher.engine.delivery import Delivery, Event, OpenPage, Subscriber, payload_of
from dispatcher.engine.ledger import Ledger
from dispatcher.errors import Undeliverable
from dispatcher.model import Endpoint
from dispatcher.moments import BEGINNING, to_datetime
from dispatcher.store.database import statements
from dispatcher.store.outbox import Cursor, OutboxPages, Page, Snapshot
from dispatcher.telemetry import Telemetry

PAGE_ROWS: Final = 500  # 5 ms of routing at a fan-out of one: what a first attempt may wait behind
FIRST_ROWS: Final = 16  # of a session: nobody knows yet how large they are, and 500 may be a gigabyte
GROWTH: Final = 4  # times the page before, at most
SLICES: Final = 10  # of a page: between two of them the loop has a turn, so that answers do not wait for all of it
SLICE_BYTES: Final = 256 << 10  # of data: what has to be rendered exactly takes half a microsecond for each
PAGE_BYTES: Final = 8 << 20  # of data: where events are large, pages are shorter
OPEN_PAGES_MAX: Final = 20_000  # 8 MB; what is held back is spilled after 10 s, and 500 pages a second are read
OPEN_BYTES_MAX: Final = 256 << 20  # of data in pages not resolved
POLL_S: Final = 0.002  # while awake
POLL_BUSY_S: Final = 0.005  # above BUSY_ROWS_PER_S: fewer, fuller pages
BUSY_ROWS_PER_S: Final = 5000
AWAKE_COMMITS_PER_S: Final = 1000  # faster than this, polling is cheaper than being told, for us and for the producers
# While we sleep, producers notify, and so commit one after the other: what they could do awake cannot be seen in their
# rate. It shows in how many transactions are open, on the average, when something arrives.
CROWD_OF_WRITERS: Final = 3
CROWD_S: Final = 1.0
RATE_WINDOW_S: Final = 0.05
LINGER_S: Final = 0.03
GENTLE_S: Final = 0.03
SAFETY_S: Final = (1.0, 5.0)
ROOM_S: Final = 0.002
SPILL_S: Final = 0.020  # looking at a thousand lanes takes 0.3 ms: at every ROOM_S that was 8 % of the loop
FAST_LANE_S: Final = 5.0  # a queue that takes longer is held; one that is done within this is waited for
STALLED_S: Final = 1.0  # what has stood still for so long is not fast any more, whatever it was
FAST_LANE_PATIENCE_S: Final = 0.05
CROWD_MIN: Final = 64  # no lane with fewer in its queue can be full; how long it takes is looked at for each so many
CURSOR_EVERY_S: Final = 60.0


class OutboxReader:
    """Reads, routes and hands over. One per shard; lives as long as its connection."""

    def __init__(
        self,
        connection: Any,
        *,
        deliverer: Deliverer,
        ledger: Ledger,
        telemetry: Telemetry,
        load_registry: Callable[[], Awaitable[Registry]],
        dice: random.Random,
        page_rows: int = PAGE_ROWS,
        safety_s: tuple[float, float] = SAFETY_S,
        has_duties: bool = True,
    ) -> None:
        self._connection = connection
        self._page_rows = page_rows
        self._safety_s = safety_s
        self._has_duties = has_duties  # for all shards: counts events, and looks at those nobody subscribed to
        self._sql = statements("shard")
        self._deliverer = deliverer
        self._ledger = ledger
        self._telemetry = telemetry
        self._load_registry = load_registry
        self._random = dice.random
        self._loop = asyncio.get_running_loop()
        self.notified = asyncio.Event()
        self.registry_changed = False  # as far as we were told; the poll's own snapshot is what counts
        self.recovering = True  # pages may hold what is settled or pending already
        self.registry = Registry((), -1)
        self.progress_at = self._loop.time()
        self._newest_known: int | None = None  # event sequence beyond which nothing was settled or pending at the start
        self.read_to_us: int | None = None  # moment of the last row read while behind; None when caught up
        self.read_seq = 0
        self.stopping = False
        self._open: deque[OpenPage] = deque()
        self._open_bytes = 0  # at most: pages are counted until those before them are resolved
        self._resolved: Cursor | None = None
        self._touched_at = self._loop.time()
        self._asleep = False
        self._barrier = 0  # while not zero: asleep, but not sure yet
        self._idle_since = self._loop.time()
        self._window_from = self._loop.time()
        self._window_rows = self._window_commits = 0
        self._window_polls = self._window_running = 0  # polls that found something, and the transactions open then
        self._rows_per_s = self._commits_per_s = 0.0
        self._crowded_at = -math.inf
        self._spill_at = 0.0  # not before

    # ── the cursor ─────────────────────────────────────────────────────────────────────────────────────────────────

    def cursor(self) -> Cursor | None:
        """How far everything is resolved: asked by the ledger at each flush."""
        pages = self._open
        while pages and pages[0].left == 0:
            page = pages.popleft()
            self._open_bytes -= page.data_bytes
            self._resolved = page.after
        return self._resolved

    @property
    def oldest_open_at(self) -> float | None:
        """Loop time at which the oldest page that is not resolved was read."""
        return self._open[0].read_at if self._open else None

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, start: Cursor, floor: datetime = BEGINNING) -> None:
        """Read from `start` until stopped; `floor` as in OutboxPages."""
        pages = OutboxPages(self._connection, floor)
        await pages.prepare()
        cursor = start
        rows_max = min(FIRST_ROWS, self._page_rows)
        began_here = False  # the difference being read: it shows whatever an owner before us may have seen
        ahead: asyncio.Task[Page] | None = None  # the next page, read while this one is routed
        try:
            while not self.stopping:
                await self._room()
                if self.registry_changed and cursor.cur is not None:  # a further page does not say so by itself
                    await self.reload()
                began_here = began_here or cursor.cur is None
                page = await (ahead or self._read(pages, cursor, rows_max))
                ahead = None
                self.progress_at = self._loop.time()
                if page.registry is not None and page.registry > self.registry.version:
                    await self.reload()
                rows = len(page.rows)
                data_bytes = sum([len(row[8]) for row in page.rows if row[8] is not None])
                by_bytes = PAGE_BYTES * rows // (data_bytes + 1)
                if rows:
                    rows_max = max(1, min(rows_max, by_bytes))
                is_doubtful = self.recovering and self._is_doubtful(page.rows)
                if not page.complete and not is_doubtful:
                    ahead = self._loop.create_task(self._read(pages, page.after, rows_max))
                if rows:
                    by_time = SLICE_BYTES * rows // (data_bytes + 1)
                    deliveries = await self._route(page, data_bytes, max(1, min(1 + rows_max // SLICES, by_time)))
                    # A page is what its deliveries cost: the loop's time and the lanes' room go by these, not events.
                    by_fan_out = self._page_rows * rows // max(rows, deliveries)
                    rows_max = max(1, min(self._page_rows, GROWTH * rows_max, by_fan_out, by_bytes))
                elif not self._open:
                    self._advance(page.after)
                cursor = page.after
                self.read_to_us = page.rows[-1][10] if page.rows and not page.complete else None
                if page.rows:
                    self.read_seq = max(self.read_seq, page.rows[-1][3])
                if page.complete:
                    self.recovering = self.recovering and not began_here
                    await self._pace(page.rows, page.after.prev)
            if ahead is not None:  # it will be read again, but the connection is not left in mid statement
                await ahead
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    async def _read(self, pages: OutboxPages, cursor: Cursor, rows_max: int) -> Page:
        with self._telemetry.timed("poll"):
            return await pages.read(cursor, rows_max)

    def _advance(self, cursor: Cursor) -> None:
        """Nothing is open: the cursor may follow, but need not be written at every poll."""
        self._resolved = cursor
        if self._loop.time() - self._touched_at > CURSOR_EVERY_S:
            self._touched_at = self._loop.time()
            self._ledger.touch()

    def hear(self, channel: str) -> None:
        """A notification came."""
        self.registry_changed = self.registry_changed or channel == REGISTRY
        self.notified.set()

    def reload_soon(self) -> None:
        """Load the registry anew before the next page is routed, changed or not."""
        self.registry = Registry(self.registry, -1)
        self.registry_changed = True
        self.notified.set()

    async def reload(self) -> None:
        """Load the registry and let every webhook in memory know."""
        self.registry_changed = False
        with self._telemetry.timed("registry"):
            registry = await self._load_registry()
        if registry.version > self.registry.version:
            self.registry = registry
            self._deliverer.apply(registry.by_id)

    async def _room(self) -> None:
        """Back-pressure: wait until the engine can hold another page."""
        while not self.stopping and self._is_full():
            if not self._ledger.full:  # endpoints may be slow for as long as they like; our own ledger may not
                self.progress_at = self._loop.time()
            if self.registry_changed:
                await self.reload()
            if not self._ledger.full and self._loop.time() >= self._spill_at:
                self._spill_at = self._loop.time() + SPILL_S
                self._deliverer.spill_slow(FAST_LANE_S, STALLED_S)
            await asyncio.sleep(ROOM_S)

    def _is_full(self) -> bool:
        lanes = self._deliverer.lanes
        # Half: a lane may fill as much as is free, so up to here a single one is never full, let alone one of many.
        if 2 * lanes.queued >= lanes.queued_max or self._ledger.full:
            return True
        if self._open_bytes < OPEN_BYTES_MAX and len(self._open) < OPEN_PAGES_MAX:
            return False
        self.cursor()
        return len(self._open) >= OPEN_PAGES_MAX or sum(p.data_bytes for p in self._open if p.left) >= OPEN_BYTES_MAX

    # ── routing ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _route(self, page: Page, data_bytes: int, slice_rows: int) -> int:
        """Hand a page's deliveries over, a slice in a turn of the loop, and return how many there were."""
        rows = page.rows
        opened = OpenPage(page.after, self._loop.time(), data_bytes)
        self._open.append(opened)
        self._open_bytes += data_bytes
        if self._has_duties:
            self._telemetry.events += len(rows)
        deliverer = self._deliverer
        # Half of all room is free now, so that no short lane can be full, unless the room is no more than some pages. A
        # long one is held before it has filled the room: what it cannot send for seconds would only be put back.
        crowd = CROWD_MIN if deliverer.lanes.queued_max > 8 * self._page_rows else 0
        deliveries = 0
        for start in range(0, len(rows), slice_rows):
            if start:
                deliverer.pump()
                await asyncio.sleep(0)
            pairs = self._pairs(rows[start : start + slice_rows])
            if self.recovering:
                known = await self._known(pairs)
                pairs = [pair for pair in pairs if (pair[1].id, pair[0].seq) not in known] if known else pairs
            opened.left += len(pairs)
            deliveries += len(pairs)
            for event, endpoint in pairs:
                subscriber = deliverer.subscriber(endpoint)
                queued = len(subscriber.lane.todo)
                if queued >= crowd and not subscriber.backlog:
                    if queued % CROWD_MIN == 0 and deliverer.drain_estimate_s(subscriber.lane) >= FAST_LANE_S:
                        deliverer.hold(Delivery(event, subscriber, opened))
                        continue
                    if self._crowded(subscriber):
                        await self._wait_for_lane(subscriber)
                        subscriber = deliverer.subscriber(endpoint)
                deliverer.offer(Delivery(event, subscriber, opened))
            self._telemetry.read += len(pairs)
            if self.recovering:  # what is held already may be younger than what is read again
                for _, endpoint in pairs:
                    deliverer.subscriber(endpoint).await_order()
        opened.left -= 1
        if opened.left == 0:
            self._ledger.touch()
        deliverer.pump()
        return deliveries

    def _pairs(self, rows: list[Any], born: Mapping[int, datetime] | None = None) -> list[tuple[Event, Endpoint]]:
        """Who gets what: (event, endpoint), events in the page's order.

        What all its webhooks have to wait with is not looked at: half of its cost is the payload, and it is read again.
        With `born`, a webhook that existed by the clock is subscribed too.
        """
        pairs: list[tuple[Event, Endpoint]] = []
        match, all_since = self.registry.match, self.registry.all_since
        subscribers, holds_all = self._deliverer.subscribers, self._deliverer.holds_all
        for _, _, _, seq, xid, event_id, account, type_, data, created_us, written_us, traceparent in rows:
            endpoints = match(account, type_)
            if not endpoints and not self._has_duties:
                continue
            payload = None
            first = subscribers.get(endpoints[0].id) if endpoints else None
            try:
                if first is None or not first.backlog or not holds_all(endpoints):
                    payload = payload_of(event_id, type_, created_us, data)
            except Undeliverable as error:
                self._ledger.discard_event(seq, str(error))
                if self._has_duties:
                    self._deliverer.journal.discarded_event(event_id, account, type_, str(error))
                continue
            if not endpoints:
                continue
            event = Event(seq, xid, written_us, payload, traceparent)
            if xid >= all_since:
                pairs += zip(repeat(event), endpoints)
            else:
                pairs += [
                    (event, endpoint)
                    for endpoint in endpoints
                    if _is_subscribed(endpoint, xid)
                    or (born is not None and endpoint.id in born and born[endpoint.id] <= event.written_at)
                ]
        return pairs

    def _is_doubtful(self, rows: list[Any]) -> bool:
        """Whether some of these may be settled or pending already, so that the database has to be asked."""
        newest = self._newest_known
        return newest is None or any(row[3] <= newest for row in rows)

    async def _known(self, pairs: list[tuple[Event, Endpoint]]) -> set[tuple[int, int]]:
        """Which of these are settled or pending already. A backlog nobody has read yet costs nothing to check."""
        if self._newest_known is None:
            self._newest_known = await self._connection.fetchval(statements("outbox")["newest_known"])
        pairs = [pair for pair in pairs if pair[0].seq <= self._newest_known]
        if not pairs:
            return set()
        since = to_datetime(min(event.written_us for event, _ in pairs)) - timedelta(days=1)
        rows = await self._connection.fetch(
            statements("outbox")["known"], [e.id for _, e in pairs], [event.seq for event, _ in pairs], since
        )
        return {(row[0], row[1]) for row in rows}

    def _crowded(self, subscriber: Subscriber) -> bool:
        """Whether the lane is full but fast: waiting a little for it is cheaper than a pending row each."""
        lanes, lane = self._deliverer.lanes, subscriber.lane
        return (
            not subscriber.backlog
            and lane.queued >= lanes.room_for_lane
            and lane.window.size > 0
            and self._deliverer.drain_estimate_s(lane) < FAST_LANE_S
        )

    async def _wait_for_lane(self, subscriber: Subscriber) -> None:
        give_up_at = self._loop.time() + FAST_LANE_PATIENCE_S
        self._deliverer.pump()
        while self._crowded(subscriber) and self._loop.time() < give_up_at and not self.stopping:
            before = subscriber.lane.queued
            await asyncio.sleep(ROOM_S)
            if subscriber.lane.queued < before:
                give_up_at = self._loop.time() + FAST_LANE_PATIENCE_S

    async def reread(self, since: datetime, flush: Callable[[], Awaitable[None]]) -> Cursor:
        """After a restore into another cluster: hold whatever is neither settled nor pending; return the new cursor.

        One repeatable-read snapshot for all of it, which becomes the cursor. Nothing is sent meanwhile; `flush` is
        called after each page and must write down what was held.
        """
        # The clock first: what is written after the snapshot must not seem to be from before it.
        at = await self._connection.fetchval("SELECT clock_timestamp()")
        async with self._connection.transaction(isolation="repeatable_read", readonly=True):
            snapshot = await self._connection.fetchval("SELECT pg_current_snapshot()")
            born = {row[0]: row[1] for row in await self._connection.fetch(statements("outbox")["born"])}
            rows = await self._connection.cursor(statements("outbox")["reread"], since)
            while chunk := await rows.fetch(self._page_rows):
                pairs = self._pairs(chunk, born)
                known = await self._known(pairs) if pairs else set()
                for event, endpoint in pairs:
                    if (endpoint.id, event.seq) not in known:
                        self._deliverer.hold(Delivery(event, self._deliverer.subscriber(endpoint), None))
                await flush()
        return Cursor(snapshot, at)

    # ── awake and asleep ───────────────────────────────────────────────────────────────────────────────────────────

    async def _pace(self, rows: list[Any], snapshot: Snapshot) -> None:
        """After a whole difference, of which `rows` came last: wait for the next, as long as it is worth waiting."""
        now = self._loop.time()
        if rows:
            self._idle_since = now
            self._window_polls += 1
            self._window_running += len(snapshot[2])
        self._measure(now, rows)
        stays_awake = self._commits_per_s >= AWAKE_COMMITS_PER_S or now - self._crowded_at < CROWD_S
        if not self._asleep:
            if now - self._idle_since > LINGER_S and not stays_awake:
                await self._fall_asleep()
            else:
                await asyncio.sleep(POLL_BUSY_S if self._rows_per_s > BUSY_ROWS_PER_S else POLL_S)
            return
        if self._barrier and snapshot[0] > self._barrier:
            self._barrier = 0
        if stays_awake:
            await self._wake_up()
            return
        low, high = self._safety_s
        await self._sleep(GENTLE_S if self._barrier else low + (high - low) * self._random())

    def _measure(self, now: float, rows: list[Any]) -> None:
        self._window_rows += len(rows)
        self._window_commits += len({row[4] for row in rows})  # a transaction notifies once, whatever it wrote
        span = now - self._window_from
        if span >= RATE_WINDOW_S:
            self._rows_per_s, self._commits_per_s = self._window_rows / span, self._window_commits / span
            if self._window_running >= CROWD_OF_WRITERS * max(1, self._window_polls):
                self._crowded_at = now
            self._window_from, self._window_rows, self._window_commits = now, 0, 0
            self._window_polls = self._window_running = 0

    async def _sleep(self, timeout_s: float) -> None:
        if not self.notified.is_set():
            alarm = self._loop.call_later(timeout_s, self.notified.set)
            await self.notified.wait()
            alarm.cancel()
        self.notified.clear()

    async def _fall_asleep(self) -> None:
        # A producer's momentary exclusive lock may be in the way: try, never wait.
        while not await self._connection.fetchval(self._sql["fall_asleep"]):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        self._asleep = True
        self._barrier = await self._connection.fetchval(self._sql["own_xid"])

    async def _wake_up(self) -> None:
        await self._connection.fetchval(self._sql["wake_up"])
        self._asleep = False
        self._barrier = 0
        self._idle_since = self._loop.time()

    def stop(self) -> None:
        """Read no further page; what is being routed is finished."""
        self.stopping = True
        self.notified.set()


def _is_subscribed(endpoint: Endpoint, xid: int) -> bool:
    """Whether the event's transaction had not ended when the webhook was made."""
    _, xmax, running = endpoint.created_snapshot
    return xid >= xmax or xid in running
