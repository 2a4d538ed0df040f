"""The daemons of one database: who is there, who holds which shard, and how many shards there are.

Being there and holding are advisory locks: both end with their session, at once. A process that hangs keeps its
sessions; it is told by their silence, since each of them speaks every second.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from dispatcher.errors import ShardsInUse
from dispatcher.model import Holdings
from dispatcher.store.database import statements
from dispatcher.store.outbox import Snapshot

SILENT: Final = timedelta(seconds=10)
"""How long a session that speaks every second may be silent before its process is taken to hang."""

VIEW_TIMEOUT_S: Final = 5.0  # a member that does not see the others is none
MEMBER_MAX: Final = 2**31 - 1  # ids are keys of advisory locks
SPREAD_TIMEOUT_S: Final = 3600.0  # a change of the number writes every pending row


class FleetStore:
    """Over a connection of its own: locks belong to the session."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._sql = statements("fleet")

    async def join(self, member: int) -> None:
        """Be a member from now on, and let the others know."""
        await self._connection.fetchval(self._sql["join"], member)
        await self._connection.execute(self._sql["call"])

    async def sign(self, member: int) -> None:
        """Say that the leases of this session are this member's."""
        await self._connection.fetchval(self._sql["sign"], member)

    async def part(self) -> None:
        """Give up membership and leases of this session, and let the others know."""
        await self._connection.execute(self._sql["part"])

    async def renew(self) -> None:
        """Break the silence. Raises what is wrong with the connection."""
        await self._connection.execute(self._sql["renew"])

    async def count(self) -> int:
        """How many shards there are."""
        return int(await self._connection.fetchval(self._sql["count"]))

    async def view(self) -> Holdings:
        """Who is there and holds what. Whoever hangs is not there and holds nothing."""
        rows = await self._connection.fetch(self._sql["view"], SILENT, timeout=VIEW_TIMEOUT_S)
        return Holdings(
            count=next(row["key"] for row in rows if row["what"] == "shards"),
            members=frozenset(row["key"] for row in rows if row["what"] == "member"),
            holders={row["key"]: row["member"] for row in rows if row["what"] == "lease"},
        )

    async def evict(self, shard: int) -> bool:
        """End the session that holds a shard's lease if its process hangs; False if it does not, or we may not."""
        return bool(await self._connection.fetchval(self._sql["evict"], shard, SILENT))

    async def reshard(self, count: int) -> int:
        """Spread all webhooks over `count` shards; return how many there were. Raises ShardsInUse while a daemon runs.

        Each new shard begins where the slowest of the old ones stands. What faster ones had settled by then is found
        settled when it is read again, as after a crash.
        """
        async with self._connection.transaction():
            await self._connection.execute(self._sql["freeze"])
            rows = await self._connection.fetch(self._sql["cursors"])
            if len(rows) == count:
                return count
            await self._refuse_if_used(rows)
            prev = common([row["prev"] for row in rows])
            epoch = max(row["epoch"] for row in rows) + 1  # nobody who knew the old ones writes any more
            prev_at, floor = min(row["prev_at"] for row in rows), min(row["floor"] for row in rows)
            await self._connection.execute(self._sql["clear"])
            await self._connection.execute(self._sql["add"], count, epoch, prev, prev_at, rows[0]["system"], floor)
            for name in ("spread_endpoints", "spread_pending"):
                await self._connection.execute(self._sql[name], count, timeout=SPREAD_TIMEOUT_S)
        return len(rows)

    async def _refuse_if_used(self, rows: Sequence[Any]) -> None:
        sessions = await self._connection.fetchval(self._sql["sessions"])
        leases = [await self._connection.fetchval(statements("shard")["try_lease"], row["id"]) for row in rows]
        if sessions or not all(leases):
            raise ShardsInUse("a daemon runs on this database; the number of shards changes only while none does")
        if len({row["system"] for row in rows}) > 1:
            raise ShardsInUse("a restored database is still being taken over; run a daemon until it is active first")


def common(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The snapshot in which just those transactions are visible that are visible in all of these."""
    xmax = min(snapshot[1] for snapshot in snapshots)
    running = tuple(sorted({xid for snapshot in snapshots for xid in snapshot[2] if xid < xmax}))
    return (running[0] if running else xmax, xmax, running)
