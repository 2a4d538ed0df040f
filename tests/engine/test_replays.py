"""The loop that moves replays on ends with its session, whatever has become of its connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from dispatcher.engine import replays
from dispatcher.engine.replays import Replays

PATIENCE_S = 30.0


class DeadConnection:
    """In the middle of a step its network went silent: nothing is answered any more, a ROLLBACK neither."""

    def __init__(self) -> None:
        self.is_silent = asyncio.Event()
        self.ended = asyncio.Event()

    async def fetch(self, *_: Any) -> list[Any]:
        return [{"id": "rpl_1"}]

    async def fetchrow(self, *_: Any) -> Any:
        self.is_silent.set()
        await self._wait()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self._wait()

    async def _wait(self) -> None:
        await self.ended.wait()
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    def terminate(self) -> None:
        self.ended.set()


async def test_a_step_on_a_dead_network_does_not_keep_the_session_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = DeadConnection()

    async def connect(*_: Any, **__: Any) -> DeadConnection:
        return connection

    monkeypatch.setattr(replays, "connect", connect)
    running = asyncio.create_task(Replays("postgresql://nowhere").run())
    async with asyncio.timeout(PATIENCE_S):
        await connection.is_silent.wait()
    running.cancel()
    await asyncio.wait((running,), timeout=PATIENCE_S)
    is_over, was_ended = running.done(), connection.ended.is_set()
    connection.terminate()
    assert (is_over, was_ended) == (True, True)
