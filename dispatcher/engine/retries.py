"""What waits: retries by the clock, and the backlogs of webhooks that could not take more.

**Problem.** Millions of deliveries may wait, most of them minutes away or for a webhook that is down. They must
survive us, fire on time, and not fill memory.

**Rule, due.** Every waiting delivery is a pending row: PostgreSQL is the overflow wheel. A ring in memory holds the
keys of what is due before the *frontier*, some minutes ahead, and is refilled below half. What fires is fetched with
its event, in batches.

**Rule, storms.** A hundred thousand may come due in one second. They are sent in steps, and beside first attempts each
step is short and followed by a rest as long as it took: where everything is slow the rests are long, and where nobody
is disturbed there are none. Whatever happens, a turn ends after a quarter of a second, and the other duties follow.

**Order.** Refill publishes the frontier, then selects; the ledger commits, then compares with the frontier. Of the
four orders only this one loses nothing: a row committed before the select is selected, one committed after it finds
the frontier published.

**Rule, held.** A webhook with a backlog has rows due at infinity. They are pulled oldest first, a few at a time,
whenever its lane runs low; new deliveries go behind them. A pull that comes back short ends that, at once for
ordinary webhooks (what is still on its way into the database is pulled when it is there), and for ordered ones when
nothing is on its way. A dead webhook is pulled for a probe when its time is over.

**Invariant, held.** A pull sees a snapshot older than the moment its rows arrive. So what left memory meanwhile is
skipped (`_gone`: its row has changed), and nothing is taken from behind the point where something was put back or in
meanwhile (`behind`): the position never passes a row that nobody has seen. Only a pull during which nothing of that
webhook was parked proves that nothing is held.

**Edge.** A key that fires while its delivery is in memory (a straggler still in flight) is skipped: whoever has it
settles it. So is one whose row says later than the wheel: it was read before a newer time was written. Rows of
webhooks that are gone or disabled are pulled like any backlog and discarded. A wheel that can hold no more, or not so
far ahead, lowers the frontier: what lies beyond comes back with a refill.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from dispatcher.core.lanes import LATENCY_START_S
from dispatcher.core.routing import Registry
from dispatcher.core.wheel import TICK_S, Wheel, due_tick, elapsed_tick
from dispatcher.core.window import Health
from dispatcher.engine.deliverer import Deliverer
from dispatcher.engine.delivery import FIRST_KEY, LAST_KEY, Delivery, Event, Row, Subscriber, payload_of
from dispatcher.engine.ledger import Committed, Ledger
from dispatcher.errors import Undeliverable
from dispatcher.model import DeliveryKey, DeliveryState, EndpointId, EndpointStatus
from dispatcher.moments import BEGINNING
from dispatcher.store.pending import PendingStore
from dispatcher.telemetry import Telemetry

HORIZON: Final = timedelta(minutes=15)  # below the ring's 17
REFILL_BELOW: Final = timedelta(minutes=7)
REFILL_ROWS: Final = 20_000
WHEEL_KEYS_MAX: Final = 200_000  # 50 MB of keys
# What comes due is fetched and sent in steps. Beside first attempts a step is short, and a rest as long follows: half
# of the machine is theirs, and whatever of it they need. Longer steps are cheaper (a row costs PostgreSQL 13 µs
# among 10 and 5 among 100) and worse neighbours: with 16 rows instead of 10 the first attempts' p99 is 1.9 times what
# it is without a storm, and not 1.4 times.
STEP_ROWS: Final = 100
STEP_ROWS_BESIDE: Final = 10
SLICE_ROWS: Final = 5  # 0.25 ms of the loop: answers, notifications and polls wait behind no more of a storm than that
BESIDE_S: Final = 1.0  # without a first attempt for so long, nobody is there to be disturbed
REST_S_MAX: Final = 0.020  # so that retries are not put off for ever where a step takes long
TURN_S: Final = 0.25  # how often backlogs and the frontier are looked after
PULL_ROWS: Final = 128  # per webhook and pull
PULL_AHEAD_S: Final = 0.1  # a lane is pulled for as much as it sends in that time, and again when half of it is gone
STALL_S: Final = 1.0  # who has not answered for so long gets no more than its window
PULL_ROWS_IN_ALL: Final = 1024  # 5 ms of parsing
PULLED_SHARE: Final = 2  # backlogs may fill half of the room for retries: what comes due needs some too
PROBE_ROWS: Final = 4
PULL_S: Final = 0.005
ORPHAN_ROWS: Final = 1000
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
        recovering: Callable[[], bool] = lambda: False,
        wall: Callable[[], float] = time.time,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._pending = pending
        self._deliverer = deliverer
        self._ledger = ledger
        self._telemetry = telemetry
        self._registry = registry
        self._recovering = recovering  # events older than what is held may still come
        self._wall = wall
        self._loop = loop or asyncio.get_running_loop()
        self._wheel: Wheel[DeliveryKey] = Wheel(elapsed_tick(self._loop.time()))
        self._frontier = BEGINNING
        self._hungry: dict[Subscriber, None] = {}  # in the order they became so
        self._gone: set[DeliveryKey] | None = None  # while a pull is under way: what left memory meanwhile
        self._orphans: dict[int, tuple[int, int]] = {}  # endpoint id of a webhook gone or disabled -> pulled up to
        self._told: dict[int, int] = {}  # endpoint id -> version of the registry that whoever told us had seen
        self._wake = asyncio.Event()
        self._notice_at = 0.0
        self._read = telemetry.read  # first attempts ever, when last looked at
        self._beside_until = 0.0  # loop time
        self.progress_at = self._loop.time()

    @property
    def waiting(self) -> int:
        """Keys in the wheel."""
        return len(self._wheel)

    # ── what others tell us ────────────────────────────────────────────────────────────────────────────────────────

    def committed(self, committed: Committed) -> None:
        """The ledger's batch stands: what left memory may be fetched again, what is due soon goes into the wheel."""
        subscribers = self._deliverer.subscribers
        if self._gone is not None:
            self._gone.update(committed.left)
        self._deliverer.rows.difference_update(committed.left)
        concerned = [subscribers.get(endpoint_id) for endpoint_id in {key[0] for key in committed.left}]
        heads = [subscriber for subscriber in concerned if subscriber is not None and subscriber.head_key is not None]
        if heads:
            ended = set(committed.left).difference(key for key, _ in committed.due)
            for subscriber in heads:
                if subscriber.head_key in ended:
                    subscriber.head_key = None  # settled, or held like the others: the oldest is next
                    self.hungry(subscriber)
        for subscriber in committed.parked:
            is_known = subscribers.get(subscriber.endpoint.id) is subscriber
            if is_known and subscriber.endpoint.status is not EndpointStatus.DISABLED:
                self.hungry(subscriber)
            else:  # deleted or disabled while its rows were on their way
                self.orphaned(subscriber.endpoint.id)
        for key, due in committed.due:
            self._wait(key, due)
        self._deliverer.pump()  # it may have stopped because the ledger was full

    def hungry(self, subscriber: Subscriber) -> None:
        """A webhook with something held may be able to take more."""
        if subscriber.held:
            self._hungry[subscriber] = None
            self._wake.set()

    def _wait(self, key: DeliveryKey, due: datetime) -> None:
        """Put a key into the wheel if it is due before the frontier."""
        if due >= self._frontier:
            return
        monotonic = due.timestamp() - self._wall() + self._loop.time()
        if len(self._wheel) >= WHEEL_KEYS_MAX or not self._wheel.insert(key, due_tick(monotonic)):
            self._frontier = due

    # ── the clock ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Learn from the database who has a backlog, and whom ordered webhooks wait for."""
        await self._pending.prepare()
        heads = await self._pending.heads()
        for endpoint_id in {*await self._pending.held_endpoints(), *heads}:
            endpoint = self._registry().by_id(EndpointId(endpoint_id))
            if endpoint is not None:
                subscriber = self._deliverer.subscriber(endpoint)
                if not endpoint.ordered:
                    subscriber.head_key = None
                elif subscriber.head_key not in self._deliverer.rows:  # else it failed just now
                    subscriber.head_key = heads.get(endpoint_id)
            self._adopt(endpoint_id)

    def _adopt(self, endpoint_id: int) -> None:
        """See to what is held: for its webhook, or to be discarded."""
        endpoint = self._registry().by_id(EndpointId(endpoint_id))
        if endpoint is None or endpoint.status is EndpointStatus.DISABLED:
            self.orphaned(endpoint_id)
            return
        subscriber = self._deliverer.subscriber(endpoint)
        subscriber.held = subscriber.backlog = True
        subscriber.rewind()
        self.hungry(subscriber)

    async def run(self) -> None:
        """Fire what is due at each tick, and look after the rest now and then, until cancelled."""
        while True:
            is_done = await self.turn()
            await asyncio.sleep(self._until_next() if is_done else 0)

    def _until_next(self) -> float:
        """Seconds until something is due, or until the next turn. A key that comes meanwhile waits for no longer."""
        now = self._loop.time()
        turn_at = (now // TURN_S + 1) * TURN_S
        tick = self._wheel.next_tick()
        return (turn_at if tick is None else min(turn_at, max(tick, elapsed_tick(now) + 1) * TICK_S)) - now

    async def turn(self) -> bool:
        """What is done each tick; False if more is due and could go on at once."""
        now = self.progress_at = self._loop.time()
        wall = datetime.fromtimestamp(self._wall(), UTC)
        if self._frontier - wall < REFILL_BELOW:
            await self._refill(wall)
        is_done = await self._fire(now + TURN_S)
        if now >= self._notice_at:
            self._notice_at = (now // TURN_S + 1) * TURN_S
            self._notice()
        return is_done

    async def _refill(self, wall: datetime) -> None:
        start, end = self._frontier, wall + HORIZON
        limit = min(REFILL_ROWS, WHEEL_KEYS_MAX - len(self._wheel))
        if limit <= 0:
            return
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
                self._wait(key, due)
        if len(rows) == limit:
            self._frontier = min(self._frontier, rows[-1][3])

    async def _fire(self, until: float) -> bool:
        """Send what is due, as far as there is room; False if that is not done `until` then (loop time)."""
        lanes = self._deliverer.lanes
        while True:  # also while it is empty: its horizon moves with it
            is_beside = self._is_beside()
            room = min(STEP_ROWS_BESIDE if is_beside else STEP_ROWS, lanes.retries_queued_max - lanes.retries_queued)
            if room <= 0 or self._ledger.full:
                return True
            fired = self._wheel.expire(elapsed_tick(self._loop.time()), room)
            if not fired:
                return True
            began = self._loop.time()
            if is_beside:
                self._ledger.gentle_until = began + TURN_S
            keys = [key for key in fired if key not in self._deliverer.rows]
            with self._telemetry.timed("fetch"):
                rows = await self._pending.fetch(keys)
            wall = datetime.fromtimestamp(self._wall(), UTC)
            for at in range(0, len(rows), SLICE_ROWS):
                for row in rows[at : at + SLICE_ROWS]:
                    if row[4] > wall:
                        self._wait((row[0], row[1], row[2]), row[4])
                    else:
                        self._recall(row, Row.DUE)
                self._deliverer.pump()
                await asyncio.sleep(0)
            self.progress_at = self._loop.time()
            if is_beside:
                await asyncio.sleep(min(self.progress_at - began, REST_S_MAX))
            if self._loop.time() >= until:
                return False

    def _is_beside(self) -> bool:
        """Whether there are first attempts beside the retries."""
        now, read = self._loop.time(), self._telemetry.read
        if read != self._read:
            self._read, self._beside_until = read, now + BESIDE_S
        return now < self._beside_until

    def _notice(self) -> None:
        """Webhooks whose death is over, or that were forgotten about, are hungry again."""
        if self._told:
            self._wake.set()
        now = self._loop.time()
        for subscriber in self._deliverer.subscribers.values():
            if subscriber.held and not subscriber.lane.paused:
                window = subscriber.lane.window
                if window.health is not Health.DEAD or now >= window.dead_until:
                    self.hungry(subscriber)
        if self._hungry and self._room_for_pulled <= 0:
            self._deliverer.spill_slow(STALL_S, STALL_S)

    # ── backlogs ───────────────────────────────────────────────────────────────────────────────────────────────────

    def told(self, endpoint_id: int, version: int) -> None:
        """Somebody else has committed held rows for a webhook, and had seen this version of the registry."""
        self._told[endpoint_id] = max(version, self._told.get(endpoint_id, version))
        self._wake.set()

    def _heed(self) -> None:
        """Take up what we were told, once our registry is as new: a webhook just made or resumed is not gone."""
        registry = self._registry()
        for endpoint_id in [key for key, version in self._told.items() if version <= registry.version]:
            del self._told[endpoint_id]
            endpoint = registry.by_id(EndpointId(endpoint_id))
            if endpoint is None or endpoint.status is EndpointStatus.DISABLED:
                self.orphaned(endpoint_id)
                continue
            subscriber = self._deliverer.subscriber(endpoint)
            subscriber.held = True
            # What happens now need not wait behind old events, unless order was promised.
            subscriber.backlog = subscriber.backlog or endpoint.ordered
            subscriber.parks += 1  # a pull under way does not prove that nothing is held
            subscriber.rewind()
            self.hungry(subscriber)

    async def run_backlogs(self) -> None:
        """Pull for the hungry until cancelled."""
        while True:
            await self._wake.wait()
            await self.turn_backlogs()
            await asyncio.sleep(PULL_S)

    async def turn_backlogs(self) -> None:
        """Pull once for all that are hungry now, as far as there is room."""
        self._wake.clear()
        self._heed()
        self._gone = set()
        try:
            await self._pull()
            if self._orphans:
                await self._bury()
        finally:
            self._gone = None

    def _appetite(self, subscriber: Subscriber) -> int:
        lane, window = subscriber.lane, subscriber.lane.window
        if not subscriber.held or lane.paused:
            return 0
        if subscriber.head_key is not None:
            return 0
        if subscriber.endpoint.ordered and (subscriber.awaited or self._recovering()):
            return 0
        if window.health is Health.DEAD:
            return PROBE_ROWS if self._loop.time() >= window.dead_until else 0
        lanes = self._deliverer.lanes
        wanted = self._wanted(subscriber)
        if len(lane.todo) * 2 > wanted:
            return 0
        return max(0, min(wanted - len(lane.todo), lanes.room_for_lane, self._room_for_pulled))

    def _wanted(self, subscriber: Subscriber) -> int:
        """How long its queue should be: webhooks that hang must not fill the room with what they cannot send."""
        lane = subscriber.lane
        window = max(1, lane.window.size)
        if lane.busy >= window and subscriber.answered_at < self._loop.time() - STALL_S:
            return window
        each_s = max((lane.latency_s or LATENCY_START_S) / window, lane.interval_s)
        return min(PULL_ROWS, max(window, int(PULL_AHEAD_S / each_s)))

    @property
    def _room_for_pulled(self) -> int:
        lanes = self._deliverer.lanes
        return lanes.retries_queued_max // PULLED_SHARE - lanes.retries_queued

    def _asking(self) -> list[tuple[Subscriber, int, int]]:
        """Whom to pull for: with how many at most, and its parks so far (-1 while some of them are on their way)."""
        asking = []
        room = min(PULL_ROWS_IN_ALL, self._room_for_pulled)
        while self._hungry and room > 0 and not self._ledger.full:
            subscriber = next(iter(self._hungry))
            del self._hungry[subscriber]
            most = min(room, self._appetite(subscriber))
            if most > 0 and self._deliverer.subscribers.get(subscriber.endpoint.id) is subscriber:
                room -= most
                asking.append((subscriber, most, -1 if subscriber.unflushed else subscriber.parks))
        return asking

    async def _pull(self) -> None:
        asking = self._asking()
        if not asking:
            return
        for subscriber, _, _ in asking:
            subscriber.behind = LAST_KEY
        with self._telemetry.timed("pull"):
            rows = await self._pending.pull([(s.endpoint.id, *s.after, most) for s, most, _ in asking])
        found: dict[int, list[Any]] = {}
        for row in rows:
            found.setdefault(row[0], []).append(row)
        for subscriber, most, parks in asking:
            if self._deliverer.subscribers.get(subscriber.endpoint.id) is subscriber:
                self._digest(subscriber, found.get(subscriber.endpoint.id, []), most, parks)
        self._deliverer.pump()

    def _digest(self, subscriber: Subscriber, rows: list[Any], most: int, parks: int) -> None:
        """Take what a pull brought for one webhook, and see whether that was all."""
        is_whole = all(self._take(subscriber, row) for row in rows)
        if not is_whole or len(rows) == most:
            if self._appetite(subscriber):
                self.hungry(subscriber)
        elif subscriber.parks == parks and subscriber.head_key is None:
            subscriber.held = subscriber.backlog = False
            subscriber.after = FIRST_KEY
        elif not subscriber.endpoint.ordered and not subscriber.lane.paused:
            # What came in meanwhile is pulled when it is committed. To hold everything until a pull meets no park at
            # all would cost a webhook under steady load a pending row per delivery, for ever.
            subscriber.backlog = False

    def _take(self, subscriber: Subscriber, row: Any) -> bool:
        """Put one pulled row into its lane and remember how far we are; False if that cannot be."""
        place = (row[1], row[2])
        if place > subscriber.behind or subscriber.head_key is not None or not self._recall(row, Row.HELD):
            return False
        subscriber.after = place
        return True

    def _recall(self, row: Any, kind: Row) -> bool:
        """Make a delivery of a pending row and hand it over; False if its lane cannot take it now."""
        endpoint_id, seq, generation, attempts, _, _, xid, written_us = row[:8]
        event_id, account, type_, data, created_us, traceparent = row[8:]
        key = (endpoint_id, seq, generation)
        if key in self._deliverer.rows or (kind is Row.HELD and self._has_left(key)):
            return True
        endpoint = self._registry().by_id(endpoint_id)
        if endpoint is None or endpoint.status is EndpointStatus.DISABLED:
            self._bury_row(row, "the webhook was deleted" if endpoint is None else "the webhook is disabled")
            return True
        subscriber = self._deliverer.subscriber(endpoint)
        if event_id is None:
            self._bury_row(row, "the event is older than the retention of events")
            return True
        try:
            payload = payload_of(event_id, type_, created_us, data)
        except Undeliverable as error:
            self._ledger.discard_event(seq, str(error))
            self._deliverer.journal.discarded_event(event_id, account, type_, str(error))
            self._bury_row(row, str(error))
            return True
        event = Event(seq, xid, written_us, payload, traceparent)
        return self._deliverer.recall(
            Delivery(event, subscriber, None, generation=generation, attempts=attempts, row=kind)
        )

    def _has_left(self, key: DeliveryKey) -> bool:
        return self._gone is not None and key in self._gone

    def _bury_row(self, row: Any, reason: str) -> None:
        self._deliverer.rows.add((row[0], row[1], row[2]))  # nobody takes it while it is on its way out
        self._ledger.discard_row(row, reason)
        self._telemetry.deliveries[_DISCARDED] += 1

    async def _bury(self) -> None:
        """Discard what is held for webhooks that are gone or disabled, a bounded step at a time."""
        for endpoint_id in [key for key in self._orphans if self._is_alive(key)]:  # enabled meanwhile
            del self._orphans[endpoint_id]
            self._adopt(endpoint_id)
        positions = [(endpoint_id, *after, ORPHAN_ROWS) for endpoint_id, after in list(self._orphans.items())[:4]]
        if not positions:
            return
        for endpoint_id, _, _, _ in positions:
            del self._orphans[endpoint_id]  # whoever finds another one meanwhile puts it back
        self._gone = set()  # what left memory before this pull is rightly in it
        rows = await self._pending.pull(positions)
        for endpoint_id, _, _, _ in positions:
            own = [row for row in rows if row[0] == endpoint_id]
            for row in own:
                key = (row[0], row[1], row[2])
                if key not in self._deliverer.rows and not self._has_left(key):
                    self._bury_row(row, "the webhook is gone or disabled")
            if len(own) == ORPHAN_ROWS:
                self._orphans.setdefault(endpoint_id, (own[-1][1], own[-1][2]))
            elif (subscriber := self._deliverer.subscribers.get(endpoint_id)) and not self._is_alive(endpoint_id):
                subscriber.held = subscriber.backlog = False
        if self._orphans:
            self._wake.set()

    def _is_alive(self, endpoint_id: int) -> bool:
        endpoint = self._registry().by_id(EndpointId(endpoint_id))
        return endpoint is not None and endpoint.status is not EndpointStatus.DISABLED

    def orphaned(self, endpoint_id: int) -> None:
        """A webhook was deleted or disabled: what is held for it goes."""
        self._orphans[endpoint_id] = FIRST_KEY
        self._wake.set()
