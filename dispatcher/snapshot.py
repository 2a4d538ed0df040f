"""The Snapshot: what everything outside the engine sees of it.

It is made once a second, or when a scraper asks. No label grows with accounts or endpoints. The snapshots of several
shards or processes add up (`total`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from dispatcher.model import EndpointStatus

SECONDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0,
)  # fmt: skip
"""Buckets around what matters: 1 ms wake-ups below, the 30 s deadline above."""
LONG_SECONDS: Final = (*SECONDS, 300.0, 3600.0, 86400.0)
"""For latencies that grow with a backlog."""
SIZES: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)

OPERATIONS: Final = ("poll", "flush", "refill", "fetch", "pull", "registry", "heartbeat")


class HistogramData(msgspec.Struct, frozen=True):
    """Counts per bucket, the last one above all bounds; not cumulated."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float

    def quantile(self, q: float) -> float | None:
        """Upper bound of the bucket that holds quantile `q`; None without observations."""
        total = sum(self.counts)
        rank, seen = q * total, 0
        for bound, n in zip((*self.bounds, self.bounds[-1]), self.counts, strict=True):
            seen += n
            if n and seen >= rank:
                return bound
        return None


class TroubledEndpoint(msgspec.Struct, frozen=True):
    """One of the worst webhooks, for people to look at first."""

    id: str
    health: str
    queued: int
    in_flight: int
    window: int
    backlog: bool
    error: str | None


class TableSize(msgspec.Struct, frozen=True):
    """One table of the store, its partitions, indexes and TOAST included."""

    table: str
    bytes: int
    rows: int  # PostgreSQL's estimate
    partitions: int  # days; 0 if it has none


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The engine at one moment: counters since the process started, gauges as they stand."""

    schema: int = 0  # the version this program was written for
    role: str = "standby"  # active | standby | web
    shards: list[int] = msgspec.field(default_factory=list)  # that it runs
    database: bool = False  # reachable right now
    database_losses: int = 0  # sessions that ended in trouble with it
    progress_age_s: float = 0.0  # since the engine's loops last went round
    at_unix_s: float = 0.0
    events: int = 0
    deliveries: dict[str, int] = msgspec.field(default_factory=dict)  # settled or set to retrying, by state
    attempts: dict[str, int] = msgspec.field(default_factory=dict)  # by result
    released: int = 0
    attempt_duration: HistogramData | None = None
    delivery_latency: HistogramData | None = None
    settle_batch_size: HistogramData | None = None
    database_operations: dict[str, HistogramData] = msgspec.field(default_factory=dict)
    outbox_lag_s: float = 0.0
    outbox_backlog: int = 0
    in_flight: int = 0
    queued: int = 0
    buffered: int = 0
    retries_waiting: int = 0
    oldest_pending_s: float = 0.0
    endpoints: dict[str, int] = msgspec.field(default_factory=dict)  # by status
    lanes: dict[str, int] = msgspec.field(default_factory=dict)  # by health
    connections: dict[str, int] = msgspec.field(default_factory=dict)  # by state
    event_loop_lag_s: float = 0.0
    instances: dict[str, int] = msgspec.field(default_factory=dict)  # daemons on this database, by role
    partitions_until_unix_s: dict[str, float] = msgspec.field(default_factory=dict)  # by table: end of the last one
    worst: list[TroubledEndpoint] = msgspec.field(default_factory=list)
    tables: list[TableSize] = msgspec.field(default_factory=list)  # as of the last retention run
    astray_rows: dict[str, int] = msgspec.field(default_factory=dict)  # in a DEFAULT partition, by table
    retention_unix_s: float = 0.0  # when retention last ran to its end; 0: not yet


_SUMS: Final = ("events", "released", "in_flight", "queued", "buffered", "retries_waiting", "database_losses")
_TALLIES: Final = ("deliveries", "attempts", "endpoints", "lanes", "connections")
_MOSTS: Final = (
    "schema", "progress_age_s", "at_unix_s", "outbox_lag_s", "outbox_backlog", "oldest_pending_s", "event_loop_lag_s",
    "retention_unix_s",
)  # fmt: skip
"""Every shard reads the whole outbox, so what is behind is as far behind as the last of them."""
_SHARED: Final = ("instances", "partitions_until_unix_s")
_HISTOGRAMS: Final = ("attempt_duration", "delivery_latency", "settle_batch_size")
WORST: Final = 10  # webhooks in a snapshot


def total(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Several snapshots, of different shards or processes, as one."""
    pruned = max(snapshots, key=lambda s: s.retention_unix_s, default=Snapshot())  # who saw the tables last
    operations = dict.fromkeys(name for s in snapshots for name in s.database_operations)
    worst = [endpoint for s in snapshots for endpoint in s.worst]
    worst.sort(key=lambda endpoint: (endpoint.health == "ready", -endpoint.queued))
    rest: dict[str, Any] = {
        **{name: sum(getattr(s, name) for s in snapshots) for name in _SUMS},
        **{name: _tally(getattr(s, name) for s in snapshots) for name in _TALLIES},
        **{name: max((getattr(s, name) for s in snapshots), default=0) for name in _MOSTS},
        **{name: _sum(getattr(s, name) for s in snapshots) for name in _HISTOGRAMS},
        # Of the database as a whole: whoever says anything says the same.
        **{name: next(filter(None, (getattr(s, name) for s in snapshots)), {}) for name in _SHARED},
    }
    return Snapshot(
        role="active" if any(s.role == "active" for s in snapshots) else "standby",
        shards=sorted(shard for s in snapshots for shard in s.shards),
        database=bool(snapshots) and all(s.database for s in snapshots),
        database_operations={n: d for n in operations if (d := _sum(s.database_operations.get(n) for s in snapshots))},
        worst=worst[:WORST],
        tables=pruned.tables,
        astray_rows=pruned.astray_rows,
        **rest,
    )


def _tally(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for each in counts:
        summed.update(each)
    return dict(summed)


def _sum(histograms: Iterable[HistogramData | None]) -> HistogramData | None:
    """Those with the bounds of the first: of another version of this program there may be others."""
    known = [data for data in histograms if data is not None]
    alike = [data for data in known if data.bounds == known[0].bounds]
    if not alike:
        return None
    counts = [sum(column) for column in zip(*(data.counts for data in alike), strict=True)]
    return HistogramData(alike[0].bounds, counts, sum(data.sum for data in alike))


NO_ENDPOINTS: Final = dict.fromkeys((s.value for s in EndpointStatus), 0)
