"""The same drain on other people's queues, on the same PostgreSQL and against the same receiver.

Each gets its own database, its jobs are enqueued before its worker starts, and every job signs and posts a body of
the same size. All take turns, so that what drifts, drifts for all, and each is judged by its best. The settings are
the best that were found and stand at the top of each file in `bench/peers/`. They keep no log of attempts and no
limits per endpoint, so they do less than the dispatcher here.

What is missing is installed, once and only when this scenario is asked for, below the user's cache directory
(`$XDG_CACHE_HOME/trackpost-bench`), never into this tree or its environment.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from bench import machine
from bench.cell import Cell
from bench.lab import Lab
from bench.processes import Broken, Daemon
from bench.report import Report
from bench.scenario import Option, Sizes
from bench.scenarios.throughput import drain

QUESTION = "how do other queues on PostgreSQL do on the same drain?"
KEYS: Final = "pgqueuer,procrastinate,graphile,pgboss"
ONE: Final = KEYS.replace(",", "|")
OPTIONS = (
    Option("events", 50_000, 500, "deliveries for each", least=10),
    Option("endpoints", 10, 10, "webhooks"),
    Option("rounds", 2, 1, "turns of each"),
    Option("which", KEYS, KEYS, "peers, separated by commas", form=rf"({ONE})(,({ONE}))*"),
)
HERE: Final = machine.ROOT / "bench" / "peers"
INSTALL_S: Final = 600.0
FILL_S: Final = 600.0


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """One of them."""

    name: str
    script: str
    packages: tuple[str, ...]

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".cjs")

    @property
    def home(self) -> Path:
        """Where it is installed."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trackpost-bench"
        return cache / self.script.partition(".")[0]

    @property
    def command(self) -> tuple[str, ...]:
        """What runs its script."""
        return ("node" if self.is_node else str(self.home / "bin" / "python"), str(HERE / self.script))

    @property
    def installation(self) -> list[tuple[str, ...]]:
        """What installs it."""
        if self.is_node:
            return [
                ("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(self.home), *self.packages)
            ]
        return [
            (sys.executable, "-m", "venv", str(self.home)),
            (str(self.home / "bin" / "python"), "-m", "pip", "install", "--quiet", *self.packages),
        ]


PEERS: Final = {
    "pgqueuer": Peer("pgqueuer + aiohttp", "pgqueuer_worker.py", ("pgqueuer>=1.6,<2", "asyncpg", "aiohttp", "uvloop")),
    "procrastinate": Peer(
        "procrastinate + aiohttp",
        "procrastinate_worker.py",
        ("procrastinate>=3.10,<4", "psycopg[binary,pool]", "aiohttp", "uvloop"),
    ),
    "graphile": Peer("graphile-worker + undici", "graphile.cjs", ("graphile-worker@0.17", "undici@7", "pg@8")),
    "pgboss": Peer("pg-boss + undici", "pgboss.cjs", ("pg-boss@10", "undici@7", "pg@8")),
}


class Worker(Daemon):
    """A peer's worker, in the daemon's place."""

    def __init__(self, peer: Peer, receiver: str, environment: dict[str, str], log: Path) -> None:
        super().__init__(log, "", "", log)
        self._peer, self._receiver, self._environment = peer, receiver, environment

    async def start(self) -> None:
        """Start it."""
        self._asked = False
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._peer.command,
                "work",
                self._receiver,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=self._peer.home,
                process_group=0,
            )


async def run(lab: Lab, report: Report, sizes: Sizes) -> None:
    """Ours and each of them, in turns."""
    events, endpoints, rounds = sizes["events"], sizes["endpoints"], sizes["rounds"]
    peers: dict[str, Peer] = {}
    for key in sizes["which"].split(","):
        if missing := await _install(lab, PEERS[key]):
            report.note(f"{PEERS[key].name} left out: {missing}")
        else:
            peers[key] = PEERS[key]
    ours: list[dict[str, Any]] = []
    theirs: dict[str, list[dict[str, Any]]] = {key: [] for key in peers}
    for turn in range(1, rounds + 1):
        ours.append(await drain(lab, report, _turn("dispatcher", turn, rounds), events, endpoints))
        for key, peer in peers.items():
            name = _turn(peer.name, turn, rounds)
            theirs[key].append(await _drain(lab, report, peer, name=name, events=events, endpoints=endpoints))
    _judge(report, ours, theirs)


def _turn(name: str, turn: int, rounds: int) -> str:
    return name if rounds == 1 else f"{name}, turn {turn}"


def _judge(report: Report, ours: list[dict[str, Any]], theirs: dict[str, list[dict[str, Any]]]) -> None:
    rates = {key: _rate(rows) for key, rows in theirs.items()}
    rate = _rate(ours)
    if "pgqueuer" in rates:
        report.bar("times pgqueuer", rate and rates["pgqueuer"] and rate / rates["pgqueuer"], at_least=6)
    if "graphile" in rates:
        times = rate and rates["graphile"] and rate / rates["graphile"]
        report.bar("times graphile-worker", times, at_least=2, stretch=3)
        own, other = _cpu_us(ours), _cpu_us(theirs["graphile"])
        report.bar("CPU per delivery, in proportion to graphile-worker", own and other and own / other, at_most=0.5)


def _rate(rows: list[dict[str, Any]]) -> float | None:
    """Of the best turn."""
    return max((row["deliveries/s"] for row in rows if row["deliveries/s"]), default=None)


def _cpu_us(rows: list[dict[str, Any]]) -> float | None:
    """Worker and PostgreSQL together, in the best turn."""
    known = [row["daemon µs"] + row["PostgreSQL µs"] for row in rows if row["daemon µs"] and row["PostgreSQL µs"]]
    return min(known, default=None)


async def _install(lab: Lab, peer: Peer) -> str:
    """Make sure it is there; return why it cannot be, or nothing."""
    if peer.is_node and not (shutil.which("node") and shutil.which("npm")):
        return "there is no node and npm"
    done = peer.home / ".installed"
    if done.exists() and done.read_text() == str(peer.packages):
        return ""
    peer.home.mkdir(parents=True, exist_ok=True)
    with lab.watch.over(f"installing {peer.name}", 1):
        for command in peer.installation:
            if problem := await _finish(command, dict(os.environ), peer.home, INSTALL_S):
                return problem
    done.write_text(str(peer.packages))
    return ""


async def _finish(command: tuple[str, ...], environment: dict[str, str], directory: Path, timeout_s: float) -> str:
    """Run a program to its end; return the end of what it complained about, or nothing."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=pipe, env=environment, cwd=directory
    )
    try:
        async with asyncio.timeout(timeout_s):
            _, complaints = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return f"{command[0]} took more than {timeout_s:g} s"
    return complaints.decode(errors="replace")[-500:].strip() or "failed" if process.returncode else ""


async def _drain(lab: Lab, report: Report, peer: Peer, *, name: str, events: int, endpoints: int) -> dict[str, Any]:
    async with lab.cell(name, events=events, endpoints=0, turns=endpoints) as cell:
        environment = {**os.environ, **postgres_variables(cell.dsn)}
        enqueued = await _fill(lab, peer, environment, events, endpoints)
        now = time.monotonic_ns()
        for number in range(events):
            cell.ledger.acked[number] = cell.ledger.due[number] = now
        cell.daemon = Worker(peer, lab.receiver_address, environment, cell.directory / "worker.log")
        await cell.daemon.start()
        await cell.arrived(events)
        values = _row(cell, report, name)
        await cell.daemon.kill()
        report.close_books(name, cell.ledger.balance(range(events), enqueued))
        if cell.ledger.distinct < events:
            report.note(f"{name}: {cell.daemon.log.read_text(errors='replace')[-500:]}")
    return values


async def _fill(lab: Lab, peer: Peer, environment: dict[str, str], events: int, endpoints: int) -> int:
    """Enqueue; return how many jobs there are."""
    pipe = asyncio.subprocess.PIPE
    with lab.watch.over(f"{peer.name}: enqueuing", 1):
        process = await asyncio.create_subprocess_exec(
            *peer.command, "fill", str(events), str(endpoints), stdout=pipe, stderr=pipe, env=environment, cwd=peer.home
        )
        async with asyncio.timeout(FILL_S):
            said, complaints = await process.communicate()
    if process.returncode:
        raise Broken(f"{peer.name} could not be filled: {complaints.decode(errors='replace')[-1000:]}")
    return int(said.split()[-1])


def _row(cell: Cell, report: Report, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {**cell.meter.drain(), "RSS MB": cell.meter.rss_max_mb}
    report.row(name, values)
    report.column("deliveries/s", name, values["deliveries/s"])
    return values


def postgres_variables(dsn: str) -> dict[str, str]:
    """A DSN as the variables that every PostgreSQL client knows."""
    parts = urlsplit(dsn)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    known = {
        "PGHOST": query.get("host") or parts.hostname,
        "PGPORT": query.get("port") or (str(parts.port) if parts.port else None),
        "PGUSER": query.get("user") or parts.username,
        "PGPASSWORD": query.get("password") or parts.password,
        "PGDATABASE": parts.path.lstrip("/"),
        "PGSSLMODE": query.get("sslmode"),
    }
    return {name: unquote(value) for name, value in known.items() if value}
