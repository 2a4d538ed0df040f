"""Lanes: turns, bounds, blocking, rates, death; then all of it at once against a naive model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dispatcher.core.lanes import LATE_S, Lane, Lanes, Offer, Place
from dispatcher.core.window import Health, Signal

NOW = 1000.0
SIGNALS = [Signal.UP, Signal.UP, Signal.UP, Signal.DOWN, Signal.DOWN, Signal.HOLD, Signal.IGNORE]


def dead_delay_s(deaths: int) -> float:
    return 30.0 * deaths


def make(
    *, queued_max: int = 10_000, lane_queued_max: int = 1000, retries_queued_max: int = 1000, in_flight_max: int = 1000
) -> Lanes[str]:
    return Lanes(
        queued_max=queued_max,
        lane_queued_max=lane_queued_max,
        retries_queued_max=retries_queued_max,
        in_flight_max=in_flight_max,
    )


def fill(
    lanes: Lanes[str], key: int, items: int, *, rate_limit: float | None = None, ordered: bool = False
) -> Lane[str]:
    """Offer `items` first attempts, named `key.number`, to the lane of `key`."""
    lane = lanes.lane(key, limit=16, rate_limit=rate_limit, ordered=ordered)
    for number in range(items):
        assert lanes.offer(lane, f"{key}.{number}", NOW) is Offer.QUEUED
    return lane


def turns(lanes: Lanes[str], now: float = NOW) -> Iterator[str]:
    while taken := lanes.next(now):
        yield taken[1]


def finish(lanes: Lanes[str], lane: Lane[str], signal: Signal = Signal.UP, now: float = NOW) -> list[str] | None:
    return lanes.done(lane, signal, lane.window.generation, now, dead_delay_s)


def kill(lanes: Lanes[str], lane: Lane[str], now: float = NOW) -> list[str]:
    """Let an idle, ready lane die of five failures."""
    for number in range(5):
        assert lanes.offer(lane, f"victim {number}", now) is Offer.QUEUED
        assert lanes.next(now) == (lane, f"victim {number}")
        released = finish(lanes, lane, Signal.DOWN, now)
    assert released is not None
    return released


def test_lanes_with_a_backlog_take_turns_of_one() -> None:
    lanes = make()
    for key in (1, 2, 3):
        fill(lanes, key, 3)
    assert list(turns(lanes)) == ["1.0", "2.0", "3.0", "1.1", "2.1", "3.1", "1.2", "2.2", "3.2"]


def test_a_lane_is_first_in_first_out_what_was_held_included() -> None:
    lanes = make()
    lane = lanes.lane(1, limit=16)
    for number in range(4):
        lanes.offer(lane, f"{number}", NOW, retry=number % 2 == 1)
    assert list(turns(lanes)) == ["0", "1", "2", "3"]


def test_a_first_attempt_stands_behind_no_more_than_one_of_its_endpoints_retries() -> None:
    lanes = make()
    lane = lanes.lane(1, limit=16)
    for number in range(5):
        lanes.offer(lane, f"due {number}", NOW, due=True)
    assert lanes.next(NOW) == (lane, "due 0")
    for number in range(3):
        lanes.offer(lane, f"first {number}", NOW)
    finish(lanes, lane)
    taken = []
    while turn := lanes.next(NOW):
        taken.append(turn[1])
        finish(lanes, lane)
    assert taken == ["first 0", "due 1", "first 1", "due 2", "first 2", "due 3", "due 4"]
    lanes.check()


def test_a_first_attempt_goes_ahead_of_other_endpoints_retries() -> None:
    lanes = make()
    for key in (1, 2, 3):
        lanes.offer(lanes.lane(key, limit=16), f"due {key}", NOW, due=True)
    fill(lanes, 4, 1)
    assert list(turns(lanes)) == ["4.0", "due 1", "due 2", "due 3"]


def test_retries_are_not_starved_by_endpoints_that_are_always_fresh() -> None:
    lanes = make()
    lanes.offer(lanes.lane(0, limit=16), "due", NOW, due=True)
    served = []
    for number in range(20):
        lane = lanes.lane(1 + number % 2, limit=16)
        lanes.offer(lane, "fresh", NOW)
        taken, item = lanes.next(NOW) or pytest.fail("work is waiting")
        served.append(item)
        finish(lanes, taken)
    assert served.index("due") <= 3


def test_both_queues_of_a_lane_share_its_bounds_and_leave_together() -> None:
    lanes = make(lane_queued_max=4, retries_queued_max=3)
    lane = lanes.lane(1, limit=16)
    for item, due in (("a", False), ("b", True), ("c", False), ("d", True)):
        assert lanes.offer(lane, item, NOW, due=due) is Offer.QUEUED
    assert lanes.offer(lane, "e", NOW, due=True) is Offer.FULL
    assert (lane.queued, lanes.queued, lanes.retries_queued) == (4, 4, 2)
    other = lanes.lane(2, limit=16)
    assert lanes.offer(other, "f", NOW, retry=True) is Offer.QUEUED
    assert lanes.offer(other, "g", NOW, due=True) is Offer.FULL
    assert lanes.release(lane) == ["b", "d", "a", "c"]
    assert (lane.queued, lanes.queued, lanes.retries_queued) == (0, 1, 1)
    lanes.check()


def test_one_event_of_a_quiet_endpoint_goes_ahead_of_another_ones_backlog() -> None:
    lanes = make()
    fill(lanes, 1, 10)
    assert lanes.next(NOW) is not None
    fill(lanes, 2, 1)
    assert lanes.next(NOW) == (lanes.find(2), "2.0")


def test_endpoints_that_are_always_fresh_do_not_starve_one_with_a_backlog() -> None:
    lanes = make()
    backlog = fill(lanes, 0, 3)
    assert lanes.next(NOW) == (backlog, "0.0")
    served = []
    for number in range(20):
        lane = lanes.lane(1 + number % 2, limit=16)  # each idle again before its next event
        lanes.offer(lane, "fresh", NOW)
        taken, item = lanes.next(NOW) or pytest.fail("work is waiting")
        served.append(item)
        finish(lanes, taken)
    assert served.index("0.1") <= 2
    assert served.index("0.2") <= 5


def test_a_lane_has_at_most_its_window_in_flight() -> None:
    lanes = make()
    lane = fill(lanes, 1, 10)
    assert list(turns(lanes)) == ["1.0", "1.1", "1.2", "1.3"]
    finish(lanes, lane, Signal.HOLD)
    assert list(turns(lanes)) == ["1.4"]


def test_a_lane_whose_window_is_full_has_no_place_to_be_looked_at() -> None:
    lanes = make()
    lane = fill(lanes, 1, 5)
    for _ in range(4):
        assert lane.place is not Place.NOWHERE
        lanes.next(NOW)
    assert lane.place is Place.NOWHERE


def test_work_that_comes_to_a_full_window_does_not_make_its_lane_new() -> None:
    lanes = make()
    lane = fill(lanes, 1, 4)
    list(turns(lanes))
    lanes.offer(lane, "1.4", NOW)
    assert lane.place is Place.NOWHERE
    finish(lanes, lane)
    assert list(turns(lanes)) == ["1.4"]


def test_an_ordered_endpoint_gets_one_at_a_time() -> None:
    lanes = make()
    lane = fill(lanes, 1, 3, ordered=True)
    for item in ("1.0", "1.1", "1.2"):
        assert list(turns(lanes)) == [item]
        finish(lanes, lane)


def test_a_window_that_shrank_while_its_lane_waits_is_respected() -> None:
    lanes = make()
    lane = fill(lanes, 1, 10)
    for _ in range(3):
        lanes.next(NOW)
    lanes.update(lane, limit=2)
    assert lanes.next(NOW) is None
    finish(lanes, lane)
    assert lanes.next(NOW) is None
    finish(lanes, lane)
    assert lanes.next(NOW) == (lane, "1.3")
    lanes.check()


def test_in_flight_is_bounded_over_all_lanes() -> None:
    lanes = make(in_flight_max=3)
    fill(lanes, 1, 2)
    lane = fill(lanes, 2, 2)
    assert list(turns(lanes)) == ["1.0", "2.0", "1.1"]
    finish(lanes, lane)
    assert list(turns(lanes)) == ["2.1"]


def test_a_full_lane_refuses_and_the_others_do_not() -> None:
    lanes = make(lane_queued_max=2)
    lane = fill(lanes, 1, 2)
    assert lanes.offer(lane, "more", NOW) is Offer.FULL
    assert not lanes.full
    fill(lanes, 2, 2)


def test_full_lanes_refuse_everybody_until_something_leaves() -> None:
    lanes = make(queued_max=2)
    fill(lanes, 1, 1)
    fill(lanes, 2, 1)
    lane = lanes.lane(3, limit=16)
    assert (lanes.full, lanes.offer(lane, "more", NOW)) == (True, Offer.FULL)
    lanes.next(NOW)
    assert (lanes.full, lanes.offer(lane, "more", NOW)) == (False, Offer.QUEUED)


def test_no_queue_is_longer_than_what_it_leaves_for_all_others() -> None:
    lanes = make(queued_max=12)
    lengths = []
    for key in range(4):
        lane = lanes.lane(key, limit=16)
        while lanes.offer(lane, "item", NOW) is Offer.QUEUED:
            pass
        assert len(lane.todo) >= lanes.room_for_lane
        lengths.append(len(lane.todo))
    assert lengths == [6, 3, 2, 1]
    assert lanes.full


def test_the_room_for_a_lane_is_bounded_by_its_own_limit_too() -> None:
    lanes = make(queued_max=100, lane_queued_max=7)
    assert lanes.room_for_lane == 7


def test_a_storm_of_retries_leaves_room_for_first_attempts() -> None:
    lanes = make(retries_queued_max=2)
    storm, calm = lanes.lane(1, limit=16), lanes.lane(2, limit=16)
    assert lanes.offer(storm, "a", NOW, retry=True) is Offer.QUEUED
    assert lanes.offer(calm, "b", NOW, retry=True) is Offer.QUEUED
    assert lanes.offer(storm, "c", NOW, retry=True) is Offer.FULL
    assert lanes.offer(storm, "d", NOW) is Offer.QUEUED
    assert lanes.offer(calm, "e", NOW) is Offer.QUEUED
    lanes.next(NOW)
    assert lanes.offer(storm, "f", NOW, retry=True) is Offer.QUEUED
    assert lanes.release(storm) == ["d", "f"]
    assert lanes.retries_queued == 1
    lanes.check()


def test_death_returns_the_queue_in_order_and_closes_the_lane() -> None:
    lanes = make()
    lane = fill(lanes, 1, 8)
    lanes.offer(lane, "retry", NOW, retry=True)
    released = None
    for _ in range(5):
        assert released is None
        lanes.next(NOW)
        released = finish(lanes, lane, Signal.DOWN)
    assert released == ["1.5", "1.6", "1.7", "retry"]
    assert (lanes.queued, lanes.retries_queued) == (0, 0)
    assert lanes.healths == {Health.READY: 0, Health.DEAD: 1, Health.PROBING: 0}
    assert lanes.offer(lane, "later", NOW + 29.9) is Offer.DEAD
    assert lanes.queued == 0
    lanes.check()


def test_a_dead_lane_whose_time_is_over_is_probed_with_one_and_then_ready() -> None:
    lanes = make()
    lane = lanes.lane(1, limit=16)
    kill(lanes, lane)
    later = NOW + 30.0
    for item in ("probe", "second", "third"):
        assert lanes.offer(lane, item, later) is Offer.QUEUED
    assert lanes.healths[Health.PROBING] == 1
    assert list(turns(lanes, later)) == ["probe"]
    assert finish(lanes, lane, Signal.UP, later) is None
    assert lanes.healths[Health.READY] == 1
    assert list(turns(lanes, later)) == ["second", "third"]


def test_a_failed_probe_returns_what_waited_behind_it() -> None:
    lanes = make()
    lane = lanes.lane(1, limit=16)
    kill(lanes, lane)
    later = NOW + 30.0
    lanes.offer(lane, "probe", later)
    lanes.offer(lane, "second", later)
    lanes.next(later)
    assert finish(lanes, lane, Signal.DOWN, later) == ["second"]
    assert lane.window.dead_until == later + 60.0


def test_a_probe_that_was_released_by_us_frees_its_slot() -> None:
    lanes = make()
    lane = lanes.lane(1, limit=16)
    kill(lanes, lane)
    lanes.offer(lane, "probe", NOW + 30.0)
    lanes.offer(lane, "second", NOW + 30.0)
    lanes.next(NOW + 30.0)
    finish(lanes, lane, Signal.IGNORE, NOW + 30.0)
    assert list(turns(lanes, NOW + 30.0)) == ["second"]


def test_a_probe_waits_for_requests_of_an_older_generation() -> None:
    lanes = make()
    lane = fill(lanes, 1, 1)
    lanes.next(NOW)
    straggler = lane.window.generation
    kill(lanes, lane)
    lanes.offer(lane, "probe", NOW + 30.0)
    assert lanes.next(NOW + 30.0) is None
    assert lanes.done(lane, Signal.DOWN, straggler, NOW + 30.0, dead_delay_s) is None
    assert lanes.next(NOW + 30.0) == (lane, "probe")


def test_a_revived_lane_is_probed_before_its_time() -> None:
    lanes = make()
    lane = lanes.lane(1, limit=16)
    kill(lanes, lane)
    lanes.revive(lane)
    assert lanes.offer(lane, "probe", NOW) is Offer.QUEUED
    assert lanes.healths[Health.PROBING] == 1
    lanes.revive(lane)
    lanes.check()


def test_a_paused_lane_starts_nothing_and_keeps_its_queue() -> None:
    lanes = make()
    lane = fill(lanes, 1, 2)
    lanes.pause(lane)
    assert lanes.offer(lane, "more", NOW) is Offer.HELD
    assert lanes.next(NOW) is None
    assert lanes.queued == 2
    lanes.resume(lane)
    assert list(turns(lanes)) == ["1.0", "1.1"]


def test_a_result_does_not_open_a_paused_lane() -> None:
    lanes = make()
    lane = fill(lanes, 1, 6)
    list(turns(lanes))
    lanes.pause(lane)
    finish(lanes, lane)
    assert lanes.next(NOW) is None
    lanes.resume(lane)
    assert list(turns(lanes)) == ["1.4"]


def test_release_empties_a_lane_in_order() -> None:
    lanes = make()
    lane = fill(lanes, 1, 6)
    list(turns(lanes))
    assert lanes.release(lane) == ["1.4", "1.5"]
    assert lanes.release(lane) == []
    assert (lanes.queued, lanes.in_flight) == (0, 4)
    lanes.check()


def test_a_released_lane_has_not_earned_another_turn_as_a_new_one() -> None:
    lanes = make()
    backlog = fill(lanes, 1, 3)
    lanes.next(NOW)
    lane = fill(lanes, 2, 2, ordered=True)
    assert lanes.next(NOW) == (lane, "2.0")
    lanes.release(lane)
    finish(lanes, lane)
    lanes.offer(lane, "2.2", NOW)
    assert lanes.next(NOW) == (backlog, "1.1")


def starts(lanes: Lanes[str], lane: Lane[str], moments: list[float]) -> list[float]:
    """When requests start if the loop turns at `moments`; each is answered at once."""
    started = []
    for now in moments:
        while lanes.next(now):
            started.append(now)
            finish(lanes, lane, Signal.UP, now)
        lanes.check()
    return started


@given(
    st.floats(0.2, 60.0),
    st.lists(st.floats(0, 0.3) | st.sampled_from([0.0, 0.001, 0.01, 1.0]), min_size=20, max_size=200),
)
def test_no_second_sees_more_starts_than_the_rate(rate: float, gaps: list[float]) -> None:
    lanes = make()
    lane = fill(lanes, 1, 1000, rate_limit=rate)
    now, moments = NOW, []
    for gap in gaps:
        now += gap
        moments.append(now)
    started = starts(lanes, lane, moments)
    for first, start in enumerate(started):
        within = [other for other in started[first:] if other < start + 1.0 - 1e-9]
        assert len(within) <= math.ceil(rate)


@pytest.mark.parametrize("rate", [1, 7, 100, 1000])
def test_a_loop_that_wakes_late_still_yields_99_percent_of_the_rate(rate: int) -> None:
    lanes = make(queued_max=30_000, lane_queued_max=30_000)
    lane = fill(lanes, 1, 11 * rate, rate_limit=rate)
    started: list[float] = []
    now = NOW
    while (wake := starts_at(lanes, lane, now, started)) is not None and wake < NOW + 10.0:
        now = max(wake, now) + 0.005
    assert 0.99 * 10 * rate - 1 <= len(started) <= 10 * rate + 1


def starts_at(lanes: Lanes[str], lane: Lane[str], now: float, started: list[float]) -> float | None:
    started += [now for _ in turns(lanes, now) if finish(lanes, lane, Signal.UP, now) is None]
    return lanes.next_wake()


def test_the_first_start_of_a_limited_lane_does_not_wait() -> None:
    lanes = make()
    lane = fill(lanes, 1, 2, rate_limit=0.1)
    assert lanes.next_wake() is None
    assert lanes.next(NOW) == (lane, "1.0")
    assert lanes.next(NOW) is None
    wake = lanes.next_wake()
    assert wake is not None
    assert wake == pytest.approx(NOW - LATE_S + 10 * (1 + LATE_S))
    assert lanes.next(wake - 0.001) is None
    assert lanes.next(wake) == (lane, "1.1")


def test_next_wake_is_the_earliest_of_all_limited_lanes() -> None:
    lanes = make()
    for key, rate in [(1, 0.5), (2, 2.0), (3, 1.0)]:
        fill(lanes, key, 2, rate_limit=rate)
    assert list(turns(lanes)) == ["1.0", "2.0", "3.0"]
    wake = lanes.next_wake()
    assert wake is not None
    assert list(turns(lanes, wake)) == ["2.1"]


def test_a_limited_lane_does_not_hold_up_an_unlimited_one() -> None:
    lanes = make()
    fill(lanes, 1, 3, rate_limit=1.0)
    fill(lanes, 2, 3)
    assert list(turns(lanes)) == ["1.0", "2.0", "2.1", "2.2"]


@pytest.mark.parametrize("rate", [None, 100.0])
def test_a_raised_rate_shortens_a_wait_that_has_begun(rate: float | None) -> None:
    lanes = make()
    lane = fill(lanes, 1, 2, rate_limit=0.001)
    assert list(turns(lanes)) == ["1.0"]
    lanes.update(lane, limit=16, rate_limit=rate)
    lanes.check()
    assert lanes.next(NOW + 0.02) == (lane, "1.1")
    assert lanes.next_wake() is None


def test_a_lowered_rate_lengthens_a_wait_that_has_begun() -> None:
    lanes = make()
    lane = fill(lanes, 1, 4, rate_limit=1.0)
    list(turns(lanes))
    lanes.update(lane, limit=16, rate_limit=0.1)
    assert lanes.next(NOW + 9.0) is None
    assert lanes.next(NOW + 10.2) == (lane, "1.1")
    lanes.check()


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_is_none_is_our_mistake(rate: float) -> None:
    with pytest.raises(AssertionError):
        make().lane(1, limit=4, rate_limit=rate)


def test_the_drain_estimate_is_queue_times_latency_over_window() -> None:
    lanes = make()
    lane = fill(lanes, 1, 40)
    assert lane.drain_estimate_s() == pytest.approx(40 * 1.0 / 4), "nobody has measured it: slow"
    lane.observe(0.2)
    assert lane.drain_estimate_s() == pytest.approx(40 * 0.2 / 4)
    lane.observe(1.0)
    assert lane.latency_s == pytest.approx(0.3)


def test_the_drain_estimate_of_a_limited_lane_is_at_least_its_spacing() -> None:
    lane = fill(make(), 1, 10, rate_limit=2.0)
    lane.observe(0.001)
    assert lane.drain_estimate_s() == pytest.approx(10 * 0.5 * (1 + LATE_S))


def test_the_drain_estimate_of_a_dead_lane_is_a_number() -> None:
    lanes = make()
    lane = lanes.lane(1, limit=16)
    kill(lanes, lane)
    assert lane.drain_estimate_s() == 0.0


def test_a_lane_is_made_once() -> None:
    lanes = make()
    lane = lanes.lane(1, limit=16)
    assert lanes.lane(1, limit=3) is lane
    assert lanes.find(1) is lane
    assert lanes.find(2) is None
    assert (len(lanes), lane.window.limit) == (1, 16)


def test_an_idle_lane_is_forgotten_when_a_sweep_meets_it_a_second_time() -> None:
    lanes = make()
    lane = fill(lanes, 1, 1)
    lanes.next(NOW)
    finish(lanes, lane)
    assert lanes.next(NOW) is None
    assert lanes.sweep(NOW) == []
    assert lanes.sweep(NOW) == [1]
    assert (len(lanes), lanes.healths[Health.READY]) == (0, 0)
    lanes.check()


def test_a_lane_that_worked_between_two_sweeps_is_kept() -> None:
    lanes = make()
    lane = lanes.lane(1, limit=16)
    for _ in range(3):
        assert lanes.sweep(NOW) == []
        lanes.offer(lane, "again", NOW)
        lanes.next(NOW)
        finish(lanes, lane)
        lanes.next(NOW)


def test_lanes_that_know_or_owe_something_are_not_forgotten() -> None:
    lanes = make()
    dead, paused, busy, limited, queued = (lanes.lane(key, limit=16) for key in range(5))
    kill(lanes, dead)
    lanes.pause(paused)
    lanes.update(limited, limit=16, rate_limit=0.01)
    for lane in (busy, limited):
        lanes.offer(lane, "item", NOW)
        assert lanes.next(NOW) == (lane, "item")
    finish(lanes, limited)
    assert lanes.next(NOW) is None
    lanes.offer(queued, "item", NOW)
    for _ in range(3):
        assert lanes.sweep(NOW) == []
    assert len(lanes) == 5
    assert lanes.sweep(NOW + 101.0) == []
    assert lanes.sweep(NOW + 101.0) == [limited.key], "the spacing of its rate is over"


def test_a_sweep_looks_at_no_more_than_it_may_and_reaches_all_in_the_end() -> None:
    lanes = make()
    for key in range(10):
        lanes.lane(key, limit=16)
    forgotten = [lanes.sweep(NOW, 4) for _ in range(5)]
    assert [len(keys) for keys in forgotten] == [0, 0, 2, 4, 4]
    assert sorted(key for keys in forgotten for key in keys) == list(range(10))


def test_a_forgotten_lane_takes_its_results_and_nothing_else() -> None:
    lanes = make()
    lane = fill(lanes, 1, 6)
    list(turns(lanes))
    assert lanes.forget(lane) == ["1.4", "1.5"]
    assert (len(lanes), lanes.queued, lanes.in_flight) == (0, 0, 4)
    again = fill(lanes, 1, 1)
    assert again is not lane
    for _ in range(4):
        finish(lanes, lane, Signal.DOWN)
        lanes.check()
    assert list(turns(lanes)) == ["1.0"]
    assert lanes.in_flight == 1
    with pytest.raises(AssertionError, match="ask for the lane anew"):
        lanes.offer(lane, "lost", NOW)
    with pytest.raises(AssertionError, match="forgotten before"):
        lanes.forget(lane)
    assert lanes.sweep(NOW) == []


def test_a_lane_forgotten_while_it_waits_for_its_rate_does_not_come_back() -> None:
    lanes = make()
    lane = fill(lanes, 1, 2, rate_limit=1.0)
    list(turns(lanes))
    lanes.forget(lane)
    assert lanes.next_wake() is None
    assert lanes.next(NOW + 5.0) is None
    with pytest.raises(AssertionError, match="ask for the lane anew"):
        lanes.offer(lane, "lost", NOW + 5.0)


def test_the_death_of_a_forgotten_lane_is_not_counted() -> None:
    lanes = make()
    lane = fill(lanes, 1, 8)
    for _ in turns(lanes):
        finish(lanes, lane)
    list(turns(lanes))
    fill(lanes, 1, 5)
    assert len(list(turns(lanes))) == 5
    lanes.forget(lane)
    for _ in range(5):
        finish(lanes, lane, Signal.DOWN)
    assert lane.window.health is Health.DEAD
    assert lanes.healths == dict.fromkeys(Health, 0)


def test_lanes_say_how_they_stand() -> None:
    lanes = make(queued_max=50, in_flight_max=9)
    lane = fill(lanes, 42, 20)
    for _ in range(3):
        lanes.next(NOW)
    assert repr(lane) == "<Lane 42 READY 3/4 busy, 17 queued, up in 4>"
    lanes.pause(lane)
    assert repr(lane) == "<Lane 42 READY 3/4 busy, 17 queued, up in 4, paused>"
    assert repr(lanes) == "<Lanes 1, 17/50 queued, 3/9 in flight>"


@pytest.mark.parametrize("harm", ["_new", "_old", "queued", "retries_queued", "in_flight", "busy"])
def test_the_check_notices_what_is_wrong(harm: str) -> None:
    lanes = make()
    lane = fill(lanes, 1, 3)
    lanes.next(NOW)
    lanes.check()
    if harm == "busy":
        lane.busy = 2
    elif harm.startswith("_"):
        getattr(lanes, harm).append(lane)
    else:
        setattr(lanes, harm, -1)
    with pytest.raises(AssertionError):
        lanes.check()


class AgainstQueues(RuleBasedStateMachine):
    """Every operation in any order; the model is one list per endpoint and the rules of `Lane` read literally."""

    keys = st.integers(0, 5)

    @initialize()
    def start(self) -> None:
        self.lanes = Lanes[int](queued_max=25, lane_queued_max=8, retries_queued_max=5, in_flight_max=9)
        self.now = NOW
        self.queues: dict[int, list[tuple[int, bool]]] = {}  # item, whether it counts as a retry
        self.dues: dict[int, list[int]] = {}
        self.due_next: dict[Lane[int], bool] = {}
        self.in_flight: list[tuple[Lane[int], int]] = []  # lane, generation
        self.offered = self.finished = self.released = 0
        # For each lane that may start: who had a turn while it could have had one.
        self.passed_by: dict[Lane[int], set[Lane[int]]] = {}

    def lane(self, key: int) -> Lane[int]:
        self.queues.setdefault(key, [])
        self.dues.setdefault(key, [])
        settings = [(4, None), (16, None), (16, None), (1, None), (16, 0.5), (16, 20.0)][key]
        return self.lanes.lane(key, limit=settings[0], rate_limit=settings[1], ordered=key == 3)

    def may_start(self, lane: Lane[int]) -> bool:
        room = self.length(lane.key) > 0 and lane.busy < lane.window.size and not lane.paused
        return room and (not lane.interval_s or lane.next_at <= self.now)

    def length(self, key: int) -> int:
        return len(self.queues[key]) + len(self.dues[key])

    def take_released(self, key: int, items: list[int]) -> None:
        assert items == self.dues[key] + [item for item, _ in self.queues[key]]
        self.released += len(items)
        self.queues[key], self.dues[key] = [], []

    def taken_by(self, lane: Lane[int]) -> int:
        """What the lane's turn brings: a retry after a first attempt and the other way round, if there are both."""
        queue, dues = self.queues[lane.key], self.dues[lane.key]
        if not dues:
            return queue.pop(0)[0]
        is_due = not queue or self.due_next.get(lane, False)
        self.due_next[lane] = not is_due
        return dues.pop(0) if is_due else queue.pop(0)[0]

    @rule(key=keys, retry=st.booleans(), due=st.booleans(), times=st.integers(1, 4))
    def offer(self, key: int, retry: bool, due: bool, times: int) -> None:
        for _ in range(times):
            lane, queue = self.lane(key), self.queues[key]
            retries = sum(is_retry for entries in self.queues.values() for _, is_retry in entries)
            retries += sum(map(len, self.dues.values()))
            left = 25 - sum(map(self.length, self.queues))
            is_full = self.length(key) >= min(8, left) or ((retry or due) and retries >= 5)
            is_dead = lane.window.health is Health.DEAD and self.now < lane.window.dead_until
            expected = Offer.HELD if lane.paused else Offer.DEAD if is_dead else Offer.FULL if is_full else Offer.QUEUED
            assert self.lanes.offer(lane, self.offered, self.now, retry, due) is expected
            if expected is Offer.QUEUED:
                if due:
                    self.dues[key].append(self.offered)
                else:
                    queue.append((self.offered, retry))
                self.offered += 1

    @rule(times=st.integers(1, 6))
    def next(self, times: int) -> None:
        for _ in range(times):
            ready = {lane for key in self.queues if (lane := self.lanes.find(key)) and self.may_start(lane)}
            taken = self.lanes.next(self.now)
            if taken is None:
                assert not ready or len(self.in_flight) >= 9
                return
            lane, item = taken
            assert lane in ready
            assert item == self.taken_by(lane)
            self.in_flight.append((lane, lane.window.generation))
            self.note_turn(lane)
            self.note_waiting()

    def note_turn(self, lane: Lane[int]) -> None:
        self.passed_by.pop(lane, None)
        for waiting, served in self.passed_by.items():
            assert lane not in served, f"{lane} had two turns while {waiting} waited"
            served.add(lane)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), signal=st.sampled_from(SIGNALS), times=st.integers(1, 6))
    def done(self, data: st.DataObject, signal: Signal, times: int) -> None:
        for _ in range(min(times, len(self.in_flight))):
            lane, generation = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
            was = lane.window.health
            known = self.lanes.find(lane.key) is lane
            items = self.lanes.done(lane, signal, generation, self.now, lambda deaths: 2.0 * deaths)
            self.finished += 1
            died = was is not Health.DEAD and lane.window.health is Health.DEAD
            assert (items is not None) == died
            if items is not None and known:
                self.take_released(lane.key, items)

    @rule(key=keys)
    def pause(self, key: int) -> None:
        self.lanes.pause(self.lane(key))

    @rule(key=keys)
    def resume(self, key: int) -> None:
        self.lanes.resume(self.lane(key))

    @rule(key=keys)
    def revive(self, key: int) -> None:
        self.lanes.revive(self.lane(key))

    @rule(key=keys)
    def release(self, key: int) -> None:
        self.take_released(key, self.lanes.release(self.lane(key)))

    @rule(key=keys)
    def forget(self, key: int) -> None:
        self.take_released(key, self.lanes.forget(self.lane(key)))

    @rule(key=keys, limit=st.integers(1, 9), rate=st.sampled_from([None, None, 0.3, 5.0]), ordered=st.booleans())
    def update(self, key: int, limit: int, rate: float | None, ordered: bool) -> None:
        self.lanes.update(self.lane(key), limit=limit, rate_limit=rate, ordered=ordered)

    @rule(lanes_max=st.integers(1, 7))
    def sweep(self, lanes_max: int) -> None:
        for key in self.lanes.sweep(self.now, lanes_max):
            assert self.length(key) == 0

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.3, 2.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sleep_until_the_next_wake(self) -> None:
        self.next(10)
        wake = self.lanes.next_wake()
        if wake is not None:
            self.now = max(self.now, wake)

    def note_waiting(self) -> None:
        waiting = [lane for key in self.queues if (lane := self.lanes.find(key)) and self.may_start(lane)]
        self.passed_by = {lane: self.passed_by.get(lane, set()) for lane in waiting}

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "lanes"):
            return
        self.lanes.check()
        self.note_waiting()
        assert self.lanes.in_flight == len(self.in_flight)
        assert self.lanes.queued == sum(map(self.length, self.queues))
        assert self.offered == self.lanes.queued + self.lanes.in_flight + self.finished + self.released
        for key in self.queues:
            lane = self.lanes.find(key)
            assert (lane.queued if lane else 0) == self.length(key)
            assert lane is None or lane.busy == sum(flight[0] is lane for flight in self.in_flight)


TestAgainstQueues = AgainstQueues.TestCase
TestAgainstQueues.settings = settings(max_examples=200, stateful_step_count=80, deadline=None)
