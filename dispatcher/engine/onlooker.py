"""A process that serves API and dashboard without an engine: it knows of engines what they write down each second."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from dispatcher.core.addresses import Guard
from dispatcher.engine.engine import EngineSettings
from dispatcher.engine.leases import HEARTBEAT_S, Instance, until_rung
from dispatcher.engine.transport import Transport
from dispatcher.logs import get_logger
from dispatcher.snapshot import Snapshot, total
from dispatcher.store.database import TROUBLE
from dispatcher.store.schema import written_for

log = get_logger("dispatcher.onlooker")


class Onlooker:
    """Stands where otherwise a Fleet does."""

    def __init__(self, pool: Any, transport: Transport) -> None:
        self.settled = False
        self._pool = pool
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._instance = Instance(self.snapshot)
        self._engines: list[Snapshot] = []
        self._database = False
        self._looked_at = self._loop.time()
        self._stopping = False
        self._bell = asyncio.Event()

    def out(self, _endpoint_id: int) -> set[tuple[int, int]]:
        """As a Fleet's: nothing is sent from here."""
        return set()

    def stop(self) -> None:
        """End. Idempotent."""
        self._stopping = True
        self._bell.set()

    def reconfigure(self, _: EngineSettings, guard: Guard) -> None:
        """Take changed settings over: test sends are judged by the guard."""
        self._transport.use_guard(guard)

    async def run(self) -> None:
        """Look once a second, until stopped. Whatever is wrong with the database is waited out."""
        while not self._stopping:
            try:
                self._engines = await self._instance.others(self._pool)
                await self._instance.beat(self._pool)
                self._database = self.settled = True
                self._looked_at = self._loop.time()
            except TROUBLE as error:
                if self._database:
                    log.warning("database.lost", reason=str(error) or type(error).__name__)
                self._database = False
            await until_rung(self._bell, HEARTBEAT_S)
        if self._database:
            try:
                await self._instance.leave(self._pool)
            except TROUBLE as error:
                log.warning("database.lost", reason=str(error) or type(error).__name__)
        await self._transport.close()

    def snapshot(self) -> Snapshot:
        """This process alone: it delivers nothing."""
        return Snapshot(
            schema=written_for(),
            role="web",
            database=self._database,
            progress_age_s=self._loop.time() - self._looked_at,
            at_unix_s=time.time(),
            connections=self._transport.count_connections(),
        )

    def everything(self) -> Snapshot:
        """All engines on this database together, as of a second ago."""
        return total(self._engines)
