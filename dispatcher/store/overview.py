"""How an account's webhooks fare, all at once: what waits, what was delivered, what changed last.

Nothing here is counted in full and nothing is skipped over: each statement reads a bounded number of rows by an index,
and its answer says where the bound was met.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from dispatcher.model import DeliveryKey, DeliveryState, EndpointStatus
from dispatcher.moments import BEGINNING
from dispatcher.snapshot import Snapshot
from dispatcher.store.database import statements

WEBHOOKS_MAX: Final = 500  # of an account, the newest; each costs some 10 µs in every statement
WAITING_ROWS: Final = 20_000  # counted for all of them together: ≈ 10 ms
TRAFFIC_ROWS: Final = 30_000  # ≈ 50 ms from memory
HELD_MAX: Final = 10_000
SPARK_ROWS: Final = 50  # of a webhook in one bar
RECENT_WITHIN: Final = timedelta(days=7)

_NEWEST: Final = "~"  # sorts behind every id

BUCKETS_MAX: Final = 60
BUCKETS: Final = tuple(timedelta(seconds=s) for s in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 10800))


class WebhookState(msgspec.Struct, frozen=True, kw_only=True):
    """One webhook and what waits for it. `is_cut`: there is more than `waiting`."""

    id: str
    url: str
    description: str
    events: list[str]
    status: EndpointStatus
    disabled_reason: str | None
    updated_at: datetime
    failing_since: datetime | None
    last_error: str | None
    waiting: int
    is_cut: bool
    oldest_at: datetime | None  # when the event that waits longest was written; replays and the like are left out
    next_at: datetime | None  # when the next attempt is due; None: what waits is held, or nothing does


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of the log in one stretch of time."""

    at: datetime
    attempts: int
    delivered: int
    exhausted: int
    discarded: int
    retrying: int
    p50_ms: float | None
    p95_ms: float | None

    @property
    def failed(self) -> int:
        """Deliveries that were given up."""
        return self.exhausted + self.discarded

    @property
    def success_rate(self) -> float | None:
        """Delivered, of those that ended; None if none did."""
        ended = self.delivered + self.failed
        return self.delivered / ended if ended else None


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """A window of the log, as a whole and by stretches, oldest first. `is_cut`: it begins later than was asked for."""

    whole: Slice
    until: datetime
    length: timedelta
    slices: list[Slice]
    is_cut: bool

    @property
    def per_minute(self) -> float:
        """Deliveries that ended."""
        ended = self.whole.delivered + self.whole.failed
        return ended / max((self.until - self.whole.at) / timedelta(minutes=1), 1 / 60)


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt, or a settlement without one (no result), of some webhook."""

    key: DeliveryKey
    webhook_id: str
    url: str
    at: datetime
    attempt: int
    state: DeliveryState
    result: str | None
    status: int | None
    ms: float
    error: str | None
    event_id: str | None
    event_type: str | None


class Spark(msgspec.Struct, frozen=True, kw_only=True):
    """One bar of a sparkline. `is_cut`: it counts the latest SPARK_ROWS only."""

    begins: datetime
    delivered: int
    failed: int
    retrying: int
    is_cut: bool


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What waits for one webhook."""

    waiting: int
    is_cut: bool
    oldest_at: datetime | None
    next_at: datetime | None


class OverviewStore:
    """All that reads about several webhooks at once. `db` is a pool or a connection of asyncpg."""

    def __init__(self, db: Any, *, waiting_rows: int = WAITING_ROWS, traffic_rows: int = TRAFFIC_ROWS) -> None:
        self._db = db
        self._waiting_rows = waiting_rows
        self._traffic_rows = traffic_rows
        self._sql = statements("overview")

    async def webhooks(self, account_id: int, after: str = _NEWEST) -> list[WebhookState]:
        """An account's webhooks, newest first: the WEBHOOKS_MAX that follow the id `after`."""
        rows = await self._db.fetch(self._sql["webhooks"], account_id, WEBHOOKS_MAX, self._waiting_rows, after)
        return [msgspec.convert(dict(row), WebhookState) for row in rows]

    async def traffic(self, account_id: int, since: datetime, until: datetime) -> Traffic:
        """How an account's deliveries fared between two moments."""
        rows = await self._db.fetch(
            self._sql["traffic"], account_id, WEBHOOKS_MAX, since, until, self._traffic_rows, BUCKETS, BUCKETS_MAX - 1
        )
        whole = next(row for row in rows if row["is_whole"])
        begin, length = whole["cut_at"] or since, whole["length"]
        found = {row["bucket"]: row for row in rows if not row["is_whole"]}
        first = BEGINNING + (begin - BEGINNING) // length * length  # as in the statement
        count = -((first - until) // length)
        places = [first + place * length for place in range(count)]
        return Traffic(
            whole=_slice(begin, whole),
            until=until,
            length=length,
            slices=[_slice(at, found.get(at)) for at in places],
            is_cut=whole["cut_at"] is not None,
        )

    async def recent(self, account_id: int, limit: int) -> list[Happening]:
        """The latest of what happened at any of an account's webhooks."""
        since = datetime.now(UTC) - RECENT_WITHIN
        rows = await self._db.fetch(self._sql["recent"], account_id, WEBHOOKS_MAX, since, limit)
        return [_happening(row) for row in rows]

    async def pulse(self, account_id: int, account: str) -> str:
        """A text that changes when an account's pages do."""
        since = datetime.now(UTC) - timedelta(minutes=1)
        row = await self._db.fetchrow(self._sql["pulse"], account_id, WEBHOOKS_MAX, since, account)
        return " ".join(str(value) for value in row)

    async def sparks(
        self, account_id: int, webhook_ids: Sequence[str], begins: Sequence[datetime], length: timedelta
    ) -> dict[str, list[Spark]]:
        """How some webhooks fared in the stretches of time that begin at these moments."""
        ends = [at + length for at in begins]
        rows = await self._db.fetch(self._sql["sparks"], account_id, list(begins), ends, SPARK_ROWS, list(webhook_ids))
        found: dict[str, list[Spark]] = {}
        for row in rows:
            spark = {name: row[name] for name in Spark.__struct_fields__}
            found.setdefault(row["id"], []).append(Spark(**spark))
        return found

    async def held(self, account_id: int, webhook_id: str) -> Held:
        """What waits for a webhook, HELD_MAX at most."""
        row = await self._db.fetchrow(self._sql["held"], account_id, webhook_id, HELD_MAX + 1)
        return Held(
            waiting=min(row["waiting"], HELD_MAX),
            is_cut=row["waiting"] > HELD_MAX,
            oldest_at=row["oldest_at"],
            next_at=row["next_at"],
        )

    async def engine(self) -> tuple[datetime, Snapshot] | None:
        """What the daemon that delivers said of itself last, and when; None if none ever did."""
        row = await self._db.fetchrow(self._sql["engine"])
        return None if row is None else (row["heartbeat_at"], msgspec.json.decode(row["snapshot"], type=Snapshot))


def _slice(at: datetime, row: Any) -> Slice:
    names = ("attempts", "delivered", "exhausted", "discarded", "retrying", "p50_ms", "p95_ms")
    empty: dict[str, Any] = dict.fromkeys(names, 0) | {"p50_ms": None, "p95_ms": None}
    return Slice(at=at, **({name: row[name] for name in names} if row is not None else empty))


def _happening(row: Any) -> Happening:
    return Happening(
        key=(row["endpoint_id"], row["event_seq"], row["generation"]),
        webhook_id=row["webhook_id"],
        url=row["url"],
        at=row["at"],
        attempt=row["attempt"],
        state=DeliveryState(row["state"]),
        result=row["result"],
        status=row["status"],
        ms=float(row["ms"]),
        error=row["error"],
        event_id=row["event_id"],
        event_type=row["event_type"],
    )
