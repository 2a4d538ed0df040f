"""PostgreSQL dies, restarts, cuts its connections off and loses its backends under load; the daemon lives on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from daemons import until
from servers import Server
from siege import Siege

AWAY_S = 1.0  # at most, between death and start
CUTS = 5  # in a row
LOAD = 60  # requests that show that work goes on


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path / "postgres")
    yield server
    await asyncio.to_thread(server.stop)


async def test_postgresql_dies_restarts_and_cuts_connections_under_load(
    server: Server, besiege: Callable[[str], Siege], rounds: range
) -> None:
    siege = besiege(await server.with_schema())
    dice, subscribers = siege.dice, siege.subscribers

    async def stopped() -> None:
        await server.stop_at_once()
        await asyncio.sleep(dice.uniform(0, AWAY_S))
        await asyncio.to_thread(server.start)

    async def killed() -> None:
        await server.die(signal.SIGKILL)
        await asyncio.to_thread(server.start)

    async def cut_again_and_again() -> None:
        for _ in range(CUTS):
            await server.cut_all()
            await asyncio.sleep(dice.uniform(0, 0.2))

    async def backend_killed() -> None:
        while not (backends := await server.backends()):
            await asyncio.sleep(0.02)
        os.kill(dice.choice(backends), signal.SIGKILL)  # PostgreSQL ends all others then, and recovers

    strikes = [stopped, cut_again_and_again, backend_killed, killed]
    daemon = await siege.serving()
    async with siege.application.writing():
        for number in rounds:
            wanted = len(subscribers.arrivals) + dice.randint(1, LOAD)
            await until(lambda wanted=wanted: len(subscribers.arrivals) >= wanted, "the load to be under way")  # type: ignore[misc]
            await strikes[number % len(strikes)]()
            assert daemon.runs, daemon.log.read_text()
    await daemon.is_ready()
    # The daemon kept its memory over all of it: nothing was exposed, so nothing may be repeated.
    siege.tell(await siege.proof.holds())
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0
