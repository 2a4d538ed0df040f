from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core import backoff
from dispatcher.core.backoff import (
    dead_delay_s,
    format_duration,
    next_delay_s,
    parse_duration,
    parse_schedule,
    reconnect_delay_s,
    retry_after_s,
)

NOW = datetime(2025, 1, 15, 10, 30, 0, tzinfo=UTC)
NOW_UNIX = NOW.timestamp()
unit = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("1m", 60), ("10m", 600), ("1h", 3600), ("5d", 432000), ("30s", 30), ("0s", 0), ("1.5h", 5400)),
        *(("1h30m", 5400), ("250ms", 0.25), ("007s", 7), (90, 90), (0, 0), (1.25, 1.25)),
    ],
)
def test_durations_are_read_as_seconds(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)
    assert isinstance(parse_duration(text), float)


@pytest.mark.parametrize(
    "value",
    [
        *("", "90", "1 m", " 1m", "1m ", "1m\n", "m", "-1m", "+1m", "1M", "30m1h", "1w", "1y", "1e3s", ".5s", "1.s"),
        *("inf", "nan", "infs", "１m", "1٣s", "9999999d", "9" * 400 + "s", -1, -0.1, True, False),
        *(math.inf, math.nan, 1e300, 10**400),
    ],
)
def test_what_is_no_duration_is_refused_with_an_example(value: str | float) -> None:
    with pytest.raises(ValueError, match=r'expected a duration like "250ms", "30s", "10m", "1h" or "5d", not '):
        parse_duration(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0s"), (0.25, "250ms"), (0.0005, "0.5ms"), (1, "1s"), (1.5, "1500ms"), (60, "1m"), (90, "90s")),
        *(
            (600, "10m"),
            (3600, "1h"),
            (5400, "90m"),
            (86400, "1d"),
            (90000, "25h"),
            (432000, "5d"),
            (0.1 + 0.2, "300ms"),
        ),
    ],
)
def test_durations_are_written_in_their_largest_whole_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(0, backoff.DURATION_S_MAX) | st.integers(0, 10**9))
def test_a_written_duration_reads_back(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-6, abs=1e-9)


def test_schedules_are_presets_or_lists() -> None:
    assert parse_schedule(["1m", "10m", 3600]) == backoff.DEFAULT
    assert parse_schedule("default") == backoff.DEFAULT
    assert parse_schedule("none") == parse_schedule([]) == ()
    assert parse_schedule("standard") == tuple(
        parse_duration(text) for text in ("5s", "5m", "30m", "2h", "5h", "10h", "14h", "20h", "24h")
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("standart", "one of default, standard, none"),
        (["1m", "soon"], "expected a duration"),
        (["31d"], "expected delays up to 30d, not 31d"),
        (["1m"] * 51, "expected at most 50 retries, not 51"),
    ],
)
def test_a_mistaken_schedule_says_what_was_expected(value: str | list[str | float], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_schedule(value)


def test_each_failed_attempt_has_its_own_delay_and_the_last_has_none() -> None:
    delays = [next_delay_s(backoff.DEFAULT, attempt, 0.1, 0.5) for attempt in (1, 2, 3, 4, 5)]
    assert delays == [60.0, 600.0, 3600.0, None, None]
    assert next_delay_s(backoff.NONE, 1, 0.1, 0.5, 10.0) is None


def test_jitter_spreads_a_delay_evenly_around_its_scheduled_value() -> None:
    assert next_delay_s((100.0,), 1, 0.1, 0.0) == pytest.approx(90)
    assert next_delay_s((100.0,), 1, 0.1, 0.75) == pytest.approx(105)
    assert next_delay_s((100.0,), 1, 0.0, 0.9) == 100
    assert next_delay_s((100.0,), 1, 0.5, 0.0) == pytest.approx(50)


def test_retry_after_is_a_minimum_and_counts_up_to_a_day() -> None:
    assert next_delay_s((60.0,), 1, 0.0, 0.5, 10.0) == 60
    assert next_delay_s((60.0,), 1, 0.0, 0.5, 300.0) == 300
    assert next_delay_s((60.0,), 1, 0.0, 0.5, 1e9) == 86400
    assert next_delay_s((100000.0,), 1, 0.0, 0.5, 1e9) == 100000


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5), st.floats(0, 1), unit, st.none() | st.floats(0, 1e9))
def test_a_delay_stays_within_its_jitter_unless_asked_to_wait(
    schedule_s: list[float], jitter: float, unit_random: float, asked_s: float | None
) -> None:
    for attempt, scheduled_s in enumerate(schedule_s, 1):
        delay_s = next_delay_s(schedule_s, attempt, jitter, unit_random, asked_s)
        assert delay_s is not None
        assert delay_s >= min(asked_s or 0, 86400)
        assert delay_s >= scheduled_s * (1 - jitter) * 0.999999
        assert delay_s <= max(scheduled_s * (1 + jitter) * 1.000001, min(asked_s or 0, 86400))


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [
        (b"120", 120),
        (b" 120\t", 120),
        (b"0", 0),
        (b"000000000007", 7),
        (b"86401", 86400),
        (b"99999999999999", 86400),
        (b"9" * 5000, 86400),
        (b"Wed, 15 Jan 2025 10:32:00 GMT", 120),
        (b"Wednesday, 15-Jan-25 10:32:00 GMT", 120),
        (b"Wed Jan 15 10:32:00 2025", 120),
        (b"Sat Feb  1 00:00:00 2025", 86400),
        (b"Mon, 99 Xxx 2025 10:32:00 GMT", None),
        (b"Thu, 30 Feb 2025 10:32:00 GMT", None),
        (b"Wed, 15 Jan 2025 25:32:00 GMT", None),
        (b"Wed, 15 Jan 2025 10:29:60 GMT", 0),
        (b"Thu, 01 Jan 1970 00:00:00 GMT", 0),
        (b"Fri, 31 Dec 9999 23:59:59 GMT", 86400),
        (b"Sat, 01 Jan 0000 00:00:00 GMT", None),
        (b"Sunday, 06-Nov-94 08:49:37 GMT", 0),
        (b"Sunday, 06-Nov-70 08:49:37 GMT", 86400),
        (b"Wed, 15 Jan 2025 10:32:00 +0100", None),
        (b"2025-01-15T10:32:00Z", None),
        (b"-5", None),
        (b"+5", None),
        (b"1.5", None),
        (b"1e300", None),
        (b"inf", None),
        (b"nan", None),
        (b"1_000", None),
        (b"0x10", None),
        (b"120, 240", None),
        (b"120\n", None),
        (b"\xb2", None),
        ("１２０".encode(), None),
        (b"", None),
        (b"soon", None),
        (None, None),
    ],
)
def test_retry_after_is_read_capped_or_ignored(raw: bytes | None, seconds: float | None) -> None:
    assert retry_after_s(raw, NOW_UNIX) == seconds


@given(st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1)))  # noqa: DTZ001 - Hypothesis wants naive bounds
def test_any_http_date_is_the_wait_until_then(moment: datetime) -> None:
    moment = moment.replace(microsecond=0, tzinfo=UTC)
    wait_s = min(max((moment - NOW).total_seconds(), 0), 86400)
    assert retry_after_s(format_datetime(moment, usegmt=True).encode(), NOW_UNIX) == wait_s
    asctime = f"{moment:%a %b} {moment.day:2} {moment:%H:%M:%S} {moment.year}"
    assert retry_after_s(asctime.encode(), NOW_UNIX) == wait_s


@given(st.integers(-49, 50))
def test_a_year_of_two_digits_is_at_most_fifty_years_ahead(years: int) -> None:
    moment = datetime(2025 + years, 6, 1, tzinfo=UTC)
    raw = f"{moment:%A, %d-%b-%y %H:%M:%S} GMT".encode()
    assert retry_after_s(raw, (moment - timedelta(seconds=7)).replace(year=2025).timestamp()) == (
        7 if years == 0 else 86400 if years > 0 else 0
    )


@given(st.binary(max_size=60) | st.from_regex(rb"[A-Za-z,: 0-9-]{20,32}", fullmatch=True), st.floats(0, 4e9))
def test_no_retry_after_ever_raises_or_exceeds_a_day(raw: bytes, now_unix: float) -> None:
    seconds = retry_after_s(raw, now_unix)
    assert seconds is None or 0 <= seconds <= 86400


def test_a_dead_endpoint_is_left_alone_for_twice_as_long_each_time() -> None:
    assert [dead_delay_s(deaths, 0.5) for deaths in range(1, 9)] == [30, 60, 120, 240, 480, 900, 900, 900]
    assert dead_delay_s(10**9, 0.5) == 900
    assert dead_delay_s(1, 0.0) == pytest.approx(27)
    assert dead_delay_s(9, 0.999999) == pytest.approx(990, rel=1e-3)


def test_reconnecting_slows_down_to_five_seconds() -> None:
    assert [reconnect_delay_s(failures, 0.0) for failures in (1, 5, 10**9)] == [0.05, 0.05, 0.05]
    ceilings = [reconnect_delay_s(failures, 1.0) for failures in (1, 2, 3, 6, 7, 8, 10**9)]
    assert ceilings == pytest.approx([0.1, 0.2, 0.4, 3.2, 5.0, 5.0, 5.0])
