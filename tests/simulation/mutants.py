"""Bugs planted by hand, each a plausible one: the simulation must find every one of them.

A mutant is a method whose source has a piece or two replaced. When the engine is rewritten, a mutant that no longer
applies says so, and is planted anew where its mistake could be made now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from world import Plan

from dispatcher.core.lanes import Lanes
from dispatcher.engine.deliverer import Deliverer
from dispatcher.engine.engine import Engine
from dispatcher.engine.ledger import Ledger
from dispatcher.engine.outbox import OutboxReader
from dispatcher.engine.retries import Retries
from dispatcher.store.outbox import OutboxPages
from dispatcher.store.retention import Retention
from dispatcher.store.shard import ShardStore


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake: in `owner.method`, `old` becomes `new`. `adjust` makes worlds in which it may matter.

    `also` is a second piece and what becomes of it, where one mistake alone is caught by the engine itself.
    """

    name: str
    owner: type
    method: str
    old: str
    new: str
    adjust: Callable[[Plan], None] = lambda plan: None
    also: tuple[str, str] = ("", "")

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        original = inspect.getattr_static(self.owner, self.method)
        source = "if True:\n" + inspect.getsource(original)
        for piece, other in ((self.old, self.new), self.also):
            assert piece in source, f"{self.name}: {self.owner.__name__}.{self.method} has changed; plant it anew"
            source = source.replace(piece, other) if piece else source
        space: dict[str, Any] = dict(vars(sys.modules[self.owner.__module__]))
        exec(compile(source, f"<mutant: {self.name}>", "exec"), space)
        with mock.patch.object(self.owner, self.method, space[self.method]):
            yield


def _stormy(plan: Plan) -> None:
    plan.kind, plan.faults = "stormy", max(plan.faults, 10)


def _duel(plan: Plan) -> None:
    plan.kind, plan.daemons, plan.faults = "duel", 2, 16


def _fleet(plan: Plan) -> None:
    _duel(plan)
    plan.daemons, plan.shards, plan.webhooks = 3, 3, max(plan.webhooks, 4)


def _in_order(plan: Plan) -> None:
    plan.kind, plan.daemons, plan.ordered, plan.webhooks = "stormy", 1, 1.0, 2
    plan.slow = "flush"


def _enabled_again(plan: Plan) -> None:
    _in_order(plan)
    plan.disable_after_s, plan.faults, plan.acts = 1.0, 12, ("_change_mood",)


def _killed(plan: Plan) -> None:
    _in_order(plan)
    plan.faults, plan.acts = 12, ("_change_mood", "_burn")


def _read_again(plan: Plan) -> None:
    _in_order(plan)
    plan.length_s, plan.transactions, plan.burst, plan.page_rows, plan.max_queued = 10.0, 5, 120, 10, 16
    plan.faults, plan.acts = 16, ("_burn", "_restart_server", "_cut", "_cut")


def _asleep(plan: Plan) -> None:
    _stormy(plan)
    plan.daemons, plan.acts = 1, ("_suspend", "_cut", "_change_mood", "_pause", "_burn")


def _slow_refill(plan: Plan) -> None:
    plan.kind, plan.daemons, plan.faults, plan.transactions = "stormy", 1, 0, 30
    plan.length_s, plan.failing, plan.slow = 6.0, True, "refill"


def _few(plan: Plan) -> None:
    _calm(plan)
    plan.faults, plan.transactions, plan.burst, plan.length_s = 0, 3, 120, 30.0


def _calm(plan: Plan) -> None:
    plan.kind, plan.faults, plan.daemons = "calm", 3, 1
    plan.safety_s, plan.max_queued, plan.max_in_flight, plan.transactions = (1e6, 2e6), 20_000, 2000, 30


MUTANTS = [
    Mutant(
        "the fence is skipped",
        ShardStore, "flush",
        "                epoch,\n                batch.number,\n",
        "                (state := self._connection.backend.server.shards[self._shard])['epoch'],\n"
        "                state['batch'] + 1,\n",
        _duel,
    ),
    Mutant(
        "the frontier is published after the select",
        Retries, "_refill",
        "            self._frontier = end  # published first; see Order\n"
        "            with self._telemetry.timed(\"refill\"):\n"
        "                rows = await self._pending.refill(start, end, limit)\n",
        "            rows = await self._pending.refill(start, end, limit)\n"
        "            self._frontier = end\n",
        _slow_refill,
    ),
    Mutant(
        "a straggler gets no pending row",
        Deliverer, "insure",
        "self._ledger.pending(delivery, _PENDING, due, None, straggler=True)",
        "self._ledger._resolve(delivery)",
        _stormy,
    ),
    Mutant(
        "what is to be held is forgotten",
        Deliverer, "park",
        "self._write_row(delivery, HELD_UNTIL)",
        "self._ledger._resolve(delivery)",
        _stormy,
    ),
    Mutant(
        "no barrier before sleeping: lock, poll once, sleep",
        OutboxReader, "_fall_asleep",
        "self._barrier = await self._connection.fetchval(self._sql[\"own_xid\"])",
        "self._barrier = 0",
        _few,
    ),
    Mutant(
        "the cursor goes past what is not resolved",
        OutboxReader, "cursor",
        "pages[0].left == 0",
        "pages[0].left >= 0",
        _stormy,
    ),
    Mutant(
        "a released request keeps its place in the window",
        Deliverer, "_done",
        "        dead = self.lanes.done(",
        "        dead = None if outcome is RELEASED else self.lanes.done(",
        _stormy,
    ),
    Mutant(
        "a retry is planned without its delay",
        Deliverer, "_retry",
        "wall + delay_s",
        "wall + delay_s * 0.5",
        _stormy,
    ),
    Mutant(
        "retries fire a second early",
        Retries, "_fire",
        "if row[4] > wall:",
        "if False:",
        _stormy,
        also=("elapsed_tick(self._loop.time())", "elapsed_tick(self._loop.time() + 1.0)"),
    ),
    Mutant(
        "ordered: the others do not wait for the head",
        Deliverer, "_wait_for",
        "subscriber.head_key = delivery.key",
        "pass",
        _stormy,
    ),
    Mutant(
        "ordered: what is read again may be pulled for before it is in the database",
        OutboxReader, "_route",
        "if self.recovering:  # what is held",
        "if False:  # what is held",
        _read_again,
    ),
    Mutant(
        "ordered: a webhook that is disabled forgets its head",
        Deliverer, "_disable",
        "        self.lanes.pause(subscriber.lane)\n",
        "        self.lanes.pause(subscriber.lane)\n        subscriber.head_key = None\n",
        _enabled_again,
    ),
    Mutant(
        "ordered: a webhook that is enabled again sends before it has looked at what is left",
        Deliverer, "_update",
        "if old.status is EndpointStatus.DISABLED:",
        "if False:",
        _enabled_again,
    ),
    Mutant(
        "ordered: a new session does not look for heads",
        Retries, "start",
        "subscriber.head_key = heads.get(endpoint_id)",
        "subscriber.head_key = None",
        _killed,
    ),
    Mutant(
        "retention does not ask what is pending",
        Retention, "_limits",
        'min(needed)',
        'row["cursor"]',
        _asleep,
    ),
    Mutant(
        "a transaction that was open while the clock leapt is looked for on the days after",
        OutboxPages, "read",
        "since = self._floor if self._barrier != 0 else max",
        "since = max",
        _asleep,
    ),
    Mutant(
        "a pause is not heeded",
        Deliverer, "apply",
        "if endpoint.status is EndpointStatus.PAUSED:",
        "if endpoint.status is None:",
        _calm,
    ),
    Mutant(
        "a batch whose answer was lost is written twice",
        Ledger, "resume",
        "        batch.cursor = None\n",
        "        batch.cursor = None\n        batch.number = self._number = last_batch + 1\n",
        _stormy,
    ),
    Mutant(
        "a batch whose answer was lost is forgotten",
        Ledger, "resume",
        "        await self._send(shard, endpoints, epoch, batch, opened)\n",
        "        self._committed(batch, opened)\n        self._number = last_batch\n",
        _stormy,
    ),
    Mutant(
        "one request more than the window allows",
        Lanes, "next",
        "busy >= size",
        "busy > size",
        _calm,
    ),
    Mutant(
        "the rate limit is forgotten",
        Lanes, "next",
        "if lane.interval_s:",
        "if False:",
        _calm,
    ),
    Mutant(
        "a changed registry is not loaded before the page is routed",
        OutboxReader, "run",
        "page.registry > self.registry.version",
        "page.registry < 0",
        _calm,
    ),
    Mutant(
        "after a take-over, what is settled is not left out",
        OutboxReader, "_known",
        "return {(row[0], row[1]) for row in rows}",
        "return set()",
        _stormy,
    ),
    Mutant(
        "the oldest page of a difference is read again from the wrong place",
        OutboxReader, "run",
        "            cursor = page.after\n",
        "            cursor = page.after if page.complete or not page.rows or page.rows[-1][3] % 7 else start\n",
        _stormy,
    ),
    Mutant(
        "a shard heeds what was told of another's webhook, takes it for deleted, and discards",
        Engine, "_work",
        "if shard_of(int(numbers[0]), self.shards) == self.shard:",
        "if True:",
        _fleet,
    ),
]  # fmt: skip
