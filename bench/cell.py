"""One measured run: a fresh database and ledger, webhooks, a daemon with a configuration file, load, and books that are
closed at the end. `Lab.cell` makes them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from bench import machine
from bench.histogram import Histogram
from bench.ledger import (
    GROUP_DIGITS,
    ID_DIGITS,
    ID_PREFIX,
    OPEN,
    TYPE_PREFIX,
    Balance,
    Ledger,
    endpoint_path,
    event_id,
    event_type,
)
from bench.meter import Meter, Sample
from bench.processes import START_S, Daemon, Process, free_address
from bench.producer import DATA, Stream
from bench.receiver import Behaviour
from bench.report import Report
from dispatcher.config import load
from dispatcher.daemon import open_vault
from dispatcher.model import BodyStyle
from dispatcher.store.endpoints import EndpointChange, EndpointStore

if TYPE_CHECKING:
    from bench.lab import Lab

FILL_EVENTS: Final = 5_000  # per round trip, for the progress bar
SECRET: Final = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

UNACCOUNTED: Final = """
    SELECT count(*) FROM dispatcher.outbox o, dispatcher.shard s
    WHERE s.id = 0 AND o.id >= $1 AND o.id <= $2
      AND (pg_visible_in_snapshot(o.xid, s.prev)
           OR (s.cur IS NOT NULL AND pg_visible_in_snapshot(o.xid, s.cur) AND (o.xid, o.seq) <= (s.at_xid, s.at_seq)))
      AND NOT EXISTS (SELECT FROM dispatcher.attempt a WHERE a.event_seq = o.seq)
      AND NOT EXISTS (SELECT FROM dispatcher.pending p WHERE p.event_seq = o.seq)
"""


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
        turns: int,
        tick_s: float,
    ) -> None:
        self.lab, self.name, self.dsn, self.ledger, self.directory = lab, name, dsn, ledger, directory
        self.exit_code = 0
        self._config = config
        self._turns = turns
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
        self.meter = Meter(self._sample, self._tick_s)
        await self.tell(behaviours)
        store = EndpointStore(self.connection, open_vault(load(path, {})))
        account = await self.connection.fetchval("SELECT id FROM dispatcher.account WHERE name = 'default'")
        async with self.connection.transaction():
            for number in range(endpoints):
                address = self.lab.refused_address if refused(number) else self.lab.receiver_address
                url = f"http://{address}{endpoint_path(number)}"
                await store.create(account, _webhook(url, number // self.ledger.fanout, webhook), SECRET)

    def _sample(self) -> Sample:
        pid = self.daemon.pid
        return Sample(
            time.monotonic_ns(),
            self.ledger.requests,
            self.ledger.distinct,
            machine.cpu_s(pid),
            machine.tree_cpu_s(self.lab.postgres_pid),
            machine.cpu_s(self.lab.receiver.pid),
            machine.rss_bytes(pid),
        )

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
            ledger=str(ledger.path),
            events=ledger.events,
            fanout=ledger.fanout,
            behaviours=told,
            turns=self._turns,
            secret="" if self._turns else SECRET.removeprefix("whsec_"),
            data=json.loads(DATA),
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
                self.lab.receiver.check()
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
                self.lab.receiver.check()
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
        self,
        report: Report,
        events: Iterable[int] | None = None,
        *,
        logged: bool = True,
        logged_before: int = 0,
        repeats: bool = False,
    ) -> Balance:
        """Stop the daemon and balance; the report is void if anything is wrong.

        `logged`: every request that came must be on record as an attempt, no more and no less, beside those that were
        `logged_before`. `repeats`: duplicates are expected.
        """
        await self.stop_daemon()
        balance = await self.balance(events)
        report.close_books(self.name, balance)
        if self.exit_code:
            report.void(self.name, f"the daemon ended with {self.exit_code}:\n{self.daemon.complaints}")
        if logged and (attempts := await self.logged() - logged_before) != self.ledger.requests:
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
