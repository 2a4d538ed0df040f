"""Who runs a shard: a lease that ends with its session, and standbys that take over.

The lease is a session advisory lock on the listener's connection, which also hears NOTIFY and says each second that
we live. PostgreSQL drops the lock with the session, so a killed daemon is followed within one try of a standby.
Waiting inside `pg_advisory_lock()` would hold a snapshot and pin vacuum for the whole database, so a standby tries,
every 0.5 to 1 s.

The lease says who should write; the fence (the shard's epoch) makes sure that nobody else does.
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
from dispatcher.store.database import close, connect, statements
from dispatcher.store.shard import ShardStore
from dispatcher.telemetry import Snapshot, Telemetry

WAKE: Final = "dispatcher_wake"
REGISTRY: Final = "dispatcher_registry"
PENDING: Final = "dispatcher_pending"  # somebody else wrote held rows for a webhook, or began a replay
TRY_S: Final = (0.5, 1.0)
HEARTBEAT_S: Final = 1.0
CLOSE_S: Final = 2.0


class Instance:
    """This daemon as others see it: one row, refreshed each second."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self.id = f"{socket.gethostname()}:{os.getpid()}"
        self.waited_at: float | None = None  # loop time of a standby's last try for the lease; None while it is none
        self._started_at = datetime.now(UTC)
        self._snapshot = snapshot

    async def beat(self, connection: Any, role: str) -> None:
        """Write the row."""
        await connection.execute(
            statements("shard")["heartbeat"],
            self.id,
            socket.gethostname(),
            os.getpid(),
            role,
            __version__,
            self._started_at,
            msgspec.json.encode(self._snapshot()).decode(),
        )

    async def leave(self, connection: Any) -> None:
        """Remove it, and those of daemons long dead."""
        await connection.execute(statements("shard")["forget_instances"], self.id)


class Listener:
    """The connection that holds the lease, hears notifications and beats."""

    def __init__(self, dsn: str, shard: int, instance: Instance, telemetry: Telemetry, dice: random.Random) -> None:
        self._dsn = dsn
        self._shard = shard
        self._instance = instance
        self._telemetry = telemetry
        self._dice = dice
        self.connection: Any = None
        self.on_wake: Callable[[str], None] = lambda channel: None
        self.on_pending: Callable[[str], None] = lambda payload: None

    async def open(self) -> None:
        """Connect and listen. Raises DatabaseUnreachable."""
        self.connection = await connect(self._dsn, name="dispatcher listener", engine=True)
        for channel in (WAKE, REGISTRY, PENDING):
            await self.connection.add_listener(channel, self._heard)

    def _heard(self, _connection: object, _pid: int, channel: str, payload: str) -> None:
        if channel == PENDING:
            self.on_pending(payload)
        else:
            self.on_wake(channel)

    async def acquire(self, standby: Callable[[], None]) -> None:
        """Return once the lease is ours; until then beat as a standby, which `standby` is told once."""
        shard = ShardStore(self.connection, self._shard)
        await shard.system()  # raises on a read-only server: no lease is worth having there
        low, high = TRY_S
        told = False
        loop = asyncio.get_running_loop()
        try:
            while not await shard.try_lease():
                if not told:
                    told = True
                    standby()
                self._instance.waited_at = loop.time()
                await self._instance.beat(self.connection, "standby")
                await asyncio.sleep(self._dice.uniform(low, high))
        finally:
            self._instance.waited_at = None

    async def run(self) -> None:
        """Beat until cancelled; raises when the connection, and with it the lease, is gone."""
        while True:
            with self._telemetry.timed("heartbeat"):
                await self._instance.beat(self.connection, "active")
            await asyncio.sleep(HEARTBEAT_S)

    async def close(self, *, leave: bool = False) -> None:
        """Give the lease back by ending the session."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        try:
            async with asyncio.timeout(CLOSE_S):
                if leave and not connection.is_closed():
                    await self._instance.leave(connection)
        except Exception:  # noqa: BLE001  whatever state it is in, it ends here
            connection.terminate()
        await close(connection, CLOSE_S)
