"""The simulation finds what it is there to find: every bug planted by hand, within a bounded number of seeds."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Mutant
from world import World

SEEDS_MAX = 60

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_found(mutant: Mutant) -> None:
    with mutant.planted():
        for seed in range(SEEDS_MAX):
            world = World(seed, mutant.adjust)
            try:
                world.run()
            except AssertionError:
                break
        else:
            pytest.fail(f"{mutant.name}: not found within {SEEDS_MAX} seeds")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_nothing_is_found_in_the_same_worlds_without_it(mutant: Mutant) -> None:
    for seed in range(3):
        World(seed, mutant.adjust).run()
