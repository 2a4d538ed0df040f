"""Upgrades as they happen: under load, beside a daemon of the release before, from the first schema there was."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from daemons import PATIENCE_S, free_address, until

from dispatcher.store import schema
from dispatcher.store.schema import FIRST_RELEASE, migrate, migrations

ROOT = Path(__file__).resolve().parent.parent
FIRST_REVISION = "6ee75f9cbd82"  # the last one whose newest migration is 0002
PRODUCERS = 3


class Release:
    """A release of the program, run as processes on one database."""

    def __init__(self, tree: Path, state: Path, dsn: str) -> None:
        self._tree, self._state, self._dsn = tree, state, dsn
        self.processes: list[subprocess.Popen[bytes]] = []

    def _environment(self, api: str, metrics: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(self._tree),
            "DISPATCHER_DATABASE_DSN": self._dsn,
            "DISPATCHER_STATE_DIRECTORY": str(self._state),
            "DISPATCHER_SERVER_LISTEN": api,
            "DISPATCHER_METRICS_LISTEN": metrics,
            "DISPATCHER_NETWORK_ALLOW": "127.0.0.0/8",
            "DISPATCHER_NETWORK_ALLOW_HTTP": "true",
            "DISPATCHER_RETRY_SCHEDULE": "1s,1s",
        }

    def start(self, *arguments: str, metrics: str = "") -> subprocess.Popen[bytes]:
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from dispatcher.cli.operator import main; main()"
        command = [sys.executable, "-c", code, str(self._tree), *arguments]
        log = self._state / f"{self._tree.name}-{arguments[0]}-{len(self.processes)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=self._environment(free_address(), metrics or free_address()), stdout=out, stderr=out,
                cwd=self._state,
            )  # fmt: skip
        self.processes.append(process)
        process.log = log  # type: ignore[attr-defined]
        return process

    async def act(self, *arguments: str) -> tuple[int, str]:
        """Run a command to its end; return its exit code and all it said."""
        process = self.start(*arguments)
        await until(lambda: process.poll() is not None, " ".join(arguments))
        return process.returncode, process.log.read_text()  # type: ignore[attr-defined]

    async def run(self, role: str) -> subprocess.Popen[bytes]:
        """A daemon that has become `role`."""
        metrics = free_address()
        process = self.start("run", metrics=metrics)
        async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
            while True:
                assert process.poll() is None, process.log.read_text()  # type: ignore[attr-defined]
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"http://{metrics}/readyz") as answer:
                        if answer.status == 200 and role in await answer.text():
                            return process
                await asyncio.sleep(0.02)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


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
    """The program's tree as it was first released, out of this repository's history."""
    command = ["git", "-C", str(ROOT), "archive", FIRST_REVISION, "dispatcher"]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"revision {FIRST_REVISION} is not in this tree's history: a source archive or a shallow clone")
    tree = tmp_path_factory.mktemp("first-release")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(tree, filter="data")
    return tree


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
