"""What waits: on time and never early, over frontiers, refills and restarts, and whatever arrives late."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from desk import EPOCH, Desk, endpoint
from house import Arrival, House, until

from dispatcher.engine import retries
from dispatcher.model import DeliveryKey, EndpointStatus


async def test_attempts_follow_the_schedule_with_the_same_bytes_and_are_never_early(house: House) -> None:
    await house.webhook(retry=[0.3, 0.5])
    await house.start()
    house.receiver.answer = lambda arrival: 500
    [event] = await house.emit()
    await until(lambda: house.settled(1))
    arrivals = house.receiver.of(event)
    assert [arrival.attempt for arrival in arrivals] == [1, 2, 3]
    assert len({arrival.body for arrival in arrivals}) == 1
    assert len({arrival.headers["X-Trackpost-Delivery"] for arrival in arrivals}) == 1
    waits = [after.at - before.at for before, after in itertools.pairwise(arrivals)]
    assert waits[0] >= 0.3
    assert waits[1] >= 0.5
    assert [row[2:] for row in await house.log()] == [(1, "retrying"), (2, "retrying"), (3, "exhausted")]


async def test_retry_after_is_a_minimum_and_no_replacement(house: House) -> None:
    await house.webhook("/longer", retry=[0.0])
    await house.webhook("/shorter", retry=[0.6])
    await house.start()
    asked = {"/longer": "1", "/shorter": "0"}
    house.receiver.answer = lambda arrival: (
        (503, f"Retry-After: {asked[arrival.path]}\r\n") if arrival.attempt == 1 else 200
    )
    await house.emit()
    await until(lambda: house.settled(2))
    for path, least_s in (("/longer", 1.0), ("/shorter", 0.6)):
        first, second = house.receiver.at(path)
        assert second.at - first.at >= least_s


async def test_rows_beyond_a_near_frontier_come_back_by_refill(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "HORIZON", timedelta(seconds=0.4))
    monkeypatch.setattr(retries, "REFILL_BELOW", timedelta(seconds=0.3))
    monkeypatch.setattr(retries, "REFILL_ROWS", 20)
    monkeypatch.setattr(retries, "WHEEL_KEYS_MAX", 30)
    await house.webhook(retry=[0.1, 0.7, 0.3])
    running = await house.start()
    house.receiver.answer = lambda arrival: 500 if arrival.attempt < 4 else 200
    await house.emit(1, 60)
    await until(lambda: house.settled(60))
    seen = Counter((arrival.n, arrival.attempt) for arrival in house.receiver.arrivals)
    assert seen == {(n, attempt): 1 for n in range(1, 61) for attempt in (1, 2, 3, 4)}
    assert running.engine.snapshot().retries_waiting <= 30


async def test_retries_survive_a_restart_and_keep_their_numbers(house: House) -> None:
    await house.webhook(retry=[0.5, 0.5])
    running = await house.start()
    house.receiver.answer = lambda arrival: 500 if arrival.attempt < 3 else 200
    await house.emit(1, 10)
    await until(lambda: len(house.receiver.arrivals) == 10)
    await house.stop(running)
    await house.start()
    await until(lambda: house.settled(10))
    assert Counter(arrival.attempt for arrival in house.receiver.arrivals) == {1: 10, 2: 10, 3: 10}


async def test_row_committed_while_a_refill_is_under_way_is_not_missed() -> None:
    for first in ("commit", "refill"):
        desk = Desk(endpoint(1, schedule_s=(2.0,)))
        desk.emit()
        desk.answer(next(iter(desk.out)), 500)
        desk.shelf.late = asyncio.Event()
        acts = {"commit": desk.flush, "refill": desk.retries.turn}
        tasks = [asyncio.create_task(acts[name]()) for name in sorted(acts, key=lambda name: name != first)]
        await asyncio.sleep(0)
        desk.shelf.late.set()
        await asyncio.gather(*tasks)
        assert desk.retries.waiting == 1, first
        await desk.settle()
        desk.check_settled()


async def test_time_read_before_a_newer_one_was_written_does_not_fire_early() -> None:
    desk = Desk(endpoint(1, timeout_s=1.0, schedule_s=(600.0,)))
    desk.emit()
    [delivery] = desk.out
    desk.clock.advance(3.0)
    desk.deliverer.insure(desk.clock.now, due_s=1.0)
    await desk.flush()
    desk.shelf.late = asyncio.Event()
    refill = asyncio.create_task(desk.retries.turn())  # reads the straggler's row
    await asyncio.sleep(0)
    late, desk.shelf.late = desk.shelf.late, None
    desk.answer(delivery, 500)
    await desk.flush()  # and now it is due in ten minutes
    late.set()
    await refill
    for _ in range(400):
        desk.clock.advance(0.25)
        await desk.retries.turn()
    assert not desk.out
    await desk.settle()  # the desk itself asserts that nothing is sent before its time
    desk.check_settled()


async def test_retry_of_the_first_failure_after_a_quiet_hour_is_not_forgotten() -> None:
    desk = Desk(endpoint(1, schedule_s=(600.0,)))
    for _ in range(720):
        await desk.retries.turn()
        desk.clock.advance(5.0)
    desk.emit()
    desk.answer(next(iter(desk.out)), 500)
    await desk.flush()
    assert desk.retries.waiting == 1
    await desk.settle()
    desk.check_settled()


async def test_key_too_far_ahead_for_the_ring_comes_back_with_a_refill() -> None:
    desk = Desk(endpoint(1, schedule_s=(700.0,)))
    await desk.retries.turn()
    desk.clock.advance(500.0)  # no turn for minutes: the ring still stands where it stood
    desk.retries._frontier = EPOCH + timedelta(seconds=desk.clock.now + 900.0)
    desk.emit()
    desk.answer(next(iter(desk.out)), 500)
    await desk.flush()
    await desk.settle()
    desk.check_settled()


@pytest.mark.interpreted
async def test_full_wheel_takes_the_rest_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WHEEL_KEYS_MAX", 3)
    desk = Desk(endpoint(1, max_concurrency=16, schedule_s=(30.0,)))
    await desk.retries.turn()
    for _ in range(12):
        desk.emit()
        desk.answer(list(desk.out)[-1], 500)
        desk.clock.advance(0.5)
    await desk.flush()
    assert desk.retries.waiting == 3
    await desk.settle()
    desk.check_settled()


async def test_pull_that_saw_rows_before_they_were_settled_does_not_send_them_again() -> None:
    desk = Desk(endpoint(1, status=EndpointStatus.PAUSED))
    desk.emit()
    desk.emit()
    await desk.flush()
    desk.set(1, status=EndpointStatus.ACTIVE)
    await desk.retries.turn_backlogs()
    subscriber = desk.deliverer.subscribers[1]
    subscriber.held = True
    subscriber.rewind()
    desk.retries.hungry(subscriber)
    desk.shelf.late = asyncio.Event()
    pull = asyncio.create_task(desk.retries.turn_backlogs())
    await asyncio.sleep(0)
    late, desk.shelf.late = desk.shelf.late, None
    for delivery in list(desk.out):
        desk.answer(delivery, 200)
    await desk.flush()
    late.set()
    await pull
    await desk.settle()
    desk.check_settled()
    assert desk.sent == [(1, 1), (1, 2)]


async def test_backlog_ends_under_steady_load() -> None:
    desk = Desk(endpoint(1, status=EndpointStatus.PAUSED, max_concurrency=16))
    for _ in range(50):
        desk.emit()
    desk.set(1, status=EndpointStatus.ACTIVE)
    for _ in range(60):
        desk.emit()  # always something on its way into the database
        await desk.flush() if desk.clock.now % 1 < 0.5 else None
        for delivery in list(desk.out):
            desk.answer(delivery, 200)
        await desk.retries.turn_backlogs()
        desk.clock.advance(0.25)
        await desk.retries.turn()
    assert not desk.deliverer.subscribers[1].backlog
    await desk.settle()
    desk.check_settled()


async def test_hungry_webhooks_take_turns() -> None:
    many = 300
    desk = Desk(
        *(endpoint(n, status=EndpointStatus.PAUSED) for n in range(1, many + 1)), queued_max=10_000, in_flight_max=5000
    )
    for _ in range(10):
        desk.emit()
    await desk.flush()
    for n in range(1, many + 1):
        desk.set(n, status=EndpointStatus.ACTIVE)
    for _ in range(3):
        await desk.retries.turn_backlogs()
        desk.clock.advance(0.0)
    assert {number for number, _ in desk.sent} == set(range(1, many + 1))


async def test_orphaned_rows_are_left_alone_when_the_webhook_is_resumed_meanwhile() -> None:
    desk = Desk(endpoint(1, status=EndpointStatus.PAUSED))
    for _ in range(3):
        desk.emit()
    await desk.flush()
    desk.set(1, status=EndpointStatus.DISABLED)
    desk.set(1, status=EndpointStatus.ACTIVE)
    await desk.settle()
    desk.check_settled()
    assert [row[5] for row in desk.shelf.attempts] == ["delivered"] * 3


async def test_rows_on_their_way_when_their_webhook_is_deleted_are_discarded() -> None:
    desk = Desk(endpoint(1, status=EndpointStatus.PAUSED))
    desk.emit()
    desk.delete(1)
    await desk.retries.turn_backlogs()  # finds nothing: the row is not in the database yet
    await desk.flush()
    await desk.settle()
    desk.check_settled()
    assert [row[5] for row in desk.shelf.attempts] == ["discarded"]


async def test_rows_that_come_in_while_a_deleted_webhook_is_looked_through_are_discarded() -> None:
    desk = Desk(endpoint(1, status=EndpointStatus.PAUSED))
    desk.emit()
    desk.delete(1)
    desk.shelf.late = asyncio.Event()
    look = asyncio.create_task(desk.retries.turn_backlogs())
    await asyncio.sleep(0)
    late, desk.shelf.late = desk.shelf.late, None
    await desk.flush()
    late.set()
    await look
    await desk.settle()
    desk.check_settled()
    assert [row[5] for row in desk.shelf.attempts] == ["discarded"]


async def test_webhook_deleted_while_it_is_pulled_for_leaves_nothing_behind() -> None:
    desk = Desk(endpoint(1, status=EndpointStatus.PAUSED))
    desk.emit()
    await desk.flush()
    desk.set(1, status=EndpointStatus.ACTIVE)
    desk.emit()
    desk.shelf.late = asyncio.Event()
    pull = asyncio.create_task(desk.retries.turn_backlogs())
    await asyncio.sleep(0)
    late, desk.shelf.late = desk.shelf.late, None
    await desk.flush()
    desk.delete(1)
    late.set()
    await pull
    await desk.settle()
    desk.check_settled()
    assert [row[5] for row in desk.shelf.attempts] == ["discarded"] * 2


async def test_ordered_webhook_gets_what_its_lane_gave_back_before_what_was_parked_earlier() -> None:
    desk = Desk(endpoint(1, ordered=True, max_concurrency=1), queued_max=16)
    for _ in range(18):
        desk.emit()  # one is out, sixteen are queued, the last is parked
    desk.deliverer.running = False
    await desk.flush()
    desk.deliverer.spill_old(desk.clock.now + 1.0)
    desk.answer(next(iter(desk.out)), 200)
    desk.deliverer.running = True
    await desk.retries.turn_backlogs()
    await desk.settle()
    desk.check_settled()
    assert [seq for _, seq in desk.sent] == list(range(1, 19))


async def test_head_that_failed_while_a_session_began_is_still_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(endpoint(1, ordered=True, schedule_s=(5.0,)))

    async def held() -> list[int]:
        return [1]

    monkeypatch.setattr(desk.shelf, "held_endpoints", held)
    desk.emit()
    desk.emit()
    desk.answer(next(iter(desk.out)), 500)
    await desk.retries.start()  # the database has yet to hear of it
    await desk.retries.turn_backlogs()
    await desk.settle()
    desk.check_settled()
    assert [seq for _, seq in desk.sent] == [1, 1, 2]


async def test_ordered_webhook_that_is_enabled_again_waits_for_its_head() -> None:
    desk = Desk(endpoint(1, ordered=True, schedule_s=(5.0,)))
    desk.emit()
    desk.emit()
    desk.answer(next(iter(desk.out)), 500)
    await desk.flush()
    desk.set(1, status=EndpointStatus.DISABLED)
    await desk.retries.turn_backlogs()  # what was held is discarded; the head is due later
    await desk.flush()
    desk.set(1, status=EndpointStatus.ACTIVE)
    desk.emit()
    assert not desk.out
    await desk.settle()
    desk.check_settled()
    assert [seq for _, seq in desk.sent] == [1, 1, 3]


async def test_webhook_that_is_enabled_again_still_has_its_requests_out() -> None:
    desk = Desk(endpoint(1, ordered=True, schedule_s=()))
    desk.emit()
    desk.set(1, status=EndpointStatus.DISABLED)
    desk.set(1, status=EndpointStatus.ACTIVE)
    desk.emit()
    assert len(desk.out) == 1
    await desk.settle()
    desk.check_settled()
    assert [seq for _, seq in desk.sent] == [1, 2]


async def test_event_that_retention_dropped_is_discarded_with_the_reason(house: House) -> None:
    await house.webhook(retry=[0.6])
    await house.start()
    house.receiver.answer = lambda arrival: 500
    await house.emit()
    await until(lambda: house.receiver.arrivals)
    await until(house.pending)
    await house.app.execute("DELETE FROM dispatcher.outbox")
    await until(lambda: house.settled(1))
    assert "retention" in await house.app.fetchval("SELECT error FROM dispatcher.attempt WHERE state = 'discarded'")


async def test_retries_that_come_due_during_a_pause_are_held_until_the_webhook_is_resumed(house: House) -> None:
    webhook = await house.webhook(retry=[0.2])
    await house.start()

    def answer(arrival: Arrival) -> int:
        return 500 if arrival.attempt == 1 else 200

    house.receiver.answer = answer
    await house.emit(1, 20)
    await until(lambda: len(house.receiver.arrivals) == 20)
    await house.change(webhook, status="paused")
    held = "SELECT count(*) = 20 FROM dispatcher.pending WHERE due_at = 'infinity'"
    await until(lambda: house.app.fetchval(held))
    assert len(house.receiver.arrivals) == 20
    await house.change(webhook, status="active")
    await until(lambda: house.settled(20))
    assert [arrival.attempt for arrival in house.receiver.arrivals[20:]] == [2] * 20


# ── storms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _storm(monkeypatch: pytest.MonkeyPatch, *, beside: bool) -> tuple[list[int], list[float]]:
    """Two hundred retries come due at once; return how many each step fetched, and how long was rested."""
    desk = Desk(*[endpoint(number, schedule_s=(30.0,)) for number in range(1, 201)], in_flight_max=500)
    desk.emit()
    while desk.out:
        desk.answer(next(iter(desk.out)), 500)
        desk.clock.advance(0.0)
    await desk.flush()
    await desk.retries.turn()
    desk.clock.advance(31.0)
    steps: list[int] = []
    rests: list[float] = []
    fetch, sleep = desk.shelf.fetch, asyncio.sleep

    async def fetching(keys: list[DeliveryKey]) -> list[Any]:
        steps.append(len(keys))
        desk.clock.advance(0.003)
        desk.telemetry.read += beside
        return await fetch(keys)

    async def sleeping(seconds: float) -> None:
        if seconds:
            rests.append(seconds)
        desk.clock.advance(seconds)
        await sleep(0)

    monkeypatch.setattr(desk.shelf, "fetch", fetching)
    monkeypatch.setattr(retries.asyncio, "sleep", sleeping)
    desk.telemetry.read += beside
    await desk.retries.turn()
    monkeypatch.undo()
    assert (desk.ledger.gentle_until > desk.clock.now) is beside
    assert len(desk.sent) == 400
    await desk.settle()
    desk.check_settled()
    return steps, rests


async def test_storm_beside_first_attempts_takes_short_steps_and_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, rests = await _storm(monkeypatch, beside=True)
    assert sum(steps) == 200
    assert max(steps) == retries.STEP_ROWS_BESIDE
    assert rests == pytest.approx([0.003] * len(steps))


async def test_storm_with_nobody_to_disturb_goes_as_fast_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await _storm(monkeypatch, beside=False) == ([retries.STEP_ROWS] * 2, [])


async def test_clock_sleeps_until_something_is_due_and_a_quarter_of_a_second_at_most() -> None:
    desk = Desk(endpoint(1, schedule_s=(0.6,)))
    await desk.retries.turn()
    assert desk.retries._until_next() == retries.TURN_S
    desk.emit()
    desk.answer(next(iter(desk.out)), 500)
    await desk.flush()
    waits = []
    while len(desk.sent) < 2:
        waits.append(desk.retries._until_next())
        desk.clock.advance(waits[-1])
        await desk.retries.turn()
    assert waits == [0.25, 0.25, 0.125], "0.6 s, and not a tick more"
    await desk.settle()
    desk.check_settled()
