"""Ending connections, and loops that must not outlive their cancellation."""

from __future__ import annotations

import asyncio

import pytest

from dispatcher.store.database import close, raise_if_cancelled


class Dead:
    """A connection over a network that has gone silent."""

    def __init__(self) -> None:
        self.terminated = False

    async def close(self) -> None:
        await asyncio.Event().wait()

    def terminate(self) -> None:
        self.terminated = True


async def test_connection_over_a_dead_network_is_closed_within_its_time() -> None:
    connection = Dead()
    await close(connection, 0.01)
    assert connection.terminated


async def test_loop_that_survives_trouble_ends_when_a_failing_clean_up_took_the_place_of_its_cancellation() -> None:
    rounds = 0

    async def loop() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            try:
                try:
                    await asyncio.Event().wait()
                finally:
                    raise ConnectionResetError
            except OSError:
                raise_if_cancelled()

    task = asyncio.create_task(loop())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rounds == 1
