"""How long to wait: before the next attempt, before knocking at a dead endpoint, before calling the database again.

Delays are seconds. Randomness comes as an argument, `unit_random` in [0, 1), and so does the clock.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from dispatcher.durations import UNITS_S, seconds_in

RETRIES_MAX: Final = 50
DURATION_S_MAX: Final = 36500 * 86400.0  # a century: more is a typing mistake
DELAY_S_MAX: Final = 30 * 86400.0  # as long as events are kept by default
RETRY_AFTER_S_MAX: Final = 86400.0

DEFAULT: Final = (60.0, 600.0, 3600.0)
STANDARD: Final = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)  # Standard Webhooks 1.0.0
NONE: Final[tuple[float, ...]] = ()
PRESETS: Final[dict[str, tuple[float, ...]]] = {"default": DEFAULT, "standard": STANDARD, "none": NONE}


_DEAD_S: Final = 30.0
_DEAD_S_MAX: Final = 900.0
_DEAD_JITTER: Final = 0.1
_RECONNECT_S: Final = 0.05
_RECONNECT_S_MAX: Final = 5.0

_MONTHS: Final = b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
_TIME: Final = rb"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_HTTP_DATES: Final = (  # RFC 9110, section 5.6.7: the one to send, and the two obsolete ones to understand
    re.compile(rb"[A-Z][a-z]{2}, (?P<day>[0-9]{2}) (?P<month>[A-Z][a-z]{2}) (?P<year>[0-9]{4}) " + _TIME + rb" GMT"),
    re.compile(rb"[A-Z][a-z]{5,8}, (?P<day>[0-9]{2})-(?P<month>[A-Z][a-z]{2})-(?P<year>[0-9]{2}) " + _TIME + rb" GMT"),
    re.compile(rb"[A-Z][a-z]{2} (?P<month>[A-Z][a-z]{2}) (?P<day>[ 0-9][0-9]) " + _TIME + rb" (?P<year>[0-9]{4})"),
)


def parse_duration(value: str | float) -> float:
    """Seconds from "250ms", "30s", "1.5m", "1h30m" or "5d", or from a plain number of seconds.

    Raises ValueError saying what was expected.
    """
    seconds: float = -1.0
    if not isinstance(value, str | bool):
        seconds = value
    elif isinstance(value, str):
        with contextlib.suppress(ValueError):
            seconds = seconds_in(value)
    if not 0.0 <= seconds <= DURATION_S_MAX:  # refuses NaN too, and compares integers of any size
        raise ValueError(f'expected a duration like "250ms", "30s", "10m", "1h" or "5d", not {value!r:.80}')
    return float(seconds)


def format_duration(seconds: float) -> str:
    """The shortest text `parse_duration` reads back: "90s" and not "1.5m", "2h" and not "120m"."""
    for unit, unit_s in UNITS_S.items():
        count = round(seconds / unit_s, 9)
        if count >= 1 and count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds * 1000:.6f}".rstrip("0").rstrip(".") + "ms" if seconds else "0s"


def parse_schedule(value: str | Sequence[str | float]) -> tuple[float, ...]:
    """Delays in seconds before each retry, from a preset's name or a list of durations.

    Raises ValueError saying what was expected.
    """
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"expected a list of delays or one of {', '.join(PRESETS)}, not {value!r:.80}")
        return PRESETS[value]
    if len(value) > RETRIES_MAX:
        raise ValueError(f"expected at most {RETRIES_MAX} retries, not {len(value)}")
    schedule_s = tuple(map(parse_duration, value))
    for delay_s in schedule_s:
        if delay_s > DELAY_S_MAX:
            raise ValueError(f"expected delays up to {format_duration(DELAY_S_MAX)}, not {format_duration(delay_s)}")
    return schedule_s


def next_delay_s(
    schedule_s: Sequence[float], attempt: int, jitter: float, unit_random: float, retry_after_s: float | None = None
) -> float | None:
    """The wait after attempt number `attempt` (from 1) failed; None when the schedule is exhausted.

    `jitter` is the share of the scheduled delay (0.1: ±10 %). What the endpoint asks for by `Retry-After` is a minimum,
    not a replacement, and counts up to a day.
    """
    assert attempt >= 1
    if attempt > len(schedule_s):
        return None
    delay_s = schedule_s[attempt - 1] * _spread(jitter, unit_random)
    return delay_s if retry_after_s is None else max(delay_s, min(retry_after_s, RETRY_AFTER_S_MAX))


def retry_after_s(raw: bytes | None, now_unix: float) -> float | None:
    """Seconds asked for by a `Retry-After` field value, at most a day; None if there is none or it makes no sense.

    Takes whole seconds or a date in any of the three forms of RFC 9110; a date gone by is 0.
    """
    text = (raw or b"").strip(b" \t")
    if text.isdigit():
        digits = text.lstrip(b"0")
        return RETRY_AFTER_S_MAX if len(digits) > 6 else min(float(digits or b"0"), RETRY_AFTER_S_MAX)
    date_unix = _http_date_unix(text, now_unix)
    return None if date_unix is None else min(max(date_unix - now_unix, 0.0), RETRY_AFTER_S_MAX)


def dead_delay_s(deaths: int, unit_random: float) -> float:
    """How long an endpoint that died `deaths` times in a row is left alone: 30 s doubling to 15 min, ±10 %."""
    return min(_DEAD_S * 2.0 ** min(deaths - 1, 16), _DEAD_S_MAX) * _spread(_DEAD_JITTER, unit_random)


def reconnect_delay_s(failures: int, unit_random: float) -> float:
    """The wait before calling the database again after `failures` refusals in a row: 50 ms up to 5 s.

    Drawn from the whole range up to a doubling ceiling ("full jitter", Marc Brooker, AWS Architecture Blog, 2015), so
    that daemons cut off in the same instant do not come back in the same instant.
    """
    ceiling_s = min(_RECONNECT_S * 2.0 ** min(failures, 16), _RECONNECT_S_MAX)
    return _RECONNECT_S + (ceiling_s - _RECONNECT_S) * unit_random


def _spread(jitter: float, unit_random: float) -> float:
    return 1.0 + jitter * (2.0 * unit_random - 1.0)


def _http_date_unix(text: bytes, now_unix: float) -> float | None:
    """Written out because `strptime` follows the locale and `email.utils` accepts nearly anything."""
    match = next(filter(None, (pattern.fullmatch(text) for pattern in _HTTP_DATES)), None)
    if match is None or match["month"] not in _MONTHS:
        return None
    year, day, hour, minute, second = (int(match[name]) for name in ("year", "day", "hour", "minute", "second"))
    if len(match["year"]) == 2:  # the century that puts it at most 50 years ahead
        this_year = datetime.fromtimestamp(now_unix, UTC).year
        year += this_year - this_year % 100
        year -= 100 if year > this_year + 50 else 0
    try:
        moment = datetime(year, _MONTHS.index(match["month"]) + 1, day, hour, minute, min(second, 59), tzinfo=UTC)
    except ValueError:
        return None
    return moment.timestamp()
