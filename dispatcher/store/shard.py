"""A shard's row: its lease, its cursor, its fence, and the flush that moves all of them and writes what happened.

The lease is a session advisory lock: it ends with its session, at once. The fence is the epoch: a take-over raises
it, and a flush that names an older one raises Fenced and writes nothing. `batch` numbers the flushes, so that one
whose answer was lost can be sent again: it is written once, whichever session comes first, even if the lost one is
still at it.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any, Final

import asyncpg

from dispatcher.errors import Fenced
from dispatcher.model import DeliveryState
from dispatcher.store.database import statements
from dispatcher.store.outbox import Cursor, Snapshot

FENCED_SQLSTATE: Final = "P0F01"
HELD_UNTIL: Final = datetime.max  # noqa: DTZ901
"""How asyncpg spells PostgreSQL's 'infinity'."""


@dataclasses.dataclass(frozen=True, slots=True)
class ShardState:
    """The shard's row.

    `system` says whose transaction ids the cursor holds; rows written before `floor` bear foreign ones.
    """

    epoch: int
    batch: int
    cursor: Cursor
    system: str
    floor: datetime
    shards: int  # how many there are in all
    is_ahead: bool  # transaction ids of the cursor or of rows lie ahead of this cluster's


@dataclasses.dataclass(slots=True)
class Batch:
    """One flush, as columns ready to be sent: tuples of rows, transposed only at the door.

    attempts: (event_seq, event_xid, endpoint_id, generation, attempt, state, result, status, duration_us, error, head,
              body)
    pending:  (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at, last_error)
    settled:  (endpoint_id, event_seq, generation) of pending rows that go
    discarded: (event_seq, reason)
    """

    number: int
    attempts: list[tuple[Any, ...]]
    pending: list[tuple[Any, ...]]
    settled: list[tuple[int, int, int]]
    discarded: list[tuple[int, str]]
    cursor: Cursor | None


_NOTHING: Final[dict[int, list[tuple[Any, ...]]]] = {width: [()] * width for width in (2, 3, 9, 12)}
_STATE: Final = 5  # of an attempt
_DUE_AT: Final = 7  # of a pending row
_DELIVERED: Final = DeliveryState.DELIVERED.value


def _columns(rows: list[Any], width: int) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True)) if rows else _NOTHING[width]


def _condensed(rows: list[Any], width: int, field: int, usual: Any) -> tuple[list[tuple[Any, ...]], list[int]]:
    """Rows as columns; and for each but the first, how many rows its first element stands for.

    asyncpg spends 0.2 to 0.6 µs on each element it encodes, and most rows say the same: those whose `field` has the
    `usual` value come first.
    """
    columns = _columns(rows, width)
    if not rows:
        return columns, [0] * (width - 1)
    alike = columns[field].count(usual)
    if 0 < alike < len(rows):
        rows = [row for row in rows if row[field] == usual] + [row for row in rows if row[field] != usual]
        columns = _columns(rows, width)
    runs = [_run(column, alike) for column in columns[1:]]
    once = [(column[0], *column[run:]) if run > 1 else column for column, run in zip(columns[1:], runs, strict=True)]
    return [columns[0], *once], runs


def _run(column: tuple[Any, ...], alike: int) -> int:
    """How many elements are as the first: all of them, or the first `alike`, or just the one."""
    first = column[0]
    for length in (len(column), alike):
        if length and column[length - 1] == first and column[:length].count(first) == length:
            return length
    return 1


class ShardStore:
    """One shard, over a connection of the engine."""

    def __init__(self, connection: Any, shard: int) -> None:
        self._connection = connection
        self._shard = shard
        self._sql = statements("shard")
        self._flush: Any = None

    async def system(self) -> str:
        """The cluster's identifier: transaction ids mean something inside one cluster only."""
        row = await self._connection.fetchrow(self._sql["identity"])
        if row["standby"]:
            raise asyncpg.CannotConnectNowError("this server is a read-only standby")
        return str(row["system"])

    async def try_lease(self) -> bool:
        """Take the lease for as long as this connection lives; False while somebody else has it."""
        return bool(await self._connection.fetchval(self._sql["try_lease"], self._shard))

    async def take_over(self) -> int:
        """Raise the epoch, which fences whoever held the shard before, and return it."""
        return int(await self._connection.fetchval(self._sql["take_over"], self._shard))

    async def state(self) -> ShardState:
        """The row as it stands. Raises Fenced when there is no such shard any more."""
        row = await self._connection.fetchrow(self._sql["cursor"], self._shard)
        if row is None:
            raise Fenced(f"there is no shard {self._shard} any more")
        cursor = Cursor(row["prev"], row["prev_at"], row["cur"], None, row["at_xid"], row["at_seq"])
        return ShardState(
            row["epoch"], row["batch"], cursor, row["system"], row["floor"], row["shards"], row["is_ahead"]
        )

    async def naturalize(self, epoch: int, system: str, prev: Snapshot, prev_at: datetime) -> None:
        """After a restore into cluster `system`: read on from `prev`; no webhook of ours remembers ids of the old one.

        Raises Fenced when the epoch is over.
        """
        async with self._connection.transaction():
            status = await self._connection.execute(self._sql["anchor"], self._shard, epoch, system, prev, prev_at)
            if status != "UPDATE 1":
                raise Fenced(f"epoch {epoch} of shard {self._shard} is over")
            await self._connection.execute(self._sql["naturalize"], self._shard)

    async def flush(self, epoch: int, batch: Batch) -> bool:
        """Write a batch in one round trip and one transaction; False if it is in already.

        Raises Fenced when the epoch is over.
        """
        if self._flush is None:
            self._flush = await self._connection.prepare(self._sql["flush"])
        c = batch.cursor
        where = (c.prev, c.prev_at, c.cur, c.at_xid, c.at_seq) if c else (None,) * 5
        attempts, attempts_alike = _condensed(batch.attempts, 12, _STATE, _DELIVERED)
        pending, pending_alike = _condensed(batch.pending, 9, _DUE_AT, HELD_UNTIL)
        try:
            written = await self._flush.fetchval(
                self._shard,
                epoch,
                batch.number,
                *where,
                *attempts,
                *pending,
                *_columns(batch.settled, 3),
                *_columns(batch.discarded, 2),
                attempts_alike,
                pending_alike,
            )
        except asyncpg.PostgresError as error:
            if error.sqlstate == FENCED_SQLSTATE:
                raise Fenced(str(error)) from None
            raise
        return bool(written)
