"""Who is there, who holds what, and what a change of the number of shards leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core.shards import SHARDS_MAX, shard_numbers, shard_of
from dispatcher.errors import ShardsInUse
from dispatcher.store import fleet as module
from dispatcher.store.database import connect
from dispatcher.store.fleet import FleetStore, common
from dispatcher.store.outbox import Snapshot
from dispatcher.store.shard import ShardStore


@pytest.fixture
async def db(database: str) -> AsyncIterator[Any]:
    connection = await connect(database, name="test")
    yield connection
    await connection.close()


async def test_schema_and_program_spell_the_same_hash(db: Any) -> None:
    ids = [0, 1, 2, 3, 1000, 123_456_789, 2**31 - 1, *range(5000, 5200)]
    for count in (1, 2, 3, 7, SHARDS_MAX):
        rows = await db.fetch("SELECT dispatcher.shard_of(id, $2) FROM unnest($1::integer[]) id", ids, count)
        assert [row[0] for row in rows] == [shard_of(each, count) for each in ids]


async def webhooks(db: Any, count: int) -> None:
    await db.execute(
        "INSERT INTO dispatcher.endpoint (public_id, account_id, url, events)"
        " SELECT 'wh_' || gen_random_uuid(), (SELECT min(id) FROM dispatcher.account), 'https://x.example/', '{*}'"
        " FROM generate_series(1, $1::integer)",
        count,
    )


async def test_new_webhooks_and_old_ones_with_what_waits_for_them_belong_to_the_new_shards(db: Any) -> None:
    await webhooks(db, 30)
    await db.execute(
        "INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts,"
        " due_at) SELECT id, 1, 0, '5', now(), 'pending', 0, now() FROM dispatcher.endpoint"
    )
    for before, count in ((1, 4), (4, 3), (3, 3), (3, 1)):
        assert await FleetStore(db).reshard(count) == before
        await webhooks(db, 10)
        for table, column in (("endpoint", "id"), ("pending", "endpoint_id")):
            rows = await db.fetch(f"SELECT {column} AS id, shard FROM dispatcher.{table}")
            assert {row["shard"] for row in rows} == set(shard_numbers(count))
            assert all(row["shard"] == shard_of(row["id"], count) for row in rows)
        await db.execute("SELECT pg_advisory_unlock_all()")


async def test_new_shards_begin_where_the_slowest_stood_and_fence_whoever_ran_the_old_ones(db: Any) -> None:
    await FleetStore(db).reshard(2)
    await db.execute("UPDATE dispatcher.shard SET prev = '5:9:5,7', epoch = 3 WHERE id = 1")
    await db.execute("UPDATE dispatcher.shard SET prev = '6:8:6,7', epoch = 8 WHERE id = 2")
    await FleetStore(db).reshard(3)
    for shard in (1, 2, 3):
        state = await ShardStore(db, shard).state()
        assert (state.epoch, state.cursor.prev, state.cursor.cur, state.shards) == (9, (5, 8, (5, 6, 7)), None, 3)


@pytest.mark.parametrize("name", ["dispatcher member", "dispatcher listener"])
async def test_number_stays_while_a_daemon_is_connected(db: Any, database: str, name: str) -> None:
    daemon = await connect(database, name=name)
    with pytest.raises(ShardsInUse):
        await FleetStore(db).reshard(2)
    await daemon.close()
    assert await FleetStore(db).count() == 1


async def test_number_stays_while_a_lease_is_held(db: Any, database: str) -> None:
    daemon = await connect(database, name="of an older release")
    assert await ShardStore(daemon, 0).try_lease()
    with pytest.raises(ShardsInUse):
        await FleetStore(db).reshard(2)
    await daemon.close()
    assert await FleetStore(db).count() == 1


async def test_view_shows_members_and_whose_the_leases_are_and_forgets_both_with_their_session(
    db: Any, database: str
) -> None:
    await FleetStore(db).reshard(3)
    await db.execute("SELECT pg_advisory_unlock_all()")
    member, listener, stranger = [await connect(database, name="x") for _ in range(3)]
    await FleetStore(member).join(77)
    await FleetStore(listener).sign(77)
    assert await ShardStore(listener, 2).try_lease()
    assert await ShardStore(stranger, 3).try_lease()
    view = await FleetStore(db).view()
    assert (view.count, view.members, view.holders) == (3, {77}, {2: 77, 3: None})
    await FleetStore(listener).part()
    await member.close()
    async with asyncio.timeout(20):
        while (view := await FleetStore(db).view()).members:
            await asyncio.sleep(0.01)
    assert view.holders == {3: None}
    await listener.close()
    await stranger.close()


async def test_who_is_silent_is_not_there_and_is_evicted_and_who_speaks_is_not(
    db: Any, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = await connect(database, name="holder")
    assert await ShardStore(holder, 0).try_lease()
    assert not await FleetStore(db).evict(0), "it has just spoken"
    monkeypatch.setattr(module, "SILENT", timedelta(0))
    assert (await FleetStore(db).view()).holders == {}
    assert await FleetStore(db).evict(0)
    async with asyncio.timeout(20):
        while not await ShardStore(db, 0).try_lease():
            await asyncio.sleep(0.01)
    holder.terminate()


def visible(xid: int, snapshot: Snapshot) -> bool:
    return xid < snapshot[1] and xid not in snapshot[2]


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    xmax = draw(st.integers(3, 30))
    running = tuple(sorted(draw(st.sets(st.integers(3, xmax), max_size=5)) - {xmax}))
    return (running[0] if running else xmax, xmax, running)


@given(st.lists(snapshots(), min_size=1, max_size=4))
def test_in_the_common_snapshot_just_that_is_visible_that_is_in_each(given_: list[Snapshot]) -> None:
    found = common(given_)
    for xid in range(1, 40):
        assert visible(xid, found) == all(visible(xid, each) for each in given_)
    assert found[0] == (found[2][0] if found[2] else found[1])
