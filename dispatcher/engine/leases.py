"""Who runs a shard: a lease that ends with its session, and others that take over.

The lease is a session advisory lock on a connection of its own, which speaks each second.
PostgreSQL drops the lock with the session, so a killed daemon is followed within one try of another one. Waiting
inside `pg_advisory_lock()` would hold a snapshot and pin vacuum for the whole database, so who waits tries, every 0.5
to 1 s, and when told that a lease was given back.

A process that hangs keeps its sessions. Who waits for its lease ends the one that has been silent for SILENT (10 s).
Should the process wake up, it has not sent anything by then: it sends only until VALID_S after it last asked and was
answered. It may still write, on its other connections, what had come in; there the fence (the shard's epoch) stops it.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from dispatcher import __version__
from dispatcher.engine.channels import FLEET
from dispatcher.logs import get_logger
from dispatcher.snapshot import Snapshot
from dispatcher.store.database import close, connect, statements
from dispatcher.store.fleet import SILENT, FleetStore
from dispatcher.store.shard import ShardStore
from dispatcher.telemetry import Telemetry

TRY_S: Final = (0.5, 1.0)
HEARTBEAT_S: Final = 1.0
CLOSE_S: Final = 2.0
VALID_S: Final = 7.0  # a margin of 3 s below SILENT for what was on its way out
assert SILENT.total_seconds() > VALID_S + HEARTBEAT_S

log = get_logger("dispatcher.leases")


class Instance:
    """This process as others see it: one row, refreshed each second."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self.id = f"{socket.gethostname()}:{os.getpid()}"
        self._started_at = datetime.now(UTC)
        self._snapshot = snapshot

    async def beat(self, connection: Any) -> None:
        """Write the row. `connection` may be a pool."""
        snapshot = self._snapshot()
        await connection.execute(
            statements("shard")["heartbeat"],
            self.id,
            socket.gethostname(),
            os.getpid(),
            snapshot.role,
            __version__,
            self._started_at,
            msgspec.json.encode(snapshot).decode(),
        )

    async def others(self, connection: Any) -> list[Snapshot]:
        """What other processes with an engine last wrote. `connection` may be a pool."""
        rows = await connection.fetch(statements("shard")["instances"])
        return [
            msgspec.json.decode(row["snapshot"], type=Snapshot)
            for row in rows
            if row["id"] != self.id and row["role"] != "web"
        ]

    async def leave(self, connection: Any) -> None:
        """Remove it, and those of daemons long dead."""
        await connection.execute(statements("shard")["forget_instances"], self.id)


async def until_rung(bell: asyncio.Event, timeout_s: float) -> None:
    """Wait until the bell rings, or for so long."""
    try:
        async with asyncio.timeout(timeout_s):
            await bell.wait()
    except TimeoutError:
        pass
    bell.clear()


class Lease:
    """The connection that holds a shard's lease. While it waits for that, it hears when one comes free."""

    def __init__(self, dsn: str, shard: int, member: int, telemetry: Telemetry, dice: random.Random) -> None:
        self._dsn = dsn
        self._shard = shard
        self._member = member
        self._telemetry = telemetry
        self._dice = dice
        self._loop = asyncio.get_running_loop()
        self._freed = asyncio.Event()
        self._valid_until = 0.0
        self.connection: Any = None
        self.on_valid: Callable[[float], None] = lambda until: None  # the lease is ours until then, loop time

    async def open(self) -> None:
        """Connect. Raises DatabaseUnreachable."""
        # Daemons of the first release find by this name whom to evict.
        self.connection = await connect(self._dsn, name="dispatcher listener", engine=True)

    def _hear(self, *_: object) -> None:
        self._freed.set()

    async def acquire(self, standby: Callable[[], None]) -> None:
        """Return once the lease is ours. `standby` is told once, if that takes longer."""
        shard, fleet = ShardStore(self.connection, self._shard), FleetStore(self.connection)
        await shard.system()  # raises on a read-only server: no lease is worth having there
        await fleet.sign(self._member)
        if await self._try(shard):
            return
        await self.connection.add_listener(FLEET, self._hear)
        told = False
        while not await self._try(shard):
            if not told:
                told = True
                standby()
            if await fleet.evict(self._shard):
                log.warning("lease.evicted", shard=self._shard, reason="its holder's process hangs")
            await until_rung(self._freed, self._dice.uniform(*TRY_S))
        await self.connection.remove_listener(FLEET, self._hear)

    async def _try(self, shard: ShardStore) -> bool:
        asked_at = self._loop.time()
        is_ours = await shard.try_lease()
        self._valid_until = asked_at + VALID_S
        return is_ours

    async def run(self) -> None:
        """Renew the lease until cancelled; raises when the connection, and with it the lease, is gone."""
        self.on_valid(self._valid_until)
        fleet = FleetStore(self.connection)
        while True:
            asked_at = self._loop.time()
            with self._telemetry.timed("heartbeat"):
                await fleet.renew()
            self.on_valid(asked_at + VALID_S)
            await asyncio.sleep(HEARTBEAT_S)

    async def close(self) -> None:
        """Give the lease back, and end the session."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        try:
            async with asyncio.timeout(CLOSE_S):
                if not connection.is_closed():
                    await FleetStore(connection).part()
        except Exception:  # noqa: BLE001  whatever state it is in, it ends here
            connection.terminate()
        await close(connection, CLOSE_S)
