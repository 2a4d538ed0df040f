"""Pending rows: deliveries that are neither settled nor only in memory.

Two kinds. *Due* rows have a time: failures that wait for their retry, and stragglers. The wheel holds those of the next
minutes. *Held* rows are due at infinity: what a paused, dead, full or ordered webhook has to wait with; they are pulled
oldest first when it can take more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from dispatcher.model import DeliveryKey
from dispatcher.store.database import statements

_NAMES = ("refill", "fetch", "pull", "held_endpoints", "heads")


class PendingStore:
    """The retries' connection and its statements. Records of `fetch` and `pull` have the columns

    (endpoint_id, event_seq, generation, attempts, due_at, state, event_xid, event_at, id, account, type, data,
    created_at, traceparent), event_at and created_at as moments; those from `id` on are None when retention has dropped
    the event, data or created_at alone when nothing can be made of it.
    """

    def __init__(self, connection: Any, shard: int) -> None:
        self._connection = connection
        self._shard = shard
        self._prepared: dict[str, Any] = {}
        self._lock = asyncio.Lock()  # clock and backlogs share the connection, which bears one statement at a time

    async def prepare(self) -> None:
        """Prepare every statement once."""
        sql = statements("pending")
        for name in _NAMES:
            self._prepared[name] = await self._connection.prepare(sql[name])

    async def refill(self, start: datetime, end: datetime, limit: int) -> list[Any]:
        """Records of (endpoint id, event sequence, generation, due_at) of rows due in [start, end), soonest first."""
        return await self._fetch("refill", self._shard, start, end, limit)

    async def fetch(self, keys: Sequence[DeliveryKey]) -> list[Any]:
        """The due rows of these keys that still stand, with their events."""
        if not keys:
            return []
        return await self._fetch("fetch", *zip(*keys, strict=True))

    async def pull(self, positions: Sequence[tuple[int, int, int, int]]) -> list[Any]:
        """Held rows with their events, for each (endpoint id, after sequence, after generation, how many at most)."""
        return await self._fetch("pull", *zip(*positions, strict=True))

    async def held_endpoints(self) -> list[int]:
        """Ids of the shard's endpoints, deleted ones included, that have anything held."""
        return [row[0] for row in await self._fetch("held_endpoints", self._shard)]

    async def heads(self) -> dict[int, DeliveryKey]:
        """For each ordered endpoint with a due row: the delivery the others wait for."""
        return {row[0]: (row[0], row[1], row[2]) for row in await self._fetch("heads", self._shard)}

    async def _fetch(self, name: str, *arguments: Any) -> list[Any]:
        async with self._lock:
            return await self._prepared[name].fetch(*arguments)  # type: ignore[no-any-return]
