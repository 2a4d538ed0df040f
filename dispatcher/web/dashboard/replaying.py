"""Replays: choose what to send again, see how many that is, begin, follow, cancel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, timedelta, tzinfo
from typing import Final

from aiohttp import web

from dispatcher.store.replays import Selection
from dispatcher.web.answers import check_query
from dispatcher.web.asked import WEBHOOK
from dispatcher.web.bodies import parse_body
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.editing import Errors, field_errors
from dispatcher.web.dashboard.log import utc_of
from dispatcher.web.dashboard.visits import named, read_form, utc_now, visit_of
from dispatcher.web.dashboard.webhook import subject_of
from dispatcher.web.problems import Problem, not_found
from dispatcher.web.replays import CANCELLED, CHECKS, NewReplay, PreviewAnswer, Replays, shown

RECENT: Final = 10
SPAN: Final = timedelta(days=1)  # how far back, unless somebody says otherwise
SELECTIONS: Final = {
    Selection.FAILED: ("Failed", "Those that were given up and never arrived."),
    Selection.MISSED: ("Missed", "Whatever never arrived: from before this webhook, while it was disabled, or failed."),
    Selection.ALL: ("All", "Those that arrived as well. The handler gets them twice, under the same event id."),
}


class ReplayPages:
    """The pages."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._replays = Replays(desk.parts, desk.log)

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [
            self._desk.page(f"{WEBHOOK}/replay", self.ask),
            self._desk.form(f"{WEBHOOK}/replay", self.begin),
            self._desk.form(f"{WEBHOOK}/replays/{{job:[A-Za-z0-9_-]{{1,64}}}}/cancel", self.cancel),
        ]

    async def ask(self, request: web.Request) -> web.StreamResponse:
        """The form, and the replays there were."""
        check_query(request, "note")
        return await self._page(request, {}, Errors(), None)

    async def begin(self, request: web.Request) -> web.StreamResponse:
        """Count what would be sent; or, once that was seen, begin."""
        form = await read_form(request)
        is_preview = form.get("act") != "begin"
        try:
            document = _document(form, is_preview=is_preview, zone=visit_of(request).zone or UTC)
            found = await self._replays.begin(*named(request), parse_body(document, NewReplay, CHECKS))
        except Problem as problem:
            if problem.status != 422:
                raise
            return await self._page(request, form, field_errors(problem.errors), None)
        if isinstance(found, PreviewAnswer):
            return await self._page(request, form, Errors(), found)
        raise web.HTTPSeeOther(f"/webhooks/{request.match_info['id']}/replay?note=replaying")

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """End one that is under way, and take back what it queued and nobody has attempted."""
        endpoint_id = await self._desk.log.deliveries.endpoint(*named(request))
        if endpoint_id is None:
            raise not_found("webhook")
        record = await self._desk.log.replays.cancel(endpoint_id, request.match_info["job"], CANCELLED)
        if record is None:
            raise not_found("replay")
        note = "?note=cancelled" if record.status == "cancelled" else ""
        raise web.HTTPSeeOther(f"/webhooks/{request.match_info['id']}/replay{note}")

    async def _page(
        self, request: web.Request, form: Mapping[str, str], errors: Errors, preview: PreviewAnswer | None
    ) -> web.StreamResponse:
        subject = await subject_of(self._desk, request)
        zone = visit_of(request).zone or UTC
        since = (utc_now() - SPAN).astimezone(zone).strftime("%Y-%m-%dT%H:%M")
        endpoint_id = await self._desk.log.deliveries.endpoint(*named(request))
        recent = [] if endpoint_id is None else await self._desk.log.replays.browse(endpoint_id, limit=RECENT)
        return self._desk.templates.page(
            request,
            "webhook-replay.html",
            status=422 if errors else 200,
            form={"since": since, "until": "", "status": "failed", "types": ""} | dict(form),
            errors=errors,
            preview=preview,
            selections=SELECTIONS,
            types=self._desk.parts.catalogue.names(),
            replays=[shown(record, subject["webhook"].id) for record in recent],
            zone=str(zone),
            **subject,
        )


def _document(form: Mapping[str, str], *, is_preview: bool, zone: tzinfo) -> str:
    """The body of the API that says the same."""
    members: dict[str, object] = {
        "since": utc_of(form.get("since", ""), zone),
        "status": form.get("status", ""),
        "dry_run": is_preview,
    }
    if form.get("until"):
        members["until"] = utc_of(form["until"], zone)
    types = form.get("types", "").replace(",", " ").split()
    if types:
        members["types"] = types
    return json.dumps(members)
