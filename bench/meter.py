"""What a run costs: CPU of daemon, PostgreSQL and receiver apart, memory, and requests, read again and again."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Final

from bench.report import Value

STEADY: Final = (0.1, 0.9)  # of all deliveries: between these a drain is neither starting nor ending


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """How everything stood at one moment; CPU in seconds since each process began."""

    at_ns: int
    requests: int
    distinct: int
    daemon_s: float | None
    postgres_s: float | None
    receiver_s: float | None
    rss_bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What lay between two samples."""

    seconds: float
    requests: int
    daemon_s: float | None
    postgres_s: float | None
    receiver_s: float | None

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0

    def per(self, count: int) -> dict[str, Value]:
        """CPU columns, µs for each of `count`."""
        return {
            "daemon µs": micros_each(self.daemon_s, count),
            "PostgreSQL µs": micros_each(self.postgres_s, count),
            "receiver µs": micros_each(self.receiver_s, count),
        }


def micros_each(seconds: float | None, count: int) -> float | None:
    """CPU seconds shared among `count`, in µs; None where they could not be read."""
    return None if seconds is None or not count else seconds / count * 1e6


class Meter:
    """Takes samples in the background: `read` says how everything stands."""

    def __init__(self, read: Callable[[], Sample], every_s: float) -> None:
        self._read = read
        self.every_s = every_s
        self.samples: list[Sample] = []
        self._task = asyncio.create_task(self._run(), name="meter")

    def take(self) -> Sample:
        """One now."""
        self.samples.append(self._read())
        return self.samples[-1]

    async def _run(self) -> None:
        while True:
            self.take()
            await asyncio.sleep(self.every_s)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    @property
    def rss_max_mb(self) -> float | None:
        """The daemon's highest resident memory."""
        known = [sample.rss_bytes for sample in self.samples if sample.rss_bytes]
        return max(known) / 1e6 if known else None

    def rss_series(self) -> list[tuple[float, float]]:
        """(seconds since the cell began, MB)."""
        start_ns = self.samples[0].at_ns
        return [((s.at_ns - start_ns) / 1e9, s.rss_bytes / 1e6) for s in self.samples if s.rss_bytes]

    def steady(self) -> Usage | None:
        """A drain without its beginning and end; None if it was too short to have anything in between."""
        total = self.samples[-1].distinct
        inside = [
            s for s in self.samples if total * STEADY[0] <= s.distinct <= total * STEADY[1] and s.daemon_s is not None
        ]
        return between(inside[0], inside[-1]) if len(inside) > 1 else None

    def drain(self) -> dict[str, Value]:
        """The columns of a drain: its steady rate, and what each delivery cost then."""
        steady = self.steady()
        if steady is None:
            return {"deliveries/s": None, **Usage(0.0, 0, None, None, None).per(0)}
        return {"deliveries/s": steady.rate, **steady.per(steady.requests)}

    def since(self, at_ns: int, until_ns: int) -> Usage:
        """Between the samples nearest to two moments."""
        first, last = (min(self.samples, key=lambda s, at=at: abs(s.at_ns - at)) for at in (at_ns, until_ns))  # type: ignore[misc]
        return between(first, last)


def between(a: Sample, b: Sample) -> Usage:
    """The difference of two samples of one daemon process."""

    def less(later: float | None, earlier: float | None) -> float | None:
        return None if later is None or earlier is None else later - earlier

    return Usage(
        (b.at_ns - a.at_ns) / 1e9,
        b.requests - a.requests,
        less(b.daemon_s, a.daemon_s),
        less(b.postgres_s, a.postgres_s),
        less(b.receiver_s, a.receiver_s),
    )
