"""The window: how many at once, and whether at all."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core.window import DEATH_RUN_MIN, TRANSITIONS, Health, Signal, Turn, Window

SATURATED = 10**6


def dead_delay_s(deaths: int) -> float:
    return 30.0 * deaths


def learn(window: Window, *signals: Signal, busy: int = SATURATED, now: float = 0.0) -> list[Turn]:
    """Teach signals of the current generation, one after the other; return the turns they caused."""
    turns = (window.learn(signal, busy, window.generation, now, dead_delay_s) for signal in signals)
    return [turn for turn in turns if turn is not None]


def grown(size: int, limit: int = 50) -> Window:
    window = Window(limit)
    while window.size < size:
        learn(window, Signal.UP)
    return window


def dead(now: float = 0.0) -> Window:
    window = Window(16)
    assert learn(window, *[Signal.DOWN] * DEATH_RUN_MIN, now=now) == [(Health.READY, Health.DEAD)]
    return window


def probing() -> Window:
    window = dead()
    assert window.wake(30.0) == (Health.DEAD, Health.PROBING)
    return window


def revived() -> Window:
    window = probing()
    learn(window, Signal.UP)
    return window


@pytest.mark.parametrize(("limit", "size"), [(1, 1), (3, 3), (4, 4), (16, 4)])
def test_a_window_starts_at_four_or_at_its_limit(limit: int, size: int) -> None:
    assert Window(limit).size == size


def test_a_window_steps_up_after_as_many_successes_as_it_is_wide() -> None:
    window = Window(16)
    sizes = []
    for _ in range(4 + 5 + 6):
        learn(window, Signal.UP)
        sizes.append(window.size)
    assert sizes == [4] * 3 + [5] * 5 + [6] * 6 + [7]


def test_a_window_never_grows_above_its_limit() -> None:
    window = Window(6)
    learn(window, *[Signal.UP] * 100)
    assert window.size == 6


def test_a_window_grows_only_when_it_is_really_in_use() -> None:
    window = Window(16)
    learn(window, *[Signal.UP] * 100, busy=1)
    assert window.size == 5, "one request at a time may open what one and the initial window need, no more"
    learn(window, *[Signal.UP] * 5, busy=2)
    assert window.size == 6


def test_first_failure_of_a_cohort_closes_one_slot() -> None:
    window = grown(10)
    learn(window, Signal.DOWN)
    assert window.size == 9


def test_after_the_first_failure_a_slot_closes_once_per_cohort() -> None:
    window = grown(10)
    sizes = []
    for _ in range(1 + 9 + 8):
        learn(window, Signal.DOWN, Signal.HOLD)  # the hold keeps the endpoint alive
        sizes.append(window.size)
    assert sizes == [9] * 9 + [8] * 8 + [7]


def test_a_step_up_makes_the_next_failure_the_first_of_a_cohort() -> None:
    window = grown(10)
    learn(window, Signal.DOWN, *[Signal.UP] * 9)
    assert window.size == 10
    learn(window, Signal.DOWN)
    assert window.size == 9


def test_a_window_never_shrinks_below_one() -> None:
    window = Window(4)
    learn(window, *[Signal.DOWN, Signal.HOLD] * 50)
    assert (window.size, window.health) == (1, Health.READY)


class Exact:
    """The rule as Postfix states it, 1/N added and taken away, in exact fractions."""

    def __init__(self, limit: int) -> None:
        self.limit, self.initial = limit, min(4, limit)
        self.size = self.initial
        self.success = self.failure = Fraction(0)

    def up(self, busy: int) -> None:
        if self.size < self.limit and self.size < busy + self.initial:
            self.success += Fraction(1, self.size)
            if self.success >= 1:
                self.size, self.success, self.failure = self.size + 1, self.success - 1, Fraction(0)

    def down(self) -> None:
        self.failure -= Fraction(1, self.size)
        if self.failure < 0:
            self.size, self.success, self.failure = max(1, self.size - 1), Fraction(0), self.failure + 1


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.booleans() | st.just(True), st.integers(1, 20)), max_size=300),
)
def test_integer_counters_equal_the_rule_in_exact_fractions(limit: int, results: list[tuple[bool, int]]) -> None:
    window, exact = Window(limit), Exact(limit)
    for up, busy in results:
        if up:
            learn(window, Signal.UP, busy=busy)
            exact.up(busy)
        else:
            learn(window, Signal.DOWN, Signal.HOLD, busy=busy)
            exact.down()
        assert window.size == exact.size


def test_a_server_that_accepts_five_at_once_gets_about_five() -> None:
    """Postfix's published experiment: 1/N feedback against a server with a concurrency limit."""
    draw, window, accepted, refused, sizes = random.Random(1), Window(20), 0, 0, []
    busy = served = 0
    now, order, pending = 0.0, itertools.count(), list[tuple[float, int, Signal]]()
    while accepted + refused < 20_000:
        while busy < window.size:
            busy += 1
            good = served < 5
            served += good
            delay_s = 1 + draw.random() * 0.01 if good else 0.005
            heapq.heappush(pending, (now + delay_s, next(order), Signal.UP if good else Signal.DOWN))
        now, _, signal = heapq.heappop(pending)
        learn(window, signal, busy=busy)
        busy -= 1
        served -= signal is Signal.UP
        accepted += signal is Signal.UP
        refused += signal is Signal.DOWN
        sizes.append(window.size)
    assert refused / (accepted + refused) == pytest.approx(1 / 6, abs=0.005)
    assert sum(sizes) / len(sizes) == pytest.approx(5.2, abs=0.1)


@pytest.mark.parametrize(("size", "failures"), [(1, 5), (4, 5), (5, 5), (16, 16)])
def test_death_takes_a_whole_cohort_and_at_least_five_in_a_row(size: int, failures: int) -> None:
    window = grown(size) if size >= 4 else Window(size)
    assert learn(window, *[Signal.DOWN] * (failures - 1)) == []
    assert learn(window, Signal.DOWN) == [(Health.READY, Health.DEAD)]


@pytest.mark.parametrize("answer", [Signal.UP, Signal.HOLD])
def test_any_answer_ends_a_run_of_failures(answer: Signal) -> None:
    window = Window(16)
    assert learn(window, *([Signal.DOWN] * 4 + [answer]) * 10) == []


def test_what_is_not_the_endpoints_doing_does_not_end_a_run_of_failures() -> None:
    window = Window(16)
    learn(window, *[Signal.DOWN] * 4, *[Signal.IGNORE] * 10)
    assert learn(window, Signal.DOWN) == [(Health.READY, Health.DEAD)]


def test_an_endpoint_that_says_nothing_but_500_neither_dies_nor_changes_its_window() -> None:
    window = grown(7)
    assert learn(window, *[Signal.HOLD] * 1000) == []
    assert window.size == 7


def test_a_dead_endpoint_gets_nothing_until_its_time_is_over() -> None:
    window = dead(now=100.0)
    assert (window.size, window.dead_until) == (0, 130.0)
    assert window.wake(129.9) is None
    assert window.wake(130.0) == (Health.DEAD, Health.PROBING)
    assert window.size == 1


def test_waking_what_is_not_dead_changes_nothing() -> None:
    window = Window(16)
    assert window.wake(1e9) is None
    window = probing()
    assert window.wake(1e9) is None


@pytest.mark.parametrize("answer", [Signal.UP, Signal.HOLD])
def test_a_probe_that_is_answered_makes_the_endpoint_ready_at_the_initial_window(answer: Signal) -> None:
    window = probing()
    assert learn(window, answer, busy=1) == [(Health.PROBING, Health.READY)]
    assert (window.size, window.deaths) == (4, 0)


def test_each_failed_probe_asks_for_the_delay_of_one_more_death() -> None:
    window = dead()
    for deaths in (2, 3, 4):
        now = window.dead_until
        window.wake(now)
        assert learn(window, Signal.DOWN, busy=1, now=now) == [(Health.PROBING, Health.DEAD)]
        assert (window.deaths, window.dead_until) == (deaths, now + dead_delay_s(deaths))


def test_deaths_are_counted_anew_after_an_answer() -> None:
    window = probing()
    learn(window, Signal.UP)
    learn(window, *[Signal.DOWN] * 5)
    assert window.deaths == 1


def test_a_probe_that_was_not_the_endpoints_doing_decides_nothing() -> None:
    window = probing()
    assert learn(window, Signal.IGNORE) == []
    assert (window.health, window.size) == (Health.PROBING, 1)


@pytest.mark.interpreted
@pytest.mark.parametrize("signal", Signal)
@pytest.mark.parametrize("make", [dead, probing, revived])
def test_a_result_of_an_older_generation_teaches_nothing(make: Callable[[], Window], signal: Signal) -> None:
    window = make()
    before = [getattr(window, name) for name in Window.__slots__]
    for generation in range(window.generation):
        assert window.learn(signal, 1, generation, 0.0, dead_delay_s) is None
    assert [getattr(window, name) for name in Window.__slots__] == before


@pytest.mark.parametrize("old", Health)
@pytest.mark.parametrize("new", Health)
def test_health_changes_only_as_the_table_says(old: Health, new: Health) -> None:
    window = {Health.READY: lambda: Window(4), Health.DEAD: dead, Health.PROBING: probing}[old]()
    if new in TRANSITIONS[old]:
        generation = window.generation
        assert window._turn(new) == (old, new)
        assert window.generation == generation + 1
    else:
        with pytest.raises(AssertionError, match="cannot become"):
            window._turn(new)


def test_a_lower_limit_holds_at_once_and_a_higher_one_is_grown_into() -> None:
    window = grown(10)
    window.resize(3)
    assert (window.size, window.initial) == (3, 3)
    window.resize(20)
    assert (window.size, window.initial) == (3, 4)
    learn(window, *[Signal.UP] * 3)
    assert window.size == 4


def test_a_limit_changed_while_dead_opens_nothing() -> None:
    window = dead()
    window.resize(2)
    assert window.size == 0
    window.wake(30.0)
    assert window.size == 1
    learn(window, Signal.UP)
    assert window.size == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_a_window_without_room_is_our_mistake(limit: int) -> None:
    with pytest.raises(AssertionError):
        Window(limit)
    with pytest.raises(AssertionError):
        Window(1).resize(limit)


@given(
    st.integers(1, 20),
    st.lists(
        st.tuples(st.sampled_from(Signal), st.integers(1, 20), st.integers(0, 2))
        | st.just((Signal.DOWN, 1, 0))
        | st.integers(1, 20)
        | st.none(),
        max_size=200,
    ),
)
def test_size_and_health_agree_whatever_happens(limit: int, steps: list[tuple[Signal, int, int] | int | None]) -> None:
    window, now = Window(limit), 0.0
    for step in steps:
        old, now = window.health, now + 1.0
        if step is None:
            turn = window.wake(now)
        elif isinstance(step, int):
            window.resize(step)
            turn = None
        elif window.size or step[2]:  # a dead endpoint has only older results
            turn = window.learn(step[0], step[1], window.generation - step[2], now, lambda deaths: 3.0 * deaths)
        else:
            continue
        assert turn == (None if window.health is old else (old, window.health))
        least, most = {Health.READY: (1, window.limit), Health.DEAD: (0, 0), Health.PROBING: (1, 1)}[window.health]
        assert least <= window.size <= most
        assert window.size == 0 or 1 <= window.up <= window.size
        assert window.down >= 1


def test_a_window_says_what_it_is_and_what_comes_next() -> None:
    window = Window(16)
    learn(window, Signal.UP)
    assert repr(window) == "<Window READY 4 of 16, up in 3>"
    assert repr(Window(2)) == "<Window READY 2 of 2, at its limit>"
    assert repr(dead(now=1.5)) == "<Window DEAD 0 of 16, dead until 31.5>"
    assert repr(probing()) == "<Window PROBING 1 of 16, one probe>"
