"""The engine end to end: sessions that break, daemons that take over, webhooks that change, and nothing lost."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections import Counter
from typing import Any

import pytest
from house import PATIENCE_S, Arrival, House, until

from dispatcher.engine import engine, outbox
from dispatcher.errors import ConfigurationError, SchemaMismatch
from dispatcher.store.database import TROUBLE, connect
from dispatcher.store.shard import ShardStore
from dispatcher.store.vault import Vault

CONNECTIONS = ("listener", "reader", "writer", "retries", "upkeep")


def never() -> asyncio.Future[int]:
    """What a hanging endpoint answers with."""
    return asyncio.get_running_loop().create_future()


async def test_committed_event_arrives_once_and_is_logged_once(house: House) -> None:
    await house.webhook()
    await house.start()
    [event] = await house.emit()
    await until(lambda: house.settled(1))
    [arrival] = house.receiver.arrivals
    assert (arrival.event_id, arrival.attempt, arrival.data) == (event, 1, {"n": 1, "x": ""})
    assert [row[2:] for row in await house.log()] == [(1, "delivered")]


async def test_rolled_back_event_is_never_sent(house: House) -> None:
    await house.webhook()
    await house.start()
    transaction = house.app.transaction()
    await transaction.start()
    await house.emit(13)
    await transaction.rollback()
    await house.emit(14)
    await until(lambda: house.settled(1))
    assert [arrival.n for arrival in house.receiver.arrivals] == [14]


@pytest.mark.parametrize("name", CONNECTIONS)
async def test_cut_connection_loses_nothing_and_logs_nothing_twice(house: House, name: str) -> None:
    await house.webhook(max_concurrency=4)
    running = await house.start()
    release = asyncio.Event()

    async def slowly(arrival: Arrival) -> int:
        await release.wait()
        return 200

    house.receiver.answer = slowly
    await house.emit(1, 50)
    await until(lambda: house.receiver.open == 4)
    assert await house.cut(name) == 1
    await until(lambda: running.engine.losses)
    release.set()
    await house.active(running)
    await house.emit(51, 100)
    await until(lambda: house.settled(100))
    log = await house.log()
    assert Counter(row[0] for row in log) == dict.fromkeys({row[0] for row in log}, 1)
    assert {arrival.n for arrival in house.receiver.arrivals} == set(range(1, 101))


async def test_all_connections_cut_again_and_again_under_load(house: House) -> None:
    webhooks = [await house.webhook(f"/{i}") for i in range(5)]
    running = await house.start()
    for round_ in range(6):
        await house.emit(round_ * 200 + 1, round_ * 200 + 200)
        await until(lambda so_far=round_: len(house.receiver.arrivals) > so_far * 1000 + 300)
        await house.cut(*CONNECTIONS)
        await until(lambda: house.engines[0].engine.role == "standby")
        running.check()
    await until(lambda: house.settled(6000))
    log = await house.log()
    assert len({row[:2] for row in log}) == len(log) == 1200 * len(webhooks)
    assert await house.app.fetchval("SELECT epoch FROM dispatcher.shard") == 1


async def test_server_may_restart(house: House, administrator, postgres) -> None:
    """Not the server itself, which other tests share, but all that a client sees of it: refused, then let in again."""
    await house.webhook()
    running = await house.start()
    name = (
        house.dsn.rpartition("/")[2].partition("?")[0]
        if "@/" not in house.dsn
        else house.dsn.split("@/")[1].split("?")[0]
    )
    administrator.run(administrator._connection.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0"))
    await house.emit(1, 20)
    administrator.run(administrator._connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
    await house.cut(*CONNECTIONS)
    await until(lambda: running.engine.role == "standby" and not running.engine.database)
    await house.emit(21, 40)
    administrator.run(administrator._connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    administrator.run(administrator._connection.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1"))
    await until(lambda: house.settled(40))
    assert {arrival.n for arrival in house.receiver.arrivals} == set(range(1, 41))


async def test_database_away_at_the_start_is_waited_for(house: House) -> None:
    running = house.launch(listen_dsn=house.dsn.replace("host=", "host=/nowhere"))
    running.may_lose = True
    await until(lambda: running.engine.role == "standby" and not running.engine.database)
    running.engine.settings = dataclasses.replace(running.engine.settings, listen_dsn=house.dsn)
    await house.active(running)


async def test_older_schema_ends_the_run_with_a_plain_mismatch(house: House) -> None:
    await house.app.execute("DELETE FROM dispatcher.migration")
    running = house.launch()
    with pytest.raises(SchemaMismatch):
        await running.task
    house.engines.clear()


async def test_secrets_sealed_with_another_key_end_the_run_plainly_wherever_they_turn_up(house: House) -> None:
    running = await house.start()
    strange = Vault(b"x" * 32)
    webhook = await house.webhook()
    await house.app.execute(
        "UPDATE dispatcher.endpoint SET secret = $1 WHERE public_id = $2",
        strange.seal("whsec_YWJj", webhook.id),
        webhook.id,
    )
    with pytest.raises(ConfigurationError):
        await asyncio.wait_for(asyncio.shield(running.task), PATIENCE_S)
    house.engines.clear()


# ── stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_stop_before_the_first_connection_returns(house: House) -> None:
    running = house.launch()
    await house.stop(running)


async def test_stop_in_the_middle_of_starting_returns_wherever_it_is(house: House) -> None:
    await house.webhook()
    for turns in range(0, 60, 3):
        running = house.launch()
        for _ in range(turns):
            await asyncio.sleep(0.001)
        await house.stop(running)
    await house.start()
    await house.emit()
    await until(lambda: house.settled(1))


async def test_stop_as_standby_returns(house: House) -> None:
    await house.start()
    standby = house.launch()
    await until(lambda: standby.engine.settled)
    await house.stop(standby)
    assert await house.app.fetchval("SELECT epoch FROM dispatcher.shard") == 1


async def test_stop_while_waiting_to_reconnect_returns(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []

    def for_ever(failures: int, _unit_random: float) -> float:
        waits.append(failures)
        return 3600.0

    monkeypatch.setattr(engine, "reconnect_delay_s", for_ever)
    running = house.launch(listen_dsn=house.dsn.replace("host=", "host=/nowhere"))
    running.may_lose = True
    await until(lambda: waits)
    await house.stop(running)


async def test_drain_waits_for_what_is_in_flight_and_begins_nothing(house: House) -> None:
    await house.webhook(max_concurrency=2)
    running = await house.start()
    release = asyncio.Event()

    async def slowly(arrival: Arrival) -> int:
        await release.wait()
        return 200

    house.receiver.answer = slowly
    await house.emit(1, 10)
    await until(lambda: house.receiver.open == 2)
    running.engine.stop()
    running.engine.stop()
    await until(lambda: not running.engine.deliverer.running)
    release.set()
    await house.stop(running)
    assert len(house.receiver.arrivals) == 2
    assert await house.states() == {"delivered": 2}
    await house.start()
    await until(lambda: house.settled(10))
    assert len(house.receiver.arrivals) == 10


async def test_drain_releases_what_does_not_finish_and_counts_no_attempt(house: House) -> None:
    await house.webhook()
    running = await house.start(drain_s=0.05)
    house.receiver.answer = lambda arrival: never()
    await house.emit()
    await until(lambda: house.receiver.open == 1)
    await house.stop(running)
    assert await house.log() == []
    house.receiver.answer = lambda arrival: 200
    await house.start()
    await until(lambda: house.settled(1))
    assert [arrival.attempt for arrival in house.receiver.arrivals] == [1, 1]


async def test_flush_under_way_when_the_drain_ends_is_not_lost(house: House) -> None:
    await house.webhook()
    for first in range(1, 200, 20):
        running = await house.start()
        await house.emit(first, first + 19)
        await until(lambda last=first: len(house.receiver.arrivals) >= last + 9)
        await house.stop(running)
    await house.start()
    await until(lambda: house.settled(200))
    assert {arrival.n for arrival in house.receiver.arrivals} == set(range(1, 201))
    log = await house.log()
    assert len({row[0] for row in log}) == len(log) == 200 == len(house.receiver.arrivals)


# ── crashes and take-overs ───────────────────────────────────────────────────────────────────────────────────────────


async def test_crashes_under_load_lose_nothing_and_log_no_delivery_twice(house: House) -> None:
    dice = random.Random(20)
    await house.webhook("/a")
    await house.webhook("/b", retry=[0.2, 0.2, 0.2])
    flaky = random.Random(21)
    house.receiver.answer = lambda arrival: (
        500 if arrival.path == "/b" and arrival.attempt == 1 and flaky.random() < 0.3 else 200
    )
    bound = 0
    for round_ in range(12):
        running = await house.start()
        await house.emit(round_ * 100 + 1, round_ * 100 + 100)
        target = len(house.receiver.arrivals) + dice.randrange(200)
        await until(lambda enough=target, it=running: len(house.receiver.arrivals) >= enough or not house.busy(it))
        bound += len(running.engine.deliverer.in_flight) + running.engine.ledger.buffered
        await house.crash(running)
    await house.start()
    await until(lambda: house.settled(2400))
    log = await house.log()
    final = [row[:2] for row in log if row[3] != "retrying"]
    assert len(set(final)) == len(final) == 2400
    seen = Counter((arrival.path, arrival.n, arrival.attempt) for arrival in house.receiver.arrivals)
    assert (
        {n for path, n, _ in seen if path == "/a"} == {n for path, n, _ in seen if path == "/b"} == set(range(1, 1201))
    )
    assert sum(times - 1 for times in seen.values()) <= bound


async def test_standby_takes_over_when_the_owner_loses_its_connections(house: House) -> None:
    await house.webhook()
    first = await house.start()
    second = house.launch()
    await until(lambda: second.engine.settled)
    await house.emit(1, 10)
    await until(lambda: house.settled(10))
    first.engine._dice = random.Random(5)
    await house.crash(first)
    await house.emit(11, 20)
    await until(lambda: house.settled(20))
    assert second.engine.role == "active"
    assert await house.app.fetchval("SELECT epoch FROM dispatcher.shard") == 2
    assert len(house.receiver.arrivals) == 20


async def test_standby_counts_nothing_of_what_it_had_as_the_owner(house: House) -> None:
    """The other one counts it: a sum over both would have it twice."""
    await house.webhook(max_concurrency=1)
    first = await house.start()
    release = asyncio.Event()

    async def slowly(arrival: Arrival) -> int:
        await release.wait()
        return 200

    house.receiver.answer = slowly
    await house.emit(1, 10)
    await until(lambda: first.engine.snapshot().queued == 9)
    await until(lambda: first.engine.snapshot().tables)
    other = await connect(house.dsn, name="other", engine=True)
    while not await ShardStore(other, 0).try_lease():  # it may have it back before we ask
        await house.cut("listener")
    await until(lambda: first.engine.snapshot().role == "standby" and first.engine.snapshot().database)
    await until(lambda: not first.engine.snapshot().queued)
    seen = first.engine.snapshot()
    assert (seen.endpoints, seen.lanes, seen.worst, seen.retries_waiting, seen.tables) == ({}, {}, [], 0, [])
    assert seen.in_flight == 1, "that is its own"
    assert seen.events == 10
    await other.close()
    release.set()
    await until(lambda: house.settled(10))
    await house.active(first)
    seen = first.engine.snapshot()
    assert (seen.endpoints["active"], seen.lanes["ready"]) == (1, 1)


async def test_old_owner_that_wakes_up_writes_nothing_and_stands_by(house: House) -> None:
    await house.webhook()
    first = await house.start()
    release = asyncio.Event()

    async def slowly(arrival: Arrival) -> int:
        await release.wait()
        return 500

    house.receiver.answer = slowly
    await house.emit()
    await until(lambda: house.receiver.open == 1)
    # As if its host had been asleep: its lease is gone, its epoch is over, and it does not know yet.
    other = await house.connect()
    await house.app.execute("UPDATE dispatcher.shard SET epoch = epoch + 1")
    release.set()
    await until(lambda: first.engine._epoch != 1)
    house.receiver.answer = lambda arrival: 200
    await house.active(first)
    await until(lambda: house.settled(1))
    assert [row[2:] for row in await house.log()] == [(1, "delivered")]
    await other.close()


async def test_results_that_come_in_after_the_shard_was_lost_are_not_ours_to_log(house: House) -> None:
    await house.webhook()
    await house.webhook("/other")
    first = await house.start()
    release = asyncio.Event()

    async def slowly(arrival: Arrival) -> int:
        if arrival.path == "/other" or len(house.receiver.at("/")) > 1:
            return 200
        await release.wait()
        return 500

    house.receiver.answer = slowly
    await house.emit()
    await until(lambda: house.receiver.open == 1 and len(house.receiver.arrivals) == 2)
    await house.app.execute("UPDATE dispatcher.shard SET epoch = epoch + 1")
    await house.emit(2)
    await until(lambda: first.engine._epoch > 1)
    await house.active(first)
    release.set()
    await until(lambda: house.settled(4))
    await until(lambda: first.engine.deliverer.lanes.in_flight == 0)
    log = await house.log()
    assert len(log) == len({row[:2] for row in log}) == 4
    assert {row[3] for row in log} == {"delivered"}


@pytest.mark.parametrize("system", ["elsewhere", "a clone"])
async def test_restored_dump_loses_nothing_and_repeats_nothing_settled(house: House, system: str) -> None:
    webhook = await house.webhook()
    running = await house.start()
    await house.emit(1, 10)
    await until(lambda: house.settled(10))
    await house.stop(running)
    await house.emit(11, 20)
    # What a restore into another cluster looks like: all transaction ids are from elsewhere, and far ahead of ours.
    for table, columns in {"outbox": ("xid",), "attempt": ("event_xid",), "pending": ("event_xid",)}.items():
        for column in columns:
            await house.app.execute(
                f"UPDATE dispatcher.{table} SET {column} = (1000000 + {column}::text::bigint)::text::xid8"
            )
    await house.app.execute(
        "UPDATE dispatcher.shard"
        " SET system = CASE WHEN $1 = 'a clone' THEN system ELSE $1 END,"
        " prev = '1000000:1900000:', cur = NULL, at_xid = '0', at_seq = 0",
        system,
    )
    await house.app.execute("ALTER TABLE dispatcher.endpoint DISABLE TRIGGER registry_changed")
    await house.change(webhook, created_snapshot=(1000000, 1000000, ()))
    await house.app.execute("ALTER TABLE dispatcher.endpoint ENABLE TRIGGER registry_changed")
    await house.emit(21, 30)  # written here, before the dispatcher was started here
    await house.start()
    await house.emit(31, 40)
    await until(lambda: house.settled(40))
    await house.emit(41)
    await until(lambda: house.settled(41))
    assert Counter(arrival.n for arrival in house.receiver.arrivals) == dict.fromkeys(range(1, 42), 1)


# ── webhooks that change ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_gone_endpoint_is_disabled_and_receives_nothing_more(house: House) -> None:
    webhook = await house.webhook(max_concurrency=1)
    await house.start()
    house.receiver.answer = lambda arrival: 410
    await house.emit(1, 100)
    await until(lambda: house.settled(100))
    assert await house.states() == {"discarded": 100}
    assert len({row[0] for row in await house.log()}) == 100
    row = await house.app.fetchrow(
        "SELECT status, disabled_reason FROM dispatcher.endpoint WHERE public_id = $1", webhook.id
    )
    assert row["status"] == "disabled"
    assert "410" in row["disabled_reason"]
    before = len(house.receiver.arrivals)
    await house.webhook("/other")
    await house.emit(101)
    await until(lambda: house.receiver.at("/other"))
    assert len(house.receiver.at("/")) == before


async def test_deleted_webhook_takes_what_waits_with_it_and_what_is_in_flight_finishes(house: House) -> None:
    webhook = await house.webhook(max_concurrency=2)
    running = await house.start()
    release = asyncio.Event()

    async def slowly(arrival: Arrival) -> int:
        await release.wait()
        return 200 if arrival.n == 1 else 500

    house.receiver.answer = slowly
    await house.emit(1, 300)
    await until(lambda: house.receiver.open == 2 and running.engine.deliverer.taken == 300)
    await house.app.execute("DELETE FROM dispatcher.endpoint WHERE public_id = $1", webhook.id)
    await until(lambda: not running.engine.deliverer.subscribers)
    running.check()
    release.set()
    await until(lambda: house.receiver.open == 0)
    await until(lambda: not running.engine.deliverer.in_flight and not running.engine.ledger.buffered)
    # The failed one is due in a minute; its row is discarded when it comes due.
    await house.app.execute("UPDATE dispatcher.pending SET due_at = now()")
    await house.crash(running)
    await house.start()
    await until(lambda: house.settled(300))
    log = await house.log()
    assert Counter(row[3] for row in log) == {"delivered": 1, "retrying": 1, "discarded": 299}
    assert len(house.receiver.arrivals) == 2


async def test_held_deliveries_of_a_deleted_webhook_are_discarded_once_each(house: House) -> None:
    webhook = await house.webhook()
    await house.change(webhook, status="paused")
    await house.start()
    await house.emit(1, 2500)
    await until(lambda: _count(house, 2500))
    await house.app.execute("DELETE FROM dispatcher.endpoint WHERE public_id = $1", webhook.id)
    await until(lambda: house.settled(2500))
    log = await house.log()
    assert len(log) == len({row[0] for row in log}) == 2500
    assert house.receiver.arrivals == []


async def _count(house: House, many: int) -> bool:
    return await house.pending() == many


async def test_queue_goes_to_the_new_url(house: House) -> None:
    webhook = await house.webhook("/old", max_concurrency=1)
    await house.start()
    release = asyncio.Event()

    async def slowly(arrival: Arrival) -> int:
        await release.wait()
        return 200

    house.receiver.answer = slowly
    await house.emit(1, 20)
    await until(lambda: house.receiver.open == 1)
    await house.change(webhook, url=house.receiver.url + "/new")
    await until(lambda: house.engines[0].engine.deliverer.subscribers[1].endpoint.url.endswith("/new"))
    release.set()
    await until(lambda: house.settled(20))
    assert Counter(arrival.path for arrival in house.receiver.arrivals) == {"/old": 1, "/new": 19}


async def test_pause_holds_and_resume_sends_in_order_of_age(house: House) -> None:
    webhook = await house.webhook(max_concurrency=1, retry=[0.05])
    running = await house.start()
    release = asyncio.Event()

    async def slowly(arrival: Arrival) -> int:
        await release.wait()
        return 500 if arrival.n == 1 and arrival.attempt == 1 else 200

    house.receiver.answer = slowly
    await house.emit(1, 10)
    await until(lambda: house.receiver.open == 1)
    await house.change(webhook, status="paused")
    await until(lambda: _count(house, 9))
    release.set()  # what is in flight finishes, fails, comes due, and is held like the others
    held = "SELECT count(*) FROM dispatcher.pending WHERE due_at = 'infinity'"
    await until(lambda: _equals(house, held, 10))
    await house.emit(11, 20)
    await until(lambda: _equals(house, held, 20))
    running.check()
    assert len(house.receiver.arrivals) == 1
    await house.change(webhook, status="active")
    await until(lambda: house.settled(20))
    assert [arrival.n for arrival in house.receiver.arrivals[1:]] == list(range(1, 21))


async def _equals(house: House, query: str, many: int) -> bool:
    return bool(await house.app.fetchval(query) == many)


async def test_backlog_of_ten_thousand_is_pulled_without_duplicates_while_new_events_come(house: House) -> None:
    webhook = await house.webhook(max_concurrency=16)
    await house.change(webhook, status="paused")
    running = await house.start()
    await house.emit(1, 10_000)
    await until(lambda: _count(house, 10_000))
    await house.change(webhook, status="active")
    for n in range(10_001, 10_301):
        await house.emit(n)
        running.check()
    await until(lambda: house.settled(10_300))
    assert Counter(arrival.n for arrival in house.receiver.arrivals) == dict.fromkeys(range(1, 10_301), 1)
    log = await house.log()
    assert len(log) == len({row[0] for row in log}) == 10_300
    assert not running.engine.deliverer.rows
    await house.emit(10_301)
    await until(lambda: len(house.receiver.arrivals) == 10_301)
    await until(lambda: not running.engine.deliverer.subscribers[1].backlog)


async def test_ordered_webhook_waits_for_the_retries_of_its_head(house: House) -> None:
    await house.webhook(ordered=True, retry=[0.05, 0.05])
    running = await house.start()
    house.receiver.answer = lambda arrival: 500 if arrival.n % 3 == 0 and arrival.attempt < 3 else 200
    await house.emit(1, 15)
    await until(lambda: house.settled(15))
    expected = list(itertools.chain.from_iterable([n] * (3 if n % 3 == 0 else 1) for n in range(1, 16)))
    assert [arrival.n for arrival in house.receiver.arrivals] == expected
    assert house.receiver.open_most == 1
    running.check()


async def test_ordered_webhook_goes_on_behind_an_exhausted_or_undeliverable_head(house: House) -> None:
    await house.webhook(ordered=True, retry=[0.05])
    await house.start()
    house.receiver.answer = lambda arrival: 500 if arrival.n == 2 else 200
    await house.emit(1, 2)
    await house.app.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('test.event', '[]')")
    await house.emit(3, 5)
    await until(lambda: house.settled(5))
    assert [arrival.n for arrival in house.receiver.arrivals] == [1, 2, 2, 3, 4, 5]
    assert await house.states() == {"delivered": 4, "retrying": 1, "exhausted": 1}


async def test_ordered_webhook_keeps_its_order_over_crashes(house: House) -> None:
    await house.webhook(ordered=True, retry=[0.05, 0.05, 0.05])
    dice = random.Random(7)
    crashes: list[int] = []
    house.receiver.answer = lambda arrival: 500 if dice.random() < 0.3 and arrival.attempt < 4 else 200
    for round_ in range(4):
        running = await house.start()
        await house.emit(round_ * 10 + 1, round_ * 10 + 10)
        target = len(house.receiver.arrivals) + dice.randrange(1, 8)
        await until(lambda enough=target: len(house.receiver.arrivals) >= enough)
        await house.crash(running)
        crashes.append(len(house.receiver.arrivals))
    await house.start()
    await until(lambda: house.settled(40))
    numbers = [arrival.n for arrival in house.receiver.arrivals]
    assert list(dict.fromkeys(numbers)) == list(range(1, 41))
    for begin, end in itertools.pairwise([0, *crashes, len(numbers)]):
        assert numbers[begin:end] == sorted(numbers[begin:end])


async def test_ordered_webhook_paused_in_the_middle_goes_on_where_it_was(house: House) -> None:
    webhook = await house.webhook(ordered=True, retry=[0.1])
    running = await house.start()
    house.receiver.answer = lambda arrival: 503 if arrival.n == 3 and arrival.attempt == 1 else 200
    await house.emit(1, 6)
    await until(lambda: len(house.receiver.arrivals) == 3)
    await house.change(webhook, status="paused")
    await until(lambda: _equals(house, "SELECT count(*) FROM dispatcher.pending WHERE due_at = 'infinity'", 4))
    running.check()
    await house.change(webhook, status="active")
    await until(lambda: house.settled(6))
    assert [arrival.n for arrival in house.receiver.arrivals] == [1, 2, 3, 3, 4, 5, 6]


async def test_previous_secret_ceases_to_sign_when_its_grace_is_over(house: House) -> None:
    webhook = await house.webhook()
    clock = [1_900_000_000.0]
    await house.app.execute(
        "UPDATE dispatcher.endpoint SET previous_secret = secret, previous_secret_expires_at = to_timestamp($1)",
        clock[0] + 60,
    )
    running = await house.start()
    running.engine.deliverer._wall = lambda: clock[0]
    running.engine.deliverer.reconfigure(running.engine.deliverer._guard, 0.0)
    await house.emit(1)
    await until(lambda: len(house.receiver.arrivals) == 1)
    clock[0] += 61
    await house.emit(2)
    await until(lambda: len(house.receiver.arrivals) == 2)
    signatures = [len(arrival.headers["webhook-signature"].split()) for arrival in house.receiver.arrivals]
    assert signatures == [2, 1], webhook


# ── nobody waits for somebody else's trouble ─────────────────────────────────────────────────────────────────────────


async def test_endpoint_that_hangs_delays_no_other(house: House) -> None:
    await house.webhook("/hangs")
    await house.webhook("/fine")
    await house.start()
    house.receiver.answer = lambda arrival: never() if arrival.path == "/hangs" else 200
    for n in range(1, 1001):  # a page each, so that every page holds something unresolved
        await house.emit(n)
    await until(lambda: len(house.receiver.at("/fine")) == 1000)
    assert house.receiver.open == len(house.receiver.at("/hangs")) <= 16


@pytest.mark.parametrize("after_a_good_start", [False, True])
async def test_many_hanging_endpoints_with_long_queues_leave_room_for_the_others(
    house: House, after_a_good_start: bool
) -> None:
    for i in range(30):
        await house.webhook(f"/hangs/{i}", events=["bad.event"])
    await house.webhook("/fine", events=["good.event"])
    running = await house.start(max_queued=2000)
    if after_a_good_start:
        await house.app.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('bad.event', '{}')")
        await until(lambda: house.settled(30))
    house.receiver.answer = lambda arrival: never() if arrival.path.startswith("/hangs") else 200
    await house.app.execute(
        "INSERT INTO dispatcher.outbox (type, data) SELECT 'bad.event', '{}' FROM generate_series(1, 200)"
    )
    await house.app.execute(
        "INSERT INTO dispatcher.outbox (type, data) SELECT 'good.event', '{}' FROM generate_series(1, 200)"
    )
    await until(lambda: len(house.receiver.at("/fine")) == 200)
    running.check()


@pytest.mark.parametrize(
    ("columns", "values", "reason"),
    [
        ("type, data", "'test.event', '[1]'", "object"),
        ("type, data", "'not a type', '{}'", "type"),
        ("type, data", "'test.event', json_build_object('x', repeat('y', 3000000))", "bytes"),
        ("type, data", "repeat('x', 1000000), '{}'", "type"),
        ("type, data, created_at", "'test.event', '{}', '20000-01-01'", "created_at"),
        ("type, data, created_at", "'test.event', '{}', '0044-03-15 BC'", "created_at"),
        ("type, data, created_at", "'test.event', '{}', 'infinity'", "created_at"),
    ],
)
async def test_event_that_cannot_be_sent_is_discarded_with_a_reason_and_blocks_nothing(
    house: House, columns: str, values: str, reason: str
) -> None:
    await house.webhook()
    await house.start()
    seq = await house.app.fetchval(f"INSERT INTO dispatcher.outbox ({columns}) VALUES ({values}) RETURNING seq")
    await house.emit(2)
    await until(lambda: house.settled(1))
    [(event, why)] = await until(lambda: house.app.fetch("SELECT event_seq, reason FROM dispatcher.discarded_event"))
    assert event == seq
    assert reason in why
    assert [arrival.n for arrival in house.receiver.arrivals] == [2]


async def test_a_lane_that_would_take_seconds_is_held_before_it_has_filled_the_room(house: House) -> None:
    slow = await house.webhook("/slow")
    await house.webhook("/fine")
    running = await house.start()
    pace_s = 0.5

    async def slowly(arrival: Arrival) -> int:
        await asyncio.sleep(pace_s if arrival.path == "/slow" else 0)
        return 200

    house.receiver.answer = slowly
    await house.emit(1, 4)
    await until(lambda: house.settled(8))  # so it is known how slow
    await house.emit(5, 1000)
    lane = running.engine.deliverer.subscribers[await house.key(slow)].lane
    queued_most = 0
    while len(house.receiver.at("/fine")) < 1000:
        queued_most = max(queued_most, lane.queued)
        await asyncio.sleep(0)
    assert queued_most <= 4 * outbox.CROWD_MIN
    await until(lambda: house.app.fetchval("SELECT count(*) > 700 FROM dispatcher.pending WHERE due_at = 'infinity'"))
    pace_s = 0.0
    await until(lambda: house.settled(2000))
    assert Counter(arrival.n for arrival in house.receiver.at("/slow")) == dict.fromkeys(range(1, 1001), 1)
    running.check()


async def test_event_that_cannot_be_sent_and_whose_webhook_holds_is_discarded_when_its_turn_comes(house: House) -> None:
    webhook = await house.webhook()
    await house.start()
    await house.change(webhook, status="paused")
    await house.emit(1)
    await until(lambda: house.app.fetchval("SELECT count(*) = 1 FROM dispatcher.pending"))
    insert = "INSERT INTO dispatcher.outbox (type, data) VALUES ('test.event', '[1]') RETURNING seq"
    seq = await house.app.fetchval(insert)
    await house.emit(3)
    await until(lambda: house.app.fetchval("SELECT count(*) = 3 FROM dispatcher.pending"))
    assert await house.app.fetchval("SELECT count(*) = 0 FROM dispatcher.discarded_event")
    await house.change(webhook, status="active")
    await until(lambda: house.settled(2))
    [(event, why)] = await until(lambda: house.app.fetch("SELECT event_seq, reason FROM dispatcher.discarded_event"))
    assert event == seq
    assert "object" in why
    assert [arrival.n for arrival in house.receiver.arrivals] == [1, 3]
    await until(lambda: house.app.fetchval("SELECT count(*) = 0 FROM dispatcher.pending"))


@pytest.mark.interpreted
async def test_error_text_the_database_cannot_hold_stops_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await house.webhook(retry=[0.01])
    running = await house.start()
    done = running.engine.deliverer._done
    spoilt: list[object] = []

    def spoil(delivery, attempt) -> None:  # type: ignore[no-untyped-def]
        if not spoilt:
            spoilt.append(attempt)
            attempt.error = "what\0 a \ud800 mess" * 100
        done(delivery, attempt)

    monkeypatch.setattr(running.engine.deliverer, "_done", spoil)
    house.receiver.answer = lambda arrival: 500 if arrival.attempt == 1 else 200
    await house.emit()
    await until(lambda: house.settled(1))
    error = await house.app.fetchval("SELECT error FROM dispatcher.attempt WHERE attempt = 1")
    assert error.startswith("what\ufffd a ? mess")


@pytest.mark.parametrize("wanted", [True, False])
async def test_outcomes_are_committed_as_the_setting_says(
    house: House, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    found: dict[str, str] = {}

    async def noting(dsn: str, *, name: str, **more: Any) -> Any:
        connection = await connect(dsn, name=name, **more)
        found[name] = await connection.fetchval("SHOW synchronous_commit")
        return connection

    monkeypatch.setattr("dispatcher.engine.engine.connect", noting)
    await house.webhook()
    await house.start(synchronous_commit=wanted)
    await house.emit(1, 100)
    await until(lambda: house.settled(100))
    assert found["dispatcher writer"] == ("on" if wanted else "off")
    servers = await house.app.fetchval("SHOW synchronous_commit")
    assert {found[f"dispatcher {name}"] for name in ("reader", "retries", "upkeep")} == {servers}


@pytest.mark.interpreted
async def test_large_events_are_read_in_short_pages(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PAGE_BYTES", 100_000)
    monkeypatch.setattr(outbox, "OPEN_BYTES_MAX", 300_000)
    await house.webhook()
    running = await house.start()
    await house.emit(0, x="y" * 20_000)
    await until(lambda: house.settled(1))
    await house.emit(1, 100, x="y" * 20_000)
    most = 0

    async def all_in() -> bool:
        nonlocal most
        reader = running.engine._reader
        assert reader is not None
        most = max(most, sum(page.data_bytes for page in reader._open if page.left))
        return await house.settled(101)

    await until(all_in)
    assert 0 < most <= 400_000
    assert len(house.receiver.arrivals) == 101


async def test_producer_may_be_cut_off_in_the_middle(house: House) -> None:
    await house.webhook()
    await house.start()
    producer = await house.connect()
    transaction = producer.transaction()
    await transaction.start()
    await house.emit(13, db=producer)
    pid = producer.get_server_pid()
    await house.app.fetchval("SELECT pg_terminate_backend($1)", pid)
    with pytest.raises(TROUBLE):
        await transaction.commit()
    producer.terminate()
    await house.emit(14)
    await until(lambda: house.settled(1))
    assert [arrival.n for arrival in house.receiver.arrivals] == [14]
