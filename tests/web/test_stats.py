"""How a webhook has fared: sums of its log, as a whole and by buckets, bounded and honest about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from counter import Desk, open_desk
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.store.deliveries import DeliveryStore
from dispatcher.web.stats import BUCKETS_MAX, WINDOW_MAX_S, WINDOW_MIN_S, bucket_of

if TYPE_CHECKING:
    from tests.web.conftest import Api


@pytest.fixture
async def desk(api: Api, pool: Any, database: str) -> AsyncIterator[Desk]:
    async with open_desk(api, pool, database) as desk:
        yield desk


async def log(desk: Desk, webhook: str, *rows: tuple[str, str, str | None, int]) -> None:
    """Write rows (age, state, result, milliseconds) into the log."""
    key = await desk.key(webhook)
    for n, (age, state, result, ms) in enumerate(rows):
        await desk.app.execute(
            "INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result,"
            " duration_us) VALUES (now() - $1::text::interval, $2, '1', $3, 0, 1, $4, $5, $6)",
            age, n, key, state, result, ms * 1000,
        )  # fmt: skip


async def test_the_log_is_summed_up_as_a_whole_and_by_buckets(desk: Desk) -> None:
    webhook, other = await desk.webhook(), await desk.webhook()
    await log(
        desk, webhook,
        ("2 hours", "delivered", "2xx", 10), ("2 hours", "delivered", "2xx", 20),
        ("2 hours", "retrying", "timeout", 30),
        ("20 hours", "exhausted", "5xx", 40), ("20 hours", "discarded", None, 0), ("25 hours", "delivered", "2xx", 9),
    )  # fmt: skip
    await log(desk, other, ("1 hour", "exhausted", "4xx", 1))
    stats = await desk.ask("GET", f"/webhooks/{webhook}/stats")
    assert stats["deliveries"] == {"delivered": 2, "exhausted": 1, "discarded": 1}
    assert (stats["attempts"], stats["retrying"], stats["success_rate"], stats["complete"]) == (4, 1, 0.5, True)
    assert stats["attempts_by_result"] == {"2xx": 2, "timeout": 1, "5xx": 1}
    assert stats["latency_ms"] == {"p50": 25.0, "p95": 38.5}
    assert stats["window"] == "24h"
    buckets = stats["buckets"]
    assert len(buckets) <= BUCKETS_MAX
    assert [b["at"] for b in buckets] == sorted({b["at"] for b in buckets})
    assert sum(bucket["attempts"] for bucket in buckets) == 4
    [full] = [bucket for bucket in buckets if bucket["delivered"]]
    assert (full["delivered"], full["retrying"], full["success_rate"]) == (2, 1, 1.0)
    assert full["latency_ms"] == {"p50": 20.0, "p95": 29.0}


async def test_a_webhook_that_has_done_nothing_has_no_rates(desk: Desk) -> None:
    webhook = await desk.webhook()
    stats = await desk.ask("GET", f"/webhooks/{webhook}/stats", params={"window": "15m"})
    assert (stats["attempts"], stats["success_rate"], stats["latency_ms"]) == (0, None, {"p50": None, "p95": None})
    assert {bucket["success_rate"] for bucket in stats["buckets"]} == {None}


async def test_what_is_no_window_is_refused(desk: Desk) -> None:
    webhook = await desk.webhook()
    for window in ("", "1s", "31d", "long", "-1h"):
        answer = await desk.api("GET", f"/v1/webhooks/{webhook}/stats", params={"window": window})
        assert (answer.status, answer.fields) == (422, ["window"])
    assert (await desk.api("GET", f"/v1/webhooks/{webhook}/stats", params={"x": "1"})).fields == ["x"]


async def test_sums_of_a_part_say_where_it_begins(desk: Desk) -> None:
    webhook = await desk.webhook()
    await log(desk, webhook, *[(f"{n} hours", "delivered", "2xx", 1) for n in (1, 2, 3)])
    now = datetime.now(UTC)
    store = DeliveryStore(desk.app, stats_rows_max=2)
    stats = await store.stats(await desk.key(webhook), now - timedelta(days=1), now, timedelta(hours=1))
    assert stats.whole.delivered == 2
    assert stats.oldest is not None
    assert now - timedelta(hours=3) < stats.oldest


@given(st.floats(WINDOW_MIN_S, WINDOW_MAX_S))
def test_no_window_has_more_buckets_than_a_chart_shows(window_s: float) -> None:
    assert window_s / bucket_of(window_s).total_seconds() <= BUCKETS_MAX - 1  # one more, where neither end is even
