"""The experiment's apparatus: PostgreSQL and the receiver, each a process of its own, for as many runs as are wanted.

PostgreSQL is a durable one (fsync on, default settings) on a real disk; the daemon is `dispatcher run`, as anybody
starts it. Every process this starts is ended by this, by its id, whatever happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from bench import machine
from bench.cell import Cell
from bench.ledger import Ledger
from bench.meter import micros_each
from bench.processes import Broken, Process
from bench.receiver import Behaviour
from bench.report import Watch
from dispatcher.embedded import DATABASE, EmbeddedPostgres
from dispatcher.store.schema import migrate


class Lab:
    """PostgreSQL and the receiver, for as many cells as are wanted."""

    receiver: Process
    receiver_address: str

    def __init__(
        self,
        *,
        directory: Path | None = None,
        dsn: str = "",
        postgres_bin: Path | None = None,
        seed: int = 1,
        tick_s: float = 0.2,
        quiet: bool = False,
    ) -> None:
        self.watch = Watch(quiet=quiet)
        self.seed = seed
        self.tick_s = tick_s
        self.versions: dict[str, Any] = {}
        self.ceiling: dict[str, float | None] = {}
        self.postgres_pid: int | None = None
        self.directory = directory or Path("/var/tmp" if Path("/var/tmp").is_dir() else tempfile.gettempdir())
        self._dsn = dsn
        self._postgres_bin = postgres_bin
        self._stack = contextlib.AsyncExitStack()
        self._numbers = itertools.count(1)
        self._closed = socket.socket()
        self.state = Path()

    async def __aenter__(self) -> Lab:
        try:
            return await self._open()
        except BaseException:
            await self._stack.aclose()
            raise

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _open(self) -> Lab:
        stack = self._stack
        if not self.directory.is_dir():
            raise Broken(f"{self.directory} is no directory")
        self.state = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-bench-", dir=self.directory))
        )
        memory = Path("/dev/shm")
        ledgers = tempfile.TemporaryDirectory(prefix="dispatcher-bench-", dir=memory if memory.is_dir() else None)
        self._ledgers = Path(stack.enter_context(ledgers))
        self._closed.bind(("127.0.0.1", 0))  # bound and never listening: connections are refused
        stack.callback(self._closed.close)
        await self._open_postgres()
        self.receiver = await Process.start("bench.receiver", "serve")
        stack.push_async_callback(self.receiver.end)
        self.receiver_address = f"127.0.0.1:{json.loads(await self.receiver.hear())['port']}"
        return self

    async def _open_postgres(self) -> None:
        if not self._dsn:
            directory = self.state / "postgres"
            server = await self._stack.enter_async_context(EmbeddedPostgres(directory, self._postgres_bin))
            self._dsn, self.postgres_pid = server.dsn, server.pid
        try:
            connection = await asyncpg.connect(self._dsn)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError) as error:
            raise Broken(f"PostgreSQL cannot be reached: {error or type(error).__name__}") from error
        try:
            self.versions["PostgreSQL"] = await connection.fetchval("SHOW server_version")
            names = ("fsync", "synchronous_commit", "shared_buffers", "max_connections", "wal_level")
            self.versions["PostgreSQL settings"] = {n: await connection.fetchval(f"SHOW {n}") for n in names}
            if self.postgres_pid is None:
                self.postgres_pid = _local_postmaster(connection.get_server_pid())
        finally:
            await connection.close()

    @property
    def refused_address(self) -> str:
        """Where every connection is refused."""
        return f"127.0.0.1:{self._closed.getsockname()[1]}"

    async def measure_ceiling(self, seconds: float) -> None:
        """What the receiver can take, into `ceiling`: requests per second, and its CPU for each."""
        await self.receiver.say(
            ledger=str(self._ledger_path()), events=1, fanout=1, behaviours=[], turns=1, secret="", data=None
        )
        await self.receiver.hear()
        before = machine.cpu_s(self.receiver.pid)
        driver = await Process.start("bench.receiver", "drive", self.receiver_address.partition(":")[2], str(seconds))
        try:
            rate = float(json.loads(await driver.hear())["rate"])
        finally:
            await driver.end()
        after = machine.cpu_s(self.receiver.pid)
        spent = None if before is None or after is None else after - before
        self.ceiling = {"requests/s": rate, "µs": micros_each(spent, int(rate * seconds * 1.2))}

    def _ledger_path(self) -> Path:
        return self._ledgers / f"{next(self._numbers)}"

    @contextlib.asynccontextmanager
    async def cell(
        self,
        name: str,
        *,
        events: int,
        endpoints: int,
        fanout: int = 1,
        behaviours: Sequence[Behaviour] = (),
        refused: Callable[[int], bool] = lambda _: False,
        config: Mapping[str, Mapping[str, object]] | None = None,
        webhook: Mapping[str, object] | None = None,
        turns: int = 0,
        tick_s: float | None = None,
    ) -> AsyncIterator[Cell]:
        """One run: database, ledger, webhooks and (not yet started) daemon.

        Endpoint number e belongs to group e // fanout and receives the events of that group. Those of which `refused`
        is true have a URL nobody listens at. `config` is the daemon's beyond what a loopback receiver needs; `webhook`
        are settings of all webhooks. With `turns` it is not the dispatcher that sends: what comes is not signed by our
        secret and does not say its type, and each event is for the webhook of its number modulo that. `tick_s` is how
        often CPU is read: that costs 2 ms, so seldom where milliseconds are measured.
        """
        assert endpoints % fanout == 0, "groups are whole"
        number = next(self._numbers)
        database = f"dispatcher_bench_{os.getpid()}_{number}"
        administrator = await asyncpg.connect(self._dsn)
        await administrator.execute(f"CREATE DATABASE {database}")
        dsn = _with_database(self._dsn, database)
        directory = self.state / f"cell-{number}"
        directory.mkdir()
        ledger = Ledger(self._ledger_path(), events, fanout)
        cell = Cell(
            self,
            name,
            dsn=dsn,
            ledger=ledger,
            directory=directory,
            config=config or {},
            turns=turns,
            tick_s=tick_s or self.tick_s,
        )
        try:
            await migrate(dsn)
            await cell.open(endpoints, behaviours, refused, webhook or {})
            yield cell
        finally:
            await cell.close()
            ledger.close()
            ledger.path.unlink()
            await administrator.execute(f"DROP DATABASE {database} WITH (FORCE)")
            await administrator.close()
            shutil.rmtree(directory, ignore_errors=True)

    def surroundings(self) -> dict[str, Any]:
        """What stands beside every figure."""
        return {
            "machine": dataclasses.asdict(machine.facts()),
            "versions": self.versions,
            "receiver ceiling": self.ceiling,
            "seed": self.seed,
        }


def _local_postmaster(backend: int) -> int | None:
    """The parent of a server process, if that process is on this machine."""
    with contextlib.suppress(OSError):
        if Path(f"/proc/{backend}/comm").read_text().strip() == "postgres":
            return machine.parent(backend)
    return None


def _with_database(dsn: str, database: str) -> str:
    parts = urlsplit(dsn)
    if parts.path in {"", "/", f"/{DATABASE}"} or parts.netloc or parts.path.count("/") == 1:
        # Not urlunsplit, which drops the empty authority of postgresql:///name?host=…
        query = f"?{parts.query}" if parts.query else ""
        return f"{parts.scheme}://{parts.netloc}/{database}{query}"
    raise Broken("--dsn must be a URL: postgresql://user@host/database")
