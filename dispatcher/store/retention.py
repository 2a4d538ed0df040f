"""Partitions made ahead, old days dropped: retention without a DELETE where it matters.

An old day is emptied by TRUNCATE, which locks that day alone, and then dropped. Dropping needs the parent for a
moment (detaching CONCURRENTLY is refused beside a DEFAULT partition, and without one producers would fail when nobody
makes partitions), so it gives up within 50 ms and comes back later: an empty day costs nothing meanwhile, and no
INSERT waits longer. Events are kept as long as a shard's cursor or a pending row needs them, whatever the
configuration says. What fell into a DEFAULT partition (the daemon was away for more than a week), and the small
tables, are deleted in bounded steps.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
import structlog

from dispatcher.store.database import statements

DAYS_AHEAD: Final = 7
STEP_ROWS: Final = 5000
STEPS_MAX: Final = 20  # per table and run
NEEDED_SLACK: Final = timedelta(days=1)  # how far a reader looks behind its cursor's clock time
LOCK_TIMEOUT: Final = "500ms"  # DDL that cannot have its lock soon comes back later: others queue behind one that waits
DROP_TIMEOUT: Final = "50ms"  # every INSERT of every producer queues behind this one

log = structlog.get_logger("dispatcher.retention")


class Retention:
    """Keeps partitions ahead and drops what is old. `run` is safe at any time, also from two daemons at once."""

    def __init__(self, connection: Any, events_kept_s: float, attempts_kept_s: float) -> None:
        self._connection = connection
        self._kept = {"outbox": timedelta(seconds=events_kept_s), "attempt": timedelta(seconds=attempts_kept_s)}
        self._sql = statements("retention")

    async def run(self) -> list[str]:
        """Make and drop partitions; return the names of those dropped.

        Whatever it raises, nothing is cleaned up behind it: the connection is to be closed then.
        """
        await self._connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        dropped: list[str] = []
        for table in self._kept:
            await self._make_ahead(table)
            dropped += await self._drop_old(table)
        await self._prune_rows()
        await self._connection.execute("RESET lock_timeout")
        return dropped

    async def _make_ahead(self, table: str) -> None:
        try:
            made = await self._connection.fetchval(self._sql["make_partitions"], table, DAYS_AHEAD)
        except (asyncpg.LockNotAvailableError, asyncpg.DuplicateTableError, asyncpg.DeadlockDetectedError) as error:
            log.info("partitions.later", table=table, reason=str(error))
            return
        if made:
            log.info("partitions.made", table=table, count=made)

    async def _drop_old(self, table: str) -> list[str]:
        limit = await self._limit(table)
        dropped = []
        for name, day in await self._connection.fetch(self._sql["partitions"], table):
            if datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1) > limit:
                continue
            try:
                await self._connection.execute(f'TRUNCATE dispatcher."{name}"')
                await self._connection.execute(f"SET lock_timeout = '{DROP_TIMEOUT}'")
                await self._connection.execute(f'DROP TABLE dispatcher."{name}"')
            except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError, asyncpg.UndefinedTableError) as error:
                log.info("partition.later", name=name, reason=str(error))
            else:
                dropped.append(name)
                log.info("partition.dropped", name=name)
            await self._connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        return dropped

    async def _limit(self, table: str) -> datetime:
        """What is older may go."""
        limit = datetime.now(UTC) - self._kept[table]
        if table == "outbox":
            limit = min(limit, await self._connection.fetchval(self._sql["needed_from"]) - NEEDED_SLACK)
        return limit

    async def _prune_rows(self) -> None:
        outbox, attempt = await self._limit("outbox"), await self._limit("attempt")
        for name, arguments in (
            ("prune_default_outbox", (outbox,)),
            ("prune_default_attempt", (attempt,)),
            ("prune_idempotency", ()),
            ("prune_discarded", (outbox,)),
        ):
            for _ in range(STEPS_MAX):
                status = await self._connection.execute(self._sql[name], *arguments, STEP_ROWS)
                if int(status.split()[-1]) < STEP_ROWS:
                    break
