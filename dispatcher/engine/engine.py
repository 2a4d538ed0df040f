"""The engine of one shard: everything that moves, put together, started, taken over, reconnected and drained.

**Sessions.** A session is a lease and its connections: that of the lease, reader (which hears NOTIFY), writer,
retries, upkeep.
Whatever breaks one of them ends the session and nothing else: lanes, requests in flight and the ledger live on
outside it. The next session finds its epoch unchanged and resumes: it settles the batch in doubt, writes pending rows
for what is in flight, forgets what is merely queued, and reads again from the persisted cursor. (Reading on from
memory would be wrong: a server that crashed may hand out again transaction ids whose rows it lost.) If the epoch has
moved, somebody else owns the shard, and memory is dropped.

**Stopping.** No new attempts; what is in flight may finish within `drain_s`; the rest is released, not counted, and
everything is settled.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from dispatcher.core.addresses import Guard
from dispatcher.core.backoff import reconnect_delay_s
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.lanes import Lanes
from dispatcher.core.routing import Registry
from dispatcher.core.shards import shard_numbers, shard_of
from dispatcher.engine.channels import FLEET, PENDING, hear
from dispatcher.engine.deliverer import Deliverer
from dispatcher.engine.delivery import Delivery
from dispatcher.engine.leases import Lease
from dispatcher.engine.ledger import Ledger
from dispatcher.engine.outbox import PAGE_ROWS, SAFETY_S, OutboxReader
from dispatcher.engine.replays import Replays
from dispatcher.engine.retries import Retries
from dispatcher.engine.spans import Spans
from dispatcher.engine.transport import Transport
from dispatcher.errors import ConfigurationError, DatabaseUnreachable, Fenced, SchemaMismatch
from dispatcher.logs import get_logger
from dispatcher.moments import to_datetime
from dispatcher.snapshot import NO_ENDPOINTS, WORST, Snapshot, TableSize, TroubledEndpoint
from dispatcher.store.database import TROUBLE, close, connect, raise_if_cancelled, statements
from dispatcher.store.endpoints import EndpointDefaults, EndpointStore
from dispatcher.store.outbox import CLOCK_SLACK
from dispatcher.store.pending import PendingStore
from dispatcher.store.retention import Pruned, Retention
from dispatcher.store.schema import check_schema, written_for
from dispatcher.store.shard import ShardState, ShardStore
from dispatcher.store.vault import Vault
from dispatcher.telemetry import Telemetry

BUFFERED_MAX: Final = 10_000  # outcomes waiting for PostgreSQL: 4 MB; SECURITY.md says what a crash may repeat
RETRIES_SHARE: Final = 4  # retries may fill a quarter of the queues
UPKEEP_S: Final = 0.25
STRAGGLER_S: Final = 2.0  # in flight longer than this after it was read: insured, so that it does not hold the cursor
SLOW_QUEUE_S: Final = 10.0
GRACE_S: Final = 10.0  # behind a straggler's deadline
GAUGES_S: Final = 1.0
SWEEP_S: Final = 30.0
RETENTION_S: Final = 600.0
CLOSE_S: Final = 5.0

log = get_logger("dispatcher.engine")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the engine must be told; from the configuration."""

    dsn: str
    listen_dsn: str
    defaults: EndpointDefaults
    jitter: float = 0.1
    max_in_flight: int = 2000
    max_queued: int = 20_000
    drain_s: float = 30.0
    synchronous_commit: bool = True
    user_agent: str = "TrackPost-Webhooks/1.0"
    header_prefix: str = "X-Trackpost-"
    events_kept_s: float = 30 * 86400.0
    attempts_kept_s: float = 30 * 86400.0
    disable_after_s: float | None = 5 * 86400.0  # of nothing but failures; None: never
    log_failures: bool = True
    log_successes: float = 0.0  # a share


class Engine:
    """One shard's engine. `run` returns after `stop`, and survives everything else but a bug."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        transport: Transport,
        guard: Guard,
        vault: Vault,
        ids: DeliveryIds,
        shard: int = 0,
        shards: int = 1,
        member: int = 0,
        telemetry: Telemetry | None = None,
        spans: Spans | None = None,
        wall: Callable[[], float] = time.time,
        dice: random.Random | None = None,
    ) -> None:
        """Make the engine of `shard`, one of `shards`, for the daemon known to others as `member`.

        Transport and telemetry may be shared with other engines: whoever made them closes and shows them.
        """
        loop = asyncio.get_running_loop()
        self.settings = settings
        self.shard = shard
        self.shards = shards
        self.leaving = False  # asked to stop
        self.role = "standby"
        self.database = False
        self.page_rows = PAGE_ROWS
        self.safety_s = SAFETY_S
        self.losses = 0  # sessions that ended in trouble with the database
        self.on_fleet: Callable[[], None] = lambda: None  # called while active, when something about the fleet changed
        self.settled = False  # active, or standing by for another daemon, at least once
        self._loop = loop
        self._wall = wall
        self._dice = dice or random.Random()  # noqa: S311  spreads load, guards nothing
        self._transport = transport
        self._vault = vault
        self._stopping = asyncio.Event()
        self._member = member
        self._is_elsewhere = (
            False  # another daemon has the shard: what memory holds of it besides requests is out of date
        )
        self._has_duties = shard == shard_numbers(shards)[0]  # of the database as a whole: one shard sees to them
        self._parts = 1  # of the limits: how many engines share them
        self._drain_s: float | None = None  # None: as configured
        self._epoch = 0
        self._reader: OutboxReader | None = None
        self._retries: Retries | None = None
        self._oldest_pending_at: datetime | None = None
        self._newest_seq = 0
        self._statuses = dict(NO_ENDPOINTS)
        self._instances: dict[str, int] = {}
        self._partitions_until: dict[str, float] = {}
        self._pruned = Pruned()
        self._sizes: list[TableSize] = []
        self._retained_at = 0.0
        self.telemetry = telemetry or Telemetry()
        lanes: Lanes[Delivery] = Lanes(
            queued_max=settings.max_queued,
            lane_queued_max=settings.max_queued,
            retries_queued_max=settings.max_queued // RETRIES_SHARE,
            in_flight_max=settings.max_in_flight,
        )
        self.ledger = Ledger(self.telemetry, loop, buffered_max=BUFFERED_MAX, wall=wall)
        self.ledger.disable_after_s = settings.disable_after_s
        self.deliverer = Deliverer(
            lanes=lanes,
            ledger=self.ledger,
            transport=transport,
            guard=guard,
            telemetry=self.telemetry,
            ids=ids,
            loop=loop,
            jitter=settings.jitter,
            user_agent=settings.user_agent,
            header_prefix=settings.header_prefix,
            wall=wall,
            dice=self._dice,
        )
        self.deliverer.spans = spans
        self._tell_journal(settings)

    # ── life ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def stop(self, drain_s: float | None = None) -> None:
        """Drain, for at most `drain_s` instead of what is configured, and end. Idempotent."""
        if not self.leaving:
            self._drain_s = drain_s
        self.leaving = True
        self._stopping.set()
        if self._reader is not None:
            self._reader.stop()

    def reconfigure(self, settings: EngineSettings, guard: Guard) -> None:
        """Take changed settings over while running: limits at once, webhook defaults with the next registry."""
        self.settings = settings
        self.ledger.disable_after_s = settings.disable_after_s
        self.share_limits(self._parts)
        self._tell_journal(settings)
        self._transport.use_guard(guard)
        self.deliverer.reconfigure(guard, settings.jitter)
        if self._reader is not None:
            self._reader.reload_soon()

    def share_limits(self, parts: int) -> None:
        """Keep to one of so many equal parts of the limits, which are the process's.

        Where more is in hand already, that is the limit until this is called again.
        """
        self._parts = parts
        settings, lanes = self.settings, self.deliverer.lanes
        queued_max = max(1, settings.max_queued // parts)
        lanes.queued_max = lanes.lane_queued_max = max(queued_max, lanes.queued)
        lanes.retries_queued_max = max(queued_max // RETRIES_SHARE, lanes.retries_queued)
        lanes.in_flight_max = max(1, settings.max_in_flight // parts, lanes.in_flight)
        self.ledger.buffered_max = BUFFERED_MAX // parts

    def _tell_journal(self, settings: EngineSettings) -> None:
        journal = self.deliverer.journal
        journal.failures, journal.successes = settings.log_failures, settings.log_successes
        self.deliverer.logs_successes = settings.log_successes > 0.0

    async def run(self) -> None:
        """Run sessions until stopped. Raises SchemaMismatch and ConfigurationError, since no waiting mends those."""
        failures = 0
        try:
            while not self._stopping.is_set():
                began = self._loop.time()
                try:
                    await self._unless_stopped(self._session())
                except* Fenced as group:
                    self._lose(group)
                except* (DatabaseUnreachable, *TROUBLE) as group:
                    failures = 1 if self._loop.time() - began > 60 else failures + 1
                    await self._mourn(group, failures)
        finally:
            await self.deliverer.close()

    async def _unless_stopped(self, session: Any) -> None:
        """Run a session; a stop before it is under way ends it, after that it drains by itself."""
        task = asyncio.create_task(session, name="engine session")
        stop = asyncio.create_task(self._stopping.wait(), name="engine stop")
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and self.role == "standby":
                task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled() and (error := task.exception()) is not None:
                raise _plain(error)
        finally:
            stop.cancel()
            if not task.done():  # we are being cancelled: so is the session
                task.cancel()
                await asyncio.wait((task,))

    async def _mourn(self, group: BaseExceptionGroup[BaseException], failures: int) -> None:
        error = _first(group)
        self.database = False
        self.role = "standby"
        self.losses += 1
        delay_s = reconnect_delay_s(failures, self._dice.random())
        reason = str(error).strip() or type(error).__name__
        log.warning("database.lost", reason=reason.splitlines()[0], retry_in_s=round(delay_s, 2), failures=failures)
        try:
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _lose(self, error: BaseException) -> None:
        log.warning("lease.lost", shard=self.shard, reason=str(_first(error)))
        self.role = "standby"
        self._epoch = 0
        self.deliverer.forget_all()
        self.ledger.abandon()

    # ── one session ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _session(self) -> None:
        settings = self.settings
        lease = Lease(settings.listen_dsn, self.shard, self._member, self.telemetry, self._dice)
        connections: list[Any] = []
        try:
            await lease.open()
            await check_schema(lease.connection)
            self.database = True
            await lease.acquire(self._stand_by)
            commit = {"synchronous_commit": "on" if settings.synchronous_commit else "off"}
            for name, dsn, extra in (
                ("reader", settings.listen_dsn, {}),
                ("writer", settings.dsn, commit),
                ("retries", settings.dsn, {}),
                ("upkeep", settings.dsn, {}),
            ):
                connections.append(await connect(dsn, name=f"dispatcher {name}", engine=True, settings=extra))
            await self._work(lease, *connections)
        finally:
            self.deliverer.running = False
            self.ledger.cursor = lambda: None
            for connection in connections:
                connection.terminate()
            await lease.close()

    def _stand_by(self) -> None:
        self.role = "standby"
        self._is_elsewhere = True
        self.settled = True
        log.info("standby", shard=self.shard, waits_for="the lease of another daemon on this database")

    async def _work(self, lease: Lease, reading: Any, writing: Any, retrying: Any, upkeep: Any) -> None:
        shard = ShardStore(writing, self.shard)
        endpoints = EndpointStore(writing, self._vault)
        registry_lock = asyncio.Lock()
        registry_store = EndpointStore(upkeep, self._vault)

        async def load_registry() -> Registry:
            async with registry_lock:
                found, version = await registry_store.registry(self.settings.defaults, self.shard)
            self._statuses = dict(NO_ENDPOINTS)
            for endpoint in found:
                self._statuses[endpoint.status.value] += 1
            return Registry(found, version)

        reader = OutboxReader(
            reading,
            deliverer=self.deliverer,
            ledger=self.ledger,
            telemetry=self.telemetry,
            load_registry=load_registry,
            dice=self._dice,
            page_rows=self.page_rows,
            safety_s=self.safety_s,
            has_duties=self._has_duties,
        )
        retries = Retries(
            PendingStore(retrying, self.shard),
            deliverer=self.deliverer,
            ledger=self.ledger,
            telemetry=self.telemetry,
            registry=lambda: reader.registry,
            recovering=lambda: reader.recovering,
            wall=self._wall,
        )
        self.deliverer.on_hungry = retries.hungry
        self.deliverer.on_dismissed = retries.orphaned
        self.ledger.on_commit = retries.committed
        replays = Replays(self.settings.dsn)

        def told(payload: str) -> None:
            numbers = payload.split()
            if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
                if shard_of(int(numbers[0]), self.shards) == self.shard:
                    retries.told(int(numbers[0]), int(numbers[1]))
            else:
                replays.told()

        def heard(channel: str, payload: str) -> None:
            if channel == PENDING:
                told(payload)
            elif channel == FLEET:
                self.on_fleet()
            else:
                reader.hear(channel)

        state = await self._take_over(shard, endpoints, reader)
        await hear(reading, heard)  # before looking for what is held: nothing falls in between
        await retries.start()
        self.ledger.cursor = reader.cursor
        self._reader, self._retries = reader, retries
        lost = asyncio.Event()
        for connection in (lease.connection, reading, writing, retrying, upkeep):
            connection.add_termination_listener(lambda _: lost.set())
        lease.on_valid = self.deliverer.send_until
        self.role = "active"
        self._is_elsewhere = False
        self.settled = True
        self.deliverer.running = True
        log.info("active", shard=self.shard, epoch=self._epoch, endpoints=len(reader.registry))
        if self._stopping.is_set():
            reader.stop()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(reader.run(state.cursor, state.floor), name="outbox reader"),
                group.create_task(retries.run(), name="retries"),
                group.create_task(retries.run_backlogs(), name="backlogs"),
                group.create_task(lease.run(), name="lease"),
                group.create_task(self._upkeep(upkeep, registry_lock, reader), name="upkeep"),
                group.create_task(_raise_when(lost), name="connections"),
            ]
            if self._has_duties:
                tasks.append(group.create_task(self._retain(), name="retention"))
                tasks.append(group.create_task(replays.run(), name="replays"))
            group.create_task(self.ledger.run(shard, endpoints, self._epoch), name="ledger")
            await self._stopping.wait()
            await self._drain(tasks[0])
            for task in tasks:
                task.cancel()
            self.ledger.finish()
        await self.ledger.flush(shard, endpoints, self._epoch)
        self.role = "standby"

    async def _take_over(self, shard: ShardStore, endpoints: EndpointStore, reader: OutboxReader) -> ShardState:
        state = await shard.state()
        if state.shards != self.shards:
            raise Fenced(f"there are {state.shards} shards now, not {self.shards}")
        if not self._epoch or state.epoch != self._epoch:
            if self._epoch:
                self._lose(Fenced("another daemon had the shard meanwhile"))
            self._epoch = await shard.take_over()
            state = await shard.state()  # its last flush may have come in between
        await self.ledger.resume(shard, endpoints, self._epoch, state.batch)
        self.deliverer.drop_queued()
        self.deliverer.insure(float("inf"), due_s=GRACE_S)
        await self.ledger.flush(shard, endpoints, self._epoch)
        self.ledger.load_health(await endpoints.health())
        await reader.reload()
        system = await shard.system()
        if state.system != system or state.is_ahead:
            await self._naturalize(shard, endpoints, reader, system)
        return await shard.state()

    async def _naturalize(self, shard: ShardStore, endpoints: EndpointStore, reader: OutboxReader, system: str) -> None:
        """The database was restored into another cluster: read by the clock once, then by its own transaction ids."""
        state = await shard.state()
        log.warning("restored", was=state.system, now=system)
        cursor = await reader.reread(
            state.cursor.prev_at - CLOCK_SLACK, lambda: self.ledger.flush(shard, endpoints, self._epoch)
        )
        await shard.naturalize(self._epoch, system, cursor.prev, cursor.prev_at)
        await reader.reload()

    async def _drain(self, reading: asyncio.Task[None]) -> None:
        deliverer = self.deliverer
        drain_s = self.settings.drain_s if self._drain_s is None else self._drain_s
        log.info("draining", shard=self.shard, in_flight=len(deliverer.in_flight), drain_s=drain_s)
        assert self._reader is not None
        self._reader.stop()
        deliverer.running = False
        reading.cancel()
        if not await deliverer.drained(drain_s):
            log.warning("drain.cut_short", shard=self.shard, in_flight=len(deliverer.in_flight))
        await deliverer.close()

    # ── upkeep ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _upkeep(self, connection: Any, lock: asyncio.Lock, reader: OutboxReader) -> None:
        gauges_at = sweep_at = 0.0
        while True:
            before = self._loop.time()
            await asyncio.sleep(UPKEEP_S)
            now = self._loop.time()
            self.telemetry.loop_lag_s = max(0.0, now - before - UPKEEP_S)
            self._free_cursor(reader.oldest_open_at, now)
            if now >= gauges_at:
                gauges_at = now + GAUGES_S
                async with lock:
                    row = await connection.fetchrow(statements("shard")["gauges"])
                self._newest_seq, self._oldest_pending_at, active, standby = row
                self._instances = {"active": active, "standby": standby}
            if now >= sweep_at:
                sweep_at = now + SWEEP_S
                self.deliverer.sweep()
                async with lock:
                    rows = await connection.fetch(statements("shard")["partitions_until"])
                self._partitions_until = dict(rows)

    def _free_cursor(self, oldest_at: float | None, now: float) -> None:
        """Write pending rows for what has held the cursor for too long."""
        if oldest_at is None:
            return
        if oldest_at < now - STRAGGLER_S:
            self.deliverer.insure(now - STRAGGLER_S, due_s=GRACE_S)
        if oldest_at < now - SLOW_QUEUE_S:
            self.deliverer.spill_old(now - SLOW_QUEUE_S)

    async def _retain(self) -> None:
        """Retention now and then, on a connection of its own: it waits for locks, and nothing waits for it."""
        settings = self.settings
        while True:
            try:
                connection = await connect(settings.dsn, name="dispatcher retention")
                try:
                    retention = Retention(connection, settings.events_kept_s, settings.attempts_kept_s)
                    self._pruned = await retention.run()
                    self._sizes = await retention.sizes()
                    self._retained_at = self._wall()
                finally:
                    await close(connection, CLOSE_S)
            except (DatabaseUnreachable, *TROUBLE) as error:
                raise_if_cancelled()
                log.warning("retention.failed", reason=str(error), retry_in_s=RETENTION_S)
            await asyncio.sleep(RETENTION_S)
            settings = self.settings

    # ── seen from outside ──────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> Snapshot:
        """The engine at this moment. Touches no table."""
        deliverer, reader, retries = self.deliverer, self._reader, self._retries
        lanes, now = deliverer.lanes, self._loop.time()
        wall = datetime.fromtimestamp(self._wall(), UTC)
        active = self.role == "active" and reader is not None and retries is not None
        moved_at = min(reader.progress_at, retries.progress_at) if active and reader and retries else None
        ours = Snapshot(
            schema=written_for(),
            role=self.role,
            database=self.database,
            database_losses=self.losses,
            progress_age_s=max(0.0, now - moved_at) if moved_at is not None else 0.0,
            at_unix_s=self._wall(),
            **self.telemetry.counters(),
            in_flight=len(deliverer.in_flight),
            buffered=self.ledger.buffered,
            connections=self._transport.count_connections(),
        )
        if self._is_elsewhere:
            return ours
        behind = to_datetime(reader.read_to_us) if active and reader and reader.read_to_us is not None else None
        oldest = [at for at in (self._oldest_pending_at, behind) if at is not None]
        return msgspec.structs.replace(
            ours,
            shards=[self.shard] if active else [],
            outbox_lag_s=max(0.0, (wall - behind).total_seconds()) if behind else 0.0,
            outbox_backlog=max(0, self._newest_seq - reader.read_seq) if behind and reader else 0,
            queued=lanes.queued,
            retries_waiting=retries.waiting if retries else 0,
            oldest_pending_s=max(0.0, (wall - min(oldest)).total_seconds()) if oldest else 0.0,
            endpoints=dict(self._statuses),
            lanes={health.value: n for health, n in lanes.healths.items()},
            instances=dict(self._instances) if active else {},
            partitions_until_unix_s=dict(self._partitions_until) if active else {},
            worst=[
                TroubledEndpoint(
                    s.endpoint.public_id,
                    s.lane.window.health.value,
                    s.lane.queued,
                    s.lane.busy,
                    s.lane.window.size,
                    s.backlog,
                    s.error,
                )
                for s in deliverer.troubled(WORST)
            ],
            tables=self._sizes,
            astray_rows=self._pruned.astray,
            retention_unix_s=self._retained_at,
        )


async def _raise_when(lost: asyncio.Event) -> None:
    """End the session as soon as a connection is lost, also one that nobody is using just then."""
    await lost.wait()
    raise ConnectionResetError("the database closed a connection")


def _plain(error: BaseException) -> BaseException:
    """What a person has to mend, out of its group; else the error as it is."""
    if isinstance(error, BaseExceptionGroup):
        mine = error.subgroup((SchemaMismatch, ConfigurationError))
        return error if mine is None else _first(mine)
    return error


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
