"""Two shards side by side: each minds its own webhooks, and what concerns all of them is done once."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from house import House, Running, until

from dispatcher.core.shards import shard_of
from dispatcher.engine.engine import Engine
from dispatcher.model import EndpointId
from dispatcher.store.database import connect
from dispatcher.store.deliveries import DeliveryStore
from dispatcher.store.endpoints import EndpointRecord
from dispatcher.store.fleet import FleetStore
from dispatcher.store.replays import Choice, ReplayStore, Selection


async def split(house: House) -> dict[int, list[EndpointRecord]]:
    """Two shards with three webhooks at least each, known by number."""
    # On a connection of its own, which takes its locks along.
    db = await connect(house.dsn, name="command")
    await FleetStore(db).reshard(2)
    await db.close()
    made: dict[int, list[EndpointRecord]] = {1: [], 2: []}
    while min(map(len, made.values())) < 3:
        webhook = await house.webhook(f"/{len(made[1]) + len(made[2])}", retry=[0.05])
        made[shard_of(await house.key(webhook), 2)].append(webhook)
    return made


async def start(house: House, **settings: Any) -> list[Running]:
    return [await house.start(shard=shard, shards=2, **settings) for shard in (1, 2)]


def path_of(webhook: EndpointRecord) -> str:
    return "/" + webhook.url.rpartition("/")[2]


async def test_each_webhook_is_served_once_and_events_are_counted_and_discarded_once(house: House) -> None:
    made = await split(house)
    webhooks = made[1] + made[2]
    engines = await start(house)
    await house.emit(1, 50)
    await house.app.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('test.event', '[1]')")
    await until(lambda: house.settled(50 * len(webhooks)))
    await until(lambda: house.app.fetchval("SELECT count(*) FROM dispatcher.discarded_event"))
    seen = Counter((arrival.path, arrival.n) for arrival in house.receiver.arrivals)
    assert seen == {(path_of(webhook), n): 1 for webhook in webhooks for n in range(1, 51)}
    counted = [running.engine.snapshot() for running in engines]
    await until(lambda: sum(running.engine.telemetry.events for running in engines) == 51)
    assert sum(s.endpoints["active"] for s in counted) == len(webhooks)
    assert [s.shards for s in counted] == [[1], [2]]


async def test_pausing_resuming_and_deleting_reach_the_shard_they_concern(house: House) -> None:
    made = await split(house)
    engines = await start(house)
    for webhooks in made.values():
        await house.change(webhooks[0], status="paused")
        await house.change(webhooks[1], status="paused")
    await house.emit(1, 20)
    total = 20 * (len(made[1]) + len(made[2]))
    await until(lambda: _pending(house, 80))
    # A restart of the other one must not take these for orphans.
    for running in engines:
        await house.stop(running)
    await start(house)
    for webhooks in made.values():
        await house.change(webhooks[0], status="active")
        await house.app.execute("DELETE FROM dispatcher.endpoint WHERE public_id = $1", webhooks[1].id)
    await until(lambda: house.settled(total))
    assert await house.states() == {"delivered": total - 40, "discarded": 40}


async def _pending(house: House, many: int) -> bool:
    return await house.pending() == many


async def test_retries_by_hand_and_replays_reach_the_shard_they_concern(house: House) -> None:
    made = await split(house)
    await start(house)
    await house.emit(1, 5)
    total = 5 * (len(made[1]) + len(made[2]))
    await until(lambda: house.settled(total))
    deliveries = DeliveryStore(house.app)
    replays = ReplayStore(house.app)
    seq = await house.app.fetchval("SELECT min(seq) FROM dispatcher.outbox")
    hour = timedelta(hours=1)
    for webhooks in made.values():
        by_hand, by_replay = await house.key(webhooks[0]), await house.key(webhooks[1])
        detail = await deliveries.find(house.account, (EndpointId(by_hand), seq, 0))
        assert detail is not None
        assert await deliveries.redeliver(detail)
        now = datetime.now(UTC)
        choice = Choice(selection=Selection.ALL, since=now - hour, until=now + hour)
        assert await replays.create(by_replay, choice)
    await until(lambda: house.settled(total + 2 + 10))
    assert await house.states() == {"delivered": total + 12}


async def test_ordered_webhooks_find_their_heads_again_and_nobody_elses(house: House) -> None:
    made = await split(house)
    for webhooks in made.values():
        await house.change(webhooks[0], ordered=True, retry="[0.5]")
    ordered = {path_of(webhooks[0]) for webhooks in made.values()}
    failed: set[str] = set()

    def fail_first(arrival: Any) -> int:
        if arrival.path in ordered and arrival.path not in failed:
            failed.add(arrival.path)
            return 500
        return 200

    house.receiver.answer = fail_first
    engines = await start(house)
    await house.emit(1, 10)
    await until(lambda: failed == ordered)
    for running in engines:
        await house.stop(running)
    await start(house)
    await until(lambda: house.settled(10 * (len(made[1]) + len(made[2]))))
    for path in ordered:
        assert [arrival.n for arrival in house.receiver.at(path)] == [1, *range(1, 11)]


async def test_restored_dump_is_taken_over_by_each_shard_for_its_own(house: House) -> None:
    made = await split(house)
    await house.emit(1, 5)  # before one more webhook is made: none of its business
    late: dict[int, str] = {}
    while late.keys() != {1, 2}:
        webhook = await house.webhook(f"/late{len(late)}")
        shard = shard_of(await house.key(webhook), 2)
        if shard in late:
            await house.app.execute("DELETE FROM dispatcher.endpoint WHERE public_id = $1", webhook.id)
        else:
            late[shard] = path_of(webhook)
    await house.emit(6, 10)
    await house.app.execute("UPDATE dispatcher.shard SET system = 'elsewhere'")
    engines = await start(house)
    total = 10 * (len(made[1]) + len(made[2])) + 5 * len(late)
    await until(lambda: house.settled(total))
    for path in late.values():
        assert sorted(arrival.n for arrival in house.receiver.at(path)) == [6, 7, 8, 9, 10]
    assert len(house.receiver.arrivals) == total
    for running in engines:
        running.check()


async def test_engine_with_an_outdated_number_of_shards_takes_none(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await split(house)
    refused: set[int] = set()
    monkeypatch.setattr(Engine, "_lose", lambda self, _: refused.add(self.shard))
    engines = [house.launch(shard=shard, shards=4) for shard in (1, 3)]  # one that is another now, and one that is none
    await until(lambda: refused == {1, 3})
    assert [running.engine.role for running in engines] == ["standby", "standby"]
    assert await house.app.fetchval("SELECT max(epoch) FROM dispatcher.shard") == 1, "one was taken over"
