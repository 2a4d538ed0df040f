"""Durations in buckets whose width grows with the value: 1.6 % wide at most, from a nanosecond up, in a few hundred
integers.

Runs are pooled by adding buckets. A quantile is read from the pooled histogram and is never the average of other
quantiles: the mean of ten p99s says nothing about the slowest hundredth of what happened.

Source: the bucket layout of HdrHistogram (G. Tene), with 64 steps to each power of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final, Self

STEP_BITS: Final = 6  # 64 steps to a power of two: an error of 1/64 at most
STEPS: Final = 1 << STEP_BITS


class Histogram:
    """Counts of nanoseconds. Negative ones count as 0."""

    __slots__ = ("buckets", "highest_ns")

    def __init__(self, values_ns: Iterable[int] = ()) -> None:
        self.buckets: Counter[int] = Counter()
        self.highest_ns = 0
        self.record(values_ns)

    def __len__(self) -> int:
        return self.buckets.total()

    def __repr__(self) -> str:
        return f"<Histogram of {len(self)}, p50 {self.ms(0.5):.3f} ms, p99 {self.ms(0.99):.3f} ms>"

    def record(self, values_ns: Iterable[int]) -> None:
        """Count durations."""
        known = [max(0, value) for value in values_ns]
        self.buckets.update(map(bucket_of, known))
        self.highest_ns = max(self.highest_ns, max(known, default=0))

    def add(self, other: Self) -> None:
        """Pool another one into this."""
        self.buckets.update(other.buckets)
        self.highest_ns = max(self.highest_ns, other.highest_ns)

    def quantile_ns(self, share: float) -> int:
        """The upper edge of the bucket in which `share` of all durations is reached; 0 when there are none."""
        missing = share * len(self)
        for bucket in sorted(self.buckets):
            missing -= self.buckets[bucket]
            if missing <= 1e-9:
                return min(edge_of(bucket), self.highest_ns)
        return self.highest_ns

    def ms(self, share: float) -> float:
        """The same in milliseconds."""
        return self.quantile_ns(share) / 1e6

    def to_json(self) -> dict[str, object]:
        """Everything: a few kilobytes however many durations there were."""
        return {
            "highest_ns": self.highest_ns,
            "steps": STEPS,
            "buckets": {str(bucket): count for bucket, count in sorted(self.buckets.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        """What `to_json` gave."""
        buckets, highest = data["buckets"], data["highest_ns"]
        assert isinstance(buckets, dict)
        assert isinstance(highest, int)
        made = cls()
        made.buckets.update({int(bucket): count for bucket, count in buckets.items()})
        made.highest_ns = highest
        return made


def bucket_of(value_ns: int) -> int:
    """The bucket of a duration: exact below 128 ns, then 64 to each power of two."""
    shift = max(0, value_ns.bit_length() - STEP_BITS - 1)
    return (shift << STEP_BITS) + (value_ns >> shift)


def edge_of(bucket: int) -> int:
    """The highest duration that falls into a bucket."""
    shift = max(0, (bucket >> STEP_BITS) - 1)
    return ((bucket - (shift << STEP_BITS) + 1) << shift) - 1
