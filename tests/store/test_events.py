from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from dispatcher.store.database import open_pool
from dispatcher.store.events import DATA_BYTES_MAX, EventStore, IdempotencyConflict


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Any]:
    pool = await open_pool(database, size=2)
    yield pool
    await pool.close()


@pytest.fixture
def events(pool: Any) -> EventStore:
    return EventStore(pool, look_max=10)


async def insert(pool: Any, event_id: str, type_: str = "a.b", data: str = "{}", account: str = "acme") -> None:
    await pool.execute(
        "INSERT INTO dispatcher.outbox (account, id, type, data) VALUES ($1, $2, $3, $4)",
        account,
        event_id,
        type_,
        data,
    )


async def test_what_is_emitted_reads_back_to_the_byte(events: EventStore) -> None:
    text = '{"b": 1.0, "a":  [1e2], "a2": "\\u0000"}'
    made, is_new = await events.emit("acme", "email.sent", text)
    assert is_new
    assert (made.type, made.data, made.reason) == ("email.sent", text, None)
    assert await events.get("acme", made.id) == made
    assert await events.get("rival", made.id) is None


async def test_an_account_without_keys_may_have_events(events: EventStore) -> None:
    made, _ = await events.emit("never-heard-of", "a.b", "{}")
    assert await events.get("never-heard-of", made.id) == made


async def test_a_key_makes_one_event(events: EventStore) -> None:
    first, _ = await events.emit("acme", "a.b", "{}", "k")
    assert await events.emit("acme", "a.b", "{}", "k") == (first, False)
    assert (await events.emit("rival", "a.b", "{}", "k"))[1]
    assert (await events.emit("acme", "a.b", "{}", "other"))[1]
    assert (await events.emit("acme", "a.b", "{}"))[1]


@pytest.mark.parametrize(("type_", "data"), [("a.c", "{}"), ("a.b", '{"x":1}'), ("a.b", "{ }")])
async def test_a_key_for_something_else_names_the_first_event(events: EventStore, type_: str, data: str) -> None:
    first, _ = await events.emit("acme", "a.b", "{}", "k")
    with pytest.raises(IdempotencyConflict, match=first.id):
        await events.emit("acme", type_, data, "k")
    assert len((await events.list("acme", limit=10)).events) == 1


async def test_a_key_is_free_again_after_a_day(events: EventStore, pool: Any) -> None:
    await events.emit("acme", "a.b", "{}", "k")
    await pool.execute("UPDATE dispatcher.idempotency SET created_at = created_at - interval '25 hours'")
    assert (await events.emit("acme", "a.c", "{}", "k"))[1]


async def test_a_key_outlives_its_event(events: EventStore, pool: Any) -> None:
    first, _ = await events.emit("acme", "a.b", "{}", "k")
    await pool.execute("DELETE FROM dispatcher.outbox")
    again, is_new = await events.emit("acme", "a.b", "{}", "k")
    assert (again.id, again.data, again.created_at, is_new) == (first.id, "{}", None, False)


async def test_pages_hold_each_event_once_whatever_is_written_meanwhile(events: EventStore, pool: Any) -> None:
    for n in range(7):
        await insert(pool, f"evt_{n}")
    found: list[str] = []
    page = await events.list("acme", limit=3)
    while True:
        found += [event.id for event in page.events]
        if page.reached is None:
            break
        await insert(pool, f"evt_9{len(found)}")
        page = await events.list("acme", limit=3, after=page.reached)
    assert found == [f"evt_{n}" for n in reversed(range(7))]


async def test_before_finds_the_nearest_newer_ones(events: EventStore, pool: Any) -> None:
    for n in range(5):
        await insert(pool, f"evt_{n}")
    page = await events.list("acme", limit=2, before="evt_1")
    assert ([event.id for event in page.events], page.reached) == (["evt_3", "evt_2"], "evt_3")
    page = await events.list("acme", limit=2, before="evt_3")
    assert ([event.id for event in page.events], page.reached) == (["evt_4"], None)


@pytest.mark.parametrize(("backwards", "start"), [("after", None), ("before", "evt_")])
async def test_a_filter_looks_only_so_far_and_says_where_to_go_on(
    events: EventStore, pool: Any, backwards: str, start: str | None
) -> None:
    for n in range(35):
        await insert(pool, f"evt_{n:02}", "rare.one" if n in {1, 2, 20} else "a.b")
    found, pages = [], 0
    cursor = start
    while True:
        page = await events.list("acme", limit=5, type="rare.one", **{backwards: cursor})
        found += [event.id for event in page.events]
        pages += 1
        if page.reached is None:
            break
        cursor = page.reached
    assert sorted(found) == ["evt_01", "evt_02", "evt_20"]
    assert pages == 4


async def test_a_filter_that_finds_more_than_fits_goes_on_behind_the_last(events: EventStore, pool: Any) -> None:
    for n in range(6):
        await insert(pool, f"evt_{n}", "rare.one" if n % 2 else "a.b")
    page = await events.list("acme", limit=2, type="rare.one")
    assert ([event.id for event in page.events], page.reached) == (["evt_5", "evt_3"], "evt_3")
    page = await events.list("acme", limit=2, type="rare.one", after="evt_3")
    assert ([event.id for event in page.events], page.reached) == (["evt_1"], None)


async def test_an_account_lists_its_own(events: EventStore, pool: Any) -> None:
    await insert(pool, "evt_1")
    await insert(pool, "evt_2", account="rival")
    assert [event.id for event in (await events.list("acme", limit=10)).events] == ["evt_1"]
    assert (await events.list("nobody", limit=10)).events == []


async def test_a_discarded_event_carries_its_reason(events: EventStore, pool: Any) -> None:
    await insert(pool, "evt_1", data="[]")
    await pool.execute(
        "INSERT INTO dispatcher.discarded_event (event_seq, reason) SELECT seq, 'no' FROM dispatcher.outbox"
    )
    [listed] = (await events.list("acme", limit=1)).events
    assert listed == await events.get("acme", "evt_1")
    assert (listed.reason, listed.data) == ("no", "[]")


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0044-03-15 12:00:00 BC", "20000-01-01", "0001-01-01"])
async def test_an_event_dated_beyond_the_calendar_is_shown_without_a_date(
    events: EventStore, pool: Any, moment: str
) -> None:
    await pool.execute(
        "INSERT INTO dispatcher.outbox (account, id, type, data, created_at)"
        f" VALUES ('acme', 'evt_1', 'a.b', '{{}}', '{moment}')"
    )
    [listed] = (await events.list("acme", limit=1)).events
    assert listed == await events.get("acme", "evt_1")
    assert listed.created_at is None


async def test_data_too_large_to_show_is_left_out(events: EventStore, pool: Any) -> None:
    fits = '"%s"' % ("x" * (DATA_BYTES_MAX - 2))
    await insert(pool, "evt_1", data=fits)
    await insert(pool, "evt_2", data=fits[:-1] + 'x"', type_="T" * 300)
    shown = (await events.list("acme", limit=2)).events
    assert [event.data for event in shown] == [None, fits]
    assert shown[0].type == "T" * 256


async def test_of_two_events_with_one_id_the_first_bears_it(events: EventStore, pool: Any) -> None:
    await insert(pool, "evt_1", "first.one")
    await insert(pool, "evt_1", "second.one")
    found = await events.get("acme", "evt_1")
    assert found is not None
    assert found.type == "first.one"
