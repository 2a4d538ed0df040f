"""Fixtures of the engine's tests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
from house import House, Receiver

from dispatcher.store.database import connect


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    await receiver.start()
    yield receiver
    await receiver.stop()


@pytest.fixture
async def house(database: str, receiver: Receiver) -> AsyncIterator[House]:
    app = await connect(database, name="application")
    house = House(database, receiver, app)
    house.account = await app.fetchval("SELECT id FROM dispatcher.account WHERE name = 'default'")
    try:
        yield house
        for running in list(house.engines):
            running.check()
            if not running.task.done():
                running.engine.settings = dataclasses.replace(running.engine.settings, drain_s=0.1)
                await house.stop(running)
    finally:
        for running in house.engines:
            running.task.cancel()
        await asyncio.gather(*(running.task for running in house.engines), return_exceptions=True)
        await app.close()
