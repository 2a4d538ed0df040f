"""The outbox's trigger: it speaks to a sleeper and to nobody else, and leaves no lock behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from dispatcher.engine.channels import WAKE
from dispatcher.store.database import LOCK_CLASS, connect, statements

EMIT = "INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', '{}')"


class Bedroom:
    """A producer, somebody who may sleep, and who hears what is said."""

    def __init__(self, producer: Any, sleeper: Any, ear: Any) -> None:
        self.producer, self.sleeper, self.ear = producer, sleeper, ear
        self.said: list[str] = []

    async def heard(self) -> list[str]:
        """All that was said until now: notifications come in the order of their commits."""
        over = asyncio.Event()
        await self.ear.add_listener("over", lambda *_: over.set())
        await self.producer.execute("NOTIFY over")
        await over.wait()
        said, self.said = self.said, []
        return said

    async def locks(self) -> int:
        """How many of the wake-up's locks are held."""
        counted = (
            "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
            " WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.classid = $1"
            " AND l.objid = 0 AND l.granted"
        )
        return int(await self.ear.fetchval(counted, LOCK_CLASS))


@pytest.fixture
async def bedroom(database: str) -> AsyncIterator[Bedroom]:
    made = Bedroom(*[await connect(database, name=name) for name in ("producer", "sleeper", "ear")])
    await made.ear.add_listener(WAKE, lambda *heard: made.said.append(heard[2]))
    yield made
    for connection in (made.producer, made.sleeper, made.ear):
        await connection.close()


async def test_while_nobody_sleeps_nothing_is_said_and_no_lock_stays(bedroom: Bedroom) -> None:
    async with bedroom.producer.transaction():
        for _ in range(3):
            await bedroom.producer.execute(EMIT)
        assert await bedroom.locks() == 0, "not even until the end of the transaction"
    assert await bedroom.heard() == []


async def test_a_sleeper_is_woken_by_each_commit(bedroom: Bedroom) -> None:
    assert await bedroom.sleeper.fetchval(statements("shard")["fall_asleep"])
    await bedroom.producer.execute(EMIT)
    await bedroom.producer.execute(EMIT)
    assert await bedroom.heard() == [WAKE, WAKE]
    assert await bedroom.locks() == 1
    assert await bedroom.sleeper.fetchval(statements("shard")["wake_up"])
    await bedroom.producer.execute(EMIT)
    assert await bedroom.heard() == []


async def test_several_may_sleep(bedroom: Bedroom, database: str) -> None:
    other = await asyncpg.connect(database)
    for each in (bedroom.sleeper, other):
        assert await each.fetchval(statements("shard")["fall_asleep"])
    await bedroom.sleeper.fetchval(statements("shard")["wake_up"])
    await bedroom.producer.execute(EMIT)
    assert await bedroom.heard() == [WAKE]
    await other.close()


async def test_what_is_rolled_back_wakes_nobody(bedroom: Bedroom) -> None:
    await bedroom.sleeper.fetchval(statements("shard")["fall_asleep"])
    transaction = bedroom.producer.transaction()
    await transaction.start()
    await bedroom.producer.execute(EMIT)
    await transaction.rollback()
    assert await bedroom.heard() == []


async def test_the_question_comes_after_the_transaction_has_its_id(bedroom: Bedroom) -> None:
    """Or a sleeper that lay down in between would miss it: see the proof in `engine/outbox.py`."""
    await bedroom.producer.execute("""
        CREATE FUNCTION pg_temp.note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM set_config('test.xid', coalesce(pg_current_xact_id_if_assigned()::text, ''), true);
            RETURN NEW;
        END $$;
        CREATE TRIGGER note BEFORE INSERT ON dispatcher.outbox FOR EACH ROW EXECUTE FUNCTION pg_temp.note()
    """)
    async with bedroom.producer.transaction():
        await bedroom.producer.execute(EMIT)
        assert await bedroom.producer.fetchval("SELECT current_setting('test.xid')"), "before the row, so before WHEN"
