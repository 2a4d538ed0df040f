"""Pending rows as the retries read them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dispatcher.store.database import connect
from dispatcher.store.pending import PendingStore

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
async def db(database: str) -> AsyncIterator[Any]:
    connection = await connect(database, name="test", engine=True)
    yield connection
    await connection.close()


@pytest.fixture
async def pending(db: Any) -> PendingStore:
    store = PendingStore(db, 0)
    await store.prepare()
    return store


async def put(db: Any, endpoint: int, seq: int, due: object, *, generation: int = 0, event: Any = None) -> None:
    """A pending row, due at a datetime or at 'infinity'; `event`: the row of the outbox it is about."""
    xid, at = (event["xid"], event["written_at"]) if event else (1, NOW)
    await db.execute(
        "INSERT INTO dispatcher.pending"
        " (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)"
        " VALUES ($1, $2, $3, $4, $5, 'pending', 0, $6::text::timestamptz)",
        endpoint, event["seq"] if event else seq, generation, xid, at, str(due),
    )  # fmt: skip


async def test_refill_yields_what_is_due_in_the_interval_soonest_first(db: Any, pending: PendingStore) -> None:
    for seq, minutes in enumerate([5, -3, 1, 0, 10]):
        await put(db, 1, seq, NOW + timedelta(minutes=minutes))
    await put(db, 1, 9, "infinity")
    found = await pending.refill(NOW, NOW + timedelta(minutes=10), 10)
    assert [row[1] for row in found] == [3, 2, 0]
    assert [row[1] for row in await pending.refill(NOW, NOW + timedelta(minutes=10), 2)] == [3, 2]


async def test_fetch_brings_the_event_along_and_leaves_out_what_is_held_or_settled(
    db: Any, pending: PendingStore
) -> None:
    event = await db.fetchrow("INSERT INTO dispatcher.outbox (type, data) VALUES ('a.b', '{\"n\": 1}') RETURNING *")
    await put(db, 1, 0, NOW, event=event)
    await put(db, 2, 7, "infinity")
    await put(db, 3, 8, NOW)
    rows = await pending.fetch([(1, event["seq"], 0), (2, 7, 0), (3, 8, 0), (4, 9, 0)])
    assert {row["endpoint_id"]: (row["id"], row["data"]) for row in rows} == {
        1: (event["id"], '{"n": 1}'),
        3: (None, None),
    }
    assert await pending.fetch([]) == []


async def test_pull_goes_on_behind_each_position_oldest_first(db: Any, pending: PendingStore) -> None:
    for endpoint in (1, 2):
        for seq in (30, 10, 20):
            await put(db, endpoint, seq, "infinity")
    await put(db, 1, 10, "infinity", generation=3)
    await put(db, 1, 15, NOW)
    rows = await pending.pull([(1, -1, -1, 3), (2, 10, 0, 5)])
    assert [(row[0], row[1], row[2]) for row in rows] == [(1, 10, 0), (1, 10, 3), (1, 20, 0), (2, 20, 0), (2, 30, 0)]


async def test_webhooks_with_anything_held_are_found(db: Any, pending: PendingStore) -> None:
    assert await pending.held_endpoints() == []
    for endpoint in (5, 3, 3, 9):
        await put(
            db, endpoint, endpoint * 10 + await db.fetchval("SELECT count(*) FROM dispatcher.pending"), "infinity"
        )
    await put(db, 4, 1, NOW)
    assert await pending.held_endpoints() == [3, 5, 9]


async def test_head_of_an_ordered_webhook_is_its_oldest_due_row(db: Any, pending: PendingStore) -> None:
    account = await db.fetchval("SELECT id FROM dispatcher.account")
    ids = [
        await db.fetchval(
            "INSERT INTO dispatcher.endpoint (public_id, account_id, url, events, ordered)"
            " VALUES ($1, $2, 'https://x', '{*}', $3) RETURNING id",
            f"wh_{ordered}", account, ordered,
        )
        for ordered in (True, False)
    ]  # fmt: skip
    for endpoint in ids:
        await put(db, endpoint, 1, "infinity")
        await put(db, endpoint, 3, NOW)
        await put(db, endpoint, 2, NOW + timedelta(hours=1))
    assert await pending.heads() == {ids[0]: (ids[0], 2, 0)}


async def test_two_may_ask_at_once(db: Any, pending: PendingStore) -> None:
    import asyncio

    await put(db, 1, 1, "infinity")
    await asyncio.gather(
        *(pending.pull([(1, -1, -1, 3)]) for _ in range(5)), pending.heads(), pending.refill(NOW, NOW, 1)
    )
