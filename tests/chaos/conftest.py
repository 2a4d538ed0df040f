"""What the tests by force share, and what they report."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from siege import Siege
from subscribers import Subscribers

BLOCK = 6  # rounds a test: it has a time limit, and says where it is

_told: list[str] = []


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say something that is shown at the end of the run, whether the test passes or not."""

    def tell(words: str) -> None:
        _told.append(f"{request.node.name}: {words}")

    return tell


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _told:
        terminalreporter.section("by force")
        for line in _told:
            terminalreporter.line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rounds" in metafunc.fixturenames:
        many = metafunc.config.getoption("--rounds")
        blocks = [range(first, min(first + BLOCK, many)) for first in range(0, many, BLOCK)]
        metafunc.parametrize("rounds", blocks, ids=[f"{block.start}-{block.stop - 1}" for block in blocks])


@pytest.fixture
def dice(request: pytest.FixtureRequest, tell: Callable[[str], None]) -> random.Random:
    """The moments: `--moments` draws them again."""
    given = request.config.getoption("--moments")
    seed = random.SystemRandom().randrange(1 << 32) if given is None else given
    tell(f"--moments {seed}")
    return random.Random(seed)


@pytest.fixture
def subscribers() -> Iterator[Subscribers]:
    with Subscribers().open() as subscribers:
        yield subscribers


@pytest.fixture
def besiege(
    tmp_path: Path, subscribers: Subscribers, dice: random.Random, tell: Callable[[str], None]
) -> Iterator[Callable[[str], Siege]]:
    """Make a siege of the database given; its daemons are gone with the test."""
    made: list[Siege] = []

    def make(dsn: str) -> Siege:
        made.append(Siege(dsn, tmp_path, subscribers, dice, tell))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def siege(besiege: Callable[[str], Siege], database: str) -> Siege:
    """A siege of a database of the test run's PostgreSQL."""
    return besiege(database)
