"""The experiment's apparatus: PostgreSQL, the daemon, the receiver and the producer, each a process of its own.

A `Lab` lasts for the whole command and owns PostgreSQL and receiver. A `Cell` is one measured run: a fresh database,
a fresh ledger, webhooks, a daemon with a configuration file, and books that are closed at the end. PostgreSQL is a
durable one (fsync on, default settings) on a real disk; the daemon is `dispatcher run`, as anybody starts it.

Every process this starts is ended by this, by its id, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg

from bench import machine
from bench.histogram import Histogram
from bench.ledger import (
    GROUP_DIGITS,
    ID_DIGITS,
    ID_PREFIX,
    NEVER,
    OPEN,
    TYPE_PREFIX,
    Balance,
    Ledger,
    endpoint_path,
    event_id,
    event_type,
)
from bench.producer import DATA, Stream
from bench.receiver import Behaviour
from bench.report import Report, Value, Watch
from dispatcher.config import load
from dispatcher.daemon import open_vault
from dispatcher.embedded import DATABASE, EmbeddedPostgres
from dispatcher.model import BodyStyle
from dispatcher.store.endpoints import EndpointChange, EndpointStore
from dispatcher.store.schema import migrate

START_S: Final = 60.0
STOP_S: Final = 60.0
FILL_EVENTS: Final = 5_000  # per round trip, for the progress bar
SECRET: Final = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
DISPATCHER: Final = (sys.executable, "-c", "from dispatcher.cli.operator import main; main()")
STEADY: Final = (0.1, 0.9)  # of all deliveries: between these a drain is neither starting nor ending
STREAM_BYTES_MAX: Final = 1 << 24


UNACCOUNTED: Final = """
    SELECT count(*) FROM dispatcher.outbox o, dispatcher.shard s
    WHERE s.id = 0 AND o.id >= $1 AND o.id <= $2
      AND (pg_visible_in_snapshot(o.xid, s.prev)
           OR (s.cur IS NOT NULL AND pg_visible_in_snapshot(o.xid, s.cur) AND (o.xid, o.seq) <= (s.at_xid, s.at_seq)))
      AND NOT EXISTS (SELECT FROM dispatcher.attempt a WHERE a.event_seq = o.seq)
      AND NOT EXISTS (SELECT FROM dispatcher.pending p WHERE p.event_seq = o.seq)
"""


class Broken(Exception):
    """The apparatus did not do its part: there is no run to judge."""


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Process:
    """A child that is spoken to in lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, *arguments: str) -> Process:
        """Start a module of this package with the interpreter that runs this."""
        pipe = asyncio.subprocess.PIPE
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", *arguments, stdin=pipe, stdout=pipe, limit=STREAM_BYTES_MAX, cwd=machine.ROOT
            )
        )

    async def say(self, **order: object) -> None:
        """Send an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await self._process.stdin.drain()

    async def hear(self, timeout_s: float = START_S) -> str:
        """The next line it says. Raises Broken when there is none."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self._process.stdout.readline()
        if not line:
            raise Broken(f"process {self.pid} ended: {await self._process.wait()}")
        return line.decode().strip()

    async def end(self) -> None:
        """Close its input, which ends it; kill it when it does not care."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class Daemon:
    """`dispatcher run` with a configuration file."""

    def __init__(self, config: Path, listen: str, metrics: str, log: Path) -> None:
        self.config, self.listen, self.metrics, self.log = config, listen, metrics, log
        self._process: asyncio.subprocess.Process | None = None
        self._asked = False  # to end

    @property
    def pid(self) -> int | None:
        """Its process while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def check(self) -> None:
        """Raise Broken with the end of its log if it has ended by itself."""
        process = self._process
        if process is not None and process.returncode is not None and not self._asked:
            raise Broken(f"the daemon ended with {process.returncode}:\n{self.complaints}")

    @property
    def complaints(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:]

    async def start(self) -> None:
        """Start it; `ready` waits until it works."""
        self._asked = False
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DISPATCHER_")}
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *DISPATCHER,
                "run",
                "--config",
                str(self.config),
                stdout=log,
                stderr=log,
                env=environment,
                cwd=machine.ROOT,
            )

    async def ready(self) -> None:
        """Wait until it is active. Raises Broken with the end of its log."""
        deadline = time.monotonic() + START_S
        while (
            "200" not in (answer := await _get(self.metrics, "/readyz")).partition("\r\n")[0] or "active" not in answer
        ):
            self.check()
            if time.monotonic() > deadline:
                raise Broken(f"the daemon did not get ready:\n{self.complaints}")
            await asyncio.sleep(0.02)

    async def get(self, path: str) -> None:
        """Ask API or dashboard for what needs no key. Raises Broken when it is not given."""
        status = (await _get(self.listen, path)).partition("\r\n")[0]
        if " 200 " not in status:
            raise Broken(f"the daemon answered {path} with {status!r}")

    async def stop(self) -> int:
        """Drain and end; return its exit code."""
        if self.pid is None:
            return 0
        assert self._process is not None
        self._asked = True
        self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                return await self._process.wait()
        except TimeoutError:
            await self.kill()
            return -1

    async def kill(self) -> None:
        """`kill -9`."""
        self._asked = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def _get(address: str, path: str) -> str:
    host, _, port = address.partition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return ""
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        async with asyncio.timeout(5):
            return (await reader.read()).decode(errors="replace")
    except (OSError, TimeoutError):
        return ""
    finally:
        writer.close()


def free_address() -> str:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# ── what it costs ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """How everything stood at one moment; CPU in seconds since each process began."""

    at_ns: int
    requests: int
    distinct: int
    daemon_s: float | None
    postgres_s: float | None
    receiver_s: float | None
    rss_bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What lay between two samples."""

    seconds: float
    requests: int
    daemon_s: float | None
    postgres_s: float | None
    receiver_s: float | None

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0

    def per(self, count: int) -> dict[str, Value]:
        """CPU columns, µs for each of `count`."""
        return {
            "daemon µs": _each(self.daemon_s, count),
            "PostgreSQL µs": _each(self.postgres_s, count),
            "receiver µs": _each(self.receiver_s, count),
        }


def _each(seconds: float | None, count: int) -> float | None:
    return None if seconds is None or not count else seconds / count * 1e6


class Meter:
    """Takes samples in the background."""

    def __init__(self, cell: Cell, every_s: float) -> None:
        self._cell = cell
        self.every_s = every_s
        self.samples: list[Sample] = []
        self._task = asyncio.create_task(self._run(), name="meter")

    def take(self) -> Sample:
        """One now."""
        cell = self._cell
        pid = cell.daemon.pid
        self.samples.append(
            Sample(
                time.monotonic_ns(),
                cell.ledger.requests,
                cell.ledger.distinct,
                machine.cpu_s(pid),
                machine.tree_cpu_s(cell.lab.postgres_pid),
                machine.cpu_s(cell.lab.receiver.pid),
                machine.rss_bytes(pid),
            )
        )
        return self.samples[-1]

    async def _run(self) -> None:
        while True:
            self.take()
            await asyncio.sleep(self.every_s)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    @property
    def rss_max_mb(self) -> float | None:
        """The daemon's highest resident memory."""
        known = [sample.rss_bytes for sample in self.samples if sample.rss_bytes]
        return max(known) / 1e6 if known else None

    def rss_series(self) -> list[tuple[float, float]]:
        """(seconds since the cell began, MB)."""
        start_ns = self.samples[0].at_ns
        return [((s.at_ns - start_ns) / 1e9, s.rss_bytes / 1e6) for s in self.samples if s.rss_bytes]

    def steady(self) -> Usage:
        """A drain without its beginning and end; all of it if it was too short for that."""
        total = self.samples[-1].distinct
        inside = [
            s for s in self.samples if total * STEADY[0] <= s.distinct <= total * STEADY[1] and s.daemon_s is not None
        ]
        if len(inside) < 2:
            inside = [sample for sample in self.samples if sample.daemon_s is not None]
        return between(inside[0], inside[-1])

    def since(self, at_ns: int, until_ns: int) -> Usage:
        """Between the samples nearest to two moments."""
        first, last = (min(self.samples, key=lambda s, at=at: abs(s.at_ns - at)) for at in (at_ns, until_ns))  # type: ignore[misc]
        return between(first, last)


def between(a: Sample, b: Sample) -> Usage:
    """The difference of two samples of one daemon process."""

    def less(later: float | None, earlier: float | None) -> float | None:
        return None if later is None or earlier is None else later - earlier

    return Usage(
        (b.at_ns - a.at_ns) / 1e9,
        b.requests - a.requests,
        less(b.daemon_s, a.daemon_s),
        less(b.postgres_s, a.postgres_s),
        less(b.receiver_s, a.receiver_s),
    )


# ── the lab ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, slots=True)
class Mix:
    """Which group an event that is filled in goes to.

    All in turn, from `group` on; with `flood_every`, each such one to `flood` instead.
    """

    groups: int = 1
    group: int = 0
    flood: int = 0
    flood_every: int = 0

    def group_of(self, number: int) -> int:
        """The group of an event."""
        if self.flood_every and number % self.flood_every == self.flood_every - 1:
            return self.flood
        return self.group + number % self.groups

    @property
    def sql(self) -> str:
        """The same over a variable `n`."""
        if not self.flood_every:
            return f"{self.group} + n % {self.groups}"
        is_flood = f"n % {self.flood_every} = {self.flood_every - 1}"
        return f"CASE WHEN {is_flood} THEN {self.flood} ELSE {self.group} + n % {self.groups} END"


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
        connection = await asyncpg.connect(self._dsn)
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
        await self.receiver.say(ledger=str(self._ledger_path()), events=1, fanout=1, behaviours=[])
        await self.receiver.hear()
        before = machine.cpu_s(self.receiver.pid)
        driver = await Process.start("bench.receiver", "drive", self.receiver_address.partition(":")[2], str(seconds))
        try:
            rate = float(json.loads(await driver.hear())["rate"])
        finally:
            await driver.end()
        after = machine.cpu_s(self.receiver.pid)
        spent = None if before is None or after is None else after - before
        self.ceiling = {"requests/s": rate, "µs": _each(spent, int(rate * seconds * 1.2))}

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
        tick_s: float | None = None,
    ) -> AsyncIterator[Cell]:
        """One run: database, ledger, webhooks and (not yet started) daemon.

        Endpoint number e belongs to group e // fanout and receives the events of that group. Those of which `refused`
        is true have a URL nobody listens at. `config` is the daemon's beyond what a loopback receiver needs; `webhook`
        are settings of all webhooks. `tick_s` is how often CPU is read: that costs 2 ms, so seldom where milliseconds
        are measured.
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


# ── one run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Cell:
    """One measured run."""

    connection: Any
    meter: Meter
    daemon: Daemon

    def __init__(
        self,
        lab: Lab,
        name: str,
        *,
        dsn: str,
        ledger: Ledger,
        directory: Path,
        config: Mapping[str, Mapping[str, object]],
        tick_s: float,
    ) -> None:
        self.lab, self.name, self.dsn, self.ledger, self.directory = lab, name, dsn, ledger, directory
        self.exit_code = 0
        self._config = config
        self._tick_s = tick_s
        self._producers: list[Process] = []

    async def open(
        self,
        endpoints: int,
        behaviours: Sequence[Behaviour],
        refused: Callable[[int], bool],
        webhook: Mapping[str, object],
    ) -> None:
        """Configure, subscribe, tell the receiver; for `Lab.cell`."""
        self.connection = await asyncpg.connect(self.dsn)
        listen, metrics = free_address(), free_address()
        path = self.directory / "dispatcher.toml"
        path.write_text(_toml(self._settings(listen, metrics)), encoding="utf-8")
        self.daemon = Daemon(path, listen, metrics, self.directory / "daemon.log")
        self.meter = Meter(self, self._tick_s)
        await self.tell(behaviours)
        store = EndpointStore(self.connection, open_vault(load(path, {})))
        account = await self.connection.fetchval("SELECT id FROM dispatcher.account WHERE name = 'default'")
        async with self.connection.transaction():
            for number in range(endpoints):
                address = self.lab.refused_address if refused(number) else self.lab.receiver_address
                url = f"http://{address}{endpoint_path(number)}"
                await store.create(account, _webhook(url, number // self.ledger.fanout, webhook), SECRET)

    def _settings(self, listen: str, metrics: str) -> dict[str, dict[str, object]]:
        settings: dict[str, dict[str, object]] = {
            "database": {"dsn": self.dsn},
            "server": {"listen": listen},
            "metrics": {"listen": metrics},
            "network": {"allow": ["127.0.0.0/8"], "allow_http": True},
            "state": {"directory": str(self.directory)},
        }
        for section, keys in self._config.items():
            settings.setdefault(section, {}).update(keys)
        return settings

    async def tell(self, behaviours: Sequence[Behaviour]) -> None:
        """Point the receiver at this cell's ledger."""
        ledger = self.ledger
        told = [dataclasses.asdict(each) for each in behaviours]
        await self.lab.receiver.say(
            ledger=str(ledger.path), events=ledger.events, fanout=ledger.fanout, behaviours=told
        )
        await self.lab.receiver.hear()

    async def close(self) -> None:
        """End whatever runs; for `Lab.cell`."""
        for producer in self._producers:
            await producer.end()
        if hasattr(self, "daemon"):
            await self.daemon.kill()
        if hasattr(self, "meter"):
            await self.meter.stop()
        if hasattr(self, "connection"):
            await self.connection.close()

    # ── load ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def fill(self, numbers: range, mix: Mix, *, rest: bool = True) -> None:
        """Commit events, each in a transaction of its own, as fast as it goes; with `rest`, a checkpoint follows."""
        connection, ledger = self.connection, self.ledger
        await connection.execute("SET synchronous_commit = off")  # here alone: preparing is not measured
        with self.lab.watch.over(f"{self.name}: committing", len(numbers)) as step:
            for at in range(numbers.start, numbers.stop, FILL_EVENTS):
                part = range(at, min(at + FILL_EVENTS, numbers.stop))
                await connection.execute(_fill_sql(part, mix))
                now = time.monotonic_ns()
                for number in part:
                    ledger.due[number] = ledger.acked[number] = now
                step(part.stop - numbers.start)
        await connection.execute("RESET synchronous_commit")
        with contextlib.suppress(asyncpg.InsufficientPrivilegeError):
            if not rest:
                return
            await connection.execute("CHECKPOINT")

    async def prepare(self, streams: Sequence[Stream]) -> Process:
        """A producer with its connections open; `produce` starts it."""
        producer = await Process.start("bench.producer")
        self._producers.append(producer)
        ledger = self.ledger
        await producer.say(
            dsn=self.dsn,
            ledger=str(ledger.path),
            events=ledger.events,
            fanout=ledger.fanout,
            seed=self.lab.seed,
            streams=[dataclasses.asdict(stream) for stream in streams],
        )
        assert await producer.hear() == "ready"
        return producer

    async def produce(self, *streams: Stream) -> Histogram:
        """Commit events on schedule, to the end; return how late they went out."""
        producer = await self.prepare(streams)
        total = sum(stream.count for stream in streams)
        seconds = max(stream.count / stream.rate for stream in streams)
        await producer.say(go=True)
        telling = asyncio.create_task(producer.hear(seconds * 3 + START_S), name="producer")
        with self.lab.watch.over(f"{self.name}: open loop", total) as step:
            while not telling.done():
                step(self.ledger.distinct / self.ledger.fanout)
                await asyncio.wait([telling], timeout=0.2)
        return Histogram.from_json(json.loads(telling.result())["late"])

    async def arrived(
        self,
        deliveries: int,
        *,
        among: Callable[[], int] | None = None,
        patience_s: float = 30.0,
        every_s: float = 0.02,
    ) -> bool:
        """Wait until so many deliveries have come (or `among` says so many); False when none came for `patience_s`."""
        count = among or (lambda: self.ledger.distinct)
        last, last_at = count(), time.monotonic()
        with self.lab.watch.over(f"{self.name}: delivering", deliveries) as step:
            while (now := count()) < deliveries:
                if now != last:
                    last, last_at = now, time.monotonic()
                elif time.monotonic() - last_at > patience_s:
                    return False
                self.daemon.check()
                step(now)
                await asyncio.sleep(every_s)
        self.meter.take()
        return True

    async def until_logged(self, attempts: int, *, patience_s: float = 10.0) -> int:
        """Wait until the dispatcher has so many attempts on record; return how many there are."""
        deadline = time.monotonic() + patience_s
        while (found := await self.logged()) < attempts and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return found

    async def logged(self) -> int:
        """Attempts on record."""
        return int(await self.connection.fetchval("SELECT count(*) FROM dispatcher.attempt"))

    # ── books ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def stop_daemon(self) -> None:
        """End it as an operator would; its exit code counts when the books are closed."""
        self.exit_code = await self.daemon.stop()

    async def balance(self, events: Iterable[int] | None = None) -> Balance:
        """The books over these events, or all."""
        committed = await self.connection.fetchval(
            "SELECT count(*) FROM dispatcher.outbox WHERE id >= $1 AND id <= $2",
            event_id(0),
            event_id(self.ledger.events - 1),
        )
        return self.ledger.balance(range(self.ledger.events) if events is None else events, int(committed))

    async def close_books(
        self, report: Report, events: Iterable[int] | None = None, *, logged: bool = True, repeats: bool = False
    ) -> Balance:
        """Stop the daemon and balance; the report is void if anything is wrong.

        `logged`: every request that came must be on record as an attempt, no more and no less. `repeats`: duplicates
        are expected.
        """
        await self.stop_daemon()
        balance = await self.balance(events)
        report.close_books(self.name, balance)
        if self.exit_code:
            report.void(self.name, f"the daemon ended with {self.exit_code}:\n{self.daemon.complaints}")
        if logged and (attempts := await self.logged()) != self.ledger.requests:
            report.void(self.name, f"{self.ledger.requests:,} requests came, {attempts:,} attempts are on record")
        if balance.duplicates and not repeats:
            report.note(f"{self.name}: {balance.duplicates:,} duplicates without a fault to explain them")
        return balance

    async def unaccounted(self) -> int:
        """Events before the persisted cursor of which there is neither attempt nor pending row: lost, if there are any.

        For endpoints that each get every event once (a fan-out of one), with the daemon stopped.
        """
        return int(await self.connection.fetchval(UNACCOUNTED, event_id(0), event_id(self.ledger.events - 1)))

    @property
    def open_connections(self) -> int:
        """Connections the receiver holds."""
        return self.ledger.head[OPEN]

    def first_ns(self) -> int:
        """When the first delivery of all came."""
        return min((at for at in self.ledger.first if at != NEVER), default=0)


def _webhook(url: str, group: int, settings: Mapping[str, object]) -> EndpointChange:
    values: dict[str, Any] = {
        "url": url,
        "description": "",
        "events": [event_type(group)],
        "headers": {},
        "body_style": BodyStyle.COMPACT,
        "retry": None,
        "max_concurrency": None,
        "rate_limit": None,
        "ordered": False,
        "timeout_s": None,
    }
    return EndpointChange(**(values | dict(settings)))


def _fill_sql(numbers: range, mix: Mix) -> str:
    data = DATA.replace("'", "''")
    return f"""
        DO $fill$ BEGIN
            FOR n IN {numbers.start}..{numbers.stop - 1} LOOP
                INSERT INTO dispatcher.outbox (id, type, data) VALUES (
                    '{ID_PREFIX}' || lpad(n::text, {ID_DIGITS}, '0'),
                    '{TYPE_PREFIX}' || lpad(({mix.sql})::text, {GROUP_DIGITS}, '0'), '{data}');
                COMMIT;
            END LOOP;
        END $fill$"""


def _toml(settings: Mapping[str, Mapping[str, object]]) -> str:
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for section, keys in settings.items()
    )
