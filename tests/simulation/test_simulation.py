"""Seeded worlds: nothing lost, whatever happens, and the same again for the same seed.

`pytest tests/simulation --seeds 20000` runs more of them, `--seed 17` one, with its history.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from world import Plan, World

HERE = Path(__file__).parent
HISTORY_LINES_MAX = 400  # of a failure, its end; `--seed` shows all of it


def play(seed: int, *, whole: bool = False, adjust: Callable[[Plan], None] = lambda plan: None) -> World:
    """Run a seed; a failure shows its history."""
    world = World(seed, adjust)
    try:
        world.run()
    except BaseException as error:
        lines = list(world.lines())
        shown = lines if whole else lines[-HISTORY_LINES_MAX:]
        history = "\n".join(shown)
        raise AssertionError(f"{history}\n\nseed {seed}: {error}\nagain, with all of it: --seed {seed}") from error
    return world


def test_seeds(seeds: range) -> None:
    for seed in seeds:
        play(seed)


def fleet(seed: int) -> Callable[[Plan], None]:
    """What makes a seed's world one of several daemons that share several shards."""
    dice = random.Random(f"{seed}/fleet")

    def adjust(plan: Plan) -> None:
        plan.kind, plan.shards, plan.daemons = "duel", dice.randint(2, 4), dice.randint(2, 4)
        plan.webhooks = max(plan.webhooks, 4)
        plan.faults = max(plan.faults, 4)

    return adjust


def test_fleets(seeds: range) -> None:
    for seed in seeds[::4]:
        play(seed, adjust=fleet(seed))


def test_one_seed_alone(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--seed")
    world = play(7 if seed is None else seed, whole=True)
    if seed is not None:
        print("\n".join(world.lines()))


def test_seed_repeats_itself_byte_for_byte() -> None:
    for seed in (1, 3, 5, 10, 13):
        first, second = play(seed), play(seed)
        assert list(first.lines()) == list(second.lines())
        assert first.digest() == second.digest()


def test_history_does_not_depend_on_the_hashing_of_strings() -> None:
    program = f"import sys; sys.path.insert(0, {str(HERE)!r}); from world import World\n"
    program += "for seed in (5, 13):\n    world = World(seed); world.run(); print(world.digest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": number},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in ("1", "2")
    }
    assert len(digests) == 1
    world = play(5)
    assert world.digest() in digests.pop()


def test_worlds_are_worth_living_in() -> None:
    """Between them, a few dozen seeds see every kind of trouble."""
    kinds = {kind for seed in range(60) for _, kind, _ in play(seed).history}
    wanted = {
        "ambush", "api", "clock", "commit", "crash", "cut", "evict", "flush", "freeze", "heal", "kill", "mood",
        "repeat", "rollback", "stall", "stop", "take-over", "thaw", "trouble",
    }  # fmt: skip
    assert wanted <= kinds
