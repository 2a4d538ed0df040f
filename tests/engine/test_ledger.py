"""Group commit: nothing is logged twice when answers are lost, and the cursor never passes what is not on record."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from desk import Desk, endpoint
from house import House, until

from dispatcher.engine.ledger import BUSY_DELAY_S, BUSY_ROWS, DELAY_S, ERROR_CHARS_MAX, GENTLE_DELAY_S
from dispatcher.errors import Fenced
from dispatcher.model import EndpointStatus
from dispatcher.store.shard import Batch, ShardStore


@pytest.mark.parametrize("when", ["lost before it is written", "written, and the answer lost", "written twice at once"])
async def test_batch_in_doubt_is_logged_once(house: House, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    flush = ShardStore.flush
    troubles = iter([False, True] * 4)

    async def unreliable(self: ShardStore, epoch: int, batch: Batch) -> bool:
        if not batch.attempts or not next(troubles, False):
            return await flush(self, epoch, batch)
        if when == "written, and the answer lost":
            await flush(self, epoch, batch)
        elif when == "written twice at once":
            late.append((epoch, batch))
        raise ConnectionResetError("cut")

    late: list[tuple[int, Batch]] = []
    monkeypatch.setattr(ShardStore, "flush", unreliable)
    await house.webhook(retry=[0.01])
    house.receiver.answer = lambda arrival: 500 if arrival.n % 5 == 0 and arrival.attempt == 1 else 200
    running = await house.start()
    running.may_lose = True
    for first in range(1, 101, 10):
        await house.emit(first, first + 9)
        await until(lambda last=first + 9: house.settled(last))  # so that each ten are a batch at least
    await until(lambda: house.settled(100))
    assert running.engine.losses >= 2
    for epoch, batch in late:  # the session that was cut was still at it
        assert not await flush(ShardStore(house.app, 0), epoch, batch)
    log = await house.log()
    assert len(log) == len(set(log)) == 120
    assert Counter(row[3] for row in log) == {"delivered": 100, "retrying": 20}
    assert len(house.receiver.arrivals) == 120, "what was logged was not sent again"


async def test_fence_lets_nothing_of_an_older_epoch_in(house: House) -> None:
    desk = Desk(endpoint(1))
    desk.emit()
    desk.answer(next(iter(desk.out)), 200)
    shard = ShardStore(house.app, 0)
    epoch = await shard.take_over()
    await shard.take_over()
    with pytest.raises(Fenced):
        await desk.ledger.flush(shard, None, epoch)
    assert await house.log() == []


async def test_finish_writes_what_is_there_and_ends_the_loop() -> None:
    desk = Desk(endpoint(1))
    run = asyncio.create_task(desk.ledger.run(desk.shelf, SimpleNamespace(), 1))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    desk.emit()
    desk.answer(next(iter(desk.out)), 200)
    desk.ledger.finish()
    await run
    assert desk.finals() == {1: [1]}


async def test_results_collect_for_a_moment_and_go_down_together() -> None:
    desk = Desk(endpoint(1))
    run = asyncio.create_task(desk.ledger.run(desk.shelf, SimpleNamespace(), 1))  # type: ignore[arg-type]
    for _ in range(3):
        desk.emit()
    for delivery in list(desk.out):
        desk.answer(delivery, 200)
    await asyncio.sleep(0)
    assert desk.ledger.buffered == 3
    desk.clock.advance(DELAY_S + 0.001)
    for _ in range(5):
        await asyncio.sleep(0)
    assert desk.ledger.buffered == 0
    assert desk.telemetry.settle_batch_size.data().sum == 3
    desk.ledger.finish()
    await run


async def test_where_much_happens_flushes_are_more_frequent_but_not_without_end() -> None:
    desk = Desk(endpoint(1, max_concurrency=16))
    run = asyncio.create_task(desk.ledger.run(desk.shelf, SimpleNamespace(), 1))  # type: ignore[arg-type]

    async def happen(results: int) -> None:
        for _ in range(results):
            desk.emit()
        for _ in range(results):
            desk.answer(next(iter(desk.out)), 200)
            desk.clock.advance(0.0)

    async def after(delay_s: float) -> int:
        desk.clock.advance(delay_s)
        for _ in range(5):
            await asyncio.sleep(0)
        return desk.ledger.buffered

    await happen(BUSY_ROWS - 1)
    assert await after(BUSY_DELAY_S) == BUSY_ROWS - 1
    await happen(1)
    assert await after(0.001) == 0, "the last flush is long ago"
    await happen(2 * BUSY_ROWS)
    assert await after(BUSY_DELAY_S - 0.002) == 2 * BUSY_ROWS
    assert await after(0.002) == 0
    desk.ledger.gentle_until = desk.clock.now + 1.0  # a storm of retries, beside first attempts
    await happen(2 * BUSY_ROWS)
    assert await after(GENTLE_DELAY_S) == 2 * BUSY_ROWS, "forty within less: not the storm, but a drain"
    assert await after(BUSY_DELAY_S - GENTLE_DELAY_S) == 0
    await after(GENTLE_DELAY_S)
    await happen(BUSY_ROWS)
    assert await after(0.0) == 0, "a short one"
    desk.ledger.finish()
    await run


async def test_full_ledger_stops_the_sending_and_the_commit_starts_it_again() -> None:
    desk = Desk(endpoint(1, max_concurrency=4))
    desk.ledger.buffered_max = 4
    for _ in range(20):
        desk.emit()
    while desk.out:
        desk.answer(next(iter(desk.out)), 200)
    assert desk.ledger.full
    assert desk.lanes.queued
    await desk.flush()
    assert desk.out
    await desk.settle()
    desk.check_settled()


@pytest.mark.parametrize("window", [1, 7, 16])
async def test_a_crash_repeats_at_most_twice_what_is_buffered_and_in_flight(window: int) -> None:
    """While one flush hangs, the next collects: what is answered and not on record, and what is out, has this end."""
    buffered_max, in_flight_max = 20, 16
    desk = Desk(endpoint(1, max_concurrency=window), endpoint(2, max_concurrency=window), in_flight_max=in_flight_max)
    desk.ledger.buffered_max = buffered_max
    desk.shelf.late = asyncio.Event()
    for _ in range(300):
        desk.emit()

    def answer_all() -> None:
        while desk.out:
            desk.answer(next(iter(desk.out)), 200)

    answer_all()
    flushing = asyncio.create_task(desk.flush())
    await asyncio.sleep(0)
    desk.deliverer.pump()
    answer_all()
    lost_by_a_crash = desk.ledger.buffered + len(desk.deliverer.in_flight)
    assert 2 * buffered_max <= lost_by_a_crash <= 2 * (buffered_max + in_flight_max)
    desk.deliverer.pump()
    assert not desk.out, "it sends on although nothing is written down"
    desk.shelf.late.set()
    await flushing


async def test_page_is_resolved_when_its_rows_are_written_and_not_when_they_are_buffered() -> None:
    desk = Desk(endpoint(1), endpoint(2))
    desk.emit()
    first, second = desk.out
    desk.answer(first, 200)
    assert desk.pages[0].left == 2
    await desk.flush()
    assert desk.pages[0].left == 1
    desk.answer(second, 500)
    await desk.flush()
    assert desk.pages[0].left == 0, "a pending row resolves it too"


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x" * 5000])
async def test_error_texts_are_made_storable(text: str) -> None:
    desk = Desk(endpoint(1))
    desk.emit()
    [delivery] = desk.out
    desk.deliverer.discard(delivery, text)
    desk.ledger.attempt(delivery, None, "discarded", 0, text)
    for row in desk.ledger._open.attempts:
        assert "\0" not in row[9]
        assert len(row[9].encode()) <= ERROR_CHARS_MAX * 3


async def test_only_a_change_of_a_webhooks_health_is_written() -> None:
    desk = Desk(endpoint(1, schedule_s=(1.0, 1.0)))
    written: list[Any] = []

    async def learn(_disabled: Any, health: Any) -> None:
        written.extend(health)

    store = SimpleNamespace(learn=learn)

    async def come_to(status: int) -> None:
        desk.emit()
        desk.answer(list(desk.out)[-1], status)
        await desk.ledger.flush(desk.shelf, store, 1)  # type: ignore[arg-type]

    for status in (200, 500, 500, 404, 200, 200):
        await come_to(status)
    assert [(h.failing_since is not None, h.last_error) for h in written] == [(True, "500"), (False, None)]
    await come_to(500)
    desk.ledger.forgive(1)
    await come_to(500)
    assert len(written) == 4, "a webhook that was resumed begins anew"


async def test_webhook_paused_while_nobody_remembers_it_begins_anew_when_it_is_resumed() -> None:
    desk = Desk(endpoint(1, schedule_s=()))
    written: list[Any] = []

    async def learn(_disabled: Any, health: Any) -> None:
        written.extend(health)

    store = SimpleNamespace(learn=learn)

    async def fail() -> None:
        desk.emit()
        desk.answer(list(desk.out)[-1], 500)
        await desk.ledger.flush(desk.shelf, store, 1)  # type: ignore[arg-type]

    await fail()
    for _ in range(3):
        desk.clock.advance(30.0)
        desk.deliverer.sweep()
    assert 1 not in desk.deliverer.subscribers
    desk.set(1, status=EndpointStatus.PAUSED)
    desk.set(1, status=EndpointStatus.ACTIVE)
    await fail()
    first, second = written
    assert second.failing_since > first.failing_since
