"""`/v1/webhooks/{id}/stats`: how a webhook has fared, as a whole and by buckets of time.

Read from the log of attempts, the newest rows first and some ten thousands at most. When a window holds more, the sums
are of its newest part: `complete` is false and `from` says where it begins.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from aiohttp import web

from dispatcher.core.backoff import parse_duration
from dispatcher.moments import BEGINNING
from dispatcher.store.deliveries import NOTHING, Stats, Tally
from dispatcher.web.answers import answer, check_query, moment
from dispatcher.web.asked import WEBHOOK
from dispatcher.web.auth import caller
from dispatcher.web.openapi import Parameter, operation
from dispatcher.web.parts import Log
from dispatcher.web.problems import FieldError, invalid, not_found

WINDOW: Final = "24h"
WINDOW_MIN_S: Final = 60.0
WINDOW_MAX_S: Final = 30 * 86400.0
BUCKETS_MAX: Final = 60  # what a chart of the width of a page can show
BUCKETS_S: Final = (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 10800, 21600, 43200, 86400)
_WINDOW: Final = Parameter("window", "How far back: 1m to 30d.", {"type": "string", "default": WINDOW})


class Deliveries(msgspec.Struct):
    """How deliveries ended."""

    delivered: int
    exhausted: int
    discarded: int


class Latency(msgspec.Struct):
    """Of attempts, from their start to the end of the response; null without any."""

    p50: float | None
    p95: float | None


class Bucket(msgspec.Struct):
    """One stretch of the window."""

    at: str | None
    attempts: int
    delivered: int
    exhausted: int
    discarded: int
    retrying: int  # attempts that failed and were followed by another one, or will be
    success_rate: float | None
    latency_ms: Latency


class StatsAnswer(msgspec.Struct, kw_only=True):
    """A window."""

    webhook_id: str
    window: str
    since: str | None = msgspec.field(name="from")
    until: str | None = msgspec.field(name="to")
    complete: bool
    attempts: int
    attempts_by_result: dict[str, int]
    retrying: int
    deliveries: Deliveries
    success_rate: float | None  # delivered, of those that ended
    latency_ms: Latency
    bucket_s: int
    buckets: list[Bucket]


class StatsOf:
    """The call."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def routes(self) -> list[web.RouteDef]:
        """Paths below /v1."""
        return [web.get(f"{WEBHOOK}/stats", self.get)]

    @operation("Webhooks", parameters=[_WINDOW], answers={200: StatsAnswer})
    async def get(self, request: web.Request) -> web.Response:
        """A webhook's last 24 hours, or another `window` like 15m, 7d."""
        check_query(request, "window")
        window = request.query.get("window", WINDOW)
        return answer(await self.tell(caller(request).account_id, request.match_info["id"], window))

    async def tell(self, account_id: int, webhook_id: str, window: str, rows_max: int | None = None) -> StatsAnswer:
        """A webhook's stats. With `rows_max` they are of so many rows, and where that is not all, in shorter buckets.

        Raises Problem: no such webhook, or no such window.
        """
        window_s = _seconds(window)
        endpoint_id = await self._log.deliveries.endpoint(account_id, webhook_id)
        if endpoint_id is None:
            raise not_found("webhook")
        until = datetime.now(UTC)
        since, bucket = until - timedelta(seconds=window_s), bucket_of(window_s)
        found = await self._log.deliveries.stats(endpoint_id, since, until, bucket, rows_max)
        if rows_max is not None and found.oldest is not None:
            bucket = bucket_of((until - found.oldest).total_seconds())
            found = await self._log.deliveries.stats(endpoint_id, since, until, bucket, rows_max)
        begin = found.oldest or since
        return StatsAnswer(
            webhook_id=webhook_id,
            window=window,
            since=moment(begin),
            until=moment(until),
            complete=found.oldest is None,
            attempts=found.whole.attempts,
            attempts_by_result=found.results,
            retrying=found.whole.retrying,
            deliveries=Deliveries(found.whole.delivered, found.whole.exhausted, found.whole.discarded),
            success_rate=_rate(found.whole),
            latency_ms=_latency(found.whole),
            bucket_s=int(bucket.total_seconds()),
            buckets=_buckets(found, begin, until, bucket),
        )


def bucket_of(window_s: float) -> timedelta:
    """The shortest of our lengths that makes no more buckets of a window than a chart can show."""
    return timedelta(seconds=next(length for length in BUCKETS_S if length * (BUCKETS_MAX - 1) >= window_s))


def _seconds(window: str) -> float:
    try:
        window_s = parse_duration(window)
    except ValueError:
        window_s = 0.0
    if not WINDOW_MIN_S <= window_s <= WINDOW_MAX_S:
        raise invalid([FieldError("window", "expected a duration from 1m to 30d, like 24h")])
    return window_s


def _buckets(found: Stats, since: datetime, until: datetime, bucket: timedelta) -> list[Bucket]:
    """Every bucket that the window touches, empty ones included, the oldest first."""
    first = BEGINNING + (since - BEGINNING) // bucket * bucket  # so that they do not move
    count = -((first - until) // bucket)
    return [_shown(at, found.buckets.get(at, NOTHING)) for at in (first + n * bucket for n in range(count))]


def _shown(at: datetime, tally: Tally) -> Bucket:
    return Bucket(
        at=moment(at),
        attempts=tally.attempts,
        delivered=tally.delivered,
        exhausted=tally.exhausted,
        discarded=tally.discarded,
        retrying=tally.retrying,
        success_rate=_rate(tally),
        latency_ms=_latency(tally),
    )


def _rate(tally: Tally) -> float | None:
    ended = tally.delivered + tally.exhausted + tally.discarded
    return round(tally.delivered / ended, 4) if ended else None


def _latency(tally: Tally) -> Latency:
    return Latency(*(None if ms is None else round(ms, 1) for ms in (tally.p50_ms, tally.p95_ms)))
