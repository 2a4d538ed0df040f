"""What the engine counts, and the Snapshot that everything outside it sees.

The engine adds to plain integers and lists; once a second, or when a scraper asks, they are copied into a Snapshot. No
label grows with accounts or endpoints. The snapshots of several shards or processes add up (`total`).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from dispatcher.model import DeliveryState, EndpointStatus, Result

SECONDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0,
)  # fmt: skip
"""Buckets around what matters: 1 ms wake-ups below, the 30 s deadline above."""
LONG_SECONDS: Final = (*SECONDS, 300.0, 3600.0, 86400.0)
"""For latencies that grow with a backlog."""
SIZES: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)

UNSORTED_MAX: Final = 1000  # values a histogram keeps before it looks where they belong: 8 KB

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


class Histogram:
    """Fixed buckets. A value costs an append; they are sorted into their buckets many at a time, or when asked for."""

    __slots__ = ("_counts", "_sum", "_values", "bounds")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._values: list[float] = []  # observed and in no bucket yet, at most UNSORTED_MAX

    def observe(self, value: float) -> None:
        """Count one value."""
        values = self._values
        values.append(value)
        if len(values) >= UNSORTED_MAX:
            self._sort()

    def _sort(self) -> None:
        values = self._values
        values.sort()
        below = 0
        for bucket, bound in enumerate(self.bounds):
            upto = bisect_right(values, bound, below)
            self._counts[bucket] += upto - below
            below = upto
        self._counts[-1] += len(values) - below
        self._sum += sum(values)
        values.clear()

    def data(self) -> HistogramData:
        """A copy that does not change any more."""
        self._sort()
        return HistogramData(self.bounds, self._counts.copy(), self._sum)


class Timed:
    """Observes in a histogram how long its block took. A class and not a generator: each poll passes here."""

    __slots__ = ("_began", "_histogram")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._histogram.observe(time.perf_counter() - self._began)


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


class Telemetry:
    """The engine's counters. One owner: the event loop."""

    __slots__ = (
        "attempt_duration", "attempts", "database", "deliveries", "delivery_latency", "events", "loop_lag_s", "read",
        "released", "settle_batch_size",
    )  # fmt: skip

    def __init__(self) -> None:
        self.events = 0  # rows read from the outbox
        self.read = 0  # deliveries made of them
        self.released = 0  # deliveries given back unattempted
        self.deliveries = dict.fromkeys((s.value for s in DeliveryState if s not in ("pending", "in_flight")), 0)
        self.attempts: dict[Result, int] = dict.fromkeys(Result, 0)
        self.attempt_duration = Histogram(SECONDS)
        self.delivery_latency = Histogram(LONG_SECONDS)
        self.settle_batch_size = Histogram(SIZES)
        self.database = {operation: Histogram(SECONDS) for operation in OPERATIONS}
        self.loop_lag_s = 0.0

    def counters(self) -> dict[str, Any]:
        """The part of a Snapshot that is counted here."""
        return {
            "events": self.events,
            "deliveries": dict(self.deliveries),
            "attempts": {result.value: n for result, n in self.attempts.items()},
            "released": self.released,
            "attempt_duration": self.attempt_duration.data(),
            "delivery_latency": self.delivery_latency.data(),
            "settle_batch_size": self.settle_batch_size.data(),
            "database_operations": {name: histogram.data() for name, histogram in self.database.items()},
            "event_loop_lag_s": self.loop_lag_s,
        }

    def timed(self, operation: str) -> Timed:
        """Observe how long a statement takes, failures included."""
        return Timed(self.database[operation])


NO_ENDPOINTS: Final = dict.fromkeys((s.value for s in EndpointStatus), 0)
