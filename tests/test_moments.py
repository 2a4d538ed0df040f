"""Moments: the integers that PostgreSQL sends, and the times they stand for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.moments import BEGINNING, BEGINNING_UNIX_S, SECOND_US, of_datetime, to_datetime, whole_second
from dispatcher.store.database import connect

ANY = st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001


@given(ANY)
def test_a_time_comes_back_from_its_moment(at: datetime) -> None:
    assert to_datetime(of_datetime(at)) == at


@given(ANY)
def test_a_whole_second_is_the_time_without_its_microseconds(at: datetime) -> None:
    assert whole_second(of_datetime(at) // SECOND_US) == at.replace(microsecond=0)


def test_a_time_of_another_zone_is_the_same_moment() -> None:
    at = datetime(2025, 1, 15, 12, 30, 2, 5, tzinfo=timezone(timedelta(hours=2)))
    assert of_datetime(at) == of_datetime(at.astimezone(UTC))


def test_moments_count_from_postgresqls_beginning() -> None:
    assert of_datetime(BEGINNING) == 0
    assert BEGINNING.timestamp() == BEGINNING_UNIX_S


def test_infinity_is_spelt_as_the_driver_spells_it() -> None:
    assert to_datetime(2**63 - 1) == datetime.max  # noqa: DTZ901
    assert to_datetime(-(2**63)) == datetime.min  # noqa: DTZ901


@pytest.mark.parametrize(
    "text",
    [
        "2025-01-15 10:30:02.000001+00",
        "1969-12-31 23:59:59.999999+00",
        "0002-01-01 00:00:00+00",
        "9998-12-31 23:59:59+00",
    ],
)
async def test_an_engines_connection_reads_moments(database: str, text: str) -> None:
    connection = await connect(database, name="test", engine=True)
    try:
        moment_us, at = await connection.fetchrow(f"SELECT '{text}'::timestamptz::timestamp, '{text}'::timestamptz")
        assert (to_datetime(moment_us), of_datetime(at)) == (at, moment_us)
        for infinity in ("infinity", "-infinity"):
            moment_us, at = await connection.fetchrow(
                f"SELECT '{infinity}'::timestamptz::timestamp, '{infinity}'::timestamptz"
            )
            assert to_datetime(moment_us) == at
    finally:
        await connection.close()
