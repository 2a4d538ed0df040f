"""Every connection that PostgreSQL has is taken: the daemon waits for some, under load and at its start."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemons import Program, until
from servers import Server
from siege import Siege

CONNECTIONS = 24
LOAD = 60
TOO_FEW = 3  # for a daemon


class Crowd:
    """Somebody who takes every connection there is, and holds on to it."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._held: list[Any] = []

    async def fill(self) -> None:
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                self._held.append(await asyncpg.connect(self._dsn))

    async def take_the_daemons(self) -> None:
        """Take them away from daemons, too."""
        others = "application_name LIKE 'dispatcher %'"
        await self.fill()
        while await self._held[0].fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {others}"):
            await self._held[0].execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
            await self.fill()

    async def release(self, count: int = CONNECTIONS) -> None:
        while self._held and count:
            await self._held.pop().close()
            count -= 1


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(
        tmp_path / "postgres", max_connections=str(CONNECTIONS), superuser_reserved_connections="0",
        reserved_connections="0",
    )  # fmt: skip
    yield server
    await asyncio.to_thread(server.stop)


def refusals(daemon: Program) -> int:
    return daemon.log.read_text().count("too many clients")


async def test_every_connection_is_taken_under_load_and_at_the_start(
    server: Server, besiege: Callable[[str], Siege]
) -> None:
    siege = besiege(await server.with_schema())
    crowd, subscribers = Crowd(server.dsn), siege.subscribers
    daemon = await siege.serving()
    async with siege.application.writing():
        await until(lambda: len(subscribers.arrivals) > LOAD, "the load to be under way")
        await crowd.take_the_daemons()
        assert "database" in await daemon.is_unready()
        await until(lambda: refusals(daemon) > 0, "it to say what is wrong")
        await crowd.release(TOO_FEW)
        before = refusals(daemon)
        await until(lambda: refusals(daemon) > before, "it to find too few")
        await crowd.release()
        await daemon.is_ready()
        wanted = len(subscribers.arrivals) + LOAD
        await until(lambda: len(subscribers.arrivals) > wanted, "deliveries to go on")

        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        await crowd.fill()
        daemon.start()
        assert await daemon.ended() == 3
        daemon.start("--wait")
        await until(lambda: "database.waiting" in daemon.log.read_text(), "it to wait")
        await crowd.release()
        await daemon.is_ready()
    siege.tell(await siege.proof.holds())
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0
