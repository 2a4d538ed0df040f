"""Snapshots of several shards or processes add up."""

from __future__ import annotations

import msgspec
import pytest

from dispatcher.snapshot import HistogramData, Snapshot, TableSize, TroubledEndpoint, total
from dispatcher.telemetry import UNSORTED_MAX, Histogram, Telemetry

ONE = Snapshot(
    role="active", shards=[2], database=True, progress_age_s=0.5, at_unix_s=10.0, events=3, deliveries={"delivered": 5},
    attempts={"2xx": 5, "5xx": 1}, attempt_duration=HistogramData((1.0, 2.0), [1, 2, 3], 9.0), outbox_lag_s=1.0,
    outbox_backlog=7, in_flight=4, endpoints={"active": 2},
    worst=[TroubledEndpoint("wh_1", "ready", 9, 0, 4, True, None)],
)  # fmt: skip
TWO = Snapshot(
    role="active", shards=[1], database=True, progress_age_s=0.1, at_unix_s=11.0, deliveries={"delivered": 1},
    attempts={"2xx": 1}, attempt_duration=HistogramData((1.0, 2.0), [1, 0, 0], 0.5), outbox_lag_s=0.1,
    outbox_backlog=9, in_flight=1, endpoints={"active": 1, "paused": 1},
    worst=[TroubledEndpoint("wh_2", "dead", 0, 0, 0, False, "timeout")],
)  # fmt: skip


def test_counts_add_up_and_ages_are_the_worst() -> None:
    both = total([ONE, TWO])
    assert (both.role, both.shards, both.database) == ("active", [1, 2], True)
    assert (both.events, both.in_flight) == (3, 5)
    assert both.deliveries == {"delivered": 6}
    assert both.attempts == {"2xx": 6, "5xx": 1}
    assert both.endpoints == {"active": 3, "paused": 1}
    assert (both.progress_age_s, both.at_unix_s, both.outbox_lag_s, both.outbox_backlog) == (0.5, 11.0, 1.0, 9)
    assert both.attempt_duration == HistogramData((1.0, 2.0), [2, 2, 3], 9.5)
    assert [endpoint.id for endpoint in both.worst] == ["wh_2", "wh_1"]


def test_a_standby_adds_nothing() -> None:
    assert total([ONE, Snapshot(database=True)]) == msgspec.structs.replace(ONE)


def test_one_away_from_the_database_shows() -> None:
    assert not total([ONE, Snapshot()]).database


def test_nobody_is_a_standby_without_a_database() -> None:
    assert total([]) == Snapshot(progress_age_s=0, at_unix_s=0)


def test_histograms_with_other_bounds_are_left_out() -> None:
    newer = Snapshot(attempt_duration=HistogramData((5.0,), [1, 1], 3.0))
    assert total([ONE, newer]).attempt_duration == ONE.attempt_duration


@pytest.mark.parametrize("name", Snapshot.__struct_fields__)
def test_no_field_is_forgotten(name: str) -> None:
    """What a shard says is in the sum of it and nothing else."""
    telemetry = Telemetry()
    telemetry.events = telemetry.released = 3
    whole = Snapshot(
        role="active", shards=[3], database=True, progress_age_s=1.0, at_unix_s=1.0, outbox_lag_s=1.0,
        outbox_backlog=1, in_flight=1, queued=1, buffered=1, retries_waiting=1, oldest_pending_s=1.0,
        endpoints={"active": 1}, lanes={"ready": 1}, connections={"idle": 1}, worst=ONE.worst, database_losses=2,
        instances={"active": 1}, partitions_until_unix_s={"outbox": 1.0},
        schema=7, tables=[TableSize("outbox", 4096, 9, 1)], astray_rows={"outbox": 2}, retention_unix_s=1.0,
        **telemetry.counters() | {"event_loop_lag_s": 1.0},
    )  # fmt: skip
    assert getattr(whole, name) != getattr(Snapshot(), name), "or nothing is shown"
    assert getattr(total([whole, Snapshot(database=True)]), name) == getattr(whole, name)


def test_tables_are_as_whoever_pruned_last_saw_them() -> None:
    """A shard moves from daemon to daemon, and the retention of the whole database with it."""
    early = Snapshot(retention_unix_s=1.0, tables=[TableSize("outbox", 1, 1, 1)], astray_rows={"outbox": 5})
    late = Snapshot(retention_unix_s=2.0, tables=[TableSize("outbox", 2, 2, 2)])
    for both in (total([early, late, Snapshot()]), total([Snapshot(), late, early])):
        assert (both.tables, both.astray_rows, both.retention_unix_s) == (late.tables, {}, 2.0)


def test_a_histogram_counts_each_value_once_in_the_bucket_that_ends_at_or_above_it() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    values = [0.0, 1.0, 1.5, 2.0, 2.1, 4.0, 4.1, 9.0] * (UNSORTED_MAX // 3)
    for value in values:
        histogram.observe(value)
    data = histogram.data()
    assert data.counts == [2 * (UNSORTED_MAX // 3)] * 4
    assert data.sum == pytest.approx(sum(values))
    histogram.observe(1.0)
    assert histogram.data().counts[0] == data.counts[0] + 1
