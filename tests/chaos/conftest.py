"""What the tests by force share, and what they report."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from siege import Siege
from subscribers import Subscribers

ROUND_S = 15.0  # of the time limit; a round takes one to two on a machine that has nothing else to do
SLACK_S = 180.0

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "rounds" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(SLACK_S + ROUND_S * config.getoption("--rounds")))


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--rounds"))


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
