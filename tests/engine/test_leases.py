"""Who runs a shard: one at a time, followed at once."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from house import until

from dispatcher.engine import leases
from dispatcher.engine.channels import REGISTRY, WAKE, hear
from dispatcher.engine.leases import Lease
from dispatcher.store import fleet
from dispatcher.store.database import connect
from dispatcher.telemetry import Telemetry


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "TRY_S", (0.01, 0.02))


def lease(dsn: str, name: str = "one") -> Lease:
    return Lease(dsn, 0, {"one": 1, "two": 2}[name], Telemetry(), random.Random(1))


async def test_second_daemon_waits_as_standby_and_follows_when_the_first_is_gone(database: str) -> None:
    first, second = lease(database, "one"), lease(database, "two")
    told: list[str] = []
    await first.open()
    await first.acquire(lambda: told.append("one"))
    await second.open()
    waiting = asyncio.create_task(second.acquire(lambda: told.append("two")))
    await until(lambda: told)
    assert not waiting.done()
    first.connection.terminate()
    await asyncio.wait_for(waiting, 20)
    assert told == ["two"], "told once, and only who has to wait"
    await second.close()


async def test_waiting_pins_no_snapshot(database: str) -> None:
    first, second = lease(database, "one"), lease(database, "two")
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


async def test_channels_are_heard_apart(database: str) -> None:
    ear, db = await connect(database, name="ear"), await connect(database, name="test")
    heard: list[tuple[str, str]] = []
    await hear(ear, lambda channel, payload: heard.append((channel, payload)))
    await db.execute(f"NOTIFY {WAKE}")
    await db.execute(f"NOTIFY {REGISTRY}, 'x'")
    await until(lambda: len(heard) == 2)
    assert heard == [(WAKE, ""), (REGISTRY, "x")]
    await ear.close()
    await db.close()


async def test_who_has_the_lease_is_woken_by_nothing(database: str) -> None:
    first, second = lease(database, "one"), lease(database, "two")
    channels = "SELECT array(SELECT pg_listening_channels())"
    await first.open()
    await first.acquire(lambda: None)
    assert await first.connection.fetchval(channels) == []
    await second.open()
    told = asyncio.Event()
    waiting = asyncio.create_task(second.acquire(told.set))
    await told.wait()
    await first.close()
    await asyncio.wait_for(waiting, 20)
    assert await second.connection.fetchval(channels) == []
    await second.close()


async def test_beating_ends_with_the_connection(database: str) -> None:
    one = lease(database)
    await one.open()
    await one.acquire(lambda: None)
    one.connection.terminate()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await one.run()
    await one.close()


async def test_read_only_server_gives_no_lease(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dispatcher.store.shard import ShardStore

    async def standby(_: Any) -> str:
        raise asyncpg.CannotConnectNowError("this server is a read-only standby")

    monkeypatch.setattr(ShardStore, "system", standby)
    one = lease(database)
    await one.open()
    with pytest.raises(asyncpg.CannotConnectNowError):
        await one.acquire(lambda: None)
    await one.close()


async def test_holder_that_hangs_is_evicted_by_who_waits(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = lease(database, "one"), lease(database, "two")
    await first.open()
    await first.acquire(lambda: None)  # and then not a word
    monkeypatch.setattr(fleet, "SILENT", timedelta(seconds=0.2))
    lost = asyncio.Event()
    first.connection.add_termination_listener(lambda _: lost.set())
    await second.open()
    await asyncio.wait_for(second.acquire(lambda: None), 20)
    await asyncio.wait_for(lost.wait(), 20)
    await first.close()
    await second.close()


async def test_holder_that_speaks_is_not_evicted(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = lease(database, "one"), lease(database, "two")
    await first.open()
    await first.acquire(lambda: None)
    renewed = asyncio.Semaphore(0)
    first.on_valid = lambda until: renewed.release()
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(fleet, "SILENT", timedelta(seconds=5))
    renewing = asyncio.create_task(first.run())
    await second.open()
    waiting = asyncio.create_task(second.acquire(lambda: None))
    for _ in range(50):
        await renewed.acquire()
    assert not waiting.done()
    assert not renewing.done()
    for task in (waiting, renewing):
        task.cancel()
    await asyncio.gather(waiting, renewing, return_exceptions=True)
    await first.close()
    await second.close()


async def test_lease_is_valid_from_when_it_was_asked_for(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = lease(database)
    await one.open()
    told: list[float] = []
    one.on_valid = told.append
    before = asyncio.get_running_loop().time()
    await one.acquire(lambda: None)
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.01)
    renewing = asyncio.create_task(one.run())
    await until(lambda: len(told) > 2)
    # The loop's clock counts whole milliseconds: two that follow at once may be equal.
    assert before + leases.VALID_S <= told[0] <= told[1] < told[2] <= asyncio.get_running_loop().time() + leases.VALID_S
    renewing.cancel()
    await asyncio.gather(renewing, return_exceptions=True)
    await one.close()


async def test_lease_given_back_is_taken_at_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "TRY_S", (1000.0, 1000.0))
    first, second = lease(database, "one"), lease(database, "two")
    await first.open()
    await first.acquire(lambda: None)
    await second.open()
    told = asyncio.Event()
    waiting = asyncio.create_task(second.acquire(told.set))
    await told.wait()
    await first.close()
    await asyncio.wait_for(waiting, 20)
    await second.close()
