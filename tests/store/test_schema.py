"""The schema: how it comes to be, and how it grows under programs that are running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

from dispatcher.errors import MigrationBlocked, SchemaMismatch
from dispatcher.store import schema as store
from dispatcher.store.database import connect
from dispatcher.store.schema import FIRST_RELEASE, Migration, check_schema, migrate, migrations

LATER = migrations()[-1].version + 5


@pytest.fixture
async def db(database: str) -> AsyncIterator[Any]:
    connection = await connect(database, name="test")
    yield connection
    await connection.close()


@pytest.fixture
def adding(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Migration]:
    """A further migration of this program."""

    def add(sql: str, *, oldest: int = FIRST_RELEASE, contracts: bool = False, version: int = LATER) -> Migration:
        made = Migration(version, f"number {version}", sql, oldest, contracts)
        known = (*store.migrations(), made)
        monkeypatch.setattr(store, "migrations", lambda: known)
        return made

    return add


async def applied_later(db: Any, version: int, oldest: int | None, program: str | None = "9.1") -> None:
    await db.execute(
        "INSERT INTO dispatcher.migration (version, name, checksum, oldest, program) VALUES ($1, 'later', 'x', $2, $3)",
        version,
        oldest,
        program,
    )


async def beat(db: Any, version: int | None) -> None:
    """A daemon that was written for a schema, as it shows in its heartbeat."""
    snapshot = "{}" if version is None else f'{{"schema": {version}}}'
    await db.execute(
        "INSERT INTO dispatcher.instance (id, host, pid, role, version, started_at, snapshot)"
        " VALUES ('here:1', 'here', 1, 'active', '0.1', now(), $1)",
        snapshot,
    )


# ── migrating ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_migrating_twice_does_nothing_the_second_time(empty_database: str) -> None:
    assert await migrate(empty_database) == list(migrations())
    assert await migrate(empty_database) == []


async def test_migrating_from_two_hosts_at_once_applies_everything_once(empty_database: str) -> None:
    done = await asyncio.gather(*(migrate(empty_database) for _ in range(3)))
    assert sorted(map(len, done)) == [0, 0, len(migrations())]


async def test_dry_run_says_what_is_missing_and_leaves_no_trace(empty_database: str) -> None:
    assert await migrate(empty_database, dry_run=True) == list(migrations())
    connection = await connect(empty_database, name="test")
    assert await connection.fetchval("SELECT to_regnamespace('dispatcher')") is None
    with pytest.raises(SchemaMismatch, match="dispatcher migrate"):
        await check_schema(connection)
    await connection.close()


async def test_dry_run_does_not_wait_for_a_host_that_migrates(db: Any, database: str) -> None:
    await db.fetchval("SELECT pg_advisory_lock($1, $2)", store.LOCK_CLASS, store.MIGRATION_LOCK)
    assert await migrate(database, dry_run=True) == []


async def test_failed_migration_leaves_nothing_of_itself_behind(
    empty_database: str, adding: Callable[..., Migration]
) -> None:
    broken = adding("CREATE TABLE dispatcher.half (); SELECT 1 / 0")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(empty_database)
    assert await migrate(empty_database, dry_run=True) == [broken]
    connection = await connect(empty_database, name="test")
    assert await connection.fetchval("SELECT to_regclass('dispatcher.half')") is None
    await connection.close()


async def test_migration_edited_after_it_was_applied_is_refused(db: Any, database: str) -> None:
    await db.execute("UPDATE dispatcher.migration SET checksum = 'another'")
    for act in (check_schema(db), migrate(database)):
        with pytest.raises(SchemaMismatch, match="another text"):
            await act


# ── locks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

HOT = "ALTER TABLE dispatcher.outbox ADD COLUMN later text"


async def test_migration_comes_back_for_its_lock_and_lets_producers_pass_meanwhile(
    db: Any, database: str, adding: Callable[..., Migration]
) -> None:
    adding(HOT)
    holder = await connect(database, name="report")
    transaction = holder.transaction()
    await transaction.start()
    await holder.fetch("SELECT count(*) FROM dispatcher.outbox")
    migrating = asyncio.create_task(migrate(database))
    for _ in range(20):  # would wait until the report has ended, were the migration to wait for it
        await db.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', '{}')")
        await asyncio.sleep(0.02)
    assert not migrating.done()
    await transaction.rollback()
    assert [m.version for m in await migrating] == [LATER]
    await holder.close()


async def test_migration_that_never_gets_its_lock_names_the_holder(
    db: Any, database: str, adding: Callable[..., Migration]
) -> None:
    adding(HOT)
    holder = await connect(database, name="the report")
    async with holder.transaction():
        await holder.fetch("SELECT count(*) FROM dispatcher.outbox")
        with pytest.raises(MigrationBlocked, match=f"{holder.get_server_pid()} .the report. since"):
            await migrate(database, patience_s=0.0)
    await holder.close()
    assert await db.fetchval("SELECT max(version) FROM dispatcher.migration") < LATER


# ── expand and contract ──────────────────────────────────────────────────────────────────────────────────────────────


def test_each_migration_says_which_program_may_run_beside_it() -> None:
    for migration in migrations():
        assert migration.version <= FIRST_RELEASE or "-- oldest program: " in migration.sql
        assert migration.oldest <= migration.version


def test_nothing_since_the_first_release_breaks_its_program() -> None:
    assert [m.name for m in migrations() if m.contracts] == []


async def test_gap_in_the_numbers_means_nothing(empty_database: str, adding: Callable[..., Migration]) -> None:
    adding("CREATE TABLE dispatcher.far ()", version=LATER + 40)
    await migrate(empty_database)
    adding("CREATE TABLE dispatcher.between ()", version=LATER + 20)
    assert [m.version for m in await migrate(empty_database)] == [LATER + 20]


async def test_program_runs_on_a_newer_schema_that_only_grew(db: Any, database: str) -> None:
    await applied_later(db, LATER, oldest=store.written_for())
    await check_schema(db)
    assert await migrate(database) == []


@pytest.mark.parametrize("oldest", [LATER, None])
async def test_program_refuses_a_schema_that_left_it_behind_and_says_what_is_needed(
    db: Any, database: str, oldest: int | None
) -> None:
    await applied_later(db, LATER, oldest)
    await applied_later(db, LATER + 1, FIRST_RELEASE, "9.2")
    for act in (check_schema(db), migrate(database), migrate(database, dry_run=True)):
        with pytest.raises(SchemaMismatch) as caught:
            await act
        for said in (f"at version {LATER + 1}", f"for version {store.written_for()}", f"migration {LATER} took", "9.2"):
            assert said in str(caught.value)
        assert "restore a backup" in str(caught.value)


async def test_program_runs_without_a_migration_that_only_takes_away(db: Any, adding: Callable[..., Migration]) -> None:
    adding("DROP VIEW dispatcher.event", oldest=LATER - 1, contracts=True)
    await check_schema(db)
    adding("CREATE TABLE dispatcher.more ()", version=LATER + 1)
    with pytest.raises(SchemaMismatch, match=f"lacks migration {LATER + 1}"):
        await check_schema(db)


@pytest.mark.parametrize(("daemon", "waits"), [(None, True), (LATER - 2, True), (LATER - 1, False)])
async def test_taking_away_waits_for_the_daemons_that_need_it(
    db: Any, database: str, adding: Callable[..., Migration], daemon: int | None, waits: bool
) -> None:
    contracting = adding("CREATE TABLE dispatcher.less ()", oldest=LATER - 1, contracts=True)
    expanding = adding("CREATE TABLE dispatcher.more ()", version=LATER + 1)
    await beat(db, daemon)
    assert await migrate(database) == ([expanding] if waits else [contracting, expanding])
    await db.execute("DELETE FROM dispatcher.instance")
    assert await migrate(database) == ([contracting] if waits else [])
