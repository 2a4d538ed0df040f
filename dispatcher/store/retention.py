"""Partitions made ahead, old days dropped: retention without a DELETE where it matters.

**Dropping.** An old day is emptied by TRUNCATE, which locks that day alone, and then dropped. Dropping needs the parent
for a moment (detaching CONCURRENTLY is refused beside a DEFAULT partition, and without one producers would fail when
nobody makes partitions), so it gives up within 50 ms and comes back later: an empty day costs nothing meanwhile, and
no INSERT waits longer.

**Never too early.** A day goes when all of it is older than the configuration says, older than the oldest pending row's
event, and older than every shard's cursor. That is asked before; and once the day is locked, so that nobody writes to
it any more, it is asked again of its rows: none of a transaction that some shard's cursor has not seen the end of.

**The DEFAULT partition** takes what no day is there for: when the daemon was away for more than a week, and rows dated
elsewhere by a restore. Rows there are reported at each run. Up to MOVE_ROWS of a day are moved into a partition made
for them, in one transaction, so that a reader sees each of them exactly once. More than that stay until they are old,
and are then deleted in bounded steps, like the rows of the small tables: moving a million would stop the reader for
seconds, and they are found where they are.

One run at a time: two daemons, or a daemon and `dispatcher prune`, take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import asyncpg
import msgspec

from dispatcher.logs import get_logger
from dispatcher.snapshot import TableSize
from dispatcher.store.database import LOCK_CLASS, statements

RETENTION_LOCK: Final = 2
TURN_S: Final = 30.0  # a run takes less; whoever is before us and does not end is not waited for
DAYS_AHEAD: Final = 7
STEP_ROWS: Final = 5000
STEPS_MAX: Final = 20  # per table and run
MOVE_ROWS: Final = 20_000  # 0.3 s in which the reader, and whoever writes to the DEFAULT partition, wait
COUNT_MAX: Final = 100_000  # rows of a DEFAULT partition that are counted: 10 ms
NEEDED_SLACK: Final = timedelta(days=1)  # how far a reader looks behind its cursor's clock time
LOCK_TIMEOUT: Final = "500ms"  # DDL that cannot have its lock soon comes back later: others queue behind one that waits
DROP_TIMEOUT: Final = "50ms"  # every INSERT of every producer queues behind this one
TABLES: Final = ("outbox", "attempt")
CLOCKS: Final = {"outbox": "written_at", "attempt": "at"}  # their partition keys
ASTRAY: Final = {"outbox": "astray_outbox", "attempt": "astray_attempt"}

_BUSY: Final = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)

_Leaf = tuple[str, date]
"""A partition's name, and its day."""

log = get_logger("dispatcher.retention")


class Pruned(msgspec.Struct, frozen=True):
    """What a run did, or with `dry_run` would do."""

    made: list[str] = []
    dropped: list[str] = []
    kept: list[str] = []  # old enough, but a delivery still needs them
    postponed: list[str] = []  # somebody's transaction was in the way
    moved: dict[str, int] = {}  # rows out of a DEFAULT partition, by the partition they are in now
    astray: dict[str, int] = {}  # rows still in a DEFAULT partition, by table; counted up to COUNT_MAX
    deleted: dict[str, int] = {}  # rows, by table


class Retention:
    """Keeps partitions ahead and drops what is old. `run` is safe at any time, also from two daemons at once."""

    def __init__(self, connection: Any, events_kept_s: float, attempts_kept_s: float) -> None:
        self._db = connection
        self._kept = {"outbox": timedelta(seconds=events_kept_s), "attempt": timedelta(seconds=attempts_kept_s)}
        self._sql = statements("retention")

    async def run(self, *, at: datetime | None = None, dry_run: bool = False) -> Pruned:
        """Make, move and drop what is due `at` that moment, by default the server's now.

        With `dry_run` nothing is changed. Raises TimeoutError when another run does not end. Whatever it raises,
        nothing is cleaned up behind it: the connection is to be closed then.
        """
        if dry_run:
            return await self._foresee(at or await self._db.fetchval(self._sql["now"]))
        await self._take_turn()
        await self._timeout(LOCK_TIMEOUT)
        done = await self._run(at or await self._db.fetchval(self._sql["now"]))
        await self._db.execute("RESET lock_timeout")
        await self._db.fetchval(self._sql["end_turn"], LOCK_CLASS, RETENTION_LOCK)
        return done

    async def _take_turn(self) -> None:
        give_up_at = time.monotonic() + TURN_S
        # Try instead of wait: a statement that waits holds a snapshot and pins vacuum for the whole database.
        while not await self._db.fetchval(self._sql["take_turn"], LOCK_CLASS, RETENTION_LOCK):
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"another run of retention has not ended within {TURN_S:.0f} s")
            await asyncio.sleep(0.1)

    async def sizes(self) -> list[TableSize]:
        """How large each table is, from the catalogue and the file system: no table is read."""
        return [TableSize(**row) for row in await self._db.fetch(self._sql["sizes"])]

    async def _run(self, at: datetime) -> Pruned:
        done = Pruned([], [], [], [], {}, {}, {})
        for table in TABLES:
            leaves = await self._leaves(table)
            await self._make_ahead(table, at.date(), leaves, done)
            await self._drop_old(table, at, leaves, done)
            await self._tidy_default(table, at, done)
        await self._prune_rows(at, done)
        return done

    async def _timeout(self, timeout: str) -> None:
        await self._db.execute(f"SET lock_timeout = '{timeout}'")

    # ── ahead ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _make_ahead(self, table: str, today: date, leaves: Sequence[_Leaf], done: Pruned) -> None:
        missing = _missing(today, leaves)
        if not missing:
            return
        try:
            await self._db.fetchval(self._sql["make_partitions"], table, missing[0], missing[-1])
        except (*_BUSY, asyncpg.DuplicateTableError) as error:
            log.info("partitions.later", table=table, reason=str(error))
            return
        made = [name for name, day in await self._leaves(table) if day in missing]
        if made:
            done.made.extend(made)
            log.info("partitions.made", table=table, names=made)

    async def _leaves(self, table: str) -> list[_Leaf]:
        return [(row["name"], row["day"]) for row in await self._db.fetch(self._sql["partitions"], table)]

    # ── old ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _drop_old(self, table: str, at: datetime, leaves: Sequence[_Leaf], done: Pruned) -> None:
        wanted, allowed = await self._limits(table, at)
        for name, day in leaves:
            end = _midnight(day + timedelta(days=1))
            if end > wanted:
                continue
            if end > allowed:
                done.kept.append(name)
                log.info("partition.needed", name=name, reason="a shard's cursor or a pending delivery needs it")
                continue
            try:
                is_empty = await self._empty(table, name)
            except _BUSY as error:
                done.postponed.append(name)
                log.info("partition.later", name=name, reason=str(error))
                continue
            (done.dropped if is_empty else done.kept).append(name)
            log.info("partition.dropped" if is_empty else "partition.needed", name=name)

    async def _empty(self, table: str, name: str) -> bool:
        """Truncate and drop a partition; False if a cursor still needs a row of it. Raises what says it is in use."""
        async with self._db.transaction():
            await self._db.execute(f'LOCK TABLE ONLY dispatcher."{name}" IN ACCESS EXCLUSIVE MODE')
            if table == "outbox" and await self._db.fetchval(self._sql["is_unread"].replace("$leaf", name)):
                return False
            await self._db.execute(f'TRUNCATE dispatcher."{name}"')
        await self._timeout(DROP_TIMEOUT)
        try:
            await self._db.execute(f'DROP TABLE dispatcher."{name}"')
        finally:
            await self._timeout(LOCK_TIMEOUT)
        return True

    async def _limits(self, table: str, at: datetime) -> tuple[datetime, datetime]:
        """What is older than the first should go; what is older than the second is needed by nobody."""
        row = await self._db.fetchrow(self._sql["needed_from"])
        needed = [row["cursor"]] + ([row["pending"]] if table == "outbox" and row["pending"] else [])
        return at - self._kept[table], min(needed) - NEEDED_SLACK

    # ── the DEFAULT partition ──────────────────────────────────────────────────────────────────────────────────────

    async def _tidy_default(self, table: str, at: datetime, done: Pruned) -> None:
        days = await self._astray(table)
        if not days:
            return
        total = sum(days.values())
        log.warning(
            "partition.default",
            table=table,
            rows=total,
            days=[f"{day:%Y-%m-%d}" for day in days],
            reason="no partition was there for them: did no daemon run for a week, or was a dump restored?",
        )
        soon = (at - self._kept[table]).date()  # what goes anyway need not be moved
        movable = [day for day, rows in days.items() if rows <= MOVE_ROWS and day > soon] if total < COUNT_MAX else []
        for day in movable:
            try:
                moved = await self._move(table, day)
            except _BUSY as error:
                log.info("partition.later", name=_leaf(table, day), reason=str(error))
                continue
            done.moved[_leaf(table, day)] = moved
            log.info("partition.moved", name=_leaf(table, day), rows=moved)
        if left := sum((await self._astray(table)).values()):
            done.astray[table] = left

    async def _astray(self, table: str) -> dict[date, int]:
        return {row["day"]: row["rows"] for row in await self._db.fetch(self._sql[ASTRAY[table]], COUNT_MAX)}

    async def _move(self, table: str, day: date) -> int:
        """Move a day out of the DEFAULT partition into one of its own; return how many rows it has."""
        await self._timeout(DROP_TIMEOUT)
        try:
            return int(await self._db.fetchval(self._sql["move"], table, CLOCKS[table], day))
        finally:
            await self._timeout(LOCK_TIMEOUT)

    # ── rows ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _prune_rows(self, at: datetime, done: Pruned) -> None:
        limits = {table: min(await self._limits(table, at)) for table in TABLES}
        for table, statement, before in (
            ("outbox_default", "prune_outbox_default", limits["outbox"]),
            ("attempt_default", "prune_attempt_default", limits["attempt"]),
            ("idempotency", "prune_idempotency", at - timedelta(hours=24)),
            ("discarded_event", "prune_discarded_event", limits["outbox"]),
        ):
            for _ in range(STEPS_MAX):
                status = await self._db.execute(self._sql[statement], before, STEP_ROWS)
                rows = int(status.split()[-1])
                if rows:
                    done.deleted[table] = done.deleted.get(table, 0) + rows
                if rows < STEP_ROWS:
                    break

    # ── foreseen ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _foresee(self, at: datetime) -> Pruned:
        foreseen = Pruned([], [], [], [], {}, {}, {})
        for table in TABLES:
            leaves = await self._leaves(table)
            foreseen.made.extend(_leaf(table, day) for day in _missing(at.date(), leaves))
            wanted, allowed = await self._limits(table, at)
            for name, day in leaves:
                end = _midnight(day + timedelta(days=1))
                if end <= wanted:
                    unread = table == "outbox" and await self._db.fetchval(
                        self._sql["is_unread"].replace("$leaf", name)
                    )
                    (foreseen.kept if end > allowed or unread else foreseen.dropped).append(name)
            if astray := sum((await self._astray(table)).values()):
                foreseen.astray[table] = astray
        return foreseen


def _missing(today: date, leaves: Sequence[_Leaf]) -> list[date]:
    """The coming days that have no partition."""
    there = {day for _, day in leaves}
    return [day for n in range(DAYS_AHEAD + 1) if (day := today + timedelta(days=n)) not in there]


def _leaf(table: str, day: date) -> str:
    return f"{table}_{day:%Y%m%d}"


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
