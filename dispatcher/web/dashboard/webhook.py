"""One webhook: how it fares and why, its settings and its secret, and what can be done with it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from aiohttp import web
from markupsafe import Markup

from dispatcher.store.endpoints import EndpointRecord
from dispatcher.store.overview import Held, WebhookState
from dispatcher.web.answers import Wanted, check_query
from dispatcher.web.asked import WEBHOOK
from dispatcher.web.bodies import parse_body
from dispatcher.web.changes import Changes
from dispatcher.web.dashboard import charts
from dispatcher.web.dashboard.advice import Trouble, trouble_of
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.editing import Errors, field_errors, number
from dispatcher.web.dashboard.live import Live
from dispatcher.web.dashboard.overview import OUTCOMES
from dispatcher.web.dashboard.shared import Shared
from dispatcher.web.dashboard.visits import local_path, named, read_form, session_of, utc_now, visit_of
from dispatcher.web.deliveries import Deliveries
from dispatcher.web.problems import Problem, not_found
from dispatcher.web.replays import shown as replay_shown
from dispatcher.web.stats import StatsAnswer, StatsOf
from dispatcher.web.webhooks import Rotation, given_or_new, rotation_checks, shown

WINDOWS: Final = ("1h", "24h", "7d", "30d")
GRACES: Final = {"0": "End it at once", "3600": "1 hour", "86400": "24 hours", "604800": "7 days"}
ROWS: Final = 20_000  # of the log in the figures and charts: ≈ 50 ms
LATEST: Final = 8
REPLAYS: Final = 3
KEPT_S: Final = 5.0


class WebhookPages:
    """The pages."""

    def __init__(self, desk: Desk, live: Live) -> None:
        self._desk = desk
        self._live = live
        self._changes = Changes(desk.parts.endpoints)
        self._stats = StatsOf(desk.log)
        self._deliveries = Deliveries(desk.parts, desk.log)
        self._known: Shared[StatsAnswer] = Shared(KEPT_S)

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        page, form = self._desk.page, self._desk.form
        return [
            page(WEBHOOK, self.show),
            form(f"{WEBHOOK}/pause", self.pause),
            form(f"{WEBHOOK}/resume", self.resume),
            form(f"{WEBHOOK}/secret", self.reveal),
            page(f"{WEBHOOK}/rotate", self.ask_rotation),
            form(f"{WEBHOOK}/rotate", self.rotate),
            page(f"{WEBHOOK}/delete", self.ask_deletion),
            form(f"{WEBHOOK}/delete", self.delete),
        ]

    async def show(self, request: web.Request) -> web.StreamResponse:
        """How it fares."""
        check_query(request, "window", "note")
        return await self._page(request)

    async def pause(self, request: web.Request) -> web.StreamResponse:
        """Hold its events."""
        await self._changes.pause(*named(request))
        raise await self._back(request, "paused")

    async def resume(self, request: web.Request) -> web.StreamResponse:
        """Let them go."""
        await self._changes.resume(*named(request))
        raise await self._back(request, "resumed")

    async def reveal(self, request: web.Request) -> web.StreamResponse:
        """The page, with the secret on it."""
        found = await self._desk.parts.endpoints.secret(*named(request))
        if found is None:
            raise not_found("webhook")
        return await self._page(request, secret=found.current)

    async def ask_rotation(self, request: web.Request) -> web.StreamResponse:
        """A form: which secret, and how long the old one signs on."""
        return await self._rotation(request, {}, Errors())

    async def rotate(self, request: web.Request) -> web.StreamResponse:
        """Replace the secret, and show the new one."""
        form = await read_form(request)
        members = {"grace_s": number(form.get("grace_s", "86400"))}
        if form.get("signing") == "own":
            members["secret"] = json.dumps(form.get("secret", "").strip())
        document = "{" + ",".join(f'"{name}":{text}' for name, text in members.items()) + "}"
        try:
            body = parse_body(document, Rotation, rotation_checks())
        except Problem as problem:
            return await self._rotation(request, form, field_errors(problem.errors))
        secret = given_or_new(body.secret)
        account_id, webhook_id = named(request)
        await self._changes.rotate(account_id, webhook_id, secret, timedelta(seconds=body.grace_s))
        return await self._page(request, secret=secret, is_rotated=True)

    async def ask_deletion(self, request: web.Request) -> web.StreamResponse:
        """A page that asks whether that is meant; with scripts it is a dialog."""
        subject = await subject_of(self._desk, request)
        return self._desk.templates.page(request, "webhook-delete.html", **subject)

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """Remove it."""
        await self._changes.delete(*named(request))
        raise web.HTTPSeeOther("/webhooks?note=deleted")

    async def _back(self, request: web.Request, note: str) -> web.HTTPSeeOther:
        """To where the button was."""
        form = await read_form(request)
        back = local_path(form.get("next", f"/webhooks/{request.match_info['id']}"))
        return web.HTTPSeeOther(f"{back}{'&' if '?' in back else '?'}note={note}")

    async def _rotation(self, request: web.Request, form: dict[str, str], errors: Errors) -> web.Response:
        subject = await subject_of(self._desk, request)
        return self._desk.templates.page(
            request,
            "webhook-rotate.html",
            status=422 if errors else 200,
            form={"grace_s": "86400", "signing": "new"} | form,
            errors=errors,
            graces=GRACES,
            **subject,
        )

    async def _page(
        self, request: web.Request, *, secret: str | None = None, is_rotated: bool = False
    ) -> web.StreamResponse:
        owner, webhook_id = session_of(request).owner, request.match_info["id"]
        subject = await subject_of(self._desk, request)
        window = request.query.get("window", "24h")
        window = window if window in WINDOWS else "24h"
        key = (self._live.moment(request), webhook_id, window)
        stats = await self._known.get(key, lambda: self._stats.tell(owner.account_id, webhook_id, window, ROWS))
        latest, older = await self._deliveries.listed(owner, webhook_id, Wanted(LATEST, None, None, {}))
        return self._desk.templates.page(
            request,
            "webhook.html",
            rows=latest,
            has_more=older is not None,
            replays=await self._replays(owner.account_id, webhook_id),
            stats=stats,
            windows=WINDOWS,
            covered=_covered(stats),
            secret=secret,
            is_rotated=is_rotated,
            is_revealed=request.method == "POST",
            charts=_charts(stats, visit_of(request).zone or UTC),
            **subject,
        )

    async def _replays(self, account_id: int, webhook_id: str) -> list[Any]:
        endpoint_id = await self._desk.log.deliveries.endpoint(account_id, webhook_id)
        if endpoint_id is None:
            raise not_found("webhook")
        found = await self._desk.log.replays.browse(endpoint_id, limit=REPLAYS)
        return [replay_shown(record, webhook_id) for record in found]


async def subject_of(desk: Desk, request: web.Request) -> dict[str, Any]:
    """What every page of one webhook shows at its head. Raises Problem when there is no such webhook."""
    account_id, webhook_id = named(request)
    record = await Changes(desk.parts.endpoints).current(account_id, webhook_id)
    held = await desk.stores.overview.held(account_id, webhook_id)
    return {
        "webhook": shown(record, desk.parts.defaults),
        "version": record.version,
        "held": held,
        "trouble": _trouble(record, held),
        "tab": request.path.removeprefix(f"/webhooks/{webhook_id}").strip("/").partition("/")[0],
    }


def _trouble(record: EndpointRecord, held: Held) -> Trouble | None:
    state = WebhookState(
        id=record.id,
        url=record.url,
        description=record.description,
        events=record.events,
        status=record.status,
        disabled_reason=record.disabled_reason,
        updated_at=record.updated_at,
        failing_since=record.failing_since,
        last_error=record.last_error,
        waiting=held.waiting,
        is_cut=held.is_cut,
        oldest_at=held.oldest_at,
        next_at=held.next_at,
    )
    return trouble_of(state, utc_now())


def _charts(stats: StatsAnswer, zone: Any) -> dict[str, Markup]:
    length = timedelta(seconds=stats.bucket_s)
    moments = [datetime.fromisoformat(bucket.at or "") for bucket in stats.buckets]
    outcomes = [
        charts.Bar(at, (bucket.delivered, bucket.retrying, bucket.exhausted + bucket.discarded))
        for at, bucket in zip(moments, stats.buckets, strict=True)
    ]
    latencies = [
        (at, bucket.latency_ms.p50, bucket.latency_ms.p95) for at, bucket in zip(moments, stats.buckets, strict=True)
    ]
    return {
        "outcomes": charts.bars(outcomes, OUTCOMES, title="Deliveries", length=length, zone=zone),
        "latencies": charts.lines(latencies, ["p50", "p95"], title="Latency", length=length, zone=zone),
    }


def _covered(stats: StatsAnswer) -> str | None:
    """Since when the figures are, if that is less than asked for."""
    return None if stats.complete else stats.since
