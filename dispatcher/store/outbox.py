"""Reading the outbox as the difference of two snapshots, page by page. No claim, no update, no gap.

Everything visible in the snapshot `prev` is read. A poll takes the current snapshot and sees, in the order (xid,
seq), the rows of transactions that were still in progress in `prev` and of those that began later. The cursor after
any page is exact, so a reader that starts from it sees each committed event once; a long transaction elsewhere stalls
nothing. PgQ proved the idea of reading by snapshots.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta
from typing import Any, Final

from dispatcher.moments import BEGINNING, of_datetime
from dispatcher.store.database import statements

Snapshot = tuple[int, int, tuple[int, ...]]
"""A pg_snapshot: xmin, xmax, the transaction ids in progress."""

CLOCK_SLACK: Final = timedelta(days=1)
"""How far the server's clock may step back without a row falling out of the partitions a poll looks into."""

LEAP: Final = CLOCK_SLACK / 2
"""Between two polls: the clock has leapt, or the host has slept. A transaction open all the while wrote before that."""

NEAR_ROWS: Final = 32
"""Rows read twice, 0.3 µs each, that cost as much as looking for one transaction's rows in every partition."""

_UNSEEN: Final = (BEGINNING, -(1 << 62))


@dataclasses.dataclass(frozen=True, slots=True)
class Cursor:
    """What is read: all that is visible in `prev`; with `cur`, also what of the difference is at or before `at`."""

    prev: Snapshot
    prev_at: datetime  # server clock just after `prev` was taken
    cur: Snapshot | None = None
    cur_at: datetime | None = None
    at_xid: int = 0
    at_seq: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """Rows of one page, the cursor once they are all resolved, and what the poll learnt on the way.

    `rows` are records (seq, xid, id, account, type, data text, created_at, written_at, traceparent) behind three
    columns of the header; the two times are moments; data or created_at is None where nothing could be made of it.
    `registry` is the version of the webhook registry in the page's own snapshot, None on a further page of one.
    """

    rows: list[Any]
    after: Cursor
    registry: int | None
    complete: bool  # the difference ends with this page


class OutboxPages:
    """The reader's connection and its statements."""

    def __init__(self, connection: Any, floor: datetime = BEGINNING) -> None:
        self._connection = connection
        self._floor_us = of_datetime(floor)
        self._floor = floor  # rows written before it bear transaction ids of another cluster
        self._first: Any = None
        self._first_near: Any = None
        self._next: Any = None
        # Since when each transaction in progress has been seen, which bounds where its rows can lie, and how many rows
        # had been read by then, which bounds how many there are of younger ones. Unknown after a restart.
        self._seen: dict[int, tuple[datetime, int]] = {}
        self._read = 0  # rows
        # Rows from before the floor that were read: they are shown again for as long as a transaction in progress has
        # the id that they brought along.
        self._foreign: set[int] = set()
        # Transactions older than this one may have written before the clock leapt. None: not known yet; 0: they ended.
        self._barrier: int | None = None

    async def prepare(self) -> None:
        """Prepare the statements once; a poll is then one round trip."""
        sql = statements("outbox")
        self._first = await self._connection.prepare(sql["first_page"])
        self._first_near = await self._connection.prepare(sql["first_page_near"])
        self._next = await self._connection.prepare(sql["next_page"])

    async def read(self, cursor: Cursor, limit: int) -> Page:
        """The next page behind `cursor`, at most `limit` rows."""
        xmax = cursor.prev[1]
        running = [xid for xid in cursor.prev[2] if xid >= cursor.at_xid]
        if self._barrier and cursor.cur is None and cursor.prev[0] > self._barrier:
            self._barrier = 0
        since = self._floor if self._barrier != 0 else max(cursor.prev_at - CLOCK_SLACK, self._floor)
        since_running, read_before = since, self._read
        if running:
            seen = [self._seen.get(xid, _UNSEEN) for xid in running]
            since_running, read_before = min(each[0] for each in seen), min(each[1] for each in seen)
        bounds = (running, xmax, cursor.at_xid, cursor.at_seq, since_running, since, limit)
        if cursor.cur is None:
            if self._read - read_before <= NEAR_ROWS * len(running):
                oldest = min(running) if running else xmax
                assert not cursor.at_xid, "a difference that has not begun is read from its beginning"
                bound = min(since_running, since)
                header, *rows = await self._first_near.fetch(cursor.prev, oldest, bound, limit)
            else:
                header, *rows = await self._first.fetch(*bounds)
            cur, cur_at, registry = header[0], header[1], header[2]
            if self._barrier is None or cur_at - cursor.prev_at > LEAP:
                since = self._floor
                self._barrier = await self._connection.fetchval(statements("shard")["own_xid"])
            self._remember(cur, cursor, since)
        else:
            rows = await self._next.fetch(*bounds, cursor.cur)
            cur, cur_at, registry = cursor.cur, cursor.cur_at or cursor.prev_at, None
        self._read += len(rows)
        if len(rows) < limit:
            return Page(self._once(rows), Cursor(cur, cur_at), registry, complete=True)
        last = rows[-1]
        after = Cursor(cursor.prev, cursor.prev_at, cur, cur_at, last[4], last[3])
        return Page(self._once(rows), after, registry, complete=False)

    def _once(self, rows: list[Any]) -> list[Any]:
        """Without the rows from before the floor that were read already."""
        if self._floor == BEGINNING:
            return rows
        rows = [row for row in rows if row[10] >= self._floor_us or row[3] not in self._foreign]
        self._foreign.update(row[3] for row in rows if row[10] < self._floor_us)
        return rows

    def _remember(self, cur: Snapshot, cursor: Cursor, since: datetime) -> None:
        """A transaction first seen running in `cur` wrote nothing before `since`, unless it is older than `prev`.

        After a restore it began after that: rows from before the floor that bear its id are not its.
        """
        if not cur[2]:
            if self._seen:
                self._seen = {}
            return
        before, old, here = self._seen, cursor.prev[2], (since, self._read)
        self._seen = {
            xid: before.get(xid, _UNSEEN) if xid in before or xid in old or xid < cursor.prev[1] else here
            for xid in cur[2]
        }
