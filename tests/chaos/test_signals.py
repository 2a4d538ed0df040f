"""Drains, reloads and take-overs under load: what is asked for repeats nothing, what is not, only what was exposed."""

from __future__ import annotations

import signal

from daemons import Program, until
from siege import Siege

LOAD = 60
DRAINS = 2


async def more_arrive(siege: Siege, count: int = LOAD) -> None:
    wanted = len(siege.subscribers.arrivals) + count
    await until(lambda: len(siege.subscribers.arrivals) >= wanted, "the load to be under way")


async def test_drains_and_reloads_under_load_repeat_nothing(siege: Siege) -> None:
    daemon = await siege.serving()
    async with siege.application.writing():
        for number in range(DRAINS):
            await siege.application.burst(LOAD)
            await more_arrive(siege)
            daemon.signal(signal.SIGHUP)
            await until(lambda n=number + 1: daemon.log.read_text().count('"reloaded"') == n, "the reload")  # type: ignore[misc]
            await more_arrive(siege)
            daemon.signal(signal.SIGTERM)
            assert await daemon.ended() == 0, daemon.log.read_text()
            daemon.start()
        await daemon.is_ready()
    siege.tell(await siege.proof.holds())
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0


async def test_a_standby_takes_over_from_one_that_is_killed_hangs_or_drains(siege: Siege) -> None:
    def sent_by(daemon: Program) -> int:
        name = daemon.environment["DISPATCHER_BRAND_USER_AGENT"]
        return sum(arrival.daemon == name for arrival in siege.subscribers.arrivals[:])

    first, second = await siege.serving(), siege.daemon()
    second.start()
    await second.is_ready(role="standby")
    async with siege.application.writing():
        await siege.application.burst(LOAD)
        await more_arrive(siege)
        first.signal(signal.SIGKILL)
        await first.ended()
        await siege.proof.crashed(first)
        await second.is_ready()
        await more_arrive(siege)

        first.start()
        await first.is_ready(role="standby")
        await siege.application.burst(LOAD)
        second.signal(signal.SIGSTOP)
        await first.is_ready()
        await siege.proof.crashed(second, is_gone=False)
        await more_arrive(siege)
        before = sent_by(second)
        second.signal(signal.SIGCONT)
        await second.is_ready(role="standby")
        assert sent_by(second) == before, "it sent something after another had taken its place"

        first.signal(signal.SIGTERM)
        assert await first.ended() == 0
        await second.is_ready()
        await more_arrive(siege)
    siege.tell(await siege.proof.holds())
    assert any(word in second.log.read_text() for word in ("lease.lost", "database.lost"))
    second.signal(signal.SIGTERM)
    assert await second.ended() == 0
