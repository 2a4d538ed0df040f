"""Shards: the hash spreads, and daemons that all follow the rule end up with fair shares and then rest."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core.shards import SHARDS_MAX, Moves, moves, shard_numbers, shard_of, target
from dispatcher.model import Holdings


@given(st.integers(0, 2**31 - 1), st.integers(1, SHARDS_MAX))
def test_every_webhook_has_a_shard_that_exists(endpoint_id: int, count: int) -> None:
    assert shard_of(endpoint_id, count) in shard_numbers(count)


def test_one_shard_is_number_0_and_several_have_none_of_that_number() -> None:
    assert list(shard_numbers(1)) == [0]
    assert list(shard_numbers(3)) == [1, 2, 3]


@given(st.integers(2, 16), st.integers(1, 8), st.integers(0, 1_000_000))
def test_webhooks_made_in_any_rhythm_are_spread(count: int, step: int, first: int) -> None:
    found = Counter(shard_of(first + step * n, count) for n in range(100 * count))
    assert min(found[shard] for shard in shard_numbers(count)) >= 60


class Fleet:
    """Daemons that follow the rule, one move at a time, in any order."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.members: set[int] = set()
        self.holders: dict[int, int | None] = {}

    def act(self, member: int) -> bool:
        """Let one look and move; False if it had nothing to do."""
        mine = {shard for shard, holder in self.holders.items() if holder == member}
        view = Holdings(self.count, self.members, dict(self.holders))
        move = moves(view, member, active=mine, waiting=set(), leaving=set())
        assert not move.lost
        for shard in move.release:
            assert self.holders.pop(shard) == member
        for shard in move.take:
            assert shard not in self.holders, "two daemons with one shard"
            self.holders[shard] = member
        return move != Moves()

    def settle(self, dice: random.Random) -> None:
        for _ in range(4 * self.count + 4):
            order = sorted(self.members)
            dice.shuffle(order)
            moved = [self.act(member) for member in order]
            if not any(moved):
                return
        raise AssertionError(f"still moving: {self.holders}")


@given(st.integers(1, 20), st.lists(st.sampled_from(["join", "leave"]), max_size=15), st.randoms(use_true_random=False))
def test_shares_become_fair_after_any_coming_and_going_and_then_nothing_moves(
    count: int, changes: list[str], dice: random.Random
) -> None:
    fleet = Fleet(count)
    fleet.members = {dice.randint(1, 1 << 30)}
    for change in ["join", *changes]:
        if change == "join":
            fleet.members.add(dice.randint(1, 1 << 30))
        elif len(fleet.members) > 1:
            gone = dice.choice(sorted(fleet.members))
            fleet.members.discard(gone)
            fleet.holders = {shard: holder for shard, holder in fleet.holders.items() if holder != gone}
        fleet.settle(dice)
        shares = [list(fleet.holders.values()).count(member) for member in fleet.members]
        assert sum(shares) == count
        assert max(shares) - min(shares) <= 1


def test_a_newcomer_takes_over_no_more_than_its_share() -> None:
    fleet = Fleet(5)
    fleet.members = {7}
    fleet.act(7)
    fleet.members.add(3)
    before = dict(fleet.holders)
    fleet.settle(random.Random(1))
    assert sum(fleet.holders[shard] != before[shard] for shard in before) == 2


def test_the_remainder_stays_with_whom_has_it() -> None:
    held = Holdings(3, {1, 2}, {1: 2, 2: 2, 3: 1})
    assert (target(held, 1), target(held, 2)) == (1, 2)


def test_what_nobody_knows_the_holder_of_is_left_alone() -> None:
    assert moves(Holdings(1, {5}, {0: None}), 5, active=set(), waiting=set(), leaving=set()) == Moves()
    assert moves(Holdings(1, {5}, {0: None}), 5, active=set(), waiting={0}, leaving=set()) == Moves(lost={0})


def test_what_waits_is_given_up_before_what_runs_and_the_lowest_number_last() -> None:
    view = Holdings(4, {1, 2}, {1: 1, 2: 1, 3: 1})
    assert moves(view, 1, active={1, 2, 3}, waiting={4}, leaving=set()).release == {3, 4}


def test_what_is_being_given_up_is_not_taken_back() -> None:
    view = Holdings(2, {1}, {1: 1, 2: 1})
    assert moves(view, 1, active={1}, waiting=set(), leaving={2}) == Moves()


def test_who_is_no_member_gives_everything_up() -> None:
    assert moves(Holdings(2, {9}, {1: 1}), 1, active={1}, waiting=set(), leaving=set()).release == {1}
