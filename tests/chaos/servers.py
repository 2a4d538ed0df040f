"""A PostgreSQL of a test's own, to be killed, cut off, filled up and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
from daemons import PATIENCE_S

from dispatcher.embedded import EmbeddedPostgres
from dispatcher.store.database import TROUBLE
from dispatcher.store.schema import migrate


class Server(EmbeddedPostgres):
    """Unlike the test run's own server, it keeps what it said was committed, whatever kills it short of a power cut."""

    def __init__(self, directory: Path, **settings: str) -> None:
        given = os.environ.get("DISPATCHER_TEST_BIN")
        super().__init__(directory, Path(given) if given else None, ephemeral=True)
        self._own = {"synchronous_commit": "on", **settings}

    def _settings(self) -> dict[str, str]:
        return super()._settings() | self._own

    async def with_schema(self) -> str:
        """Start it and bring the schema up; return the DSN."""
        await asyncio.to_thread(self.start)
        await migrate(self.dsn)
        return self.dsn

    async def die(self, number: int) -> None:
        """Kill the postmaster."""
        assert self.pid is not None
        os.kill(self.pid, number)
        while self._runs():
            await asyncio.sleep(0.01)

    async def stop_at_once(self) -> None:
        """What `pg_ctl stop -m immediate` does."""
        await self.die(signal.SIGQUIT)

    @contextlib.asynccontextmanager
    async def asked(self) -> AsyncIterator[Any]:
        """A connection, once it can be had: the server may be recovering."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    connection = await asyncpg.connect(self.dsn)
                    break
                except TROUBLE:
                    await asyncio.sleep(0.02)
        try:
            yield connection
        finally:
            connection.terminate()

    async def backends(self) -> list[int]:
        """Processes that serve a daemon."""
        async with self.asked() as connection:
            rows = await connection.fetch("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'dispatcher %'")
        return [row["pid"] for row in rows]

    async def cut_all(self) -> None:
        async with self.asked() as connection:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
