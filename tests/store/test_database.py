"""The schema: who may do what in it, and what applications write through."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from dispatcher.errors import DatabaseUnreachable
from dispatcher.store import database as module
from dispatcher.store.database import connect, open_pool, place, statements


@pytest.fixture
async def db(database: str) -> AsyncIterator[Any]:
    connection = await connect(database, name="test")
    yield connection
    await connection.close()


# ── reaching it ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_unreachable_database_is_named_without_the_password() -> None:
    with pytest.raises(DatabaseUnreachable) as caught:
        await connect("postgresql://me:secret@127.0.0.1:1/shop", name="test")
    assert "127.0.0.1:1/shop" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_server_process_that_hangs_keeps_nobody_for_long(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RELEASE_S", 0.1)
    pool = await open_pool(database, size=1)
    pid = await pool.fetchval("SELECT pg_backend_pid()")
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(20):  # asyncpg alone waits for the 30 s of the statement
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await pool.fetchval("SELECT 1")
            assert await pool.fetchval("SELECT pg_backend_pid()") != pid
    finally:
        os.kill(pid, signal.SIGCONT)
        await pool.close()


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://me:secret@db.example:5433/shop?sslmode=require", "db.example:5433/shop"),
        ("postgresql://me:secret@/shop?host=/run/pg", "/run/pg/shop"),
        ("host=db.example password=secret dbname=shop", "host=db.example dbname=shop"),
    ],
)
def test_place_shows_where_and_never_the_password(dsn: str, shown: str) -> None:
    assert place(dsn) == shown


async def test_check_constraints_mirror_the_enums(db: Any) -> None:
    from dispatcher.model import SETTLED, DeliveryState, EndpointStatus, Result

    async def allowed(table: str, column: str) -> set[str]:
        text = await db.fetchval(
            "SELECT string_agg(pg_get_constraintdef(oid), ' ') FROM pg_constraint"
            " WHERE conrelid = $1::regclass AND contype = 'c'"
            " AND pg_get_constraintdef(oid) LIKE '%' || $2 || ' = ANY%'",
            f"dispatcher.{table}",
            column,
        )
        return set(re.findall(r"'(\w+)'::text", text))

    assert await allowed("attempt", "state") == {state.value for state in SETTLED | {DeliveryState.RETRYING}}
    assert await allowed("pending", "state") == {DeliveryState.PENDING.value, DeliveryState.RETRYING.value}
    assert await allowed("attempt", "result") == {result.value for result in Result}
    assert await allowed("endpoint", "status") == {status.value for status in EndpointStatus}


@pytest.fixture
async def engine_db(database: str) -> AsyncIterator[Any]:
    connection = await connect(database, name="test", engine=True)
    yield connection
    await connection.close()


ARGUMENTS = {"timestamptz": "'2000-01-01'", "int8": "1", "int4": "1", "xid8": "'1'", "pg_snapshot": "'1:1:'"}
EMPTY = "'{}'"
ONCE = {"reread", "newest_known", "born", "heads"}  # at a take-over, or once in a cluster's life


@pytest.mark.parametrize("file", ["outbox", "pending"])
async def test_statements_of_the_engine_scan_and_sort_no_table(engine_db: Any, file: str) -> None:
    for name in statements(file).keys() - ONCE:
        sql = statements(file)[name]
        kinds = [parameter.name for parameter in (await engine_db.prepare(sql)).get_parameters()]
        await engine_db.execute(f"PREPARE p_{name} AS {sql}")
        given = f"({', '.join(ARGUMENTS.get(kind, EMPTY) for kind in kinds)})" if kinds else ""
        plan = "\n".join(row[0] for row in await engine_db.fetch(f"EXPLAIN EXECUTE p_{name}{given}"))
        assert not re.search(r"Seq Scan on (outbox|attempt|pending)|-> +(Incremental )?Sort ", plan), plan
        assert "Index" in plan, plan


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("first_page_near", "'{now}', '{xmax}', '2000-01-01', 500"),
        ("first_page", "'{{}}', '{xmax}', '0', 0, '2000-01-01', '2000-01-01', 500"),
        ("next_page", "'{{}}', '{xmax}', '0', 0, '2000-01-01', '2000-01-01', 500, '{now}'"),
    ],
)
async def test_poll_reads_nothing_of_what_the_day_brought_before(engine_db: Any, name: str, arguments: str) -> None:
    await engine_db.execute(
        "INSERT INTO dispatcher.outbox (type, data) SELECT 'a.b', '{}' FROM generate_series(1, 20000)"
    )
    now = await engine_db.fetchval("SELECT pg_current_snapshot()::text")
    await engine_db.execute(f"PREPARE poll AS {statements('outbox')[name]}")
    given = arguments.format(now=now, xmax=now.split(":")[1])
    [plan] = json.loads(await engine_db.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE poll({given})"))
    assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 60


# ── what applications do ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def producer(db: Any) -> Any:
    """The application's connection, in the documented role."""
    await db.execute("SET ROLE dispatcher_producer")
    return db


async def test_producer_may_insert_and_emit(producer: Any) -> None:
    await producer.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', '{}')")
    assert re.fullmatch("evt_[0-9a-f]{32}", await producer.fetchval("SELECT dispatcher.emit('a.b', '{}')"))


@pytest.mark.parametrize(
    "table",
    [
        "outbox",
        "event",
        "endpoint",
        "api_key",
        "account",
        "setting",
        "attempt",
        "pending",
        "idempotency",
        "shard",
        "instance",
    ],
)
async def test_producer_may_read_nothing(producer: Any, table: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await producer.fetch(f"SELECT * FROM dispatcher.{table}")


@pytest.mark.parametrize(
    "act",
    [
        "UPDATE dispatcher.outbox SET type = 'x.y'",
        "DELETE FROM dispatcher.outbox",
        "TRUNCATE dispatcher.outbox",
        "SELECT dispatcher.flush(0, 1, 1, NULL, NULL, NULL, NULL, NULL" + ", NULL" * 26 + ")",
        "SELECT dispatcher.make_partitions('outbox', '2030-01-01', '2030-01-02')",
        "SELECT dispatcher.grant_producer()",
        "UPDATE dispatcher.shard SET epoch = 0",
    ],
)
async def test_producer_may_change_nothing(producer: Any, act: str) -> None:
    with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError)):
        await producer.execute(act)


async def test_application_sets_account_type_data_id_and_created_at(producer: Any) -> None:
    await producer.execute(
        "INSERT INTO dispatcher.outbox (account, type, data, id, created_at)"
        " VALUES ('acme', 'a.b', '{}', 'evt_mine', '2020-01-01')"
    )


@pytest.mark.parametrize(("column", "value"), [("seq", "1"), ("xid", "'1'"), ("written_at", "now()")])
async def test_application_sets_nothing_else(producer: Any, column: str, value: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await producer.execute(f"INSERT INTO dispatcher.outbox (type, data, {column}) VALUES ('a.b', '{{}}', {value})")


async def test_data_is_kept_as_it_was_written(db: Any) -> None:
    text = '{"b": 1.0,  "a": 1e2, "b2": "\\u0041"}'
    await db.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', $1)", text)
    assert await db.fetchval("SELECT data::text FROM dispatcher.outbox") == text


@pytest.mark.parametrize("event_id", ["", "with space", "x" * 65, "line\nbreak"])
async def test_event_id_that_could_not_stand_in_a_header_is_refused(db: Any, event_id: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await db.execute("INSERT INTO dispatcher.outbox (type, data, id) VALUES ('a.b', '{}', $1)", event_id)


async def test_event_id_made_by_a_default_is_a_uuid_of_version_7(db: Any) -> None:
    for made in (
        await db.fetchval("INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', '{}') RETURNING id"),
        await db.fetchval("SELECT dispatcher.emit('a.b', '{}')"),
    ):
        assert re.fullmatch("evt_[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", made)


# ── idempotency ──────────────────────────────────────────────────────────────────────────────────────────────────────

EMIT = "SELECT dispatcher.emit($1, $2::text::json, account => $3, idempotency_key => $4)"


async def test_key_repeated_with_the_same_data_returns_the_first_event(producer: Any, db: Any) -> None:
    first = await producer.fetchval(EMIT, "a.b", '{"n":1}', "default", "k")
    assert await producer.fetchval(EMIT, "a.b", '{"n":1}', "default", "k") == first
    other = await producer.fetchval(EMIT, "a.b", '{"n":1}', "acme", "k")
    assert other != first, "each account has its own keys"
    await db.execute("RESET ROLE")
    assert await db.fetchval("SELECT count(*) FROM dispatcher.outbox") == 2


@pytest.mark.parametrize(("type_", "data"), [("a.b", '{"n":2}'), ("a.c", '{"n":1}')])
async def test_key_repeated_with_other_data_raises(db: Any, type_: str, data: str) -> None:
    await db.fetchval(EMIT, "a.b", '{"n":1}', "default", "k")
    with pytest.raises(asyncpg.UniqueViolationError, match="other data"):
        await db.fetchval(EMIT, type_, data, "default", "k")


async def test_key_may_be_used_again_after_a_day(db: Any) -> None:
    first = await db.fetchval(EMIT, "a.b", '{"n":1}', "default", "k")
    await db.execute("UPDATE dispatcher.idempotency SET created_at = created_at - interval '25 hours'")
    second = await db.fetchval(EMIT, "a.b", '{"n":2}', "default", "k")
    assert second != first
    assert await db.fetchval(EMIT, "a.b", '{"n":2}', "default", "k") == second


async def test_rolled_back_emit_leaves_its_key_free(db: Any) -> None:
    transaction = db.transaction()
    await transaction.start()
    await db.fetchval(EMIT, "a.b", '{"n":1}', "default", "k")
    await transaction.rollback()
    await db.fetchval(EMIT, "a.b", '{"n":2}', "default", "k")
    rows = await db.fetch("SELECT data::text FROM dispatcher.outbox")
    assert [json.loads(row[0]) for row in rows] == [{"n": 2}]


@pytest.mark.parametrize("first_commits", [True, False])
async def test_two_transactions_with_one_key_make_one_event(db: Any, database: str, first_commits: bool) -> None:
    other = await connect(database, name="other")
    transaction = db.transaction()
    await transaction.start()
    first = await db.fetchval(EMIT, "a.b", "{}", "default", "k")
    second = asyncio.create_task(other.fetchval(EMIT, "a.b", "{}", "default", "k"))
    watch = await connect(database, name="watch")
    while not await watch.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ):
        await asyncio.sleep(0.002)
    assert not second.done()
    await (transaction.commit() if first_commits else transaction.rollback())
    assert (await second == first) is first_commits
    assert await watch.fetchval("SELECT count(*) FROM dispatcher.outbox") == 1
    for connection in (other, watch):
        await connection.close()


# ── waking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_trigger_notifies_only_while_somebody_sleeps(db: Any, database: str) -> None:
    sleeper = await connect(database, name="sleeper")
    heard: list[object] = []
    await sleeper.add_listener("dispatcher_wake", lambda *args: heard.append(args))
    await db.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', '{}')")
    await sleeper.fetchval("SELECT 1")  # whatever was sent has come in with it
    assert heard == []
    assert await sleeper.fetchval(statements("shard")["fall_asleep"])
    await db.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', '{}')")
    while not heard:
        await sleeper.fetchval("SELECT 1")
    await sleeper.close()


async def test_registry_version_changes_with_every_change_of_a_webhook(db: Any) -> None:
    versions = []
    account = await db.fetchval("SELECT id FROM dispatcher.account")
    for act in (
        "INSERT INTO dispatcher.endpoint (public_id, account_id, url, events) VALUES ('wh_1', $1, 'https://x', '{*}')",
        "UPDATE dispatcher.endpoint SET status = 'paused' WHERE account_id = $1",
        "DELETE FROM dispatcher.endpoint WHERE account_id = $1",
    ):
        await db.execute(act, account)
        versions.append(await db.fetchval("SELECT version FROM dispatcher.registry"))
    assert versions == [2, 3, 4]
