"""The engine's memory without a database and without a network.

A clock that stands still, a shelf for pending rows, and requests that are answered when the test says so. Whatever the
shelf hands out may arrive late, as over a connection.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from dispatcher.core.addresses import Guard
from dispatcher.core.attempt import Attempt
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.lanes import Lanes
from dispatcher.core.rendering import Payload
from dispatcher.core.routing import Registry
from dispatcher.engine.connection import Released
from dispatcher.engine.deliverer import Deliverer
from dispatcher.engine.delivery import Delivery, Event, OpenPage, Row
from dispatcher.engine.ledger import Ledger
from dispatcher.engine.retries import Retries
from dispatcher.model import AccountId, DeliveryKey, Endpoint, EndpointId, EndpointStatus, Result
from dispatcher.moments import of_datetime
from dispatcher.store.shard import HELD_UNTIL, Batch
from dispatcher.telemetry import Telemetry

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)


class Handle:
    """A timer of the clock."""

    def __init__(self, at: float, call: Callable[[], object]) -> None:
        self.at = at
        self.call: Callable[[], object] | None = call

    def when(self) -> float:
        return self.at

    def cancel(self) -> None:
        self.call = None


class Clock:
    """Stands in for the event loop where that is only asked for the time and for timers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._handles: list[Handle] = []

    def time(self) -> float:
        return self.now

    def wall(self) -> float:
        return EPOCH.timestamp() + self.now

    def call_at(self, at: float, call: Callable[..., object], *arguments: Any) -> Handle:
        handle = Handle(at, lambda: call(*arguments))
        self._handles.append(handle)
        return handle

    def call_later(self, delay_s: float, call: Callable[..., object], *arguments: Any) -> Handle:
        return self.call_at(self.now + delay_s, call, *arguments)

    def call_soon(self, call: Callable[..., object], *arguments: Any) -> Handle:
        return self.call_at(self.now, call, *arguments)

    def advance(self, by_s: float) -> None:
        end = self.now + by_s
        while due := [handle for handle in self._handles if handle.at <= end]:
            first = min(due, key=Handle.when)
            self._handles.remove(first)
            self.now = max(self.now, first.at)
            if first.call is not None:
                first.call()
        self.now = end


class Shelf:
    """What PostgreSQL would hold: attempts and pending rows. Stands in for the shard's and the pending store."""

    def __init__(self) -> None:
        self.attempts: list[tuple[Any, ...]] = []
        self.rows: dict[DeliveryKey, tuple[Any, ...]] = {}
        self.events: dict[int, Event] = {}
        self.dues: dict[DeliveryKey, datetime] = {}  # the last finite time written for a key
        self.late: asyncio.Event | None = None  # answers wait for it; what they say is older then

    async def _answer(self, answer: Any) -> Any:
        if self.late is not None:
            await self.late.wait()
        return answer

    async def flush(self, _epoch: int, batch: Batch) -> bool:
        final = [row for row in batch.attempts if row[5] != "retrying"]
        done = {(row[0], row[2], row[3]) for row in self.attempts if row[5] != "retrying"}
        assert not [row for row in final if (row[0], row[2], row[3]) in done], "a delivery was settled twice"
        assert len({(row[0], row[2], row[3]) for row in final}) == len(final), "a delivery was settled twice"
        self.attempts += batch.attempts
        for row in batch.pending:
            self.rows[row[0], row[1], row[2]] = row
            if row[7] is not HELD_UNTIL:
                self.dues[row[0], row[1], row[2]] = row[7]
        for key in batch.settled:
            self.rows.pop(key, None)
        return bool(await self._answer(True))

    async def prepare(self) -> None:
        """Nothing to prepare."""

    async def refill(self, start: datetime, end: datetime, limit: int) -> list[Any]:
        found = [(*key, row[7]) for key, row in self.rows.items() if row[7] is not HELD_UNTIL and start <= row[7] < end]
        return list(await self._answer(sorted(found, key=lambda row: row[3])[:limit]))

    async def fetch(self, keys: list[DeliveryKey]) -> list[Any]:
        found = [self.rows[key] for key in keys if key in self.rows and self.rows[key][7] is not HELD_UNTIL]
        return list(await self._answer([self._record(row) for row in found]))

    async def pull(self, positions: list[tuple[int, int, int, int]]) -> list[Any]:
        found: list[Any] = []
        for endpoint_id, seq, generation, most in positions:
            own = [
                row
                for key, row in sorted(self.rows.items())
                if key[0] == endpoint_id and key[1:] > (seq, generation) and row[7] is HELD_UNTIL
            ]
            found += own[:most]
        return list(await self._answer([self._record(row) for row in found]))

    async def held_endpoints(self) -> list[int]:
        return sorted({key[0] for key, row in self.rows.items() if row[7] is HELD_UNTIL})

    async def heads(self) -> dict[int, DeliveryKey]:
        return {}

    def _record(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        event = self.events[row[1]]
        payload = event.payload
        return (
            row[0], row[1], row[2], row[6], row[7], row[5], row[3], of_datetime(row[4]), payload.event_id, "default",
            payload.type, "{}", of_datetime(EPOCH), None,
        )  # fmt: skip


class Desk:
    """Lanes, deliverer, ledger and retries of one shard, with the shelf behind and nobody in front."""

    def __init__(self, *endpoints: Endpoint, queued_max: int = 1000, in_flight_max: int = 100) -> None:
        self.clock = Clock()
        self.shelf = Shelf()
        self.telemetry = Telemetry()
        self.out: dict[Delivery, Callable[[Any, Attempt], None]] = {}  # requests not answered yet
        self.sent: list[tuple[int, int]] = []  # (endpoint id, event sequence), in order
        self.pages: list[OpenPage] = []
        self._numbers = itertools.count(1)
        self.ledger = Ledger(self.telemetry, self.clock, buffered_max=10_000)  # type: ignore[arg-type]
        self.lanes: Lanes[Delivery] = Lanes(
            queued_max=queued_max,
            lane_queued_max=queued_max,
            retries_queued_max=queued_max // 4,
            in_flight_max=in_flight_max,
        )
        self.deliverer = Deliverer(
            lanes=self.lanes,
            ledger=self.ledger,
            transport=SimpleNamespace(origin=lambda target, may_send: self),  # type: ignore[arg-type]
            guard=Guard(["127.0.0.0/8"], allow_http=True),
            telemetry=self.telemetry,
            ids=DeliveryIds(b"1" * 16),
            loop=self.clock,  # type: ignore[arg-type]
            jitter=0.0,
            user_agent="T",
            header_prefix="X-T-",
            wall=self.clock.wall,
        )
        self.registry = Registry(endpoints, 1)
        self.retries = Retries(
            self.shelf,  # type: ignore[arg-type]
            deliverer=self.deliverer,
            ledger=self.ledger,
            telemetry=self.telemetry,
            registry=lambda: self.registry,
            wall=self.clock.wall,
            loop=self.clock,  # type: ignore[arg-type]
        )
        self.deliverer.on_hungry = self.retries.hungry
        self.deliverer.on_dismissed = self.retries.orphaned
        self.ledger.on_commit = self.retries.committed
        self.deliverer.running = True

    # ── stands in for an origin of the transport ─────────────────────────────────────────────────────────────────

    def submit(
        self, _request: bytes, _timeout_s: float, done: Callable[[Any, Attempt], None], delivery: Delivery
    ) -> None:
        assert delivery.key not in {other.key for other in self.out if other is not delivery}, "sent by two owners"
        due = self.shelf.dues.get(delivery.key)
        assert due is None or not delivery.attempts or self.clock.wall() >= due.timestamp(), "sent early"
        self.out[delivery] = done
        self.sent.append((delivery.key[0], delivery.key[1]))

    def release_waiting(self, reason: str) -> None:
        pass

    def close(self) -> None:
        """The webhook has another URL, or is gone."""

    # ── what the test does ───────────────────────────────────────────────────────────────────────────────────────

    def emit(self) -> int:
        """One event for every webhook that is not disabled; return its sequence number."""
        seq = next(self._numbers)
        event = Event(seq, seq, of_datetime(EPOCH), Payload(f"evt_{seq}", "test.event", EPOCH, "{}"))
        self.shelf.events[seq] = event
        page = OpenPage(None, self.clock.now)
        self.pages.append(page)
        for endpoint in self.registry.match("default", "test.event"):
            page.left += 1
            self.deliverer.offer(Delivery(event, self.deliverer.subscriber(endpoint), page))
        page.left -= 1
        self.deliverer.pump()
        return seq

    def answer(self, delivery: Delivery, status: int) -> None:
        """Let a request come to a status; 0: to a timeout, -1: to nothing that counts."""
        done = self.out.pop(delivery)
        if status == -1:
            done(delivery, Released("our fault"))
        elif status == 0:
            done(delivery, Attempt(Result.TIMEOUT, error="timed out"))
        else:
            results = {2: Result.OK, 4: Result.CLIENT_ERROR, 5: Result.SERVER_ERROR}
            done(delivery, Attempt(results[status // 100], status=status))

    async def flush(self) -> None:
        await self.ledger.flush(self.shelf, SimpleNamespace(learn=self._learn), 1)  # type: ignore[arg-type]

    async def _learn(self, disabled: dict[int, str], _health: Any) -> None:
        for endpoint_id in disabled:
            self.set(endpoint_id, status=EndpointStatus.DISABLED)

    def set(self, endpoint_id: int, **changes: Any) -> None:
        """Change a webhook's settings; the engine sees them at once."""
        changed = [
            dataclasses.replace(endpoint, **changes) if endpoint.id == endpoint_id else endpoint
            for endpoint in self.registry
        ]
        self.registry = Registry(changed, self.registry.version + 1)
        self.deliverer.apply(self.registry.by_id)

    def delete(self, endpoint_id: int) -> None:
        left = [endpoint for endpoint in self.registry if endpoint.id != endpoint_id]
        self.registry = Registry(left, self.registry.version + 1)
        self.deliverer.apply(self.registry.by_id)

    async def settle(self, status: int = 200) -> None:
        """Go on until nothing is left to do."""
        for _ in range(3000):
            for delivery in list(self.out):
                self.answer(delivery, status)
            await self.flush()
            await self.retries.turn()
            await self.retries.turn_backlogs()
            self.check()
            self.clock.advance(0.25 if self.out or self.lanes.queued else 5.0)
            if not (self.shelf.rows or self.out or self.lanes.queued or self.ledger.buffered):
                return
        raise AssertionError(f"never done: {self.lanes}, {len(self.shelf.rows)} rows, {self.deliverer.subscribers}")

    # ── what must hold at every step ─────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        self.lanes.check()
        assert self.deliverer.balance == 0, "deliveries nobody can account for"
        queued = [
            getattr(entry, "item", entry)
            for s in self.deliverer.subscribers.values()
            for entry in (*s.lane.due, *s.lane.todo)
        ]
        keys = [delivery.key for delivery in (*queued, *self.deliverer.in_flight)]
        assert len(set(keys)) == len(keys), "a delivery has two owners"
        recalled = {d.key for d in (*queued, *self.deliverer.in_flight) if d.row is not Row.NONE}
        assert recalled <= self.deliverer.rows, "a delivery with a row is not known to have one"
        assert all(page.left >= 0 for page in self.pages), "a page was resolved more than once"

    def check_settled(self) -> None:
        """Nothing is left anywhere."""
        self.check()
        assert not self.deliverer.rows
        assert all(page.left == 0 for page in self.pages), "a page is held for ever"
        assert all(s.unflushed == 0 and s.head_key is None for s in self.deliverer.subscribers.values())

    def finals(self) -> dict[int, list[int]]:
        """Settled event sequences by endpoint, in the order they were settled."""
        found: defaultdict[int, list[int]] = defaultdict(list)
        for row in self.shelf.attempts:
            if row[5] != "retrying":
                found[row[2]].append(row[0])
        return dict(found)


def endpoint(number: int, **changes: Any) -> Endpoint:
    """A webhook that receives everything."""
    settings: dict[str, Any] = {
        "id": EndpointId(number), "public_id": f"wh_{number}", "account_id": AccountId(1), "account": "default",
        "url": f"http://127.0.0.1/{number}", "events": ("*",), "status": EndpointStatus.ACTIVE,
        "schedule_s": (1.0, 5.0, 40.0),
    }  # fmt: skip
    return Endpoint(**settings | changes)
