"""A daemon among daemons: which shards it runs, an engine for each.

**Rule.** A daemon is a member as long as a session of its own holds a lock that says so. Twice a second, and whenever
told that somebody came, went or gave a lease back, it looks who is there and who holds what, and moves towards its
share (`core/shards.py`): it begins shards that nobody holds, and gives up what is too much.

**Giving up.** An engine that is released begins nothing new, waits a moment for what is in flight, lets go of the rest
uncounted, settles everything and only then gives the lease back. So a webhook is never called by two daemons at once,
and nothing is sent twice but what was let go. After a crash PostgreSQL gives the leases back.

**Sharing.** Engines share the transport, the counters and the limits of their process, each taking an equal part of
`max_in_flight` and `max_queued`. With one shard the first daemon runs it and the others stand by.

**Edge.** When the database is away, engines keep what they have in memory and go on where they were, unless somebody
else has taken their shard meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from dispatcher.core.addresses import Guard
from dispatcher.core.backoff import reconnect_delay_s
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.shards import Moves, moves
from dispatcher.engine.channels import FLEET
from dispatcher.engine.engine import Engine, EngineSettings
from dispatcher.engine.leases import CLOSE_S, HEARTBEAT_S, Instance, until_rung
from dispatcher.engine.spans import Spans
from dispatcher.engine.transport import Transport
from dispatcher.errors import DatabaseUnreachable
from dispatcher.logs import get_logger
from dispatcher.snapshot import Snapshot, total
from dispatcher.store.database import TROUBLE, close, connect
from dispatcher.store.fleet import MEMBER_MAX, FleetStore
from dispatcher.store.schema import check_schema, written_for
from dispatcher.store.shard import ShardStore
from dispatcher.store.vault import Vault
from dispatcher.telemetry import Telemetry

LOOK_S: Final = 0.5  # 0.3 ms of PostgreSQL's time
HANDOVER_S: Final = 3.0  # what a released shard's requests get to finish; its webhooks wait that long

log = get_logger("dispatcher.fleet")


class Fleet:
    """The engines of this process. `run` returns after `stop`, and survives everything else but a bug."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        transport: Transport,
        guard: Guard,
        vault: Vault,
        ids: DeliveryIds,
        spans: Spans | None = None,
        wall: Callable[[], float] = time.time,
        dice: random.Random | None = None,
    ) -> None:
        self.settings = settings
        self.telemetry = Telemetry()
        self.engines: dict[int, Engine] = {}  # by shard; those that are ending included
        self.database = False
        self.losses = 0  # sessions that ended in trouble with the database: our own and those of engines that ended
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._guard = guard
        self._vault = vault
        self._ids = ids
        self._spans = spans
        self._wall = wall
        self._dice = dice or random.Random()  # noqa: S311  spreads load, guards nothing
        self._member = self._dice.randint(1, MEMBER_MAX)
        self._instance = Instance(self.snapshot)
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by shard
        self._bell = asyncio.Event()  # something about the fleet may have changed
        self._joining: asyncio.Task[None] | None = None  # a session that is not under way yet
        self._stopping = False
        self._looked = False  # at who holds what, at least once
        self._looked_at = self._loop.time()
        self._is_one_of_several = False
        self._others: list[Snapshot] = []

    # ── life ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def settled(self) -> bool:
        """Whether we know which shards are ours, and each of them has begun or stands by."""
        return self._looked and all(engine.settled for engine in self.engines.values())

    def stop(self) -> None:
        """Drain all shards and end. Idempotent."""
        self._stopping = True
        for engine in self.engines.values():
            engine.stop()
        if self._joining is not None:
            self._joining.cancel()
        self._bell.set()

    def reconfigure(self, settings: EngineSettings, guard: Guard) -> None:
        """Take changed settings over while running."""
        self.settings = settings
        self._guard = guard
        self._transport.use_guard(guard)
        for engine in self.engines.values():
            engine.reconfigure(settings, guard)

    async def run(self) -> None:
        """Take part until stopped. Raises SchemaMismatch and ConfigurationError, since no waiting mends those."""
        failures = 0
        try:
            while self._tasks or not self._stopping:
                began = self._loop.time()
                try:
                    await self._member_session()
                except (DatabaseUnreachable, *TROUBLE) as error:
                    failures = 1 if self._loop.time() - began > 60 else failures + 1
                    await self._mourn(error, failures)
        finally:
            for task in self._tasks.values():
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks.values())
            await self._transport.close()

    async def _mourn(self, error: BaseException, failures: int) -> None:
        self.database = False
        self.losses += 1
        delay_s = reconnect_delay_s(failures, self._dice.random())
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("database.lost", reason=reason, retry_in_s=round(delay_s, 2), failures=failures)
        await until_rung(self._bell, delay_s)
        self._bury_ended()

    # ── one session as a member ────────────────────────────────────────────────────────────────────────────────────

    async def _member_session(self) -> None:
        """A session, which a stop before it is under way ends."""
        task = self._joining = asyncio.create_task(self._session(), name="member")
        try:
            await asyncio.wait((task,))
            if not task.cancelled():
                task.result()
        finally:
            self._joining = None
            if not task.done():  # we are being cancelled: so is the session
                task.cancel()
                await asyncio.wait((task,))

    async def _session(self) -> None:
        connection = await connect(self.settings.listen_dsn, name="dispatcher member", engine=True)
        try:
            await check_schema(connection)
            await ShardStore(connection, 0).system()  # raises on a read-only server
            fleet = FleetStore(connection)
            if not self._stopping:
                await fleet.join(self._member)
            self.database = True
            self._looked_at = self._loop.time()
            self._joining = None
            await self._take_part(connection, fleet)
            async with asyncio.timeout(CLOSE_S):
                await self._instance.leave(connection)
        finally:
            await close(connection, CLOSE_S)

    async def _take_part(self, connection: Any, fleet: FleetStore) -> None:
        is_member, is_listening, beat_at = True, False, 0.0
        while self._tasks or not self._stopping:
            if is_listening is self._is_told:
                is_listening = not is_listening
                await (connection.add_listener if is_listening else connection.remove_listener)(FLEET, self._hear)
            if not self._stopping:
                await self._look(fleet)
            elif is_member:
                is_member = False
                await fleet.part()
            if self._loop.time() >= beat_at:
                beat_at = self._loop.time() + HEARTBEAT_S
                with self.telemetry.timed("heartbeat"):
                    await self._instance.beat(connection)
                self._others = await self._instance.others(connection) if self._is_one_of_several else []
            await until_rung(self._bell, LOOK_S)
            self._bury_ended()

    @property
    def _is_told(self) -> bool:
        """Whether an engine of ours hears what happens in the fleet, and tells us."""
        return any(engine.role == "active" for engine in self.engines.values())

    def _hear(self, *_: object) -> None:
        self._bell.set()

    async def _look(self, fleet: FleetStore) -> None:
        """See who is there and who holds what, and move towards our share."""
        view = await fleet.view()
        self._looked_at = self._loop.time()
        self._is_one_of_several = len(view.members) > 1
        for engine in self.engines.values():
            if engine.shards != view.count:
                engine.stop()  # without a lease: the number changes only while nobody has one
        staying = {shard: engine for shard, engine in self.engines.items() if not engine.leaving}
        active = {shard for shard, engine in staying.items() if engine.role == "active"}
        move = moves(
            view, self._member, active=active, waiting=staying.keys() - active, leaving=self.engines.keys() - staying
        )
        if not self._stopping:
            self._move(move, view.count)

    def _move(self, move: Moves, count: int) -> None:
        for shard in move.lost:
            self.engines[shard].stop()
        for shard in move.release:
            log.info("shard.released", shard=shard)
            self.engines[shard].stop(min(HANDOVER_S, self.settings.drain_s))
        for shard in move.take:
            self._begin(shard, count)
        if not self._looked and not self.engines:
            log.info("standby", waits_for="a daemon on this database that ends")
        self._looked = True

    # ── engines ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, shard: int, count: int) -> None:
        engine = Engine(
            self.settings,
            transport=self._transport,
            guard=self._guard,
            vault=self._vault,
            ids=self._ids,
            shard=shard,
            shards=count,
            member=self._member,
            telemetry=self.telemetry,
            spans=self._spans,
            wall=self._wall,
            dice=self._dice,
        )
        engine.on_fleet = self._hear
        task = asyncio.create_task(engine.run(), name=f"engine of shard {shard}")
        task.add_done_callback(self._hear)
        self.engines[shard], self._tasks[shard] = engine, task
        self._share_limits()

    def _bury_ended(self) -> None:
        """Forget the engines that have ended. Raises what one of them ended with."""
        for shard in [shard for shard, task in self._tasks.items() if task.done()]:
            self.losses += self.engines.pop(shard).losses
            self._tasks.pop(shard).result()
        self._share_limits()

    def _share_limits(self) -> None:
        for engine in self.engines.values():
            engine.share_limits(len(self.engines))

    # ── seen from outside ──────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> Snapshot:
        """This process at this moment. Touches no table."""
        engines = total([engine.snapshot() for engine in self.engines.values()])
        idle_s = self._loop.time() - self._looked_at if self.database and not self._stopping else 0.0
        return msgspec.structs.replace(
            engines,
            schema=written_for(),
            database=self.database and all(engine.database for engine in self.engines.values()),
            database_losses=self.losses + engines.database_losses,
            progress_age_s=max(idle_s, engines.progress_age_s),
            at_unix_s=self._wall(),
            connections=self._transport.count_connections(),
            **self.telemetry.counters(),
        )

    def out(self, endpoint_id: int) -> set[tuple[int, int]]:
        """Which deliveries to a webhook have a request out, by (event sequence, generation). Walks over all of them."""
        return {each for engine in self.engines.values() for each in engine.deliverer.out(endpoint_id)}

    def everything(self) -> Snapshot:
        """All engines on this database together: ours now, the others' as of a second or two ago."""
        return total([self.snapshot(), *self._others])
