"""Deliveries in motion: one owner each, everything accounted for, whatever happens to their webhooks meanwhile."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest
from desk import Desk, endpoint

from dispatcher.core.window import Health
from dispatcher.engine.deliverer import LANE_DUE_MAX, SENDS_PER_TURN
from dispatcher.engine.delivery import Row
from dispatcher.model import EndpointStatus
from dispatcher.store.shard import HELD_UNTIL

PAUSED, ACTIVE, DISABLED = EndpointStatus.PAUSED, EndpointStatus.ACTIVE, EndpointStatus.DISABLED


async def test_delivery_is_settled_by_its_answer() -> None:
    desk = Desk(endpoint(1))
    desk.emit()
    [delivery] = desk.out
    assert desk.deliverer.balance == 0
    desk.answer(delivery, 200)
    await desk.flush()
    desk.check_settled()
    assert desk.finals() == {1: [1]}


async def test_released_request_counts_no_attempt_and_goes_again() -> None:
    desk = Desk(endpoint(1))
    desk.emit()
    desk.answer(next(iter(desk.out)), -1)
    await desk.flush()
    assert not desk.shelf.attempts
    await desk.settle()
    assert [row[4] for row in desk.shelf.attempts] == [1]


async def test_straggler_is_insured_once_and_settled_by_whatever_comes() -> None:
    for status in (200, 500, 410, -1):
        desk = Desk(endpoint(1, schedule_s=(1.0,)))
        desk.emit()
        [delivery] = desk.out
        desk.clock.advance(3.0)
        desk.deliverer.insure(desk.clock.now - 2.0, due_s=10.0)
        desk.deliverer.insure(desk.clock.now - 2.0, due_s=10.0)
        desk.check()
        if status != 410:
            await desk.flush()
            assert desk.shelf.rows[1, 1, 0][5] == "pending"
            assert desk.pages[0].left == 0, "its page need not wait any more"
        desk.answer(delivery, status)
        await desk.settle()
        desk.check_settled()


async def test_straggler_that_comes_due_while_it_is_still_out_is_not_sent_twice() -> None:
    desk = Desk(endpoint(1, timeout_s=5.0))
    desk.emit()
    [delivery] = desk.out
    desk.clock.advance(3.0)
    desk.deliverer.insure(desk.clock.now - 2.0, due_s=1.0)
    await desk.flush()
    for _ in range(40):
        desk.clock.advance(0.25)
        await desk.retries.turn()
    assert list(desk.out) == [delivery]
    desk.answer(delivery, 200)
    await desk.settle()
    desk.check_settled()
    assert len(desk.sent) == 1


async def test_dead_endpoint_keeps_its_queue_in_the_database_and_is_probed() -> None:
    desk = Desk(endpoint(1, max_concurrency=4, schedule_s=(600.0,)))
    for _ in range(20):
        desk.emit()
    while desk.out:
        desk.answer(next(iter(desk.out)), 0)
    lane = desk.deliverer.subscribers[1].lane
    assert lane.window.health is Health.DEAD
    await desk.flush()
    held = [key for key, row in desk.shelf.rows.items() if row[7] is HELD_UNTIL]
    assert len(held) + sum(row[5] == "retrying" for row in desk.shelf.attempts) == 20
    sent = len(desk.sent)
    desk.clock.advance(20.0)
    await desk.retries.turn()
    await desk.retries.turn_backlogs()
    assert len(desk.sent) == sent, "it is dead"
    desk.clock.advance(20.0)
    await desk.retries.turn()
    await desk.retries.turn_backlogs()
    assert len(desk.out) == 1, "one probe"
    await desk.settle()
    desk.check_settled()
    assert sorted(desk.finals()[1]) == list(range(1, 21))


async def test_dead_endpoint_with_nothing_but_retries_due_comes_back() -> None:
    desk = Desk(endpoint(1, max_concurrency=5, schedule_s=(1.0, 1.0)))
    for _ in range(5):
        desk.emit()
    while desk.out:
        desk.answer(next(iter(desk.out)), 0)
    assert desk.deliverer.subscribers[1].lane.window.health is Health.DEAD
    await desk.settle()
    desk.check_settled()
    assert sorted(desk.finals()[1]) == [1, 2, 3, 4, 5]


async def test_forgotten_idle_webhook_is_made_anew_and_one_with_a_backlog_is_kept() -> None:
    desk = Desk(endpoint(1), endpoint(2, status=PAUSED))
    desk.emit()
    desk.answer(next(iter(desk.out)), 200)
    await desk.flush()
    first, second = desk.deliverer.subscribers[1], desk.deliverer.subscribers[2]
    for _ in range(3):
        desk.clock.advance(30.0)
        desk.deliverer.sweep()
    assert 1 not in desk.deliverer.subscribers
    assert desk.deliverer.subscribers[2] is second
    desk.emit()
    assert desk.deliverer.subscribers[1] is not first
    desk.set(2, status=ACTIVE)
    await desk.settle()
    assert desk.finals() == {1: [1, 2], 2: [1, 2]}


async def test_sweep_never_forgets_a_webhook_with_a_request_out() -> None:
    desk = Desk(endpoint(1))
    desk.emit()
    for _ in range(3):
        desk.clock.advance(30.0)
        desk.deliverer.sweep()
    assert 1 in desk.deliverer.subscribers
    await desk.settle()
    desk.check_settled()


@pytest.mark.parametrize("gone", ["disabled", "deleted"])
async def test_webhook_dismissed_with_requests_out_settles_each_delivery_once(gone: str) -> None:
    for status in (200, 500, 0, -1):
        desk = Desk(endpoint(1, max_concurrency=2, schedule_s=(1.0,)))
        for _ in range(6):
            desk.emit()
        out = list(desk.out)
        if gone == "disabled":
            desk.set(1, status=DISABLED)
        else:
            desk.delete(1)
        desk.check()
        for delivery in out:
            desk.answer(delivery, status)
        await desk.settle()
        desk.check_settled()
        assert sorted(desk.finals()[1]) == [1, 2, 3, 4, 5, 6]


async def test_webhook_disabled_and_resumed_with_a_request_out_goes_on() -> None:
    desk = Desk(endpoint(1, max_concurrency=1))
    desk.emit()
    desk.emit()
    [delivery] = desk.out
    desk.set(1, status=DISABLED)
    desk.set(1, status=ACTIVE)
    third = desk.emit()
    desk.answer(delivery, 500)
    await desk.settle()
    desk.check_settled()
    finals = {row[0]: row[5] for row in desk.shelf.attempts if row[5] != "retrying"}
    assert finals == {1: "delivered", 2: "discarded", third: "delivered"}


async def test_second_secret_is_tried_once_even_if_the_endpoint_died_meanwhile() -> None:
    expires = desk_time(3600.0)
    desk = Desk(
        endpoint(
            1, secret="whsec_YWFh", previous_secret="whsec_YmJi", previous_secret_expires_at=expires, max_concurrency=6
        )
    )
    for _ in range(40):
        desk.emit()
    for _ in range(4):  # widen the window
        desk.answer(next(iter(desk.out)), 200)
    first, *others = list(desk.out)
    for delivery in others[:-1]:
        desk.answer(delivery, 0)
    desk.answer(others[-1], 0)
    desk.answer(first, 401)
    assert first in desk.out or desk.deliverer.subscribers[1].lane.window.health is not Health.DEAD
    if first in desk.out:
        desk.answer(first, 200)
    desk.check()
    await desk.settle()
    desk.check_settled()


async def test_second_try_whose_grace_has_just_ended_goes_out_all_the_same() -> None:
    expires = desk_time(10.0)
    desk = Desk(endpoint(1, secret="whsec_YWFh", previous_secret="whsec_YmJi", previous_secret_expires_at=expires))
    desk.emit()
    [delivery] = desk.out
    desk.clock.advance(20.0)
    desk.answer(delivery, 401)
    assert list(desk.out) == [delivery]
    await desk.settle()
    desk.check_settled()


def desk_time(in_s: float):  # type: ignore[no-untyped-def]
    from datetime import timedelta

    from desk import EPOCH

    return EPOCH + timedelta(seconds=1000.0 + in_s)


async def test_retries_that_come_due_behind_many_others_are_held() -> None:
    desk = Desk(endpoint(1, max_concurrency=1, schedule_s=(100.0,)), queued_max=4000)
    for _ in range(LANE_DUE_MAX + 3):
        desk.emit()
    while desk.out:
        desk.answer(next(iter(desk.out)), 500)
    await desk.flush()
    desk.clock.advance(101.0)
    await desk.retries.turn()
    await desk.flush()
    assert len(desk.deliverer.subscribers[1].lane.due) == LANE_DUE_MAX
    held = [key[1] for key, row in desk.shelf.rows.items() if row[7] is HELD_UNTIL]
    assert held == [LANE_DUE_MAX + 2, LANE_DUE_MAX + 3], "one is out"
    await desk.settle()
    desk.check_settled()


async def test_first_attempt_does_not_stand_behind_the_retries_of_its_webhook() -> None:
    desk = Desk(endpoint(1, max_concurrency=1, schedule_s=(100.0,)))
    for _ in range(20):
        desk.emit()
    while desk.out:
        desk.answer(next(iter(desk.out)), 500)
    await desk.flush()
    desk.clock.advance(101.0)
    await desk.retries.turn()
    new = desk.emit()
    desk.sent.clear()
    for _ in range(2):
        desk.answer(next(iter(desk.out)), 200)
    assert (1, new) in desk.sent
    await desk.settle()
    desk.check_settled()


async def test_one_turn_of_the_loop_sends_a_bounded_number_and_the_next_ones_the_rest() -> None:
    desk = Desk(*[endpoint(number, max_concurrency=1) for number in range(1, 301)], in_flight_max=500)
    desk.emit()
    assert len(desk.out) == SENDS_PER_TURN
    desk.answer(next(iter(desk.out)), 200)
    desk.deliverer.pump()
    assert len(desk.sent) == SENDS_PER_TURN, "what goes on already is not begun a second time"
    desk.clock.advance(0.0)
    assert sorted(desk.sent) == [(number, 1) for number in range(1, 301)]
    await desk.settle()
    desk.check_settled()


async def test_shard_that_is_lost_while_sending_sends_no_more() -> None:
    desk = Desk(*[endpoint(number, max_concurrency=1) for number in range(1, 301)], in_flight_max=500)
    desk.emit()
    desk.deliverer.running = False
    desk.deliverer.drop_queued()
    desk.clock.advance(1.0)
    assert len(desk.sent) == SENDS_PER_TURN


async def test_engine_that_lost_the_shard_takes_no_more_results() -> None:
    desk = Desk(endpoint(1))
    desk.emit()
    [delivery] = desk.out
    desk.deliverer.forget_all()
    desk.ledger.abandon()
    desk.check()
    desk.answer(delivery, 200)
    await desk.flush()
    assert not desk.shelf.attempts
    assert desk.lanes.in_flight == 0


async def test_engine_that_hung_sends_nothing_until_its_lease_is_renewed() -> None:
    rotating = {"previous_secret": "old", "previous_secret_expires_at": datetime.now(UTC) + timedelta(days=1)}
    desk = Desk(endpoint(1, secret="new", max_concurrency=1, **rotating))
    desk.deliverer.send_until(desk.clock.now + 7.0)
    for _ in range(3):
        desk.emit()
    desk.clock.advance(8.0)
    desk.answer(next(iter(desk.out)), 401)  # it came in meanwhile: no second try either
    assert not desk.out
    assert desk.lanes.queued == 2
    desk.deliverer.send_until(desk.clock.now + 7.0)
    assert len(desk.out) == 1
    await desk.settle()
    desk.check_settled()


async def test_ordered_webhook_resumed_as_an_unordered_one_does_not_wait_for_its_head() -> None:
    desk = Desk(endpoint(1, ordered=True, schedule_s=(900.0,)))
    desk.emit()
    desk.emit()
    desk.answer(next(iter(desk.out)), 500)
    await desk.flush()
    desk.set(1, ordered=False)
    await desk.retries.turn()
    await desk.retries.turn_backlogs()
    assert [delivery.key[1] for delivery in desk.out] == [2]


@pytest.mark.parametrize("seed", range(60))
async def test_every_delivery_is_settled_once_whatever_happens_in_whatever_order(seed: int) -> None:
    dice = random.Random(seed)
    desk = Desk(
        endpoint(1, max_concurrency=3),
        endpoint(2, ordered=True),
        endpoint(3, max_concurrency=8, rate_limit=20.0),
        queued_max=dice.choice([40, 200, 1000]),
    )
    waiting: list[tuple[asyncio.Event, asyncio.Task[None]]] = []
    tasks: dict[str, asyncio.Task[None]] = {}

    def late(name: str, act) -> None:  # type: ignore[no-untyped-def]
        """Begin something whose answer comes late, unless the last one of its kind is still under way."""
        if name in tasks and not tasks[name].done():
            return
        desk.shelf.late = asyncio.Event()
        tasks[name] = asyncio.create_task(act())
        waiting.append((desk.shelf.late, tasks[name]))

    async def step() -> None:
        match dice.choices(
            ["emit", "answer", "flush", "turn", "pull", "arrive", "pause", "resume", "advance", "insure", "spill"],
            [30, 40, 15, 8, 20, 25, 2, 4, 15, 3, 2],
        )[0]:
            case "emit":
                desk.emit()
            case "answer" if desk.out:
                desk.answer(dice.choice(list(desk.out)), dice.choices([200, 500, 503, 0, -1], [60, 10, 10, 15, 5])[0])
            case "flush":
                late("flush", desk.flush)
            case "turn":
                late("turn", desk.retries.turn)
            case "pull":
                late("pull", desk.retries.turn_backlogs)
            case "arrive" if waiting:
                event, task = waiting.pop(dice.randrange(len(waiting)))
                event.set()
                await asyncio.sleep(0)
                if not task.done():
                    waiting.append((event, task))
            case "pause":
                desk.set(dice.randrange(1, 4), status=PAUSED)
            case "resume":
                desk.set(dice.randrange(1, 4), status=ACTIVE)
            case "advance":
                desk.clock.advance(dice.choice([0.1, 0.3, 2.0, 35.0]))
            case "insure":
                desk.deliverer.insure(desk.clock.now, due_s=dice.choice([0.0, 10.0]))
            case "spill":
                dice.choice(
                    [lambda: desk.deliverer.spill_slow(1.0, 1.0), lambda: desk.deliverer.spill_old(desk.clock.now)]
                )()

    for _ in range(400):
        await step()
        await asyncio.sleep(0)
        desk.check()
    desk.shelf.late = None
    for event, _ in waiting:
        event.set()
    while not all(task.done() for task in tasks.values()):
        for task in tasks.values():
            if not task.done():
                await asyncio.wait([task], timeout=0.01)
        for event, _ in waiting:
            event.set()
    for task in tasks.values():
        task.result()
    for number in (1, 2, 3):
        desk.set(number, status=ACTIVE)
    await desk.settle()
    desk.check_settled()
    everything = sorted(desk.shelf.events)
    finals = desk.finals()
    assert {number: sorted(finals[number]) for number in finals} == dict.fromkeys((1, 2, 3), everything)
    ordered = [seq for number, seq in desk.sent if number == 2]
    assert ordered == sorted(ordered), "an ordered webhook was sent something out of order"
    assert finals[2] == everything
    assert not any(row is Row.DUE for row in desk.shelf.rows.values())
