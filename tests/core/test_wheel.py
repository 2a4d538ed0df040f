"""The wheel against a sorted list of what is due."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dispatcher.core.wheel import SLOTS, TICK_S, Wheel, due_tick, elapsed_tick

Key = tuple[int, int]


def test_what_is_due_leaves_in_due_order_and_first_come_within_a_tick() -> None:
    wheel = Wheel[str](0)
    for key, due in [("late", 9), ("a", 5), ("b", 5), ("early", 2), ("c", 5)]:
        assert wheel.insert(key, due)
    assert wheel.expire(1) == []
    assert wheel.expire(8) == ["early", "a", "b", "c"]
    assert wheel.expire(9) == ["late"]
    assert len(wheel) == 0


def test_nothing_leaves_before_its_tick() -> None:
    wheel = Wheel[str](10)
    wheel.insert("a", 12)
    assert wheel.expire(11) == []
    assert wheel.expire(12) == ["a"]


@pytest.mark.parametrize("due", [-5, 0, 10])
def test_what_is_already_due_leaves_at_the_next_tick(due: int) -> None:
    wheel = Wheel[str](10)
    wheel.insert("a", due)
    assert wheel.next_tick() == 11
    assert wheel.expire(10) == []
    assert wheel.expire(11) == ["a"]


def test_what_keeps_coming_back_due_cannot_keep_a_turn_busy() -> None:
    wheel = Wheel[str](0)
    wheel.insert("again", 1)
    for now in range(1, 5):
        assert wheel.expire(now) == ["again"]
        wheel.insert("again", now)
        assert wheel.expire(now) == []


def test_beyond_the_horizon_the_wheel_refuses() -> None:
    wheel = Wheel[str](100)
    assert wheel.horizon == 100 + SLOTS - 1
    assert not wheel.insert("far", wheel.horizon + 1)
    assert "far" not in wheel
    assert wheel.insert("near", wheel.horizon)
    assert wheel.expire(wheel.horizon) == ["near"]


def test_a_key_moved_beyond_the_horizon_does_not_fire_at_its_old_moment() -> None:
    wheel = Wheel[str](0)
    wheel.insert("a", 5)
    assert not wheel.insert("a", SLOTS + 5)
    assert "a" not in wheel
    assert wheel.expire(5) == []


def test_the_horizon_moves_with_the_clock() -> None:
    wheel = Wheel[str](0)
    assert not wheel.insert("a", SLOTS)
    wheel.expire(1)
    assert wheel.insert("a", SLOTS)


def test_a_key_is_in_once_and_leaves_at_its_last_moment() -> None:
    wheel = Wheel[str](0)
    wheel.insert("a", 3)
    wheel.insert("a", 7)
    assert len(wheel) == 1
    assert wheel.expire(6) == []
    assert wheel.expire(7) == ["a"]


def test_cancelling_says_whether_there_was_anything_to_cancel() -> None:
    wheel = Wheel[str](0)
    wheel.insert("a", 3)
    assert wheel.cancel("a")
    assert not wheel.cancel("a")
    assert wheel.next_tick() is None
    assert wheel.expire(10) == []


def test_a_limit_stops_within_a_slot_and_goes_on_there() -> None:
    wheel = Wheel[int](0)
    for key in range(10):
        wheel.insert(key, 1)
    wheel.insert(10, 2)
    assert wheel.expire(5, 4) == [0, 1, 2, 3]
    assert wheel.next_tick() == 1
    assert wheel.expire(5, 4) == [4, 5, 6, 7]
    assert wheel.expire(5, 4) == [8, 9, 10]
    assert wheel.elapsed == 5


def test_a_limit_holds_over_several_slots() -> None:
    wheel = Wheel[int](0)
    for key, due in enumerate([1, 2, 2, 3]):
        wheel.insert(key, due)
    assert wheel.expire(5, 2) == [0, 1]
    assert wheel.expire(5, 2) == [2, 3]


def test_what_is_cancelled_while_its_slot_is_handed_out_does_not_leave() -> None:
    wheel = Wheel[int](0)
    for key in range(5):
        wheel.insert(key, 1)
    assert wheel.expire(1, 2) == [0, 1]
    assert wheel.cancel(3)
    assert 3 not in wheel
    assert wheel.expire(1, 9) == [2, 4]


def test_what_is_moved_while_its_slot_is_handed_out_leaves_at_its_new_moment_only() -> None:
    wheel = Wheel[int](0)
    for key in range(5):
        wheel.insert(key, 1)
    assert wheel.expire(1, 1) == [0]
    assert wheel.insert(2, 6)
    assert wheel.expire(5) == [1, 3, 4]
    assert wheel.expire(6) == [2]


def test_a_slot_whose_rest_is_cancelled_leaves_nothing_to_wait_for() -> None:
    wheel = Wheel[int](0)
    for key in range(3):
        wheel.insert(key, 1)
    wheel.expire(1, 1)
    wheel.cancel(1)
    wheel.cancel(2)
    assert wheel.next_tick() is None
    assert wheel.expire(2, 1) == []
    assert wheel.elapsed == 2


def test_a_clock_that_stands_still_or_goes_back_moves_nothing() -> None:
    wheel = Wheel[str](10)
    wheel.insert("a", 12)
    assert wheel.expire(3) == []
    assert wheel.elapsed == 10


@pytest.mark.parametrize("slots", [0, 1, 3, 4095])
def test_a_ring_has_a_power_of_two_of_slots(slots: int) -> None:
    with pytest.raises(AssertionError):
        Wheel[str](0, slots)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_lets_nothing_out_is_our_mistake(limit: int) -> None:
    with pytest.raises(AssertionError):
        Wheel[str](0).expire(1, limit)


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_ticks_are_never_early_and_at_most_one_late(at: float, now: float) -> None:
    assert due_tick(at) * TICK_S >= at
    assert (due_tick(at) - 1) * TICK_S < at or due_tick(at) == at == 0
    if elapsed_tick(now) >= due_tick(at):
        assert now >= at
    if now >= at + TICK_S:
        assert elapsed_tick(now) >= due_tick(at)


def test_a_wheel_says_where_it_stands() -> None:
    wheel = Wheel[str](3)
    wheel.insert("a", 8)
    assert repr(wheel) == "<Wheel at 3, 1 waiting, next 8>"


class AgainstASortedList(RuleBasedStateMachine):
    """A small ring, so that the seam is crossed all the time; the oracle is a dictionary, sorted when asked."""

    slots = 8

    @initialize(now=st.integers(0, 100))
    def start(self, now: int) -> None:
        self.wheel = Wheel[Key](now, self.slots)
        self.now = now
        self.due: dict[Key, int] = {}  # re-inserted keys go to the end, as in a slot

    @rule(moments=st.lists(st.tuples(st.integers(0, 30), st.integers(-3, 12)), min_size=1, max_size=12))
    def insert(self, moments: list[tuple[int, int]]) -> None:
        for number, ahead in moments:
            key, elapsed = (number, 0), self.wheel.elapsed
            due = max(elapsed + ahead, elapsed + 1)
            self.due.pop(key, None)
            assert self.wheel.insert(key, elapsed + ahead) == (due - elapsed < self.slots)
            if due - elapsed < self.slots:
                self.due[key] = due

    @rule(numbers=st.lists(st.integers(0, 30), min_size=1, max_size=6))
    def cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            assert self.wheel.cancel((number, 0)) == (self.due.pop((number, 0), None) is not None)

    @rule(ticks=st.sampled_from([0, 1, 1, 2, 3, 7, 8, 9, 40]), limit=st.none() | st.integers(1, 6))
    def expire(self, ticks: int, limit: int | None) -> None:
        self.now += ticks
        ready = sorted((key for key in self.due if self.due[key] <= self.now), key=lambda key: self.due[key])
        expected = ready[:limit]
        assert self.wheel.expire(self.now, limit) == expected
        for key in expected:
            del self.due[key]

    @precondition(lambda self: self.due)
    @rule(limit=st.integers(1, 3))
    def hand_out_a_few_of_the_next_slot(self, limit: int) -> None:
        self.expire(max(0, min(self.due.values()) - self.now), limit)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "wheel"):
            assert len(self.wheel) == len(self.due)
            assert all(key in self.wheel for key in self.due)
            assert self.wheel.next_tick() == min(self.due.values(), default=None)
            assert self.wheel.elapsed <= self.now


TestAgainstASortedList = AgainstASortedList.TestCase
TestAgainstASortedList.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
