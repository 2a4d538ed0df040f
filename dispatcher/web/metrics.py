"""Metrics for Prometheus, and two questions for whoever supervises the process. A listener of its own, without keys.

Every number comes from one Snapshot or from the operating system: a scrape touches no table, and no label grows with
accounts or webhooks. Counters
begin anew with the process; labels known beforehand stand there from the start with 0, so that a rate over them sees
the first event too.

    /healthz    the event loop answers, so do not restart this process
    /readyz     the database is reachable and the engine goes round; as standby too, which is ready to take over
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dispatcher import __version__
from dispatcher.build import IS_COMPILED
from dispatcher.logs import dropped_lines
from dispatcher.model import SETTLED, DeliveryState, EndpointStatus, Result
from dispatcher.snapshot import (
    LONG_SECONDS,
    OPERATIONS,
    SECONDS,
    SIZES,
    HistogramData,
    Snapshot,
)
from dispatcher.web.answers import answer
from dispatcher.web.boundary import boundary, finish_head

PROGRESS_AGE_S_MAX: Final = 15.0
"""Three times the longest pause between two polls of an engine that has nothing to do."""

PREFIX: Final = "dispatcher_"

_STATES: Final = sorted({DeliveryState.RETRYING, *SETTLED})
_BUILD: Final = {
    "version": __version__,
    "python": platform.python_version(),
    "compiled": str(IS_COMPILED).lower(),
}
_HEALTHS: Final = ("ready", "dead", "probing")
_CONNECTIONS: Final = ("connecting", "active", "idle")
_ROLES: Final = ("active", "standby")


class SnapshotCollector(Collector):
    """The engine's Snapshot in Prometheus' terms."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: a registry need not ask for a snapshot to know the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families of one snapshot."""
        s = self._snapshot()
        yield InfoMetricFamily(f"{PREFIX}build", "What runs", _BUILD)
        yield _counter("events", "Events read from the outbox", s.events)
        yield _counters("deliveries", "Deliveries that reached a state", "state", _STATES, s.deliveries)
        yield _counter("database_losses", "Times that a connection to the database was lost", s.database_losses)
        yield _counters("attempts", "HTTP requests by what they came to", "result", Result, s.attempts)
        yield from self._histograms(s)
        yield from self._gauges(s)
        yield from self._tables(s)
        yield _counter("log_lines_dropped", "Log lines that nobody took: a full pipe, a full disk", dropped_lines())

    @staticmethod
    def _histograms(s: Snapshot) -> Iterator[Metric]:
        yield _histogram("attempt_duration_seconds", "From start to end of a request", SECONDS, s.attempt_duration)
        yield _histogram(
            "delivery_latency_seconds",
            "From commit to first byte, first attempts",
            LONG_SECONDS,
            s.delivery_latency,
        )
        yield _histogram("settle_batch_size", "Outcomes written in one transaction", SIZES, s.settle_batch_size)
        family = HistogramMetricFamily(
            f"{PREFIX}database_seconds", "Statements of the engine, round trip included", labels=["operation"]
        )
        for operation in _known_first(OPERATIONS, s.database_operations):
            buckets, total = _cumulated(SECONDS, s.database_operations.get(operation))
            family.add_metric([operation], buckets, total)
        yield family

    @staticmethod
    def _gauges(s: Snapshot) -> Iterator[Metric]:
        yield _gauge("shards", "Shards of webhooks that this process runs", len(s.shards))
        yield _gauge("outbox_lag_seconds", "How far behind the reader is", s.outbox_lag_s)
        yield _gauge("outbox_backlog", "Events not read yet, by sequence number", s.outbox_backlog)
        yield _gauge("in_flight", "Requests out", s.in_flight)
        yield _gauge("retries_waiting", "Deliveries waiting in memory for another attempt", s.retries_waiting)
        yield _gauge("oldest_pending_seconds", "Age of the oldest event not settled everywhere", s.oldest_pending_s)
        yield _gauges("endpoints", "Webhooks by status", "status", EndpointStatus, s.endpoints)
        yield _gauges("lanes", "Webhooks with work, by what their answers let believe", "state", _HEALTHS, s.lanes)
        yield _gauges("connections", "Connections to subscribers", "state", _CONNECTIONS, s.connections)
        yield _gauge("event_loop_lag_seconds", "How late the event loop runs what is due", s.event_loop_lag_s)
        yield _gauge("active", "1 if this process delivers, 0 if it stands by for another", s.role == "active")
        yield _gauge("progress_age_seconds", "Since the engine's loops last went round", s.progress_age_s)
        yield _gauge("database_up", "1 if the database can be reached", s.database)
        # What follows is known to the active daemon only. On the others there is no sample, rather than a wrong one.
        yield _gauges(
            "instances", "Daemons on this database, by role", "role", _ROLES if s.instances else (), s.instances
        )
        yield _gauges(
            "partitions_until_timestamp_seconds",
            "When the last partition made ahead ends",
            "table",
            (),
            s.partitions_until_unix_s,
        )

    @staticmethod
    def _tables(s: Snapshot) -> Iterator[Metric]:
        """What retention saw at its last run, some minutes ago; nothing on a standby, which runs none."""
        if not s.retention_unix_s:
            return
        sizes = {table.table: table.bytes for table in s.tables}
        rows = {table.table: table.rows for table in s.tables}
        days = {table.table: table.partitions for table in s.tables if table.partitions}
        astray = {table: s.astray_rows.get(table, 0) for table in days}
        yield _gauges("table_bytes", "Size on disk, with partitions, indexes and TOAST", "table", (), sizes)
        yield _gauges("table_rows", "Rows, by PostgreSQL's estimate", "table", (), rows)
        yield _gauges("table_partitions", "Days there is a partition for", "table", (), days)
        yield _gauges("default_partition_rows", "Rows that no day's partition was there for", "table", (), astray)
        yield _gauge("retention_last_run_timestamp_seconds", "When retention last ran to its end", s.retention_unix_s)


class DiskCollector(Collector):
    """Room on the file system of a directory, which holds the embedded PostgreSQL if there is one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """What the file system says; nothing while the directory is not there."""
        try:
            usage = shutil.disk_usage(self._directory)
        except OSError:
            return
        yield _gauge("state_filesystem_size_bytes", "Size of the state directory's file system", usage.total)
        yield _gauge("state_filesystem_avail_bytes", "Room left on the state directory's file system", usage.free)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}{name}", help_text, value=value)


def _counters(name: str, help_text: str, label: str, known: Iterable[str], values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}{name}", help_text, labels=[label])
    for value in _known_first(known, values):
        family.add_metric([value], values.get(value, 0))
    return family


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}{name}", help_text, value=value)


def _gauges(name: str, help_text: str, label: str, known: Iterable[str], values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}{name}", help_text, labels=[label])
    for value in _known_first(known, values):
        family.add_metric([value], values.get(value, 0))
    return family


def _histogram(name: str, help_text: str, bounds: tuple[float, ...], data: HistogramData | None) -> Metric:
    buckets, total = _cumulated(bounds, data)
    return HistogramMetricFamily(f"{PREFIX}{name}", help_text, buckets=buckets, sum_value=total)


def _known_first(known: Iterable[str], values: Mapping[str, object]) -> Iterable[str]:
    return dict.fromkeys([*(str(value) for value in known), *values])


def _cumulated(bounds: tuple[float, ...], data: HistogramData | None) -> tuple[list[tuple[str, float]], float]:
    """Buckets as Prometheus wants them: each counts everything up to its bound, the last one everything."""
    if data is None:
        data = HistogramData(bounds, [0] * (len(bounds) + 1), 0.0)
    buckets: list[tuple[str, float]] = []
    seen = 0
    for bound, count in zip((*map(repr, data.bounds), "+Inf"), data.counts, strict=True):
        seen += count
        buckets.append((bound, seen))
    return buckets, data.sum


def unready_because(s: Snapshot, progress_age_s_max: float) -> str | None:
    """Why this process cannot do its work right now; None if it can."""
    if not s.database:
        return "the database cannot be reached"
    if s.progress_age_s > progress_age_s_max:
        return f"the engine has made no progress for {s.progress_age_s:.0f} s"
    return None


def build_metrics_app(
    snapshot: Callable[[], Snapshot],
    *,
    state_directory: Path | None = None,
    progress_age_s_max: float = PROGRESS_AGE_S_MAX,
) -> web.Application:
    """The metrics listener: `/metrics`, `/healthz`, `/readyz`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(snapshot))
    if state_directory is not None:
        registry.register(DiskCollector(state_directory))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def healthz(_: web.Request) -> web.Response:
        return answer({"status": "alive"})

    async def readyz(_: web.Request) -> web.Response:
        s = snapshot()
        reason = unready_because(s, progress_age_s_max)
        if reason is not None:
            return answer({"status": "unready", "role": s.role, "reason": reason}, 503)
        return answer({"status": "ready", "role": s.role})

    app = web.Application(middlewares=[boundary])
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    app.on_response_prepare.append(finish_head)
    return app
