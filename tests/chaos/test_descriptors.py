"""Fewer file descriptors than webhooks: the daemon says so, shares them out, and delivers everything."""

from __future__ import annotations

import functools
import resource
import signal

from siege import Siege

FILES = 160  # of which deliveries get half
WEBHOOKS = 200
MUTE = 100  # accept and never answer, more of them than there are descriptors
EVENTS = 3


async def test_more_webhooks_than_descriptors_are_all_served_beside_some_that_hang(siege: Siege) -> None:
    siege.proof.webhooks = {f"/slow/{n}": "email.*" for n in range(WEBHOOKS)}
    siege.proof.webhooks |= {f"/mute/{n}": "email.*" for n in range(MUTE)}
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (FILES, FILES))
    daemon = await siege.serving(start={"preexec_fn": limit}, DISPATCHER_RETRY_SCHEDULE="1s")
    assert "files.few" in daemon.log.read_text()
    for _ in range(EVENTS):
        await siege.application.burst(1)
        await daemon.is_ready()  # there is a descriptor left for whoever asks
    siege.tell(await siege.proof.holds())
    assert "database.lost" not in daemon.log.read_text()
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0
