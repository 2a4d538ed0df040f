"""The list of webhooks: the state of each and why, how its last day went, and what is waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import urlencode

from aiohttp import web
from markupsafe import Markup

from dispatcher.store.overview import WEBHOOKS_MAX, Spark, WebhookState
from dispatcher.web.answers import check_query, is_id
from dispatcher.web.dashboard import charts
from dispatcher.web.dashboard.advice import trouble_of
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.live import Live
from dispatcher.web.dashboard.overview import OUTCOMES
from dispatcher.web.dashboard.shared import Shared
from dispatcher.web.dashboard.visits import session_of, utc_now

PAGE: Final = 25
LOOKS_MAX: Final = 10  # × WEBHOOKS_MAX webhooks are searched for one page
TROUBLE: Final = "trouble"
STATUSES: Final = {"active": "Active", "paused": "Paused", "disabled": "Disabled", TROUBLE: "Needs attention"}
HOUR: Final = timedelta(hours=1)
BARS: Final = 24
KEPT_S: Final = 5.0


class WebhookList:
    """The page."""

    def __init__(self, desk: Desk, live: Live) -> None:
        self._desk = desk
        self._live = live
        self._sparks: Shared[dict[str, list[Spark]]] = Shared(KEPT_S)

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [self._desk.page("/webhooks", self.browse)]

    async def browse(self, request: web.Request) -> web.StreamResponse:
        """A page of the list."""
        check_query(request, "status", "q", "after", "note")
        account_id, query = session_of(request).owner.account_id, request.query
        status, text = query.get("status", ""), query.get("q", "").strip()
        after = query.get("after", "")
        found, reached = await self._find(account_id, status, text, after if is_id(after) else "")
        now = utc_now()
        return self._desk.templates.page(
            request,
            "webhooks.html",
            webhooks=found,
            troubles={webhook.id: trouble_of(webhook, now) for webhook in found},
            sparks=await self._charts(request, [webhook.id for webhook in found], now),
            state=status,
            statuses=STATUSES,
            text=text,
            is_filtered=bool(status or text),
            first=_link(status, text) if after else None,
            older=_link(status, text, reached) if reached else None,
        )

    async def _find(
        self, account_id: int, status: str, text: str, after: str
    ) -> tuple[Sequence[WebhookState], str | None]:
        """A page of what is asked for, and the id to go on behind; None if nothing follows."""
        found: list[WebhookState] = []
        now, reached = utc_now(), after
        for _ in range(LOOKS_MAX):
            some = await self._desk.stores.overview.webhooks(account_id, *([reached] if reached else []))
            found += [webhook for webhook in some if _passes(webhook, status, text, now)]
            if len(found) > PAGE:
                return found[:PAGE], found[PAGE - 1].id
            if len(some) < WEBHOOKS_MAX:
                return found, None
            reached = some[-1].id
        return found, reached

    async def _charts(self, request: web.Request, ids: Sequence[str], now: datetime) -> Mapping[str, Markup]:
        """A sparkline of the last day for each of them."""
        if not ids:
            return {}
        this_hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        begins = [this_hour - (BARS - 1 - place) * HOUR for place in range(BARS)]
        store = self._desk.stores.overview
        account_id, key = session_of(request).owner.account_id, (self._live.moment(request), *ids)
        found = await self._sparks.get(key, lambda: store.sparks(account_id, ids, begins, HOUR))
        return {webhook_id: _spark(found.get(webhook_id, [])) for webhook_id in ids}


def _spark(sparks: Sequence[Spark]) -> Markup:
    bars = [charts.Bar(one.begins, (one.delivered, one.retrying, one.failed), one.is_cut) for one in sparks]
    return charts.spark(bars, OUTCOMES, label="Last 24 hours")


def _passes(webhook: WebhookState, status: str, text: str, now: datetime) -> bool:
    if status == TROUBLE and trouble_of(webhook, now) is None:
        return False
    if status not in {"", TROUBLE, webhook.status.value}:
        return False
    words = f"{webhook.id} {webhook.url} {webhook.description} {' '.join(webhook.events)}".lower()
    return all(word in words for word in text.lower().split())


def _link(status: str, text: str, after: str = "") -> str:
    given = {name: value for name, value in (("status", status), ("q", text), ("after", after)) if value}
    return f"/webhooks?{urlencode(given)}" if given else "/webhooks"
