"""One throw-away PostgreSQL per test run, one migrated template in it, and from that a fresh database per test.

`DISPATCHER_TEST_BIN` names the PostgreSQL `bin` directory to run against; without it, the one the program would choose.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import hypothesis
import pytest
import structlog
import uvloop

import dispatcher
from dispatcher import logs
from dispatcher.build import IS_COMPILED
from dispatcher.embedded import DATABASE, EmbeddedPostgres

T = TypeVar("T")

# No deadline: how long an example takes says more about the machine than about the code. CI draws the same examples
# each time, so that it judges the change and not the draw; by hand they are new each time, and a failure prints how to
# draw them again. HYPOTHESIS_PROFILE=long is for a night, with --timeout=0 -o faulthandler_timeout=0.
for profile, examples in (("quick", 25), ("default", 100), ("ci", 200), ("long", 20_000)):
    hypothesis.settings.register_profile(
        profile, max_examples=examples, deadline=None, derandomize=profile == "ci", print_blob=True
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "default"))


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the asynchronous tests on the loop that production runs on."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_configure() -> None:
    """Let Ctrl-C reach the programs under test also where this run was put into the background, which ignores it.

    And let nobody test yesterday's program: a compiled module goes before the source it was made from.
    """
    for module in Path(dispatcher.__file__).parent.rglob("*.so"):
        source = module.with_name(module.name.partition(".")[0] + ".py")
        if source.stat().st_mtime > module.stat().st_mtime:
            pytest.exit(f"{module} is older than its source: delete every *.so here, or build anew", returncode=2)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs the source where the modules beside it are compiled."""
    if IS_COMPILED:
        for item in items:
            if item.get_closest_marker("interpreted"):
                item.add_marker(pytest.mark.skip(reason="these modules are compiled"))


def pytest_addoption(parser: pytest.Parser) -> None:
    simulation = parser.getgroup("simulation")
    simulation.addoption("--seeds", type=int, default=500, help="how many worlds to simulate (default: %(default)s)")
    simulation.addoption("--seed", type=int, help="one world to simulate, with its history")
    chaos = parser.getgroup("chaos")
    chaos.addoption("--rounds", type=int, default=6, help="how often to strike (default: %(default)s)")
    chaos.addoption("--moments", type=int, help="a seed: when to strike, as an earlier run printed it")


class Administrator:
    """A superuser's connection with a thread and a loop of its own, so that fixtures of any kind may wait for it."""

    def __init__(self, dsn: str) -> None:
        self._thread = ThreadPoolExecutor(1, "administrator")
        self._loop = asyncio.new_event_loop()
        self._dsn = dsn
        self._numbers = itertools.count(1)
        self._connection: asyncpg.Connection = self.run(asyncpg.connect(self.dsn_of("postgres")))

    def run(self, act: Coroutine[Any, Any, T]) -> T:
        return self._thread.submit(self._loop.run_until_complete, act).result()

    def dsn_of(self, database: str) -> str:
        return self._dsn.replace(f"/{DATABASE}?", f"/{database}?")

    def create(self, template: str) -> str:
        name = f"test_{next(self._numbers)}"
        # Copying files beats writing all of it into the WAL (14 ms against 31); before 15 it is the only way.
        strategy = "STRATEGY FILE_COPY" if self._connection.get_server_version().major >= 15 else ""
        self.run(self._connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} {strategy}"))
        return name

    def drop(self, database: str) -> None:
        self.run(self._connection.execute(f"DROP DATABASE {database} WITH (FORCE)"))

    def close(self) -> None:
        self.run(self._connection.close())
        self._loop.close()
        self._thread.shutdown()


@pytest.fixture
def log_stream() -> Iterator[io.StringIO]:
    """A stream for `start_logging`; what the run's own settings were comes back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    logs._State.outlet = logs._State.stream = logs._State.render = None


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL of this run's own, gone with it."""
    given = os.environ.get("DISPATCHER_TEST_BIN")
    with (
        tempfile.TemporaryDirectory(prefix="dispatcher-tests-", dir=_memory()) as directory,
        EmbeddedPostgres(Path(directory), Path(given) if given else None, ephemeral=True) as server,
    ):
        yield server


def _memory() -> Path | None:
    """A file system in memory, if there is a large one: a database per test is a few hundred files (14 ms, not 70)."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK | os.X_OK) and shutil.disk_usage(memory).free > 2 << 30
    return memory if roomy else None


@pytest.fixture(scope="session")
def administrator(postgres: EmbeddedPostgres) -> Iterator[Administrator]:
    administrator = Administrator(postgres.dsn)
    yield administrator
    administrator.close()


@pytest.fixture(scope="session")
def template(administrator: Administrator) -> str:
    """The name of a database with the whole schema and nothing in it; nobody may stay connected to it."""
    from dispatcher.store.schema import migrate

    name = administrator.create("template1")
    administrator.run(migrate(administrator.dsn_of(name)))
    return name


@pytest.fixture
def database(administrator: Administrator, template: str) -> Iterator[str]:
    """The DSN of a fresh database with the schema in it."""
    name = administrator.create(template)
    yield administrator.dsn_of(name)
    administrator.drop(name)


@pytest.fixture
def empty_database(administrator: Administrator) -> Iterator[str]:
    """The DSN of a fresh database without the schema."""
    name = administrator.create("template1")
    yield administrator.dsn_of(name)
    administrator.drop(name)
