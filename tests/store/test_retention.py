"""Partitions: there before they are needed, gone when nobody needs them, and never in a producer's way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from dispatcher.store.database import connect
from dispatcher.store.retention import DAYS_AHEAD, Retention

DAY_S = 86400.0
TODAY = datetime.now(UTC).date()


@pytest.fixture
async def db(database: str) -> AsyncIterator[Any]:
    connection = await connect(database, name="test")
    yield connection
    await connection.close()


async def leaves(db: Any, table: str) -> list[str]:
    rows = await db.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = $1::regclass", f"dispatcher.{table}"
    )
    return sorted(row[0].removeprefix("dispatcher.") for row in rows)


def leaf(table: str, day: date) -> str:
    return f"{table}_{day:%Y%m%d}"


async def make(db: Any, table: str, day: date) -> str:
    await db.fetchval("SELECT dispatcher.make_partitions($1, $2, $2)", table, day)
    return leaf(table, day)


async def write(db: Any, at: datetime) -> int:
    return int(
        await db.fetchval(
            "INSERT INTO dispatcher.outbox (type, data, written_at) VALUES ('a.b', '{}', $1) RETURNING seq", at
        )
    )


def noon(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, 12, tzinfo=UTC)


async def test_coming_week_is_there_from_the_start_and_made_again_each_run(db: Any) -> None:
    for table in ("outbox", "attempt"):
        expected = [leaf(table, TODAY + timedelta(days=n)) for n in range(DAYS_AHEAD + 1)] + [f"{table}_default"]
        assert await leaves(db, table) == sorted(expected)
        await db.execute(f"DROP TABLE dispatcher.{expected[3]}")
    await Retention(db, 30 * DAY_S, 30 * DAY_S).run()
    for table in ("outbox", "attempt"):
        assert len(await leaves(db, table)) == DAYS_AHEAD + 2


async def test_row_of_a_day_without_partition_falls_into_the_default_one(db: Any) -> None:
    await write(db, noon(TODAY - timedelta(days=3)))
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox_default") == 1


async def test_day_whose_rows_lie_in_the_default_partition_stays_there(db: Any) -> None:
    day = TODAY + timedelta(days=DAYS_AHEAD + 1)
    await write(db, noon(day))
    name = await make(db, "outbox", day)
    assert name not in await leaves(db, "outbox")
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox") == 1


async def test_old_days_are_dropped_and_young_ones_kept(db: Any) -> None:
    old = [await make(db, table, TODAY - timedelta(days=32)) for table in ("outbox", "attempt")]
    young = await make(db, "outbox", TODAY - timedelta(days=29))
    await write(db, noon(TODAY - timedelta(days=32)))
    assert sorted(await Retention(db, 30 * DAY_S, 30 * DAY_S).run()) == sorted(old)
    assert young in await leaves(db, "outbox")
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox") == 0


async def test_day_that_a_cursor_or_a_pending_row_needs_is_kept(db: Any) -> None:
    day = TODAY - timedelta(days=40)
    name = await make(db, "outbox", day)
    seq = await write(db, noon(day))
    await db.execute(
        "INSERT INTO dispatcher.pending"
        " (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)"
        " VALUES (1, $1, 0, '1', $2, 'retrying', 1, 'infinity')", seq, noon(day),
    )  # fmt: skip
    retention = Retention(db, 30 * DAY_S, 30 * DAY_S)
    assert await retention.run() == []
    await db.execute("DELETE FROM dispatcher.pending")
    await db.execute("UPDATE dispatcher.shard SET prev_at = $1", noon(day))
    assert await retention.run() == []
    await db.execute("UPDATE dispatcher.shard SET prev_at = now()")
    assert await retention.run() == [name]


async def test_rows_in_the_default_partition_are_kept_as_long_as_they_are_needed_and_go_in_steps(db: Any) -> None:
    at = noon(TODAY - timedelta(days=40))
    await write(db, at)
    await db.execute("UPDATE dispatcher.shard SET prev_at = $1", at)
    retention = Retention(db, 30 * DAY_S, 30 * DAY_S)
    await retention.run()
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox_default") == 1
    await db.execute("UPDATE dispatcher.shard SET prev_at = now()")
    await db.execute(
        "INSERT INTO dispatcher.outbox (type, data, written_at) SELECT 'a.b', '{}', $1 FROM generate_series(1, 6000)",
        at,
    )
    await retention.run()
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox_default") == 0


async def test_drop_lets_go_when_a_transaction_is_in_its_way_and_comes_back(db: Any, database: str) -> None:
    name = await make(db, "outbox", TODAY - timedelta(days=40))
    reader = await connect(database, name="reader")
    transaction = reader.transaction()
    await transaction.start()
    await reader.fetch("SELECT * FROM dispatcher.outbox")
    retention = Retention(db, 30 * DAY_S, 30 * DAY_S)
    assert await retention.run() == []
    assert name in await leaves(db, "outbox")
    await transaction.commit()
    assert await retention.run() == [name]
    await reader.close()


async def test_idempotency_keys_go_after_a_day(db: Any) -> None:
    for key in ("old", "new"):
        await db.fetchval("SELECT dispatcher.emit('a.b', '{}', idempotency_key => $1)", key)
    await db.execute("UPDATE dispatcher.idempotency SET created_at = now() - interval '25 hours' WHERE key = 'old'")
    await Retention(db, 30 * DAY_S, 30 * DAY_S).run()
    assert [row[0] for row in await db.fetch("SELECT key FROM dispatcher.idempotency")] == ["new"]
