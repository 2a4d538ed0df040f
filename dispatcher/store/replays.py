"""Replays: new deliveries of old events, for one webhook.

A replay is a row that says which events, and how far it has come. The engine moves it a step at a time: look at some
hundred events, write a held pending row for each that is chosen, and remember the place, all in one transaction. So a
replay survives restarts, queues each event once whoever takes its steps, and never has more than a few hundred rows
waiting: what happens meanwhile does not queue up behind it.

    all       every event the webhook asks for
    failed    those that were given up (exhausted or discarded) and never arrived
    missed    those that never arrived: the failed ones, those from while it was disabled or did not ask for them, and
              those from before it existed

None of them takes what is on its way already: what has a pending row; and, of the missed, what was written so
recently that it may still be in memory, unless it is older than the webhook.

Events are taken in the order of their ids, which is that of the time for ids made here, and `since` and `until` are
about when an event was written.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

import msgspec

from dispatcher.model import EndpointStatus, new_id
from dispatcher.store.database import statements

ID_PREFIX: Final = "rpl_"
STEP_EVENTS: Final = 500  # deliveries made in a step: 5 ms of PostgreSQL's time
LOOK_EVENTS: Final = 2000  # events looked at for that, at 20-50 µs each
HELD_MAX: Final = 500  # waiting at the webhook: the next step comes when there are fewer
COUNT_EVENTS: Final = 10_000  # events a preview looks at: ≈ 0.3 s
PASS_EVENTS: Final = 20_000  # events of the same days but outside the times asked for, passed in a step: ≈ 0.1 s
COUNT_PASS_EVENTS: Final = 400_000  # and in a preview: ≈ 2 s
JOBS: Final = 50  # taken at a time
RUNNING_MAX: Final = 10  # replays of one webhook under way at once
MEMORY: Final = timedelta(seconds=15)  # how long an event may be in the engine's memory only: it is spilled after 10 s

DAY: Final = timedelta(days=1)

_DELIVERED: Final = 3
_GIVEN_UP: Final = 2


class Selection(StrEnum):
    """Which events to replay."""

    FAILED = "failed"
    ALL = "all"
    MISSED = "missed"


class ReplayStatus(StrEnum):
    """Where a replay stands."""

    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"  # by its owner, or because its webhook was disabled


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which events: `types`, filters like a webhook's, narrows what the webhook asks for; None narrows nothing."""

    selection: Selection
    since: datetime
    until: datetime
    types: Sequence[str] | None = None


class ReplayRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A replay and its progress."""

    id: str
    selection: Selection
    types: list[str] | None
    since: datetime
    until: datetime
    status: ReplayStatus
    reason: str | None
    reached_at: datetime | None  # when the last event looked at was written
    first_seq: int | None  # of the events looked at: the first,
    reached_seq: int | None  # the last so far,
    newest_seq: int | None  # and the last there was at the beginning; None: it ends earlier than that
    looked: int
    queued: int
    created_at: datetime
    finished_at: datetime | None

    @property
    def progress(self) -> float:
        """From 0 to 1, estimated: events are not counted beforehand."""
        if self.status is ReplayStatus.DONE:
            return 1.0
        if self.reached_at is None or self.first_seq is None or self.reached_seq is None:
            return 0.0
        if self.newest_seq is None:
            share = (self.reached_at - self.since) / (self.until - self.since)
        else:
            share = (self.reached_seq - self.first_seq + 1) / max(1, self.newest_seq - self.first_seq + 1)
        return round(min(max(share, 0.0), 0.99), 3)


class ReplayPreview(msgspec.Struct, frozen=True):
    """What a replay would queue. `is_whole` is False when there was more to look at: then `count` is a lower bound.

    `looked` counts the events of the times asked for.
    """

    count: int
    looked: int
    is_whole: bool


class ReplayStore:
    """All that touches replays. `db` is a pool or a connection of asyncpg; steps need a connection."""

    def __init__(
        self,
        db: Any,
        *,
        step_events: int = STEP_EVENTS,
        count_events: int = COUNT_EVENTS,
        pass_events: int = PASS_EVENTS,
        count_pass_events: int = COUNT_PASS_EVENTS,
    ) -> None:
        self._db = db
        self._step_events = step_events
        self._count_events = count_events
        self._pass_events = pass_events
        self._count_pass_events = count_pass_events
        self._sql = statements("replay")

    # -- for the webhooks' owners

    async def create(self, endpoint_id: int, choice: Choice) -> ReplayRecord | None:
        """Begin a replay; None if the webhook is disabled or has too many under way."""
        types = None if choice.types is None else list(choice.types)
        job_id = new_id(ID_PREFIX, time.time(), secrets.token_bytes(10))
        row = await self._db.fetchrow(
            self._sql["create"],
            job_id,
            endpoint_id,
            choice.selection.value,
            types,
            choice.since,
            choice.until,
            RUNNING_MAX,
        )
        return None if row is None else _record(row)

    async def get(self, endpoint_id: int, job_id: str) -> ReplayRecord | None:
        """A webhook's replay; None if it has no such."""
        row = await self._db.fetchrow(self._sql["get"], endpoint_id, job_id)
        return None if row is None else _record(row)

    async def browse(
        self, endpoint_id: int, *, limit: int, after: str | None = None, before: str | None = None
    ) -> list[ReplayRecord]:
        """Newest first: those older than `after`, or the nearest ones newer than `before`; `limit` at most."""
        if before is not None:
            rows = await self._db.fetch(self._sql["list_before"], endpoint_id, before, limit)
            return [_record(row) for row in reversed(rows)]
        rows = await self._db.fetch(self._sql["list_after"], endpoint_id, after or "~", limit)
        return [_record(row) for row in rows]

    async def cancel(self, endpoint_id: int, job_id: str, reason: str) -> ReplayRecord | None:
        """Stop a replay and take back what it queued and the engine does not hold already. Where there was neither
        anything to stop nor to take back, it stays as it is. None if the webhook has no such.
        """
        await self._db.execute(self._sql["stop"], endpoint_id, job_id, reason)
        row = await self._db.fetchrow(self._sql["unqueue"], endpoint_id, job_id, reason)
        return None if row is None else _record(row)

    async def preview(self, endpoint_id: int, choice: Choice) -> ReplayPreview | None:
        """Count what would be queued, as far as that can be had at once; None if the webhook is gone."""
        webhook = await self._db.fetchrow(self._sql["preview"], endpoint_id)
        if webhook is None:
            return None
        most = {"limit": self._count_events, "passed": self._count_pass_events}
        rows = await self._look(endpoint_id, webhook, choice, "", **most)
        fresh_from = datetime.now(UTC) - MEMORY
        count = sum(is_chosen(row, choice.selection, fresh_from) for row in rows)
        is_whole = _is_last(rows, self._count_events, self._count_pass_events)
        return ReplayPreview(count, _within(rows), is_whole)

    # -- for the engine

    async def running(self) -> list[str]:
        """Ids of replays under way, oldest first."""
        return [row["id"] for row in await self._db.fetch(self._sql["running"], JOBS)]

    async def step(self, job_id: str) -> bool:
        """Move a replay on by one step; False if there was nothing to do: it is over, waits for its webhook, or another
        engine is at it.
        """
        async with self._db.transaction():
            job = await self._db.fetchrow(self._sql["begin"], job_id, HELD_MAX)
            if job is None or (job["held"] >= HELD_MAX and job["endpoint_status"] != EndpointStatus.DISABLED):
                return False
            if job["endpoint_status"] == EndpointStatus.DISABLED:
                await self._db.execute(self._sql["cancel"], job_id, "the webhook was disabled")
                return False
            return await self._advance(job)

    async def _advance(self, job: Any) -> bool:
        choice = Choice(
            selection=Selection(job["selection"]), since=job["since"], until=job["until"], types=job["types"]
        )
        most = {"limit": LOOK_EVENTS, "passed": self._pass_events}
        rows = await self._look(job["endpoint_id"], job, choice, job["after_id"], **most)
        looked, chosen = _cut(rows, choice.selection, job["created_at"] - MEMORY, self._step_events)
        queued = 0
        if chosen:
            columns = [[row[name] for row in chosen] for name in ("seq", "xid", "written_at")]
            queued = await self._db.fetchval(
                self._sql["queue"], job["endpoint_id"], job["generation"], job["shard"], *columns
            )
        is_over = looked == len(rows) and _is_last(rows, LOOK_EVENTS, self._pass_events)
        last = rows[looked - 1] if looked else None
        await self._db.execute(
            self._sql["advance"],
            job["id"],
            last["id"] if last else job["after_id"],
            last["written_at"] if last else None,
            _within(rows[:looked]),
            queued,
            (ReplayStatus.DONE if is_over else ReplayStatus.RUNNING).value,
            rows[0]["seq"] if looked else None,
            last["seq"] if last else None,
        )
        return not is_over

    async def _look(
        self, endpoint_id: int, webhook: Any, choice: Choice, after_id: str, *, limit: int, passed: int
    ) -> Sequence[Any]:
        types = None if choice.types is None else list(choice.types)
        return await self._db.fetch(  # type: ignore[no-any-return]
            self._sql["look"], webhook["account"], after_id, choice.since, choice.until, limit, endpoint_id,
            webhook["events"], types, webhook["created_snapshot"], passed, _day(choice.since), _day(choice.until) + DAY,
        )  # fmt: skip


def _day(at: datetime) -> datetime:
    """When its day begins in UTC, as the outbox's partitions do."""
    return at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _is_last(rows: Sequence[Any], limit: int, passed: int) -> bool:
    """Whether nothing follows what `look` found within these limits."""
    return len(rows) < limit and not (rows and rows[-1]["place"] == passed)


def _within(rows: Sequence[Any]) -> int:
    """How many of these events are of the times asked for."""
    return sum(row["is_within"] for row in rows)


def is_chosen(row: Any, selection: Selection, fresh_from: datetime) -> bool:
    """Whether an event is one of those to replay. `row` is one of `look`'s; see the table above."""
    if not row["is_wanted"] or row["waits"] or row["is_refused"]:
        return False
    best = row["best"] or 0
    match selection:
        case Selection.ALL:
            return True
        case Selection.FAILED:
            return bool(best == _GIVEN_UP)
        case Selection.MISSED:
            return bool(best < _DELIVERED and (best or row["is_older"] or row["written_at"] < fresh_from))


def _cut(rows: Sequence[Any], selection: Selection, fresh_from: datetime, most: int) -> tuple[int, list[Any]]:
    """How many of these rows one step looks at, and which of them it takes: `most` at most."""
    chosen: list[Any] = []
    for place, row in enumerate(rows):
        if len(chosen) == most:
            return place, chosen
        if is_chosen(row, selection, fresh_from):
            chosen.append(row)
    return len(rows), chosen


def _record(row: Any) -> ReplayRecord:
    return msgspec.convert({name: row[name] for name in ReplayRecord.__struct_fields__}, ReplayRecord)
