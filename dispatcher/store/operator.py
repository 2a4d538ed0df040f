"""The whole installation as its operator sees it: daemons, accounts, the database and its partitions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, Final

import msgspec

from dispatcher.model import EndpointStatus
from dispatcher.snapshot import Snapshot
from dispatcher.store.database import statements

WEBHOOKS_MAX: Final = 1000  # counted of an account
WAITING_MAX: Final = 1000


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon as it last described itself; `now` is the database's clock, which heartbeats are written by."""

    id: str
    host: str
    pid: int
    role: str
    version: str
    started_at: datetime
    heartbeat_at: datetime
    now: datetime
    snapshot: Snapshot


class AccountState(msgspec.Struct, frozen=True, kw_only=True):
    """One account. What is cut says so: there is more."""

    name: str
    created_at: datetime
    active: int
    paused: int
    disabled: int
    failing: int
    webhooks_cut: bool
    waiting: int
    waiting_cut: bool
    oldest_at: datetime | None  # when the oldest event that waits was written


class KnownWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook by its id."""

    id: str
    url: str
    status: EndpointStatus
    account: str


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """The database server."""

    version: str
    name: str
    bytes: int
    is_standby: bool
    started_at: datetime
    schema_version: int
    connections: int
    connections_max: int
    oldest_transaction_at: datetime | None  # None: none is open, or we may not see those of others


class ShardState(msgspec.Struct, frozen=True, kw_only=True):
    """A shard: how often it was taken over, and when its cursor was last moved."""

    id: int
    epoch: int
    prev_at: datetime


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """One day of events or attempts; without a day, what no other partition takes. `rows` is an estimate."""

    parent: str
    name: str
    day: date | None
    bytes: int
    rows: int


class OperatorStore:
    """All that reads about everybody. `db` is a pool or a connection of asyncpg."""

    def __init__(self, db: Any) -> None:
        self._db = db
        self._sql = statements("operator")

    async def instances(self) -> list[Instance]:
        """The daemons of the last day, those that live in front."""
        rows = await self._db.fetch(self._sql["instances"])
        return [
            Instance(**{**dict(row), "snapshot": msgspec.json.decode(row["snapshot"], type=Snapshot)}) for row in rows
        ]

    async def accounts(self, after: str, limit: int) -> list[AccountState]:
        """Accounts by name, those behind `after`."""
        rows = await self._db.fetch(self._sql["accounts"], after, limit, WEBHOOKS_MAX, WAITING_MAX)
        return [AccountState(**dict(row)) for row in rows]

    async def webhooks(self, ids: Sequence[str]) -> dict[str, KnownWebhook]:
        """Webhooks of any account by their ids."""
        rows = await self._db.fetch(self._sql["webhooks"], ids)
        return {row["id"]: msgspec.convert(dict(row), KnownWebhook) for row in rows}

    async def server(self) -> Server:
        """The database server."""
        return Server(**dict(await self._db.fetchrow(self._sql["server"])))

    async def shards(self) -> list[ShardState]:
        """The shards."""
        return [ShardState(**dict(row)) for row in await self._db.fetch(self._sql["shards"])]

    async def partitions(self) -> list[Partition]:
        """The partitions of events and attempts, the latest day in front."""
        return [Partition(**dict(row)) for row in await self._db.fetch(self._sql["days"])]
