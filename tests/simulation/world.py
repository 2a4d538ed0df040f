"""A seeded world for the real engine: what happens in it, how it is run, and its history.

A seed decides everything: the webhooks and what their receivers are like, who writes events when and for how long
their transactions take, the way to the database, and the faults. For a while the world is unkind; then it heals, and
everything must settle. Two runs of a seed have the same history, byte for byte.

What runs is `dispatcher.engine.engine.Engine` as it is, on a virtual event loop, with three things in place of the
outside: `asyncpg.connect`, the loop's sockets, and the wall clock it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import gc
import hashlib
import logging
import random
import ssl
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from unittest import mock

import asyncpg
import model_postgres
import model_receivers
import structlog
from judge import Judge, Violation
from model_driver import Driver, ModelConnection, Weather
from model_postgres import ACCOUNT, ModelPostgres, Transaction
from model_receivers import PASSING, Internet, Mood, Receiver
from model_statements import Statement
from virtual_loop import PROCESS, Process, State, VirtualLoop

from dispatcher.core.addresses import Guard
from dispatcher.core.backoff import PRESETS
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.shards import Moves
from dispatcher.engine.engine import Engine, EngineSettings
from dispatcher.engine.fleet import Fleet
from dispatcher.engine.outbox import SAFETY_S
from dispatcher.engine.transport import Transport, TransportSettings
from dispatcher.model import BodyStyle
from dispatcher.store.database import statements
from dispatcher.store.endpoints import EndpointChange, EndpointDefaults, EndpointStore
from dispatcher.store.replays import Choice, ReplayStore, Selection
from dispatcher.store.vault import Vault

EPOCH: Final = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
HEALING_S: Final = 1800.0  # a world that has healed for so long and is not settled never will be
VAULT: Final = Vault(b"k" * 32)
IDS: Final = DeliveryIds(b"1" * 16)
GUARD: Final = Guard(["127.0.0.0/8"], allow_http=True)
SLOW: Final = ("refill", "pull", "fetch", "flush", "first_page", "first_page_near", "known", "registry", "take_over")
TYPES: Final = ("a.one", "a.two", "b.one")
_OUTSIDE: Final = contextvars.Context()


@dataclasses.dataclass(slots=True)
class Plan:
    """What a seed makes of a world. A test may fix some of it."""

    kind: str
    length_s: float  # until it heals
    daemons: int = 1
    shards: int = 1  # one: an engine stands alone; several: daemons are a fleet
    webhooks: int = 3
    transactions: int = 25
    burst: int = 0  # events at once, somewhere in the middle
    faults: int = 10
    page_rows: int = 500
    max_queued: int = 20_000
    max_in_flight: int = 2000
    safety_s: tuple[float, float] = (1.0, 5.0)
    is_durable: bool = True
    slow: str = ""  # a statement that takes its time
    failing: bool = False  # no receiver is well before the end
    jitter: float = 0.1
    ordered: float = 0.3  # a share of the webhooks
    disable_after_s: float = 5 * 86400.0  # of nothing but failures
    acts: tuple[str, ...] = ()  # what goes wrong, by the names of the world's methods; none: whatever its kind has

    @classmethod
    def of(cls, dice: random.Random) -> Plan:
        kind = dice.choices(("calm", "stormy", "duel"), (2, 6, 2))[0]
        plan = cls(
            kind,
            dice.uniform(6, 30),
            webhooks=dice.randint(1, 5),
            transactions=dice.choice((5, 15, 30)),
            burst=dice.choice((0, 0, 0, 30, 120)),
            page_rows=dice.choice((1, 3, 10, 500)),
            max_queued=dice.choice((16, 60, 20_000)),
            max_in_flight=dice.choice((2, 8, 2000)),
            safety_s=dice.choice(((1.0, 5.0), (1e6, 2e6))),
            is_durable=dice.random() < 0.9,
            jitter=dice.choice((0.0, 0.1)),
        )
        if kind == "calm":
            plan.faults = dice.choice((0, 3))
            plan.max_queued, plan.max_in_flight = 20_000, 2000
            plan.page_rows, plan.safety_s = dice.choice((3, 500)), (1e6, 2e6)
        else:
            plan.faults = dice.randint(4, 16)
            plan.slow = dice.choice(("", "", *SLOW))
            plan.failing = dice.random() < 0.1
            plan.disable_after_s = dice.choice((5 * 86400.0, 5 * 86400.0, 1.0, 6.0))
        plan.daemons = 2 if kind == "duel" or dice.random() < 0.2 else 1
        return plan


@dataclasses.dataclass(slots=True)
class Settings:
    """A webhook, as the world made it."""

    receiver: Receiver
    events: list[str]
    schedule_s: tuple[float, ...]
    concurrency: int
    rate_limit: float | None
    ordered: bool
    timeout_s: float
    secrets: list[str]
    is_prompt: bool
    public_id: str = ""
    id: int = 0


class Storm(Weather):
    """The way to the database in a seeded world."""

    def __init__(self, world: World, dice: random.Random, *, calm: bool) -> None:
        self._world = world
        self._dice = dice
        self._calm = calm
        self._slow = world.plan.slow
        self.stalled_until = 0.0
        self.down_until = 0.0
        self.ambush: tuple[str, str] | None = None  # statement, when

    def can_connect(self) -> Exception | None:
        if self._world.loop.now < self.down_until:
            if self._dice.random() < 0.5:
                return ConnectionRefusedError(111, "Connection refused")
            return asyncpg.CannotConnectNowError("the database system is starting up")
        return None

    def connect_s(self) -> float:
        return self._dice.uniform(0.001, 0.01) + self._stall()

    def there_s(self, connection: ModelConnection, statement: Statement) -> float:
        if statement.name == self._slow and self._dice.random() < 0.5:
            return self._dice.uniform(0.02, 0.8)
        return self._way() + self._stall()

    def work_s(self, statement: Statement) -> float:
        if not self._calm and self._dice.random() < 0.03:
            return self._dice.uniform(0.02, 1.0)
        return self._dice.uniform(0.0002, 0.003)

    def back_s(self, statement: Statement | None = None) -> float:
        if statement is not None and statement.name == self._slow and self._dice.random() < 0.5:
            return self._dice.uniform(0.02, 0.8)
        return self._way()

    def linger_s(self) -> float:
        return self._dice.choice((0.0, 0.05, 0.5, 2.0))

    def _way(self) -> float:
        if not self._calm and self._dice.random() < 0.03:
            return self._dice.choice((0.01, 0.1, 0.6))
        return self._dice.uniform(0.00005, 0.0005)

    def _stall(self) -> float:
        return max(0.0, self.stalled_until - self._world.loop.now)

    def sent(self, connection: ModelConnection, statement: Statement) -> None:
        if self.ambush is None or self.ambush[0] != statement.name or self.ambush[1] == "after":
            return
        when, self.ambush = self.ambush[1], None
        self._world.note("ambush", f"{connection} {when} {statement.name}")
        if when == "before":
            connection.break_off()
        else:
            act = functools.partial(connection.break_off, linger_s=self._dice.choice((0.0, 0.5, 3.0)))
            connection.later(self._dice.uniform(0.0001, 0.003), act)

    def executed(self, connection: ModelConnection, statement: Statement) -> None:
        if self.ambush == (statement.name, "after"):
            self.ambush = None
            self._world.note("ambush", f"{connection} after {statement.name}")
            connection.break_off()


class Daemon:
    """A place where an engine runs, is killed, and is started again."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.starts = 0
        self.process = Process(f"d{number}.0")
        self.engine: Engine | Fleet | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def engines(self) -> list[Engine]:
        """Those of all its shards."""
        if self.engine is None:
            return []
        return list(self.engine.engines.values()) if isinstance(self.engine, Fleet) else [self.engine]

    def __repr__(self) -> str:
        return self.process.name


class WatchedFleet(Fleet):
    """A fleet whose judge hears when an engine ends with something in its hands."""

    def __init__(self, daemon: Daemon, world: World, settings: EngineSettings, **more: Any) -> None:
        super().__init__(settings, **more)
        self._daemon = daemon
        self._world = world

    def _begin(self, shard: int, count: int) -> None:
        super()._begin(shard, count)
        self._world.equip(self.engines[shard])

    def _move(self, move: Moves, count: int) -> None:
        given = [self.engines[shard] for shard in sorted(move.lost | move.release)]
        self._world.note("move", f"{self._daemon} {move}")
        self._world.judge.forgive(self._daemon, [engine for engine in given if engine.role != "active"])
        super()._move(move, count)

    def _bury_ended(self) -> None:
        ended = [self.engines[shard] for shard, task in self._tasks.items() if task.done()]
        self._world.judge.forgive(self._daemon, [engine for engine in ended if engine.ledger.buffered])
        super()._bury_ended()


class World:
    """One seed's world. `run` returns its history, or raises Violation."""

    def __init__(self, seed: int | str, adjust: Callable[[Plan], None] = lambda plan: None) -> None:
        self.seed = seed
        self.dice = random.Random(f"{seed}/world")
        self.plan = Plan.of(self.dice)
        adjust(self.plan)
        self.loop = VirtualLoop()
        self.history: list[tuple[float, str, str]] = []
        self.wall_offset_s = 0.0
        self.db_offset_s = self.dice.choice((0.0, 0.0, -2.0, 3.0))
        self.server = ModelPostgres(self.db_clock, self.plan.shards)
        self.weather = Storm(self, random.Random(f"{seed}/weather"), calm=self.plan.kind == "calm")
        self.driver = Driver(self.server, self.weather)
        self.office = Driver(self.server, Weather())  # the way of API and applications: their troubles are not ours
        self.internet = Internet(self.loop, self.wall, random.Random(f"{seed}/internet"))
        self.loop.network = self.internet
        self.judge = Judge(self.server, IDS, self.note, self.loop.time, self.wall)
        self.judge.calm = self.plan.kind == "calm"
        self.judge.jitter = self.plan.jitter
        self.server.watch = self.internet.watch = self.judge
        self.daemons = [Daemon(number) for number in range(1, self.plan.daemons + 1)]
        self.settings: list[Settings] = []
        self.dead: list[Process] = []
        self.healed = self.over = False
        self._fuse: tuple[Daemon, int] | None = None
        self._api_tasks: list[asyncio.Task[Any]] = []

    # ── clocks and the record ──────────────────────────────────────────────────────────────────────────────────────

    def wall(self) -> float:
        return EPOCH + self.loop.now + self.wall_offset_s

    def db_clock(self) -> datetime:
        return datetime.fromtimestamp(EPOCH + self.loop.now + self.db_offset_s, UTC)

    def note(self, kind: str, what: str = "") -> None:
        self.history.append((self.loop.now, kind, what))

    def lines(self) -> Iterator[str]:
        """The history, for people and for comparing."""
        for at, kind, what in self.history:
            yield f"{at:14.6f}  {kind:12}  {what}"

    def digest(self) -> str:
        """What two runs of a seed have in common."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()

    # ── a run ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Let it happen. Raises Violation, with the history on `self.history`."""
        self.note("seed", f"{self.seed} {self.plan}")
        gc_was = gc.isenabled()
        gc.disable()  # when objects go is not part of a history
        try:
            with self._outside_replaced():
                try:
                    self.loop.on_step = self._step
                    self.loop.run_until_complete(self._main())
                finally:
                    self._bury()
        finally:
            self.loop.close()
            if gc_was:
                gc.enable()

    @contextlib.contextmanager
    def _outside_replaced(self) -> Iterator[None]:
        before = structlog.get_config()
        trouble = _Trouble(self)
        loggers = logging.getLogger("asyncio"), logging.getLogger("dispatcher")
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(asyncpg, "connect", self.driver.connect))
            stack.enter_context(mock.patch.object(ssl, "create_default_context", _tls_context))
            structlog.configure(processors=[self._log], cache_logger_on_first_use=False)
            stack.callback(structlog.configure, **before)
            for logger in loggers:
                logger.addHandler(trouble)
                stack.callback(logger.removeHandler, trouble)
            yield

    def _log(self, _logger: Any, level: str, line: Any) -> Any:
        self.note(f"log {level}", f"{PROCESS.get()} {dict(line)}")
        if line["event"] == "drain.cut_short":
            self.judge.allowance += line["in_flight"]
        raise structlog.DropEvent

    def _step(self) -> None:
        if self._fuse is not None:
            daemon, steps = self._fuse
            self._fuse = (daemon, steps - 1) if steps else None
            if not steps:
                self.kill(daemon)
        if self.loop.faults:
            context = self.loop.faults[0]
            error = context.get("exception")
            self.judge.fail(f"{context['message']}: {error!r}")
            raise Violation(self.judge.violation) from error
        self.judge.step()

    async def _main(self) -> None:
        for _ in range(self.plan.webhooks):
            await self._create()
        self._schedule()
        for daemon in self.daemons:
            self._later(self.dice.choice((0.0, 0.0, 1.0)), self.start, daemon)
        await asyncio.sleep(self.plan.length_s)
        await self._heal()
        give_up_at = self.loop.now + HEALING_S
        while not (self.judge.is_settled and self._is_idle()):
            if self.loop.now > give_up_at:
                owed = sorted(self.judge.owed)[:10]
                self.judge.fail(f"never settled: {owed} owed, {sorted(self.server.pending)[:10]} pending")
            self._revive()
            await asyncio.sleep(0.5)
        self.judge.conclude()
        self.note("settled")
        for daemon in self.daemons:
            if daemon.engine is not None and daemon.task is not None:
                daemon.engine.stop()
                await daemon.task
        self.judge.conclude()
        self.note("over", f"{self.judge.repeats} repeats of {self.judge.allowance}")

    def _is_idle(self) -> bool:
        """Whether every shard is run by somebody, and nobody who does has anything to do."""
        active = [engine for daemon in self.daemons for engine in daemon.engines if engine.role == "active"]
        return len(active) == self.plan.shards and not any(
            engine.deliverer.in_flight or engine.deliverer.lanes.queued or engine.ledger.buffered for engine in active
        )

    def _bury(self) -> None:
        """End whatever is left of the run, the dead included, so that nothing of it haunts the next."""
        self.over = self.healed = True
        self.loop.on_step = lambda: None
        self.server.watch = model_postgres.Watch()
        self.internet.watch = model_receivers.Watch()
        history, self.history = self.history, []
        self.weather.down_until = self.loop.now + 1e9
        for connection in (*self.driver.connections, *self.office.connections):
            connection.terminate()
        processes = {daemon.process: None for daemon in self.daemons} | dict.fromkeys(self.dead)

        async def end() -> None:
            for process in processes:
                self.loop.thaw(process)
            for _ in range(20):
                tasks = [task for process in processes for task in self.loop.tasks_of(process)]
                tasks += [task for task in self._api_tasks if not task.done()]
                if not tasks:
                    break
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=10)
            else:
                raise AssertionError(f"tasks that do not end: {tasks}")

        self.loop.run_until_complete(end())
        self.internet.close()
        self.history = history

    # ── daemons ────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, daemon: Daemon) -> None:
        if self.over or daemon.task is not None:
            return
        daemon.starts += 1
        daemon.process = Process(f"d{daemon.number}.{daemon.starts}")
        self.note("start", str(daemon))
        self.judge.daemons[daemon.process.name] = daemon
        daemon.task = self.loop.spawn(daemon.process, self._engine(daemon), "engine")

    async def _engine(self, daemon: Daemon) -> None:
        plan = self.plan
        transport = Transport(settings=TransportSettings(), guard=GUARD)
        settings = EngineSettings(
            dsn="postgresql://model/model",
            listen_dsn="postgresql://model/model",
            defaults=EndpointDefaults((1.0, 4.0, 10.0), PRESETS, 64, 5.0),
            jitter=plan.jitter,
            max_in_flight=plan.max_in_flight,
            max_queued=plan.max_queued,
            drain_s=2.0,
            synchronous_commit=plan.is_durable,
            disable_after_s=plan.disable_after_s,
            events_kept_s=3600.0,
        )
        given: dict[str, Any] = {
            "transport": transport, "guard": GUARD, "vault": VAULT, "ids": IDS, "wall": self.wall,
            "dice": random.Random(f"{self.seed}/{daemon}"),
        }  # fmt: skip
        if plan.shards == 1:
            engine: Engine | Fleet = Engine(settings, **given)
            self.equip(engine)
        else:
            engine = WatchedFleet(daemon, self, settings, **given)
        daemon.engine = engine
        await engine.run()

    def equip(self, engine: Engine) -> None:
        engine.page_rows = self.plan.page_rows
        engine.safety_s = self.plan.safety_s

    def kill(self, daemon: Daemon) -> None:
        """SIGKILL: nothing of it runs any more."""
        process = daemon.process
        if daemon.task is None:
            return
        self.note("kill", str(daemon))
        self.judge.forgive(daemon)
        self._remove(daemon)
        process.state = State.DEAD
        for connection in [each for each in self.driver.connections if each.backend.owner is process]:
            connection.break_off(notice=False)
        for wire in [wire for wire in self.internet.wires if wire.process is process]:
            wire.vanish()
        self.dead.append(process)
        daemon.engine = daemon.task = None
        self._later(self.dice.choice((0.05, 0.5, 3.0)), self.start, daemon)

    def _remove(self, daemon: Daemon) -> None:
        self.judge.daemons.pop(daemon.process.name, None)

    def _revive(self) -> None:
        """A daemon that has ended is started again, as by an init system."""
        if self.over:
            return
        for daemon in self.daemons:
            if daemon.task is not None and daemon.task.done():
                error = None if daemon.task.cancelled() else daemon.task.exception()
                if error is not None:
                    self.judge.fail(f"{daemon} ended by {error!r}")
                self._remove(daemon)
                self.dead.append(daemon.process)
                daemon.engine = daemon.task = None
                self.start(daemon)

    # ── what happens when ──────────────────────────────────────────────────────────────────────────────────────────

    def _later(self, delay_s: float, act: Callable[..., None], *arguments: Any) -> None:
        self.loop.call_later(delay_s, act, *arguments, context=_OUTSIDE)

    def _schedule(self) -> None:
        plan, dice = self.plan, self.dice
        for _ in range(plan.transactions):
            self._later(dice.uniform(0, plan.length_s), self._produce)
        if plan.burst:
            self._later(dice.uniform(0, plan.length_s), self._burst, plan.burst)
        acts = self._calm_faults() if plan.kind == "calm" else self._faults()
        if plan.acts:
            acts = [getattr(self, name) for name in plan.acts]
        for _ in range(plan.faults):
            self._later(dice.uniform(0.01, plan.length_s), self._happen, dice.choice(acts))

    def _happen(self, act: Callable[[], None]) -> None:
        if not self.healed:
            act()

    def _calm_faults(self) -> list[Callable[[], None]]:
        return [self._pause, self._rotate, self._redeliver, self._replay]

    def _faults(self) -> list[Callable[[], None]]:
        every = [
            *[self._change_mood] * 4, self._cut, self._cut, self._lie_in_wait, self._lie_in_wait, self._stall,
            self._restart_server, self._burn, self._burn, self._step_clock, self._pause, self._pause, self._rotate,
            self._delete, self._create_soon, self._redeliver, self._stop, self._local_trouble, self._freeze,
            self._replay, self._replay, self._abandon,
            self._suspend,
        ]  # fmt: skip
        if self.plan.kind == "duel":
            every += [self._freeze, self._freeze, self._evict, self._evict, self._evict]
        return every

    # producers

    def _produce(self) -> None:
        dice = self.dice
        if self.healed or self.weather.can_connect() is not None:
            return
        transaction = self.server.begin()
        duration_s = dice.choice((0.0, 0.001, 0.02, 0.3, 3.0))
        self._emit(transaction)
        for _ in range(dice.choice((0, 0, 1, 4))):
            self._later(dice.uniform(0, duration_s) if duration_s else 0.0, self._emit, transaction)
        self._later(duration_s, self._end, transaction, dice.random() < 0.1)

    def _burst(self, events: int) -> None:
        """Enough at once to wake the reader, and others that write while it is awake and commit when it sleeps."""
        if self.healed or self.weather.can_connect() is not None:
            return
        for _ in range(4):
            self._later(self.dice.uniform(0.05, 0.13), self._produce)
        for n in range(events):
            self._later(0.0005 * n, self._write_at_once)

    def _write_at_once(self) -> None:
        transaction = self.server.begin()
        self._emit(transaction)
        self._end(transaction, False)

    def _emit(self, transaction: Transaction) -> None:
        if transaction.done:
            return
        dice = self.dice
        type_, data = dice.choice(TYPES), f'{{"n": {dice.randrange(100)}}}'
        if dice.random() < 0.03:
            type_, data = dice.choice((("No Type", data), (type_, "[1]"), (type_, '{"x": NaN}')))
        event = transaction.emit(type_, data)
        began_at = self.judge.began_at
        began_at[event.seq] = began_at.get(transaction.events[0].seq, self.loop.now)
        self.note("insert", f"event {event.seq} {type_} xid {event.xid}")

    def _end(self, transaction: Transaction, rolls_back: bool) -> None:
        if not transaction.done:
            if rolls_back:
                transaction.abort()
                self.note("rollback", f"xid {transaction.xid}")
            else:
                transaction.commit()

    # receivers

    def _change_mood(self) -> None:
        dice = self.dice
        settings = dice.choice(self.settings)
        mood = dice.choice((*PASSING, Mood.GONE) if dice.random() < 0.2 else PASSING)
        if settings.rate_limit is not None and mood in {Mood.UNREACHABLE, Mood.MOODY}:
            mood = Mood.BROKEN  # what waits for a connection would come all at once
        self._set_mood(settings.receiver, mood)
        self._later(dice.choice((0.5, 4.0, 15.0)), self._set_mood, settings.receiver, Mood.WELL)
        may_be_disabled = mood is Mood.GONE or self.plan.disable_after_s < self.plan.length_s
        if may_be_disabled and dice.random() < 0.7:
            self._act(self._enable_again(settings, dice.choice((0.1, 2.0, 6.0))))

    def _set_mood(self, receiver: Receiver, mood: Mood) -> None:
        self.note("mood", f"{receiver.port} {mood.value}")
        receiver.mood = mood

    # the database and the way to it

    def _cut(self) -> None:
        victims = [each for each in self.driver.connections if each.reaches and each.backend.alive]
        if not victims:
            return
        victim, how = self.dice.choice(victims), self.dice.choice(("both", "server", "silent"))
        if how == "silent" and victim.name == "reader" and self.plan.safety_s[0] > SAFETY_S[1]:
            how = "both"  # who only hears finds its line dead by the safety poll, which this world does without
        self.note("cut", f"{victim} of {victim.backend.owner} {how}")
        match how:
            case "both":
                victim.break_off()
            case "server":  # pg_terminate_backend
                victim.backend.end()
            case "silent":
                victim.break_off(notice=False, linger_s=11.0)

    def _lie_in_wait(self) -> None:
        pages = ("first_page", "first_page_near")
        others = ("pull", "fetch", "refill", "take_over", "learn", "registry")
        name = self.dice.choice(("flush", "flush", "flush", *pages, *others))
        self.weather.ambush = (name, self.dice.choice(("before", "during", "after")))

    def _stall(self) -> None:
        seconds = self.dice.choice((0.05, 1.0, 5.0, 33.0))
        self.note("stall", f"{seconds}")
        self.weather.stalled_until = self.loop.now + seconds

    def _restart_server(self) -> None:
        self.note("crash", "of the server")
        self.weather.down_until = self.loop.now + self.dice.choice((0.1, 1.0, 4.0))
        self.server.crash(reuse_ids=self.dice.random() < 0.7, lose_unsaved=self.dice.random() < 0.7)

    def _evict(self) -> None:
        """The owner's listener is cut off, and perhaps the owner is not even awake: another daemon takes over."""
        for lease in list(self.server.leases.values()):
            self.note("evict", f"{lease} of {lease.owner}")
            lease.end()

    # daemons

    def _burn(self) -> None:
        if self._fuse is None:
            self._fuse = (self.dice.choice(self.daemons), self.dice.choice((0, 3, 20, 100)))

    def _freeze(self) -> None:
        daemon = self.dice.choice(self.daemons)
        if daemon.process.state is State.RUNNING:
            self.note("freeze", str(daemon))
            daemon.process.state = State.FROZEN
            self._later(self.dice.choice((0.5, 3.0, 12.0)), self._thaw, daemon.process)
            if self.dice.random() < 0.7:
                self._later(self.dice.uniform(0, 0.3), self._evict)

    def _thaw(self, process: Process) -> None:
        if process.state is State.FROZEN:
            self.note("thaw", str(process))
            self.loop.thaw(process)

    def _stop(self) -> None:
        daemon = self.dice.choice(self.daemons)
        if daemon.engine is not None and daemon.process.state is State.RUNNING:
            self.note("stop", str(daemon))
            self.judge.forgive(daemon)  # what does not finish within the drain is sent again
            daemon.engine.stop()
            self._later(8.0, self._revive)

    def _step_clock(self) -> None:
        by_s = self.dice.choice((-3600.0, -7.0, -0.5, 0.5, 7.0, 3600.0))
        self.note("clock", f"{by_s}")
        self.judge.latest_wall = max(self.judge.latest_wall, self.wall())
        if self.dice.random() < 0.7:
            self.wall_offset_s += by_s
        else:
            self.db_offset_s += by_s

    def _suspend(self) -> None:
        """All hosts sleep for days: no monotonic clock runs, no connection survives, and much is old afterwards."""
        self.note("suspend")
        self.judge.latest_wall = max(self.judge.latest_wall, self.wall())
        days_s = self.dice.choice((1.0, 3.0)) * 86400.0
        self.wall_offset_s += days_s
        self.db_offset_s += days_s
        for connection in self.driver.connections:
            connection.break_off()

    def _local_trouble(self) -> None:
        self.note("trouble", "no local ports")
        self.internet.local_trouble = True
        self._later(self.dice.choice((0.3, 2.0)), self._end_local_trouble)

    def _end_local_trouble(self) -> None:
        self.internet.local_trouble = False

    # people

    def _act(self, act: Coroutine[Any, Any, None]) -> None:
        if self.weather.can_connect() is not None:
            act.close()
            return
        self._api_tasks = [task for task in self._api_tasks if not task.done()]
        self._api_tasks.append(self.loop.create_task(act, name="api", context=contextvars.Context()))

    def _pause(self) -> None:
        self._act(self._pause_for(self.dice.choice(self.settings), self.dice.choice((0.2, 4.0, 12.0))))

    async def _pause_for(self, settings: Settings, seconds: float) -> None:
        settings.is_prompt = False
        if await self._call("pause", settings):
            await asyncio.sleep(seconds)
            await self._call("resume", settings)

    async def _enable_again(self, settings: Settings, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._set_mood(settings.receiver, Mood.WELL)
        await self._call("resume", settings)

    async def _call(self, name: str, settings: Settings, *arguments: Any) -> Any:
        """One call of the API's, on a connection of its own; None if it came to nothing."""
        row = self.server.endpoints.get(settings.id)
        if row is None or self.weather.can_connect() is not None:
            return None
        try:
            db = await self.office.connect()
            store = EndpointStore(db, VAULT)
            method = getattr(store, name)
            found = await method(ACCOUNT[0], settings.public_id, *arguments, version=row["version"])
            await db.close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return None
        self.note("api", f"{name} {settings.id}: {bool(found)}")
        return found

    def _rotate(self) -> None:
        self._act(self._rotate_secret(self.dice.choice(self.settings)))

    async def _rotate_secret(self, settings: Settings) -> None:
        receiver, secret = settings.receiver, f"whsec_{len(settings.secrets):032d}"
        settings.secrets.append(secret)
        grace_s = self.dice.choice((2.0, 60.0))
        switch_s = self.dice.uniform(0, grace_s)
        if await self._call("rotate", settings, secret, timedelta(seconds=grace_s)):
            receiver.expects = max(receiver.expects, 0)
            await asyncio.sleep(switch_s)
            receiver.expects = len(settings.secrets) - 1

    def _delete(self) -> None:
        settings = self.dice.choice(self.settings)
        settings.is_prompt = False
        self._act(self._delete_one(settings))

    async def _delete_one(self, settings: Settings) -> None:
        await self._call("delete", settings)

    def _create_soon(self) -> None:
        self._act(self._create())

    def _redeliver(self) -> None:
        rows = [row for row in self.server.attempts if row[6] in {"delivered", "exhausted"}]
        if rows:
            row = self.dice.choice(rows)
            self._act(self._redeliver_one(row[3], row[1], row[2]))

    async def _redeliver_one(self, endpoint: int, seq: int, xid: int) -> None:
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            db = await self.office.connect()
            await db.fetchrow(statements("delivery")["redeliver"], endpoint, seq, xid)
            await db.close()
            self.note("api", f"redeliver {endpoint}:{seq}")

    def _replay(self) -> None:
        dice = self.dice
        since = self.db_clock() - timedelta(seconds=dice.choice((3.0, 3600.0)))
        choice = Choice(selection=dice.choice(tuple(Selection)), since=since, until=self.db_clock())
        self._act(self._replay_for(dice.choice(self.settings), choice))

    async def _replay_for(self, settings: Settings, choice: Choice) -> None:
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            db = await self.office.connect()
            made = await ReplayStore(db).create(settings.id, choice)
            await db.close()
            self.note("api", f"replay {choice.selection} {settings.id}: {bool(made)}")

    def _abandon(self) -> None:
        """A webhook is deleted with deliveries held for it."""
        settings = self.dice.choice(self.settings)
        settings.is_prompt = False
        self._act(self._delete_paused(settings, self.dice.choice((0.5, 3.0))))

    async def _delete_paused(self, settings: Settings, after_s: float) -> None:
        if await self._call("pause", settings):
            await asyncio.sleep(after_s)
            await self._call("delete", settings)

    async def _create(self) -> None:
        dice = self.dice
        receiver = self.internet.receiver(dice.choice((0.002, 0.02, 0.2)))
        ordered = dice.random() < self.plan.ordered
        rate_limit = dice.choice((5.0, 20.0)) if dice.random() < 0.15 else None
        calm = self.plan.kind == "calm"
        receiver.mood = Mood.BROKEN if self.plan.failing else Mood.WELL
        receiver.closes_idle = 0.0 if calm else dice.choice((0.0, 0.3))
        if rate_limit is not None:
            receiver.closes_idle = 0.0
        settings = Settings(
            receiver,
            events=dice.choice((["*"], ["a.*"], ["b.one", "a.one"])),
            schedule_s=tuple(dice.choice((0.0, 0.5, 1.0, 3.0, 12.0)) for _ in range(dice.randint(0, 4))),
            concurrency=dice.choice((1, 2, 4, 16)),
            rate_limit=rate_limit,
            ordered=ordered,
            timeout_s=dice.choice((1.0, 3.0, 6.0)),
            secrets=[f"whsec_{0:032d}"],
            is_prompt=calm and not ordered and rate_limit is None and receiver.latency_s < 0.1,
        )
        receiver.secrets = settings.secrets
        settings.is_prompt = settings.is_prompt and settings.concurrency > 1
        change = EndpointChange(
            url=receiver.url, description="", events=settings.events, headers={}, body_style=BodyStyle.COMPACT,
            retry=list(settings.schedule_s), max_concurrency=settings.concurrency, rate_limit=rate_limit,
            ordered=ordered, timeout_s=settings.timeout_s,
        )  # fmt: skip
        try:
            db = await self.office.connect()
            record = await EndpointStore(db, VAULT).create(ACCOUNT[0], change, settings.secrets[0])
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return
        settings.public_id = record.id
        [row] = [row for row in self.server.endpoints.values() if row["public_id"] == record.id]
        settings.id = row["id"]
        self.settings.append(settings)
        self.judge.created(row, settings)
        self.note("webhook", f"{settings.id} {settings.receiver.port} {'ordered ' if ordered else ''}{settings.events}")
        if ordered:
            settings.concurrency = 1
        await db.close()

    # the end of all trouble

    async def _heal(self) -> None:
        self.note("heal")
        self.healed = True
        self.weather.ambush = None
        self.judge.latest_wall = max(self.judge.latest_wall, self.wall())
        # A clock that was ahead and is not any more would have retries wait for an hour, rightly.
        self.wall_offset_s = max(self.wall_offset_s, self.judge.latest_wall - EPOCH - self.loop.now, 0.0)
        self._fuse = None
        for settings in self.settings:
            self._set_mood(settings.receiver, Mood.WELL)
            settings.receiver.expects = -1
        while self.weather.can_connect() is not None:
            await asyncio.sleep(0.1)
        for daemon in self.daemons:
            self._thaw(daemon.process)
        for task in self._api_tasks:
            await task
        for settings in self.settings:
            row = self.server.endpoints.get(settings.id)
            if row is not None and row["status"] == "paused":
                await self._call("resume", settings)


class _Trouble(logging.Handler):
    """Whatever the engine logs as an error is a finding."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.judge.fail(f"logged: {record.getMessage()} {record.exc_info}")


@functools.cache
def _tls_context(*_: Any, **__: Any) -> ssl.SSLContext:
    """One for all: reading the system's trust store takes longer than a seed."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
