"""A shard's row: lease, fence, and the flush that is written once however often it is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from dispatcher.errors import Fenced
from dispatcher.store.database import connect
from dispatcher.store.outbox import Cursor
from dispatcher.store.shard import Batch, ShardStore

NOW = datetime(2030, 1, 1, tzinfo=UTC)
INFINITY = datetime.max  # noqa: DTZ901  as asyncpg spells it


@pytest.fixture
async def db(database: str) -> AsyncIterator[Any]:
    connection = await connect(database, name="test", engine=True)
    yield connection
    await connection.close()


def batch(number: int, cursor: Cursor | None = None, seq: int = 1) -> Batch:
    return Batch(
        number,
        [(seq, 700, 1, 0, 1, "retrying", "5xx", 500, 1234, None, b"head", b"\0\xff")],
        [(1, seq, 0, 700, NOW, "retrying", 1, NOW, "500")],
        [(1, 99, 0)],
        [(50, "no")],
        cursor,
    )


async def counts(db: Any) -> tuple[int, ...]:
    return tuple(
        await db.fetchrow(
            "SELECT (SELECT count(*) FROM dispatcher.attempt), (SELECT count(*) FROM dispatcher.pending),"
            " (SELECT count(*) FROM dispatcher.discarded_event)"
        )
    )


async def test_flush_moves_everything_in_one_go(db: Any) -> None:
    shard = ShardStore(db, 0)
    epoch = await shard.take_over()
    cursor = Cursor((10, 12, (10,)), NOW, (11, 15, ()), None, 12, 7)
    await db.execute(
        "INSERT INTO dispatcher.pending"
        " (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)"
        " VALUES (1, 99, 0, '1', now(), 'retrying', 1, now())"
    )
    assert await shard.flush(epoch, batch(1, cursor))
    assert await counts(db) == (1, 1, 1)
    state = await shard.state()
    assert (state.epoch, state.batch, state.cursor) == (epoch, 1, cursor)
    assert await db.fetchval("SELECT event_seq FROM dispatcher.pending") == 1


async def test_flush_without_a_cursor_leaves_it_where_it_is(db: Any) -> None:
    shard = ShardStore(db, 0)
    epoch = await shard.take_over()
    before = (await shard.state()).cursor
    assert await shard.flush(epoch, batch(1))
    assert (await shard.state()).cursor == before


async def test_batch_sent_twice_is_written_once(db: Any) -> None:
    shard = ShardStore(db, 0)
    epoch = await shard.take_over()
    assert await shard.flush(epoch, batch(1))
    assert not await shard.flush(epoch, batch(1))
    assert await shard.flush(epoch, batch(2, seq=2))
    assert not await shard.flush(epoch, batch(1)), "a lost session that comes last"
    assert await counts(db) == (2, 2, 1)


async def test_batch_sent_again_while_the_first_is_still_being_written_is_written_once(db: Any, database: str) -> None:
    other = await connect(database, name="other", engine=True)
    epoch = await ShardStore(db, 0).take_over()
    transaction = db.transaction()
    await transaction.start()
    assert await ShardStore(db, 0).flush(epoch, batch(1))
    import asyncio

    again = asyncio.create_task(ShardStore(other, 0).flush(epoch, batch(1)))
    watch = await connect(database, name="watch")
    while not await watch.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ):
        await asyncio.sleep(0.002)
    await transaction.commit()
    assert not await again
    assert await counts(db) == (1, 1, 1)
    for connection in (other, watch):
        await connection.close()


async def test_older_epoch_writes_nothing(db: Any) -> None:
    shard = ShardStore(db, 0)
    old = await shard.take_over()
    new = await shard.take_over()
    assert new == old + 1
    for act in (shard.flush(old, batch(1)), shard.naturalize(old, "x", (1, 1, ()), NOW)):
        with pytest.raises(Fenced):
            await act
    assert await counts(db) == (0, 0, 0)
    assert await shard.flush(new, batch(1))


async def test_a_batch_is_written_as_it_is_whatever_its_rows_have_in_common(db: Any) -> None:
    shard = ShardStore(db, 0)
    epoch = await shard.take_over()
    delivered = [(seq, 700, 1, 0, 1, "delivered", "2xx", 200, seq, None, b"head", b"ok") for seq in range(1, 8)]
    failed = [
        (11, 701, 2, 0, 1, "retrying", "5xx", 500, 9, "no", b"h", None),
        (12, 702, 2, 3, 4, "exhausted", "timeout", None, 8, "late", None, b"\0"),
    ]
    discarded = [(13, 703, 3, 0, 0, "discarded", None, None, 0, "gone", None, None)]
    held = [(4, seq, 0, 700, NOW, "pending", 0, INFINITY, None) for seq in range(1, 5)]
    due = [(5, 6, 0, 704, NOW, "retrying", 1, NOW, "500"), (5, 7, 2, 705, NOW, "retrying", 2, NOW, "502")]
    batches = [
        (failed[:1] + delivered[:4] + discarded + delivered[4:] + failed[1:], due[:1] + held + due[1:]),
        (delivered, held),  # all alike
        (failed + discarded, due),  # none as most are
        (delivered[:1] + failed[:1], []),
        ([], held[:1]),
    ]
    for number, (attempts, pending) in enumerate(batches, 1):
        await db.execute("TRUNCATE dispatcher.attempt, dispatcher.pending")
        assert await shard.flush(epoch, Batch(number, attempts, pending, [], [], None))
        rows = await db.fetch(
            "SELECT event_seq, event_xid, endpoint_id, generation, attempt, state, result, status, duration_us, error,"
            " response_head, response_body FROM dispatcher.attempt ORDER BY event_seq"
        )
        assert [tuple(row) for row in rows] == sorted(attempts, key=lambda row: row[0])
        rows = await db.fetch(
            "SELECT endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at, last_error"
            " FROM dispatcher.pending ORDER BY endpoint_id, event_seq"
        )
        assert [tuple(row) for row in rows] == sorted(pending, key=lambda row: row[:2])


async def test_one_key_may_be_pending_again_and_keeps_its_last_error(db: Any) -> None:
    shard = ShardStore(db, 0)
    epoch = await shard.take_over()
    await shard.flush(epoch, batch(1))
    held = Batch(2, [], [(1, 1, 0, 700, NOW, "retrying", 1, INFINITY, None)], [], [], None)
    await shard.flush(epoch, held)
    row = await db.fetchrow("SELECT due_at = 'infinity' AS held, last_error FROM dispatcher.pending")
    assert tuple(row) == (True, "500")


async def test_lease_ends_with_its_session(db: Any, database: str) -> None:
    other = await connect(database, name="other", engine=True)
    assert await ShardStore(other, 0).try_lease()
    shard = ShardStore(db, 0)
    assert not await shard.try_lease()
    assert await ShardStore(db, 1).try_lease(), "each shard has its own"
    await other.close()
    while not await shard.try_lease():
        pass


async def test_naturalized_shard_reads_on_from_here_and_knows_where_foreign_rows_end(db: Any) -> None:
    shard = ShardStore(db, 0)
    epoch = await shard.take_over()
    await shard.naturalize(epoch, "here", (5, 6, ()), NOW)
    state = await shard.state()
    assert (state.system, state.floor, state.cursor) == ("here", NOW, Cursor((5, 6, ()), NOW))


async def test_ids_ahead_of_the_cluster_are_foreign_though_it_bears_the_same_name(db: Any) -> None:
    """A dump of one clone, restored into another that has come less far."""
    shard = ShardStore(db, 0)
    assert not (await shard.state()).is_ahead
    await db.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('test.event', '{}')")
    assert not (await shard.state()).is_ahead, "ours, and not read yet"
    await db.execute("UPDATE dispatcher.outbox SET xid = '1000000000'")
    assert (await shard.state()).is_ahead, "its row would be read again at every poll"
    await db.execute("UPDATE dispatcher.shard SET floor = clock_timestamp()")
    assert not (await shard.state()).is_ahead, "known to be foreign"
    await db.execute("UPDATE dispatcher.shard SET prev = '1000:1000000000:'")
    assert (await shard.state()).is_ahead, "nothing would be read until ours have come so far"


async def test_fresh_schema_knows_its_cluster(db: Any) -> None:
    shard = ShardStore(db, 0)
    assert (await shard.state()).system == await shard.system()
