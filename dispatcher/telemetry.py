"""What the engine counts: plain integers and lists, copied now and then into a Snapshot (`snapshot.py`)."""

from __future__ import annotations

import time
from bisect import bisect_right
from typing import Any, Final

from dispatcher.model import DeliveryState, Result
from dispatcher.snapshot import LONG_SECONDS, OPERATIONS, SECONDS, SIZES, HistogramData

UNSORTED_MAX: Final = 1000  # values a histogram keeps before it looks where they belong: 8 KB


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
