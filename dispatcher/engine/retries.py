"""What waits: retries by the clock, and the backlogs of webhooks that could not take more.

**Problem.** Millions of deliveries may wait, most of them minutes away or for a webhook that is down. They must survive us,
fire on time, and not fill memory.

**Rule, due.** Every waiting delivery is a pending row: PostgreSQL is the overflow wheel. A ring in memory holds the keys of what is due
before the *frontier*, some minutes ahead, and is refilled below half. What fires is fetched with its event, in batches.

**Order.** Refill publishes the frontier, then selects; the ledger commits, then compares with the frontier. Of the four orders only
this one loses nothing: a row committed before the select is selected, one committed after it finds the frontier published.

**Rule, held.** A webhook with a backlog has rows due at infinity. They are pulled oldest first, a few at a time, whenever its lane runs low; new
deliveries go behind them. The backlog ends with a pull that comes back short while nothing of that webhook was on its way into
the database. A dead webhook is pulled for one probe when its time is over.

**Edge.** A key that fires while its delivery is in memory (a straggler still in flight) is skipped: whoever has it settles it. Rows of webhooks that
are gone or disabled are pulled like any backlog and discarded. A wheel that holds its bound lowers the frontier: what lies beyond
comes back with the next refill.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from dispatcher.core.rendering import Payload
from dispatcher.core.routing import Registry
from dispatcher.core.wheel import TICK_S, Wheel, due_tick, elapsed_tick
from dispatcher.core.window import Health
from dispatcher.engine.deliverer import Deliverer, Delivery, Event, Row, Subscriber
from dispatcher.engine.ledger import HELD_UNTIL, Committed, Ledger
from dispatcher.errors import Undeliverable
from dispatcher.model import DeliveryKey, DeliveryState, EndpointId, EndpointStatus
from dispatcher.store.pending import PendingStore
from dispatcher.telemetry import Telemetry

HORIZON: Final = timedelta(minutes=15)  # below the ring's 17
REFILL_BELOW: Final = timedelta(minutes=7)
REFILL_ROWS: Final = 20_000
WHEEL_KEYS_MAX: Final = 200_000  # 50 MB of keys
FIRE_ROWS: Final = 500
PULL_ROWS: Final = 128  # per webhook and pull
PULL_ENDPOINTS: Final = 64  # per statement
PULL_BELOW: Final = 16  # a lane with less than this queued is hungry
PROBE_ROWS: Final = 4
PULL_S: Final = 0.005
ORPHAN_ROWS: Final = 1000
BEGINNING: Final = datetime(2000, 1, 1, tzinfo=UTC)
_DISCARDED: Final = DeliveryState.DISCARDED.value


class Retries:
    """The wheel and the backlogs of one shard."""

    def __init__(
        self,
        pending: PendingStore,
        *,
        deliverer: Deliverer,
        ledger: Ledger,
        telemetry: Telemetry,
        registry: Callable[[], Registry],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._pending = pending
        self._deliverer = deliverer
        self._ledger = ledger
        self._telemetry = telemetry
        self._registry = registry
        self._wall = wall
        self._loop = asyncio.get_running_loop()
        self._wheel: Wheel[DeliveryKey] = Wheel(elapsed_tick(self._loop.time()))
        self._frontier = BEGINNING
        self._hungry: set[Subscriber] = set()
        self._orphans: dict[int, tuple[int, int]] = {}  # endpoint id of a webhook gone or disabled -> pulled up to
        self._wake = asyncio.Event()
        self.progress_at = self._loop.time()
        self.oldest_due: datetime | None = None

    @property
    def waiting(self) -> int:
        """Keys in the wheel."""
        return len(self._wheel)

    # ── what others tell us ────────────────────────────────────────────────────────────────────────────────────────

    def committed(self, committed: Committed) -> None:
        """The ledger's batch stands: what left memory may be fetched again, what is due soon goes into the wheel."""
        rows, subscribers = self._deliverer.rows, self._deliverer.subscribers
        waiting = {key for key, _ in committed.due} if committed.due else ()
        for key in committed.left:
            rows.pop(key, None)
            subscriber = subscribers.get(key[0])
            if subscriber is not None and subscriber.head_key == key and key not in waiting:
                subscriber.head_key = None  # settled, or held like the others: the oldest is next
                self.hungry(subscriber)
        frontier = self._frontier
        for key, due in committed.due:
            if due < frontier:
                if len(self._wheel) >= WHEEL_KEYS_MAX:
                    self._frontier = frontier = due
                else:
                    self._insert(key, due)
        if self._hungry:
            self._wake.set()

    def hungry(self, subscriber: Subscriber) -> None:
        """A webhook with a backlog may be able to take more."""
        if subscriber.backlog:
            self._hungry.add(subscriber)
            self._wake.set()

    def _insert(self, key: DeliveryKey, due: datetime) -> bool:
        monotonic = due.timestamp() - self._wall() + self._loop.time()
        return self._wheel.insert(key, due_tick(monotonic))

    # ── the clock ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Learn from the database who has a backlog, and whom ordered webhooks wait for."""
        await self._pending.prepare()
        heads = await self._pending.heads()
        for endpoint_id in {*await self._pending.held_endpoints(), *heads}:
            self._adopt(endpoint_id, heads.get(endpoint_id))

    def _adopt(self, endpoint_id: int, head: DeliveryKey | None) -> None:
        endpoint = self._registry().by_id(EndpointId(endpoint_id))
        if endpoint is None or endpoint.status is EndpointStatus.DISABLED:
            self._orphans[endpoint_id] = (-1, -1)
            return
        subscriber = self._deliverer.subscriber(endpoint)
        subscriber.backlog = True
        subscriber.head_key = head if endpoint.ordered else None
        subscriber.rewind()
        if endpoint.status is EndpointStatus.PAUSED:
            self._deliverer.lanes.pause(subscriber.lane)
        self._hungry.add(subscriber)

    async def run(self) -> None:
        """Fire what is due, once per tick, until cancelled."""
        while True:
            now = self._loop.time()
            self.progress_at = now
            wall = datetime.fromtimestamp(self._wall(), UTC)
            if self._frontier - wall < REFILL_BELOW:
                await self._refill(wall)
            await self._fire()
            self._notice()
            await asyncio.sleep(TICK_S - self._loop.time() % TICK_S)

    async def _refill(self, wall: datetime) -> None:
        start, end = self._frontier, wall + HORIZON
        limit = REFILL_ROWS
        while True:
            self._frontier = end  # published first; see Order
            with self._telemetry.timed("refill"):
                rows = await self._pending.refill(start, end, limit)
            if len(rows) == limit and rows[0][3] == rows[-1][3]:
                limit *= 2  # that many at one instant: all of them or none
                continue
            break
        known = self._deliverer.rows
        for endpoint_id, seq, generation, due in rows:
            key = (endpoint_id, seq, generation)
            if key not in known:
                self._insert(key, due)
        if len(rows) == limit:
            self._frontier = min(self._frontier, rows[-1][3])

    async def _fire(self) -> None:
        lanes = self._deliverer.lanes
        while len(self._wheel):
            room = min(FIRE_ROWS, lanes.retries_queued_max - lanes.retries_queued)
            if room <= 0 or self._ledger.full:
                return
            fired = self._wheel.expire(elapsed_tick(self._loop.time()), room)
            if not fired:
                return
            keys = [key for key in fired if key not in self._deliverer.rows]
            try:
                with self._telemetry.timed("fetch"):
                    rows = await self._pending.fetch(keys)
            except BaseException:
                for key in keys:  # not lost: the next engine, or this one reconnected, reads them again
                    self._wheel.insert(key, self._wheel.elapsed + 1)
                raise
            for row in rows:
                self._recall(row, Row.DUE)
            self._deliverer.pump()

    def _notice(self) -> None:
        """Webhooks whose death is over, or that were forgotten about, are hungry again."""
        now = self._loop.time()
        for subscriber in self._deliverer.subscribers.values():
            if subscriber.backlog and not subscriber.lane.paused:
                window = subscriber.lane.window
                if window.health is not Health.DEAD or now >= window.dead_until:
                    self._hungry.add(subscriber)
        if self._hungry or self._orphans:
            self._wake.set()

    # ── backlogs ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def run_backlogs(self) -> None:
        """Pull for the hungry until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._pull()
            if self._orphans:
                await self._bury()
            await asyncio.sleep(PULL_S)

    def _appetite(self, subscriber: Subscriber) -> int:
        lane, window = subscriber.lane, subscriber.lane.window
        if lane.paused or subscriber.head_key is not None or len(lane.todo) >= PULL_BELOW:
            return 0
        if window.health is Health.DEAD:
            return PROBE_ROWS if self._loop.time() >= window.dead_until else 0
        lanes = self._deliverer.lanes
        return max(0, min(PULL_ROWS, lanes.room_for_lane, lanes.retries_queued_max - lanes.retries_queued))

    async def _pull(self) -> None:
        asking: list[tuple[Subscriber, int, int]] = []  # with how many at most, and its parks if none is under way
        if self._ledger.full:
            return
        for subscriber in list(self._hungry)[:PULL_ENDPOINTS]:
            self._hungry.discard(subscriber)
            most = self._appetite(subscriber) if subscriber.backlog else 0
            if most:
                asking.append((subscriber, most, -1 if subscriber.unflushed else subscriber.parks))
        if not asking:
            return
        with self._telemetry.timed("pull"):
            rows = await self._pending.pull([(s.endpoint.id, *s.after, most) for s, most, _ in asking])
        count: dict[int, int] = {}
        refused: set[int] = set()
        for row in rows:
            count[row[0]] = count.get(row[0], 0) + 1
            if row[0] not in refused and not self._take(row):
                refused.add(row[0])
        for subscriber, most, parks in asking:
            short = count.get(subscriber.endpoint.id, 0) < most
            if short and subscriber.parks == parks and subscriber.endpoint.id not in refused:
                self._finish(subscriber)
            elif not short:
                self._hungry.add(subscriber)
                self._wake.set()
        self._deliverer.pump()

    def _take(self, row: Any) -> bool:
        """Put one pulled row into its lane and remember how far we are; False if the lane cannot take it."""
        subscriber = self._deliverer.subscribers.get(row[0])
        if subscriber is None:
            return False
        if not self._recall(row, Row.HELD):
            return False
        subscriber.after = (row[1], row[2])
        return True

    def _finish(self, subscriber: Subscriber) -> None:
        """A pull came back short: whatever is held is in memory, and what comes next may go straight to the lane."""
        subscriber.backlog = False
        subscriber.rewind()

    def _recall(self, row: Any, kind: Row) -> bool:
        """Make a delivery of a pending row and hand it over; False if its lane cannot take it now."""
        endpoint_id, seq, generation, attempts, _due, _state, xid, written_at, event_id, _account, type_, data, created_at = row
        key = (endpoint_id, seq, generation)
        if key in self._deliverer.rows:
            return True
        endpoint = self._registry().by_id(endpoint_id)
        if endpoint is None or endpoint.status is EndpointStatus.DISABLED:
            self._bury_row(row, "the webhook was deleted" if endpoint is None else "the webhook is disabled")
            return True
        subscriber = self._deliverer.subscriber(endpoint)
        try:
            if event_id is None:
                raise Undeliverable("the event is older than the retention of events")
            payload = Payload(event_id, type_, created_at, data)
        except Undeliverable as error:
            self._bury_row(row, str(error))
            return True
        delivery = Delivery(Event(seq, xid, written_at, payload), subscriber, None, generation, attempts, kind)
        if self._deliverer.recall(delivery):
            return True
        if kind is Row.DUE:
            self._deliverer.park(delivery)
        return False

    def _bury_row(self, row: Any, reason: str) -> None:
        self._ledger.discard_row(row, reason)
        self._telemetry.deliveries[_DISCARDED] += 1

    async def _bury(self) -> None:
        """Discard what is held for webhooks that are gone or disabled, a bounded step at a time."""
        positions = [(endpoint_id, *after, ORPHAN_ROWS) for endpoint_id, after in list(self._orphans.items())[:4]]
        rows = await self._pending.pull(positions)
        for endpoint_id, _, _, _ in positions:
            own = [row for row in rows if row[0] == endpoint_id]
            for row in own:
                self._bury_row(row, "the webhook is gone or disabled")
            if len(own) < ORPHAN_ROWS:
                del self._orphans[endpoint_id]
            else:
                self._orphans[endpoint_id] = (own[-1][1], own[-1][2])
        if self._orphans:
            self._wake.set()

    def orphaned(self, endpoint_id: int) -> None:
        """A webhook was deleted or disabled: what is held for it goes."""
        self._orphans[endpoint_id] = (-1, -1)
        self._wake.set()

    def reset(self) -> None:
        """Start over from the database: nothing is in the wheel."""
        self._wheel = Wheel(elapsed_tick(self._loop.time()))
        self._frontier = BEGINNING
        self._hungry.clear()
        self._orphans.clear()
