"""Partitions: there before they are needed, gone when nobody needs them, and never in a producer's way."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from dispatcher.store import retention as module
from dispatcher.store.database import LOCK_CLASS, connect, statements
from dispatcher.store.retention import DAYS_AHEAD, RETENTION_LOCK, Retention

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


async def read(db: Any, at: datetime | None = None) -> None:
    """The cursor passes everything there is, at that time."""
    await db.execute(
        "UPDATE dispatcher.shard SET prev = pg_current_snapshot(), prev_at = coalesce($1, now()), cur = NULL", at
    )


async def rows(db: Any, table: str = "outbox") -> int:
    return int(await db.fetchval(f"SELECT count(*) FROM dispatcher.{table}"))


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


async def test_day_whose_rows_lie_in_the_default_partition_is_not_made_beside_them(db: Any) -> None:
    day = TODAY + timedelta(days=DAYS_AHEAD + 1)
    await write(db, noon(day))
    name = await make(db, "outbox", day)
    assert name not in await leaves(db, "outbox")
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox") == 1


async def test_old_days_are_dropped_and_young_ones_kept(db: Any) -> None:
    old = [await make(db, table, TODAY - timedelta(days=32)) for table in ("outbox", "attempt")]
    young = await make(db, "outbox", TODAY - timedelta(days=29))
    await write(db, noon(TODAY - timedelta(days=32)))
    await read(db)
    assert sorted((await Retention(db, 30 * DAY_S, 30 * DAY_S).run()).dropped) == sorted(old)
    assert young in await leaves(db, "outbox")
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox") == 0


async def test_day_that_a_cursor_or_a_pending_row_needs_is_kept(db: Any) -> None:
    day = TODAY - timedelta(days=40)
    name = await make(db, "outbox", day)
    seq = await write(db, noon(day))
    await read(db)
    await db.execute(
        "INSERT INTO dispatcher.pending"
        " (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)"
        " VALUES (1, $1, 0, '1', $2, 'retrying', 1, 'infinity')", seq, noon(day),
    )  # fmt: skip
    retention = Retention(db, 30 * DAY_S, 30 * DAY_S)
    assert (await retention.run()).dropped == []
    await db.execute("DELETE FROM dispatcher.pending")
    await db.execute("UPDATE dispatcher.shard SET prev_at = $1", noon(day))
    assert (await retention.run()).dropped == []
    await db.execute("UPDATE dispatcher.shard SET prev_at = now()")
    assert (await retention.run()).dropped == [name]


async def test_rows_in_the_default_partition_are_kept_as_long_as_they_are_needed_and_go_in_steps(db: Any) -> None:
    at = noon(TODAY - timedelta(days=40))
    await write(db, at)
    await db.execute("UPDATE dispatcher.shard SET prev_at = $1", at)
    retention = Retention(db, 30 * DAY_S, 30 * DAY_S)
    await retention.run()
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox_default") == 1
    await db.execute(
        "INSERT INTO dispatcher.outbox (type, data, written_at) SELECT 'a.b', '{}', $1 FROM generate_series(1, 6000)",
        at,
    )
    await read(db)
    assert (await retention.run()).deleted == {"outbox_default": 6001}
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox_default") == 0


async def test_day_that_the_reader_may_still_look_into_is_kept(db: Any) -> None:
    """It looks a day behind its cursor: the clock may have stepped back since."""
    day = TODAY - timedelta(days=40)
    name = await make(db, "outbox", day)
    retention = Retention(db, 30 * DAY_S, 30 * DAY_S)
    await read(db, noon(day + timedelta(days=1)))
    assert (await retention.run()).kept == [name]
    await read(db, noon(day + timedelta(days=2)))
    assert (await retention.run()).dropped == [name]


async def test_rows_go_when_they_are_old_and_not_as_soon_as_nobody_needs_them(db: Any) -> None:
    await read(db)
    for days in (5, 29, 31):
        await db.execute(
            "INSERT INTO dispatcher.discarded_event VALUES ($1::int, now() - $1::int * interval '1 day', '')", days
        )
    done = await Retention(db, 30 * DAY_S, 30 * DAY_S).run()
    assert done.deleted == {"discarded_event": 1}
    assert await rows(db, "discarded_event") == 2


class Overheard:
    """A connection that remembers under which lock timeout each statement began."""

    def __init__(self, db: Any) -> None:
        self._db = db
        self.timeouts: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    async def execute(self, statement: str, *arguments: Any) -> str:
        self.timeouts[statement.partition(" dispatcher")[0]] = await self._db.fetchval("SHOW lock_timeout")
        return str(await self._db.execute(statement, *arguments))


async def test_what_producers_queue_behind_waits_for_the_shortest_time(db: Any) -> None:
    old = TODAY - timedelta(days=40)
    await make(db, "outbox", old)
    await read(db)
    overheard = Overheard(db)
    done = await Retention(overheard, 30 * DAY_S, 30 * DAY_S).run()
    assert done.dropped == [leaf("outbox", old)]
    assert overheard.timeouts["DROP TABLE"] == module.DROP_TIMEOUT
    assert overheard.timeouts["TRUNCATE"] == module.LOCK_TIMEOUT, "behind this one only readers of that day"


async def test_drop_lets_go_when_a_transaction_is_in_its_way_and_comes_back(db: Any, database: str) -> None:
    name = await make(db, "outbox", TODAY - timedelta(days=40))
    reader = await connect(database, name="reader")
    transaction = reader.transaction()
    await transaction.start()
    await reader.fetch("SELECT * FROM dispatcher.outbox")
    retention = Retention(db, 30 * DAY_S, 30 * DAY_S)
    assert (await retention.run()).dropped == []
    assert name in await leaves(db, "outbox")
    await transaction.commit()
    assert (await retention.run()).dropped == [name]
    await reader.close()


async def test_idempotency_keys_go_after_a_day(db: Any) -> None:
    for key in ("old", "new"):
        await db.fetchval("SELECT dispatcher.emit('a.b', '{}', idempotency_key => $1)", key)
    await db.execute("UPDATE dispatcher.idempotency SET created_at = now() - interval '25 hours' WHERE key = 'old'")
    await Retention(db, 30 * DAY_S, 30 * DAY_S).run()
    assert [row[0] for row in await db.fetch("SELECT key FROM dispatcher.idempotency")] == ["new"]


# ── what a cursor or a pending row needs ─────────────────────────────────────────────────────────────────────────────


async def test_day_of_a_transaction_that_the_cursor_has_not_seen_the_end_of_is_kept(db: Any, database: str) -> None:
    """It was running in the cursor's snapshot: the cursor's time says nothing of its rows."""
    day = TODAY - timedelta(days=40)
    name = await make(db, "outbox", day)
    other = await connect(database, name="slow application")
    transaction = other.transaction()
    await transaction.start()
    await write(other, noon(day))
    await read(db)
    retention = Retention(db, DAY_S, DAY_S)
    assert (await retention.run()).postponed == [name]
    await transaction.commit()
    assert (await retention.run()).kept == [name]
    assert await rows(db) == 1
    await read(db)
    assert (await retention.run()).dropped == [name]
    await other.close()


async def test_unread_row_in_the_default_partition_is_kept_whatever_its_age(db: Any) -> None:
    await read(db)
    await write(db, noon(TODAY - timedelta(days=40)))
    await Retention(db, DAY_S, DAY_S).run()
    assert await rows(db) == 1


async def test_slowest_of_several_shards_counts(db: Any) -> None:
    name = await make(db, "outbox", TODAY - timedelta(days=40))
    await write(db, noon(TODAY - timedelta(days=40)))
    await db.execute(
        "INSERT INTO dispatcher.shard (id, prev, prev_at, system) SELECT 7, prev, prev_at, system FROM dispatcher.shard"
    )
    await db.execute("UPDATE dispatcher.shard SET prev = pg_current_snapshot(), prev_at = now() WHERE id <> 7")
    retention = Retention(db, DAY_S, DAY_S)
    assert (await retention.run()).kept == [name]
    await read(db)
    assert (await retention.run()).dropped == [name]


async def test_rows_of_another_cluster_are_judged_by_the_clock_alone(db: Any) -> None:
    """A restored dump: its transaction ids may lie far ahead of this cluster's."""
    name = await make(db, "outbox", TODAY - timedelta(days=40))
    await db.execute(
        "INSERT INTO dispatcher.outbox (type, data, written_at, xid) VALUES ('a.b', '{}', $1, '99999999999')",
        noon(TODAY - timedelta(days=40)),
    )
    await read(db)
    await db.execute("UPDATE dispatcher.shard SET floor = now()")
    assert (await Retention(db, DAY_S, DAY_S).run()).dropped == [name]


async def test_attempts_are_kept_as_long_as_the_cursor_is_behind_them(db: Any) -> None:
    """After a take-over they tell what was delivered already."""
    day = TODAY - timedelta(days=40)
    name = await make(db, "attempt", day)
    await read(db, noon(day))
    retention = Retention(db, DAY_S, DAY_S)
    assert (await retention.run()).kept == [name]
    await read(db)
    assert (await retention.run()).dropped == [name]


# ── the DEFAULT partition ────────────────────────────────────────────────────────────────────────────────────────────


async def without_partition(db: Any, day: date, count: int = 3) -> list[str]:
    """The day's partition was never made, and applications wrote."""
    await db.execute(f"DROP TABLE dispatcher.{leaf('outbox', day)}")
    made = await db.fetch(
        "INSERT INTO dispatcher.outbox (type, data, written_at)"
        " SELECT 'a.b', '{}', $1 FROM generate_series(1, $2::integer) RETURNING id",
        noon(day),
        count,
    )
    return [row["id"] for row in made]


async def test_rows_gone_astray_are_moved_into_a_partition_of_their_own(db: Any) -> None:
    ids = await without_partition(db, TODAY)
    before = await db.fetch("SELECT * FROM dispatcher.outbox ORDER BY seq")
    done = await Retention(db, 30 * DAY_S, 30 * DAY_S).run()
    assert done.moved == {leaf("outbox", TODAY): len(ids)}
    assert done.astray == {}
    assert await rows(db, "outbox_default") == 0
    assert await db.fetch("SELECT * FROM dispatcher.outbox ORDER BY seq") == before
    await write(db, noon(TODAY))
    assert await rows(db, leaf("outbox", TODAY)) == len(ids) + 1


async def test_reader_sees_each_row_once_while_it_is_moved(db: Any, database: str) -> None:
    ids = await without_partition(db, TODAY, 500)
    reader = await connect(database, name="reader", engine=True)
    moving = asyncio.create_task(Retention(db, 30 * DAY_S, 30 * DAY_S).run())
    seen = 0
    while not moving.done() or not seen:
        found = [row["id"] for row in await reader.fetch("SELECT id FROM dispatcher.event WHERE xid > '0'")]
        assert sorted(found) == sorted(ids)
        seen += 1
    assert (await moving).moved == {leaf("outbox", TODAY): 500}
    await reader.close()


async def test_too_many_rows_stay_where_they_are_and_are_told_of(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOVE_ROWS", 2)
    await without_partition(db, TODAY, 3)
    done = await Retention(db, 30 * DAY_S, 30 * DAY_S).run()
    assert (done.moved, done.astray) == ({}, {"outbox": 3})
    assert await rows(db) == 3


async def test_move_lets_go_when_a_producer_is_in_its_way_and_comes_back(db: Any, database: str) -> None:
    await without_partition(db, TODAY)
    producer = await connect(database, name="producer")
    transaction = producer.transaction()
    await transaction.start()
    await write(producer, noon(TODAY))
    retention = Retention(db, 30 * DAY_S, 30 * DAY_S)
    assert (await retention.run()).astray == {"outbox": 3}
    await transaction.commit()
    assert (await retention.run()).moved == {leaf("outbox", TODAY): 4}
    await producer.close()


# ── prune by hand ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_two_runs_at_once_take_turns(db: Any, database: str) -> None:
    names = [await make(db, t, TODAY - timedelta(days=n)) for t in ("outbox", "attempt") for n in range(40, 50)]
    await read(db)
    others = [await connect(database, name=f"prune {n}") for n in range(3)]
    done = await asyncio.gather(*(Retention(other, 30 * DAY_S, 30 * DAY_S).run() for other in others))
    assert sorted(name for each in done for name in each.dropped) == sorted(names)
    assert sorted(len(each.dropped) for each in done) == [0, 0, 20]
    for other in others:
        await other.close()


async def test_run_does_not_wait_for_ever_for_another(db: Any, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_S", 0.0)
    await db.fetchval("SELECT pg_advisory_lock($1, $2)", LOCK_CLASS, RETENTION_LOCK)
    other = await connect(database, name="prune")
    with pytest.raises(TimeoutError, match="another run"):
        await Retention(other, DAY_S, DAY_S).run()
    await other.close()


async def test_dry_run_foresees_what_a_run_does_and_changes_nothing(db: Any) -> None:
    old = await make(db, "outbox", TODAY - timedelta(days=40))
    unread = await make(db, "outbox", TODAY - timedelta(days=41))
    await read(db)
    await write(db, noon(TODAY - timedelta(days=41)))
    ahead = leaf("outbox", TODAY + timedelta(days=3))
    await db.execute(f"DROP TABLE dispatcher.{ahead}")
    retention = Retention(db, 30 * DAY_S, 30 * DAY_S)
    before = await leaves(db, "outbox")
    foreseen = await retention.run(dry_run=True)
    assert await leaves(db, "outbox") == before
    assert (foreseen.made, foreseen.dropped, foreseen.kept) == ([ahead], [old], [unread])
    assert await retention.run() == foreseen


# ── growth ───────────────────────────────────────────────────────────────────────────────────────────────────────────

KEPT_DAYS = 4
CATALOGUES = (
    "pg_class",
    "pg_attribute",
    "pg_inherits",
    "pg_index",
    "pg_constraint",
    "pg_attrdef",
    "pg_depend",
    "pg_type",
)


async def test_a_year_costs_at_its_end_what_it_cost_at_its_beginning(db: Any) -> None:
    """Each day: events come and are read, retention runs. No clock, no sleep: the day is an argument."""
    retention = Retention(db, KEPT_DAYS * DAY_S, KEPT_DAYS * DAY_S)
    asked = 0

    def count(_: object) -> None:
        nonlocal asked
        asked += 1

    history: list[tuple[int, ...]] = []
    first = noon(TODAY)
    with db.query_logger(count):
        for number in range(366):
            at = first + timedelta(days=number)
            await db.execute(
                "WITH made AS (INSERT INTO dispatcher.outbox (type, data, written_at)"
                " SELECT 'a.b', '{}', $1 FROM generate_series(1, 3) RETURNING seq, xid)"
                "INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state,"
                " result, duration_us) SELECT $1, seq, xid, 1, 0, 1, 'delivered', '2xx', 1 FROM made",
                at,
            )
            await read(db, at)
            asked = 0
            done = await retention.run(at=at)
            statements_asked = asked
            assert len(done.dropped) == (2 if number > KEPT_DAYS else 0)
            assert len(done.made) == (2 if number else 0)
            assert (done.kept, done.postponed, done.astray) == ([], [], {})
            if number % 30 == 15:
                catalogue = [await rows_of(db, name) for name in CATALOGUES]
                pages = await db.fetchval("SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits")
                history.append((statements_asked, len(await leaves(db, "outbox")), *catalogue, pages))
    assert len(history) == 12
    assert set(history) == {history[0]}, "something grew"
    assert await rows(db) == await rows(db, "attempt") == 3 * (KEPT_DAYS + 1)
    assert await rows(db, "outbox_default") == 0


async def rows_of(db: Any, catalogue: str) -> int:
    return int(await db.fetchval(f"SELECT count(*) FROM {catalogue}"))


async def test_partition_bears_the_settings_that_were_measured(db: Any) -> None:
    await Retention(db, 30 * DAY_S, 30 * DAY_S).run(at=noon(TODAY + timedelta(days=9)))
    expected = (await db.fetchval("SELECT dispatcher.partition_settings()")).replace(" = ", "=").split(", ")
    for table in ("outbox", "attempt"):
        for name in await leaves(db, table):
            if not name.endswith("_default"):
                options = await db.fetchval(
                    "SELECT reloptions FROM pg_class WHERE oid = $1::text::regclass", f"dispatcher.{name}"
                )
                assert options == expected, name


# ── sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_sizes_are_asked_of_the_catalogue_and_read_no_table(db: Any) -> None:
    await db.execute("INSERT INTO dispatcher.outbox (type, data) SELECT 'a.b', '{}' FROM generate_series(1, 2000)")
    await db.execute("ANALYZE dispatcher.outbox")
    found = {size.table: size for size in await Retention(db, DAY_S, DAY_S).sizes()}
    assert found["outbox"].rows == 2000
    assert found["outbox"].bytes > 2000 * 100
    assert found["outbox"].partitions == found["attempt"].partitions == DAYS_AHEAD + 1
    assert found["pending"].partitions == 0
    plan = await db.fetchval(f"EXPLAIN (FORMAT JSON) {statements('retention')['sizes']}")
    assert set(re.findall('"Relation Name": "([^"]*)"', plan)) == {"pg_class", "pg_inherits"}
