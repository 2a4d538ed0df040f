"""Lists of deliveries on tables filled by hand: their order, their places, and what bounds the work."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dispatcher.model import DeliveryState
from dispatcher.store.database import connect, statements
from dispatcher.store.deliveries import DeliveryFilter, DeliveryStore, Place

ENDPOINT = 7
NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)
ALL = DeliveryFilter()


@pytest.fixture
async def db(database: str) -> AsyncIterator[Any]:
    connection = await connect(database, name="test")
    yield connection
    await connection.close()


async def attempt(db: Any, seq: int, state: str, age_s: float, *, number: int = 1, generation: int = 0) -> None:
    await db.execute(
        "INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result,"
        " duration_us) VALUES ($1, $2, '1', $3, $4, $5, $6, '5xx', 1)",
        NOW - timedelta(seconds=age_s), seq, ENDPOINT, generation, number, state,
    )  # fmt: skip


async def pending(db: Any, seq: int, attempts: int, *, generation: int = 0, due: str = "infinity") -> None:
    await db.execute(
        "INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts,"
        " due_at) VALUES ($1, $2, $3, '1', $4, $5, $6, $7::text::timestamptz)",
        ENDPOINT, seq, generation, NOW, "retrying" if attempts else "pending", attempts, due,
    )  # fmt: skip


async def seqs(db: Any, wanted: DeliveryFilter = ALL, **part: Any) -> list[int]:
    page = await DeliveryStore(db).browse(ENDPOINT, "acme", wanted, **{"limit": 100, **part})
    return [record.key[1] for record in page.deliveries]


async def test_what_waits_comes_first_then_what_changed_last(db: Any) -> None:
    await attempt(db, 1, "delivered", 30)
    await attempt(db, 2, "exhausted", 10)
    await attempt(db, 3, "discarded", 20)
    await pending(db, 5, 0)
    await pending(db, 4, 0)
    assert await seqs(db) == [5, 4, 2, 3, 1]


async def test_a_retrying_delivery_stands_once_at_its_last_attempt(db: Any) -> None:
    await attempt(db, 1, "retrying", 50)
    await attempt(db, 2, "delivered", 40)
    await attempt(db, 1, "retrying", 30, number=2)
    await pending(db, 1, 2, due="2030-01-01")
    page = await DeliveryStore(db).browse(ENDPOINT, "acme", ALL, limit=10)
    assert [(r.key[1], r.state, r.attempts) for r in page.deliveries] == [
        (1, DeliveryState.RETRYING, 2),
        (2, DeliveryState.DELIVERED, 1),
    ]
    assert page.deliveries[0].next_attempt_at == datetime(2030, 1, 1, tzinfo=UTC)


async def test_attempts_that_a_later_one_settled_are_no_deliveries_of_their_own(db: Any) -> None:
    await attempt(db, 1, "retrying", 50)
    await attempt(db, 1, "delivered", 30, number=2)
    assert await seqs(db) == [1]
    assert await seqs(db, DeliveryFilter(status=DeliveryState.RETRYING)) == []


async def test_a_held_retry_has_no_time(db: Any) -> None:
    await attempt(db, 1, "retrying", 50)
    await pending(db, 1, 1)
    [record] = (await DeliveryStore(db).browse(ENDPOINT, "acme", ALL, limit=10)).deliveries
    assert (record.state, record.next_attempt_at) == (DeliveryState.RETRYING, None)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
async def test_pages_join_without_gap_or_repeat_even_where_many_changed_at_one_instant(db: Any, size: int) -> None:
    for seq in range(1, 8):
        await attempt(db, seq, "delivered", 10 if seq < 6 else 20)
        await attempt(db, seq, "delivered", 10, generation=seq)
    for seq in range(8, 11):
        await pending(db, seq, 0)
    store = DeliveryStore(db)
    whole = [r.key for r in (await store.browse(ENDPOINT, "acme", ALL, limit=100)).deliveries]
    assert len(whole) == 17
    down, after = [], None
    while True:
        page = await store.browse(ENDPOINT, "acme", ALL, limit=size, after=after)
        down += [r.key for r in page.deliveries]
        if (after := page.reached) is None:
            break
    assert down == whole
    up: list[Any] = []
    before: Place | None = Place(NOW - timedelta(days=1), 0, 0)
    while before is not None:
        page = await store.browse(ENDPOINT, "acme", ALL, limit=size, before=before)
        up = [r.key for r in page.deliveries] + up
        before = page.deliveries[0].place if page.reached is not None else None
    assert up == whole


async def test_a_filter_that_few_pass_looks_so_far_and_says_where_it_stopped(db: Any) -> None:
    for seq in range(1, 21):
        await attempt(db, seq, "exhausted" if seq == 1 else "delivered", 100 - seq)
    store = DeliveryStore(db, look_max=8, chunk_rows=4)
    wanted = DeliveryFilter(status=DeliveryState.EXHAUSTED)
    pages, after = [], None
    while True:
        page = await store.browse(ENDPOINT, "acme", wanted, limit=5, after=after)
        pages.append([r.key[1] for r in page.deliveries])
        if (after := page.reached) is None:
            break
    assert pages == [[], [], [1]]


async def test_time_bounds_both_parts_of_the_list(db: Any) -> None:
    for seq in range(1, 6):
        await attempt(db, seq, "delivered", 10 * seq)
    await pending(db, 9, 0)
    since, until = NOW - timedelta(seconds=40), NOW - timedelta(seconds=20)
    assert await seqs(db, DeliveryFilter(since=since, until=until)) == [3, 4]
    assert await seqs(db, DeliveryFilter(since=since, until=until), before=Place(NOW - timedelta(hours=1), 0, 0)) == [
        3,
        4,
    ]
    assert await seqs(db, DeliveryFilter(since=NOW)) == [9]


async def test_a_delivery_settled_without_a_request_is_found_and_keeps_its_reason(db: Any) -> None:
    account = await db.fetchval("SELECT id FROM dispatcher.account")
    endpoint = await db.fetchval(
        "INSERT INTO dispatcher.endpoint (public_id, account_id, url, events) VALUES ('wh_1', $1, 'https://x/', '{*}')"
        " RETURNING id",
        account,
    )
    await db.execute(
        "INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state,"
        " duration_us, error) VALUES (now(), 1, '1', $1, 0, 0, 'discarded', 0, 'too old')",
        endpoint,
    )
    detail = await DeliveryStore(db).find(account, (endpoint, 1, 0))
    assert detail is not None
    assert (detail.record.state, detail.record.attempts, detail.record.error) == (DeliveryState.DISCARDED, 0, "too old")
    assert await DeliveryStore(db).find(account, (endpoint, 2, 0)) is None
    assert await DeliveryStore(db).find(account + 1, (endpoint, 1, 0)) is None


async def test_the_log_is_read_by_its_indexes(db: Any) -> None:
    """Planners would read small tables as a whole; made to look expensive, that only shows where an index lacks."""
    await db.execute("SET enable_seqscan = off")
    place = (ENDPOINT, NOW, 5, 0, NOW - timedelta(days=1), 10)
    asked: dict[str, tuple[Any, ...]] = {
        "attempted_after": place,
        "attempted_before": (*place[:4], NOW + timedelta(days=1), 10),
        "waiting_after": (ENDPOINT, 5, 0, 10),
        "waiting_before": (ENDPOINT, 5, 0, 10),
        "attempts": (ENDPOINT, 5, 0, 10),
        "stats": (ENDPOINT, NOW - timedelta(days=1), NOW, timedelta(hours=1), 10),
    }
    for name, arguments in asked.items():
        rows = await db.fetch(f"EXPLAIN {statements('delivery')[name]}", *arguments)
        plan = "\n".join(row[0] for row in rows)
        assert "Seq Scan" not in plan, plan
        assert "Index Cond" in plan, plan
