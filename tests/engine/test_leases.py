"""Who runs a shard: one at a time, followed at once."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import asyncpg
import pytest
from house import until

from dispatcher.engine import leases
from dispatcher.engine.leases import REGISTRY, WAKE, Instance, Listener
from dispatcher.store.database import connect
from dispatcher.telemetry import Snapshot, Telemetry


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "TRY_S", (0.01, 0.02))


def listener(dsn: str, name: str = "one") -> Listener:
    instance = Instance(Snapshot)
    instance.id = name
    return Listener(dsn, 0, instance, Telemetry(), random.Random(1))


async def test_second_daemon_waits_as_standby_and_follows_when_the_first_is_gone(database: str) -> None:
    first, second = listener(database, "one"), listener(database, "two")
    told: list[str] = []
    await first.open()
    await first.acquire(lambda: told.append("one"))
    await second.open()
    waiting = asyncio.create_task(second.acquire(lambda: told.append("two")))
    await until(lambda: told)
    db = await connect(database, name="test")
    await until(lambda: db.fetchval("SELECT role = 'standby' FROM dispatcher.instance WHERE id = 'two'"))
    assert not waiting.done()
    tried_at = second._instance.waited_at
    assert tried_at is not None
    await until(lambda: (second._instance.waited_at or 0.0) > tried_at)
    first.connection.terminate()
    await asyncio.wait_for(waiting, 20)
    assert second._instance.waited_at is None, "it waits no longer"
    assert told == ["two"], "told once, and only who has to wait"
    await second.close(leave=True)
    assert await db.fetchval("SELECT count(*) FROM dispatcher.instance WHERE id = 'two'") == 0
    await db.close()


async def test_waiting_pins_no_snapshot(database: str) -> None:
    first, second = listener(database, "one"), listener(database, "two")
    await first.open()
    await first.acquire(lambda: None)
    await second.open()
    told = asyncio.Event()
    waiting = asyncio.create_task(second.acquire(told.set))
    await told.wait()
    db = await connect(database, name="test")
    states = (
        "SELECT bool_and(backend_xmin IS NULL) FROM pg_stat_activity"
        " WHERE application_name = 'dispatcher listener' AND state = 'idle'"
    )
    await until(lambda: db.fetchval(states))
    waiting.cancel()
    for each in (first, second, db):
        await each.close()


async def test_listener_hears_both_channels_apart(database: str) -> None:
    one = listener(database)
    heard: list[str] = []
    one.on_wake = heard.append
    await one.open()
    db = await connect(database, name="test")
    for channel in (WAKE, REGISTRY):
        await db.execute(f"NOTIFY {channel}")
    await until(lambda: len(heard) == 2)
    assert heard == [WAKE, REGISTRY]
    await one.close()
    await db.close()


async def test_beating_ends_with_the_connection(database: str) -> None:
    one = listener(database)
    await one.open()
    await one.acquire(lambda: None)
    one.connection.terminate()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await one.run()
    await one.close(leave=True)


async def test_read_only_server_gives_no_lease(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dispatcher.store.shard import ShardStore

    async def standby(_: Any) -> str:
        raise asyncpg.CannotConnectNowError("this server is a read-only standby")

    monkeypatch.setattr(ShardStore, "system", standby)
    one = listener(database)
    await one.open()
    with pytest.raises(asyncpg.CannotConnectNowError):
        await one.acquire(lambda: None)
    await one.close()
