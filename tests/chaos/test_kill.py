"""`kill -9` of the daemon at random moments: while it starts, takes over, reads, sends, writes down.

`pytest tests/chaos --rounds 100` kills it a hundred times; `--moments SEED` draws the same moments again, as far as
processes keep to them.
"""

from __future__ import annotations

import asyncio
import signal

from daemons import until
from siege import Siege

LIFE_S = 1.5  # at most, of a daemon killed by the clock: about half of them die before they deliver
BURST = 300  # events committed at once: a second's work for the slow webhook, with many flushes in it


async def test_kill_9_at_random_moments_under_load(siege: Siege, rounds: range) -> None:
    dice, subscribers = siege.dice, siege.subscribers
    daemon = await siege.serving()
    async with siege.application.writing():
        for _ in rounds:
            await siege.application.burst(BURST)
            if dice.random() < 0.5:
                await asyncio.sleep(dice.uniform(0, LIFE_S))
            else:
                wanted = len(subscribers.arrivals) + dice.randint(1, 3 * BURST)
                await until(lambda wanted=wanted: len(subscribers.arrivals) >= wanted, "the load to be under way")  # type: ignore[misc]
            daemon.signal(signal.SIGKILL)
            assert await daemon.ended() == -signal.SIGKILL, daemon.log.read_text()
            await siege.proof.crashed(daemon.name)
            daemon.start()
        await daemon.is_ready()
    siege.tell(await siege.proof.holds())
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0
