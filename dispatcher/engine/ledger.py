"""What happened, on its way to PostgreSQL: group commit with a fence.

**Problem.** A transaction per delivery is a WAL flush per delivery; a buffer that is lost is a duplicate per row.

**Rule.** Outcomes collect for some milliseconds or a thousand rows and go down in one statement, one transaction:
first the shard's row (cursor, and the fence: a newer epoch there ends us), then attempts, pending rows, settled rows.
The cursor written is that of the oldest page not wholly resolved, so it never passes a delivery that is neither
settled nor pending.

**Order.** A delivery leaves memory for good only after its batch has committed: then `on_commit` learns which pending
rows stand now, and the wheel compares them with its frontier.

**Edge.** A connection cut in the middle of a commit leaves the batch in doubt. It is kept, with its number; on the
next connection it is sent again, and PostgreSQL, which knows the number of the last one, writes it or finds it
written: no attempt is ever logged twice. When too much is buffered, `full` stops the dispatching: lanes fill, the
reader stops.

**Source.** Group commit: Gawlick and Kinkade, "Varieties of Concurrency Control in IMS/VS Fast Path" (1985).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from dispatcher.core.attempt import Attempt
from dispatcher.engine.delivery import Delivery, OpenPage, Subscriber
from dispatcher.model import DeliveryKey, DeliveryState, Endpoint
from dispatcher.store.endpoints import EndpointHealth
from dispatcher.store.outbox import Cursor
from dispatcher.store.shard import HELD_UNTIL, Batch, ShardStore
from dispatcher.telemetry import Telemetry

BATCH_ROWS_MAX: Final = 1000  # 2 µs a row in PostgreSQL: 2-3 ms, short beside the fsync it shares
DELAY_S: Final = 0.050  # what a row may wait for company: at 200 rows/s ten share a flush and its fsync
BUSY_ROWS: Final = 40  # company enough not to wait that long, since a crash sends what waits once more; but
BUSY_DELAY_S: Final = 0.020  # never more flushes than one in this time, short of BATCH_ROWS_MAX
GENTLE_DELAY_S: Final = 0.003  # beside first attempts retries are written in small flushes, below 13,000 rows/s
CURSOR_DELAY_S: Final = 0.5  # a cursor that moved with nothing to write beside it
ERROR_CHARS_MAX: Final = 500  # of an error's text: it may quote what a peer sent
DURATION_US_MAX: Final = 2**31 - 1  # PostgreSQL's integer ends here

_DELIVERED: Final = DeliveryState.DELIVERED.value
_DISCARDED: Final = DeliveryState.DISCARDED.value
_EXHAUSTED: Final = DeliveryState.EXHAUSTED.value


@dataclasses.dataclass(slots=True)
class _Parked:
    """What of one webhook was parked: how many, and the oldest of them."""

    rows: int
    oldest: tuple[int, int]  # event sequence, generation


@dataclasses.dataclass(slots=True)
class _Open:
    """What collects until the next flush."""

    attempts: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    pending: dict[DeliveryKey, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    settled: list[DeliveryKey] = dataclasses.field(default_factory=list)
    discarded: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    pages: list[OpenPage] = dataclasses.field(default_factory=list)
    parked: dict[Subscriber, _Parked] = dataclasses.field(default_factory=dict)
    left: list[DeliveryKey] = dataclasses.field(default_factory=list)  # no longer in memory once this has committed
    disabled: dict[int, str] = dataclasses.field(default_factory=dict)
    health: dict[int, EndpointHealth] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.attempts) + len(self.pending) + len(self.discarded)

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.settled or self.disabled or self.health)


@dataclasses.dataclass(slots=True)
class Committed:
    """What a committed batch means for memory."""

    due: list[tuple[DeliveryKey, datetime]]  # pending rows with a time
    left: list[DeliveryKey]  # deliveries no longer in memory
    parked: list[Subscriber]  # whose held rows can be pulled from now on


class Ledger:
    """Collects outcomes and writes them down in batches."""

    def __init__(
        self,
        telemetry: Telemetry,
        loop: asyncio.AbstractEventLoop,
        *,
        buffered_max: int,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._telemetry = telemetry
        self._loop = loop
        self._wall = wall
        self.buffered_max = buffered_max
        self._open = _Open()
        self._doubt: tuple[Batch, _Open] | None = None  # sent, and nobody knows whether it arrived
        self._number = 0  # of the last batch
        self._finishing = False
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._urgent = False
        self._flushed_at = 0.0  # loop time at which the last flush began
        self.gentle_until = 0.0  # loop time: until then somebody waits for the cores that a long flush takes
        self._health: dict[int, EndpointHealth] = {}
        self.on_commit: Callable[[Committed], None] = lambda committed: None
        self.cursor: Callable[[], Cursor | None] = lambda: None  # asked at each flush: how far everything is resolved
        self._written: Cursor | None = None
        self.disable_after_s: float | None = None  # of nothing but failures; None: never

    # ── what happened, synchronously ───────────────────────────────────────────────────────────────────────────────

    @property
    def buffered(self) -> int:
        """Rows not committed yet."""
        return self._open.rows + (self._doubt[1].rows if self._doubt else 0)

    @property
    def full(self) -> bool:
        """Whether dispatching must wait for PostgreSQL."""
        opened = self._open  # counted in place: asked after each attempt
        return len(opened.attempts) + len(opened.pending) + len(opened.discarded) >= self.buffered_max

    def attempt(self, delivery: Delivery, attempt: Attempt | None, state: str, number: int, error: str | None) -> None:
        """Log an attempt, or with None a delivery settled without one. `state` is the delivery's state after it."""
        event = delivery.event
        endpoint_id = delivery.subscriber.endpoint.id
        if attempt is None:
            row: tuple[Any, ...] = (
                event.seq, event.xid, endpoint_id, delivery.generation, number, state, None, None, 0, _storable(error),
                None, None,
            )  # fmt: skip
        else:
            row = (
                event.seq, event.xid, endpoint_id, delivery.generation, number, state, attempt.result,
                attempt.status or None, min(int(attempt.duration_s * 1e6), DURATION_US_MAX),
                error and _storable(error), attempt.head, attempt.body,
            )  # fmt: skip
        opened = self._open
        opened.attempts.append(row)
        if delivery.page is not None:
            opened.pages.append(delivery.page)
            delivery.page = None
        rows = len(opened.attempts)
        if not self._urgent or rows == BUSY_ROWS or rows >= BATCH_ROWS_MAX:
            self._arm()

    def pending(
        self, delivery: Delivery, state: str, due: datetime, error: str | None, *, straggler: bool = False
    ) -> None:
        """Write a delivery's pending row. Unless it is a straggler's, the delivery leaves memory with it."""
        event, key = delivery.event, delivery.key
        endpoint_id, seq, generation = key
        opened = self._open
        opened.pending[key] = (
            endpoint_id, seq, generation, event.xid, event.written_at, state, delivery.attempts, due,
            error and _storable(error),
        )  # fmt: skip
        if not straggler:
            opened.left.append(key)
            if due is HELD_UNTIL:
                parked = opened.parked.get(delivery.subscriber)
                if parked is None:
                    opened.parked[delivery.subscriber] = _Parked(1, (seq, generation))
                else:
                    parked.rows += 1
                    if seq <= parked.oldest[0]:
                        parked.oldest = min(parked.oldest, (seq, generation))
        self._resolve(delivery)
        self._arm()

    def settled(self, delivery: Delivery) -> None:
        """Remove a delivery's pending row."""
        self.settle_key(delivery.key)

    def settle_key(self, key: DeliveryKey) -> None:
        """Remove a pending row by name."""
        opened = self._open
        opened.pending.pop(key, None)
        opened.settled.append(key)
        opened.left.append(key)
        self._arm()

    def discard_row(self, row: Any, reason: str) -> None:
        """Settle a pending row (a record of the pending store) as discarded, without its delivery in memory."""
        endpoint_id, seq, generation, attempts, xid = row[0], row[1], row[2], row[3], row[6]
        self._open.attempts.append(
            (seq, xid, endpoint_id, generation, attempts, _DISCARDED, None, None, 0, reason, None, None)
        )
        self.settle_key((endpoint_id, seq, generation))

    def discard_event(self, seq: int, reason: str) -> None:
        """Log that no body can be made of an event; who finds it says so, and once is enough."""
        self._open.discarded.append((seq, reason))
        self._arm()

    def disable(self, endpoint_id: int, reason: str) -> None:
        """Disable a webhook with the next flush."""
        self._open.disabled[endpoint_id] = reason
        self._arm()

    def learn(self, endpoint: Endpoint, state: str, error: str | None) -> None:
        """Note how a webhook fares; only a change costs a row."""
        old = self._health.get(endpoint.id)
        if state == _DELIVERED:
            if old is None or old.failing_since is None:
                return
            new = EndpointHealth(endpoint.id, None, None, None)
        else:
            now = datetime.fromtimestamp(self._wall(), UTC)
            since = old.failing_since if old and old.failing_since else now
            if self.disable_after_s is not None and (now - since).total_seconds() >= self.disable_after_s:
                self.disable(endpoint.id, f"nothing but failures since {since:%Y-%m-%dT%H:%M:%SZ}: {_storable(error)}")
            exhausted = old.exhausted_at if old else None
            if exhausted is None and state == _EXHAUSTED:
                exhausted = now
            if old and old.failing_since and old.exhausted_at == exhausted:
                return
            new = EndpointHealth(endpoint.id, since, exhausted, _storable(error))
        self._health[endpoint.id] = self._open.health[endpoint.id] = new

    def forgive(self, endpoint_id: int) -> None:
        """A webhook was resumed: its owner has mended it, and its row is gone."""
        self._health.pop(endpoint_id, None)
        self._open.health.pop(endpoint_id, None)

    def learnt_of(self) -> list[int]:
        """The webhooks whose health is remembered."""
        return list(self._health)

    def load_health(self, health: dict[int, EndpointHealth]) -> None:
        """Start from what is in the database."""
        self._health = health

    def touch(self) -> None:
        """Have the cursor written before long, with or without anything else."""
        if self._timer is None and not self._wake.is_set():
            self._timer = self._loop.call_later(CURSOR_DELAY_S, self._ring)

    def _resolve(self, delivery: Delivery) -> None:
        if delivery.page is not None:
            self._open.pages.append(delivery.page)
            delivery.page = None

    def _arm(self) -> None:
        rows = len(self._open.attempts)
        if rows >= BATCH_ROWS_MAX:
            self._wake.set()
        elif not self._urgent:
            self._urgent = True
            self._ring_at(self._loop.time() + DELAY_S)
        elif rows == BUSY_ROWS:
            now = self._loop.time()
            is_gentle = now < self.gentle_until and now >= self._flushed_at + GENTLE_DELAY_S
            self._ring_at(now if is_gentle else max(now, self._flushed_at + BUSY_DELAY_S))

    def _ring_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._wake.set()

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, shard: ShardStore, endpoints: Any, epoch: int) -> None:
        """Flush until told to finish. Raises Fenced, or whatever broke the connection; the batch in doubt is kept."""
        while not self._finishing:
            await self._wake.wait()
            await self.flush(shard, endpoints, epoch)

    def finish(self) -> None:
        """Let `run` write what is there and return. Cancelling it instead would leave a batch in doubt."""
        self._finishing = True
        self._wake.set()

    async def flush(self, shard: ShardStore, endpoints: Any, epoch: int) -> None:
        """Write everything collected so far. `endpoints` is the store of webhooks."""
        assert self._doubt is None, "a batch in doubt is settled before the next one"
        self._wake.clear()
        self._urgent = False
        self._flushed_at = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        opened, self._open = self._open, _Open()
        for page in opened.pages:
            page.left -= 1
        cursor = self.cursor()
        if opened.is_empty and cursor == self._written:
            return
        self._number += 1
        batch = Batch(
            self._number,
            opened.attempts,
            list(opened.pending.values()),
            opened.settled,
            sorted(opened.discarded),  # other shards may write the same ones: all in one order, or they would deadlock
            cursor,
        )
        self._doubt = (batch, opened)
        with self._telemetry.timed("flush"):
            is_new = await self._send(shard, endpoints, epoch, batch, opened)
        assert is_new, f"batch {batch.number} was written by somebody else in our epoch"

    async def _send(self, shard: ShardStore, endpoints: Any, epoch: int, batch: Batch, opened: _Open) -> bool:
        if opened.disabled or opened.health:
            await endpoints.learn(opened.disabled, list(opened.health.values()))
        is_new = await shard.flush(epoch, batch)
        self._telemetry.settle_batch_size.observe(len(batch.attempts))
        self._committed(batch, opened)
        return is_new

    def _committed(self, batch: Batch, opened: _Open) -> None:
        self._doubt = None
        self._written = batch.cursor or self._written
        for subscriber, parked in opened.parked.items():
            subscriber.unflushed -= parked.rows
            subscriber.awaited = max(0, subscriber.awaited - parked.rows)
            seq, generation = parked.oldest
            subscriber.rewind((seq, generation - 1))
        due = [(key, row[7]) for key, row in opened.pending.items() if row[7] is not HELD_UNTIL]
        self.on_commit(Committed(due, opened.left, list(opened.parked)))

    async def resume(self, shard: ShardStore, endpoints: Any, epoch: int, last_batch: int) -> None:
        """On a new connection, before anything else: settle the batch in doubt, or count on from the shard's."""
        self._written = None
        self._finishing = False
        if self._doubt is None:
            self._number = last_batch
            return
        batch, opened = self._doubt
        # Whose transaction ids the next cursor holds is decided after this; until then it stays where it is.
        batch.cursor = None
        await self._send(shard, endpoints, epoch, batch, opened)

    def abandon(self) -> None:
        """Another daemon owns the shard: nothing of this may be written any more."""
        opened = [self._open] + ([self._doubt[1]] if self._doubt else [])
        for each in opened:
            for subscriber, parked in each.parked.items():
                subscriber.unflushed -= parked.rows
        self._open, self._doubt, self._health = _Open(), None, {}


def _storable(error: str | None) -> str | None:
    """What of an error's text PostgreSQL takes: no NUL, no lone surrogate, of bounded length."""
    if error is None:
        return None
    return error[:ERROR_CHARS_MAX].replace("\0", "\ufffd").encode("utf-8", "replace").decode()
