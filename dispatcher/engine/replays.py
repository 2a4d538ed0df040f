"""Replays, moved on a step at a time, on a connection of their own.

Nothing of a replay is in memory: a job is a row, and a step is a transaction that locks it. So a step that is cut off
has not happened, two engines cannot take the same one, and whoever is active goes on. The rows a step leaves behind are
held ones, which the backlogs pull as their webhook can take them.
"""

from __future__ import annotations

import asyncio
from typing import Final

from dispatcher.engine.leases import until_rung
from dispatcher.errors import DatabaseUnreachable
from dispatcher.logs import get_logger
from dispatcher.store.database import TROUBLE, connect, raise_if_cancelled
from dispatcher.store.replays import ReplayStore

STEP_S: Final = 0.25  # between two rounds: a step makes 500 deliveries, so 2000 a second for each job
SAFETY_S: Final = 30.0  # should we not have been told of one

log = get_logger("dispatcher.replays")


class Replays:
    """Runs the jobs. `told` wakes it."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._wake = asyncio.Event()

    def told(self) -> None:
        """A replay was begun."""
        self._wake.set()

    async def run(self) -> None:
        """Move every job on until cancelled. Trouble with the database is waited out: nothing else depends on this."""
        while True:
            self._wake.clear()
            try:
                connection = await connect(self._dsn, name="dispatcher replays", engine=True)
                steps = asyncio.create_task(self._work(ReplayStore(connection)), name="replay steps")
                try:
                    await asyncio.wait((steps,))
                    steps.result()
                finally:
                    # Before the task is cancelled: its ROLLBACK would wait for ever on a dead network.
                    connection.terminate()
                    steps.cancel()
                    steps.add_done_callback(_hear)
            except (DatabaseUnreachable, *TROUBLE) as error:
                raise_if_cancelled()
                log.warning("replays.failed", reason=str(error) or type(error).__name__, retry_in_s=SAFETY_S)
            await until_rung(self._wake, SAFETY_S)

    async def _work(self, replays: ReplayStore) -> None:
        """Until no job is under way. Each gets one step a round, so that a long one keeps nobody waiting."""
        while jobs := await replays.running():
            for job in jobs:
                await replays.step(job)
            await asyncio.sleep(STEP_S)


def _hear(steps: asyncio.Task[None]) -> None:
    """Take note of how it ended: it was cut off, so any way will do."""
    if not steps.cancelled():
        steps.exception()
