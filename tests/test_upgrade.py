"""Upgrades as they happen: under load, beside a daemon of the release before, from the first schema there was."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from daemons import until
from releases import ROOT, Release, unpack_first_release

from dispatcher.store import schema
from dispatcher.store.schema import FIRST_RELEASE, migrate, migrations

PRODUCERS = 3


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[str, Counter[str]]]:
    """A subscriber's URL, and how often each event came."""
    came: Counter[str] = Counter()

    async def take(request: web.Request) -> web.Response:
        came[request.headers["webhook-id"]] += 1
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/", came
    await runner.cleanup()


@contextlib.asynccontextmanager
async def producers(dsn: str, sent: list[str]) -> AsyncIterator[None]:
    """An application that writes all the while, in both ways; an INSERT that fails, fails the test."""
    stop = asyncio.Event()

    async def produce() -> None:
        connection = await asyncpg.connect(dsn)
        for number in itertools.count():
            if stop.is_set():
                break
            statement = (
                "INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', '{}') RETURNING id"
                if number % 2
                else "SELECT dispatcher.emit('a.b', '{}')"
            )
            sent.append(await connection.fetchval(statement))
            await asyncio.sleep(0.002)
        await connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(PRODUCERS):
            group.create_task(produce())
        try:
            yield
        finally:
            stop.set()


async def subscribe(connection: Any, url: str) -> None:
    await connection.execute(
        "INSERT INTO dispatcher.endpoint (public_id, account_id, url, events)"
        " SELECT 'wh_1', id, $1, '{*}' FROM dispatcher.account",
        url,
    )


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_first_release(tmp_path_factory.mktemp("first-release"))


@pytest.fixture
def releases(first_release: Path, empty_database: str, tmp_path: Path) -> Iterator[tuple[Release, Release]]:
    old, new = (Release(tree, tmp_path, empty_database) for tree in (first_release, ROOT))
    yield old, new
    old.end()
    new.end()


async def test_rolling_upgrade_from_the_first_release_under_load_loses_nothing(
    releases: tuple[Release, Release], empty_database: str, receiver: tuple[str, Counter[str]]
) -> None:
    old, new = releases
    url, came = receiver
    sent: list[str] = []
    assert (await old.act("migrate"))[0] == 0
    connection = await asyncpg.connect(empty_database)
    assert await connection.fetchval("SELECT max(version) FROM dispatcher.migration") == FIRST_RELEASE
    await subscribe(connection, url)
    old_daemon = await old.run("active")
    async with producers(empty_database, sent):
        await until(lambda: len(came) > 50, "the old daemon to deliver")

        hosts = await asyncio.gather(new.act("migrate"), new.act("migrate"))
        assert [code for code, _ in hosts] == [0, 0], hosts
        assert await connection.fetchval("SELECT max(version) FROM dispatcher.migration") == migrations()[-1].version
        first_after = len(sent)
        await until(lambda: len(sent) > first_after and sent[first_after] in came, "the old daemon to deliver on")
        assert old_daemon.poll() is None

        new_daemon = await new.run("standby")
        old_daemon.send_signal(signal.SIGTERM)
        await until(lambda: old_daemon.poll() is not None, "the old daemon to drain")
        assert old_daemon.returncode == 0
        first_after = len(sent)
        await until(lambda: len(sent) > first_after and sent[first_after] in came, "the new daemon to deliver")
    await until(lambda: came.keys() >= set(sent), "every event")
    assert came.keys() == set(sent)
    assert new_daemon.poll() is None

    code, said = await old.act("run")
    assert code == 2, said
    assert f"the schema is at version {migrations()[-1].version}" in said
    await connection.close()


async def test_first_schema_with_data_comes_up_under_load_and_keeps_every_row(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = migrations()[:1]
    with monkeypatch.context() as patch:
        patch.setattr(schema, "migrations", lambda: first)
        await migrate(empty_database)
    connection = await asyncpg.connect(empty_database)
    await subscribe(connection, "https://example.com/")
    await connection.execute(
        """
        INSERT INTO dispatcher.outbox (type, data)
            SELECT 'a.b', json_build_object('n', n) FROM generate_series(1, 500) n;
        INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result,
                                        status, duration_us)
            SELECT now(), seq, xid, 1, 0, 1, 'retrying', '5xx', 500, 1 FROM dispatcher.outbox;
        INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts,
                                        due_at)
            SELECT 1, seq, 0, xid, written_at, 'retrying', 1, now() + interval '1 hour' FROM dispatcher.outbox;
        """
    )
    tables = ("outbox", "attempt", "pending", "endpoint", "shard", "account")
    before = {t: await connection.fetch(f"SELECT md5(t::text) AS m FROM dispatcher.{t} t ORDER BY 1") for t in tables}
    sent: list[str] = []
    async with producers(empty_database, sent):
        assert await migrate(empty_database) == list(migrations()[1:])
    events = await connection.fetchval("SELECT count(*) FROM dispatcher.event WHERE type = 'a.b' AND data IS NOT NULL")
    assert events == 500 + len(sent)
    await connection.execute("ALTER TABLE dispatcher.outbox DROP COLUMN traceparent CASCADE")
    await connection.execute("DELETE FROM dispatcher.outbox WHERE id = ANY ($1)", sent)
    after = {t: await connection.fetch(f"SELECT md5(t::text) AS m FROM dispatcher.{t} t ORDER BY 1") for t in tables}
    assert after == before
    await connection.close()
