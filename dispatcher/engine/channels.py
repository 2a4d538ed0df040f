"""What PostgreSQL tells us of between polls: the channels of NOTIFY, and who hears them.

A notification wakes every session of the database that listens to anything, whatever the channel: 40 µs of a server
process each, and as many of ours, for every event of an application under light load. So one session of a daemon
listens while it runs a shard: the reader's, which is the one that has to ask for something next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

WAKE: Final = "dispatcher_wake"
REGISTRY: Final = "dispatcher_registry"
PENDING: Final = "dispatcher_pending"  # somebody else wrote held rows for a webhook, or began a replay
FLEET: Final = "dispatcher_fleet"  # a daemon came or went, or gave a lease back


async def hear(connection: Any, told: Callable[[str, str], None]) -> None:
    """Listen to all channels on `connection`; `told(channel, payload)` is called for each notification."""

    def heard(_connection: object, _pid: int, channel: str, payload: str) -> None:
        told(channel, payload)

    for channel in (WAKE, REGISTRY, PENDING, FLEET):
        await connection.add_listener(channel, heard)
