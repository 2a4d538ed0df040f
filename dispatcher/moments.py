"""Moments as integers: microseconds since 2000-01-01 UTC, which is how PostgreSQL keeps and sends them.

Of an event's two times one is printed in whole seconds, the other subtracted once. A `datetime` of each would cost the
driver 0.4 µs; few events need one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

BEGINNING: Final = datetime(2000, 1, 1, tzinfo=UTC)
BEGINNING_UNIX_S: Final = 946_684_800
SECOND_US: Final = 1_000_000

_MICROSECOND: Final = timedelta(microseconds=1)


def of_datetime(at: datetime) -> int:
    """The moment of an aware time, in µs."""
    return (at - BEGINNING) // _MICROSECOND


def to_datetime(moment_us: int) -> datetime:
    """The time of a moment; of PostgreSQL's infinities the naive end of Python's calendar, as asyncpg spells them."""
    try:
        return BEGINNING + timedelta(microseconds=moment_us)
    except OverflowError:
        return datetime.max if moment_us > 0 else datetime.min  # noqa: DTZ901


@lru_cache(maxsize=256)
def whole_second(second: int) -> datetime:
    """The time of a whole second since the beginning: the same object for the many events of that second.

    Raises OverflowError outside of Python's calendar.
    """
    return BEGINNING + timedelta(seconds=second)
