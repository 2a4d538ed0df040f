"""The named statements: each is used, and those that answer the outside read by an index."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import dispatcher
from dispatcher.store.database import statements

PACKAGE = Path(dispatcher.__file__).parent
FILES = sorted(file.stem for file in (PACKAGE / "store" / "sql").glob("*.sql"))
SOURCES = {file: file.read_text() for file in PACKAGE.rglob("*.py")}

WHOLE_TABLE = {
    ("endpoint", "registry"),  # once per change of a webhook, and at a take-over
    ("endpoint", "health"),
    ("overview", "engine"),  # a row for each daemon
}
SUMMED = {("overview", "traffic")}  # quantiles sort the rows they are of, which a LIMIT bounds
OUTSIDE = [
    (file, name)
    for file in ("account", "endpoint", "event", "overview", "session")
    for name in statements(file)
    if (file, name) not in WHOLE_TABLE
] + [("delivery", "everywhere"), ("operator", "webhooks")]


def test_there_are_statements() -> None:
    assert {"account", "endpoint", "event", "outbox", "pending", "shard"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_statement_is_used_by_those_who_read_its_file(file: str) -> None:
    readers = [text for text in SOURCES.values() if f'statements("{file}")' in text]
    assert readers
    assert [name for name in statements(file) if not any(f'"{name}"' in text for text in readers)] == []


@pytest.mark.parametrize("file", FILES)
def test_no_statement_stands_without_a_name(file: str) -> None:
    text = (PACKAGE / "store" / "sql" / f"{file}.sql").read_text()
    assert text.count("-- name: ") - text.count("-- name: _") == len(statements(file))
    assert "/* _" not in "".join(statements(file).values())
    head = text.partition("-- name: ")[0]
    assert all(line.startswith("--") for line in head.splitlines() if line)


@pytest.fixture(scope="module")
def filled(administrator: Any, template: str) -> Iterator[str]:
    """A database with enough in it for the planner to care."""
    name = administrator.create(template)
    dsn = administrator.dsn_of(name)
    administrator.run(_fill(dsn))
    yield dsn
    administrator.drop(name)


async def _fill(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        """
        INSERT INTO dispatcher.account (name) SELECT 'a' || n FROM generate_series(1, 500) n;
        INSERT INTO dispatcher.api_key (id, account_id, mode, hash, hint)
            SELECT 'key_' || n, 1 + n % 500, 'live', sha256(n::text::bytea), 'abcd' FROM generate_series(1, 5000) n;
        INSERT INTO dispatcher.endpoint (public_id, account_id, url, events)
            SELECT 'wh_' || n, 1 + n % 500, 'https://example.com/', '{*}' FROM generate_series(1, 5000) n;
        INSERT INTO dispatcher.endpoint_health (endpoint_id) SELECT id FROM dispatcher.endpoint WHERE id % 2 = 0;
        INSERT INTO dispatcher.outbox (account, id, type, data, written_at)
            SELECT 'a' || n % 50, 'evt_' || n, 'a.b', '{}', now() + n % 3 * interval '1 day'
            FROM generate_series(1, 9000) n;
        INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, duration_us)
            SELECT now() + n % 3 * interval '1 day', n, '1', 1 + n % 5000, 0, 1, 'delivered', 1
            FROM generate_series(1, 20000) n;
        INSERT INTO dispatcher.pending
            (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)
            SELECT 1 + n % 5000, n, 0, '1', now(), 'pending', 0, now() FROM generate_series(1, 9000) n;
        INSERT INTO dispatcher.session (hash, key_id, expires_at)
            SELECT sha256(n::text::bytea), 'key_' || 1 + n % 5000, now() + n * interval '1 s'
            FROM generate_series(1, 9000) n;
        INSERT INTO dispatcher.discarded_event (event_seq, reason) SELECT seq, 'x' FROM dispatcher.outbox;
        """
    )
    await connection.execute("ANALYZE")
    await connection.close()


@pytest.fixture
async def connection(filled: str) -> AsyncIterator[asyncpg.Connection]:
    settings = {"plan_cache_mode": "force_generic_plan", "enable_seqscan": "off", "jit": "off"}
    connection = await asyncpg.connect(filled, server_settings=settings)
    yield connection
    await connection.close()


async def plan_of(connection: asyncpg.Connection, statement: str) -> dict[str, Any]:
    """The plan for any parameters: EXPLAIN (GENERIC_PLAN) would do, were it not for servers older than 16."""
    count = len((await connection.prepare(statement)).get_parameters())
    nulls = f"({', '.join(['NULL'] * count)})" if count else ""
    await connection.execute(f"PREPARE explained AS {statement}")
    text = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE explained{nulls}")
    plan: dict[str, Any] = json.loads(text)[0]["Plan"]
    return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


@pytest.mark.parametrize(("file", "name"), OUTSIDE)
async def test_what_the_outside_asks_is_found_by_an_index(connection: asyncpg.Connection, file: str, name: str) -> None:
    for node in nodes(await plan_of(connection, statements(file)[name])):
        assert node["Node Type"] != "Seq Scan", node
        if node["Node Type"] in {"Index Scan", "Index Only Scan", "Bitmap Index Scan"}:
            assert "Index Cond" in node, node
        if node["Node Type"] == "Sort" and (file, name) not in SUMMED:
            assert node["Plan Rows"] < 1000, node


async def test_a_plan_that_reads_everything_would_be_noticed(connection: asyncpg.Connection) -> None:
    plan = await plan_of(connection, "SELECT id FROM dispatcher.api_key WHERE hint = $1")
    assert any(node["Node Type"] == "Seq Scan" or "Index Cond" not in node for node in nodes(plan))
