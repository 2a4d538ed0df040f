"""The overview: is everything flowing, what is stuck, since when, why, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from aiohttp import web
from markupsafe import Markup

from dispatcher.model import EndpointStatus
from dispatcher.snapshot import Snapshot
from dispatcher.store.overview import Happening, Traffic, WebhookState
from dispatcher.web.dashboard import charts
from dispatcher.web.dashboard.advice import Trouble, trouble_of
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.live import Live
from dispatcher.web.dashboard.rendering import duration
from dispatcher.web.dashboard.shared import Shared
from dispatcher.web.dashboard.visits import session_of, utc_now, visit_of

OUTCOMES: Final = (
    charts.Series("Delivered", "delivered"),
    charts.Series("Retrying", "retrying"),
    charts.Series("Failed", "failed"),
)
WINDOW: Final = timedelta(hours=1)
FEED: Final = 12
WORST: Final = 6
KEPT_S: Final = 5.0
ENGINE_AWAY: Final = timedelta(seconds=10)  # without a heartbeat; a take-over takes less than one
LAG_S: Final = 30.0  # committed this long ago and not read yet: something is wrong


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Everything on the page."""

    at: datetime
    webhooks: Sequence[WebhookState]
    traffic: Traffic
    feed: Sequence[Happening]
    troubles: Sequence[Trouble]

    @property
    def waiting(self) -> int:
        """Deliveries that wait, held ones included."""
        return sum(webhook.waiting for webhook in self.webhooks)

    @property
    def is_cut(self) -> bool:
        """Whether there are more."""
        return any(webhook.is_cut for webhook in self.webhooks)

    @property
    def oldest(self) -> WebhookState | None:
        """The webhook whose event has waited longest."""
        waiting = [webhook for webhook in self.webhooks if webhook.oldest_at is not None]
        return min(waiting, key=lambda webhook: webhook.oldest_at or self.at, default=None)

    @property
    def held(self) -> int:
        """Deliveries that wait because somebody paused their webhook."""
        return sum(webhook.waiting for webhook in self.webhooks if webhook.status is EndpointStatus.PAUSED)

    @property
    def counts(self) -> dict[str, int]:
        """Webhooks by status."""
        return {status.value: sum(w.status is status for w in self.webhooks) for status in EndpointStatus}


class Overview:
    """The page."""

    def __init__(self, desk: Desk, live: Live) -> None:
        self._desk = desk
        self._live = live
        self._known: Shared[Figures] = Shared(KEPT_S)

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [self._desk.page("/", self.show)]

    async def show(self, request: web.Request) -> web.StreamResponse:
        """Everything in one look."""
        account_id = session_of(request).owner.account_id
        figures = await self._known.get(self._live.moment(request), lambda: self._look(account_id))
        return self._desk.templates.page(
            request,
            "overview.html",
            figures=figures,
            chart=_chart(figures.traffic, visit_of(request).zone),
            span=_span(figures.traffic),
            worst_shown=WORST,
            delivery_id=lambda happening: self._desk.log.ids.id_of(*happening.key),
        )

    async def _look(self, account_id: int) -> Figures:
        now, store = utc_now(), self._desk.stores.overview
        webhooks = await store.webhooks(account_id)
        traffic = await store.traffic(account_id, now - WINDOW, now)
        feed = await store.recent(account_id, FEED)
        engine = await self._engine()
        troubles = [*_of_engine(engine, now), *sorted(_of_webhooks(webhooks, now), key=_rank)]
        return Figures(at=now, webhooks=webhooks, traffic=traffic, feed=feed, troubles=troubles)

    async def _engine(self) -> tuple[datetime, Snapshot] | None:
        own = self._desk.parts.snapshot()
        return (utc_now(), own) if own.role == "active" else await self._desk.stores.overview.engine()


def _chart(traffic: Traffic, zone: ZoneInfo | None) -> Markup:
    """Deliveries by when they ended, and failed attempts that will be followed by another one."""
    rows = [charts.Bar(one.at, (one.delivered, one.retrying, one.failed)) for one in traffic.slices]
    return charts.bars(rows, OUTCOMES, title=f"Deliveries, {_span(traffic)}", length=traffic.length, zone=zone or UTC)


def _span(traffic: Traffic) -> str:
    """What the figures are about, in words: of a busy log they cover its newest part only."""
    return f"last {duration(traffic.until - traffic.whole.at)}"


def _of_engine(engine: tuple[datetime, Snapshot] | None, now: datetime) -> list[Trouble]:
    """What stops everybody's deliveries. It tells nothing of other accounts."""
    if engine is None or now - engine[0] > ENGINE_AWAY:
        return [
            Trouble(
                level="bad",
                title="No dispatcher is delivering",
                reason="Events are safe in the outbox and will be sent once one runs.",
                since=engine[0] if engine else None,
                remedy="Ask the operator to start the dispatcher.",
            )
        ]
    at, snapshot = engine
    if snapshot.outbox_lag_s > LAG_S:
        return [
            Trouble(
                level="warn",
                title="The dispatcher lags behind",
                reason="Events are read later than they are written. None is lost.",
                since=at - timedelta(seconds=snapshot.outbox_lag_s),
                remedy="Ask the operator to look at its load and its database.",
            )
        ]
    return []


def _of_webhooks(webhooks: Sequence[WebhookState], now: datetime) -> list[Trouble]:
    found = (trouble_of(webhook, now) for webhook in webhooks)
    return [trouble for trouble in found if trouble is not None]


def _rank(trouble: Trouble) -> tuple[bool, float]:
    """What is bad first, then what has lasted longest."""
    return (trouble.level != "bad", trouble.since.timestamp() if trouble.since else 0.0)
