"""Seeded worlds: nothing lost, whatever happens, and the same again for the same seed.

`pytest tests/simulation --seeds 20000` runs more of them, `--seed 17` one, with its history.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from world import World

HERE = Path(__file__).parent
HISTORY_LINES_MAX = 400  # of a failure, its end; `--seed` shows all of it
REGRESSIONS = [
    18,  # a dead network kept a daemon from stopping
    158,  # retention, cleaning up over a broken connection, swallowed the end of its session
    206,  # the head of an ordered webhook failed while a session began
    399,  # ordered: a lane gave back older events than those already parked
    501,  # ordered: younger events were held already when older ones were read again
    2144,  # a webhook was deleted while an event for it was on its way into a pending row
    4024,  # retention waited for ever on a dead network
    5222,  # the grace of a rotation ended with the answer that asked for the other secret
    6301,  # an event was parked while its webhook's other rows were being discarded
]


def play(seed: int, *, whole: bool = False) -> World:
    """Run a seed; a failure shows its history."""
    world = World(seed)
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


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_seed_that_once_found_something(seed: int) -> None:
    play(seed)


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
        "ambush", "api", "clock", "commit", "crash", "cut", "evict", "flush", "freeze", "heal", "kill", "mood", "repeat",
        "rollback", "stall", "stop", "take-over", "thaw", "trouble",
    }  # fmt: skip
    assert wanted <= kinds
