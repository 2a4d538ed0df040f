"""The log of one webhook: its deliveries, by filters that stand in the address, a page at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from typing import Final
from urllib.parse import urlencode

from aiohttp import web

from dispatcher.model import DeliveryState, Result
from dispatcher.web.answers import Wanted, check_query, is_id, moment
from dispatcher.web.asked import WEBHOOK
from dispatcher.web.chronicle import DeliveryAnswer
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.editing import Errors, field_errors
from dispatcher.web.dashboard.visits import session_of, visit_of
from dispatcher.web.dashboard.webhook import subject_of
from dispatcher.web.deliveries import FILTERS, Deliveries
from dispatcher.web.problems import FieldError, Problem

PAGE: Final = 30
STATES: Final = list(DeliveryState)

_is_local: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d+)?)?").fullmatch


class LogPage:
    """The page."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._deliveries = Deliveries(desk.parts, desk.log)

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [self._desk.page(f"{WEBHOOK}/deliveries", self.browse)]

    async def browse(self, request: web.Request) -> web.StreamResponse:
        """A page of the list."""
        check_query(request, *FILTERS, "id", "after", "before", "note")
        subject = await subject_of(self._desk, request)
        zone = visit_of(request).zone or UTC
        entered = {name: value for name, value in request.query.items() if name != "note"}
        given = {name: _shareable(name, value.strip(), zone) for name, value in entered.items() if value.strip()}
        if given != entered:
            raise web.HTTPSeeOther(f"{request.path}?{urlencode(given)}")
        if given.get("id", "").startswith("dlv_"):
            raise web.HTTPSeeOther(f"/deliveries/{given['id']}") if is_id(given["id"]) else _no_id()
        filters = _only(given, *FILTERS)
        errors, rows, cursor = Errors(), list[DeliveryAnswer](), None
        try:
            rows, cursor = await self._listed(request, _asked(filters, given), given)
        except Problem as problem:
            if problem.status != 422:
                raise
            errors = field_errors(problem.errors)
        kept = {**filters, **_only(given, "id")}
        newer, older = _pages(request.path, kept, given, rows, cursor)
        return self._desk.templates.page(
            request,
            "webhook-log.html",
            status=422 if errors else 200,
            rows=rows,
            newer=newer,
            older=older,
            filters={name: _shown(given.get(name, ""), name, zone) for name in (*FILTERS, "id")},
            is_filtered=bool(filters or "id" in given),
            is_first="after" not in given and "before" not in given,
            errors=errors,
            states=STATES,
            results=list(Result),
            types=self._desk.parts.catalogue.names(),
            zone=str(zone),
            **subject,
        )

    async def _listed(
        self, request: web.Request, filters: Mapping[str, str], given: Mapping[str, str]
    ) -> tuple[list[DeliveryAnswer], str | None]:
        after, before = given.get("after"), given.get("before")
        if (after and before) or not all(is_id(text) for text in (after, before) if text):
            after = before = None
        part = Wanted(PAGE, after, before, filters)
        return await self._deliveries.listed(session_of(request).owner, request.match_info["id"], part)


def _shareable(name: str, value: str, zone: tzinfo) -> str:
    """A filter as the address has it, which means the same to a reader in another zone."""
    return utc_of(value, zone) if name in {"since", "until"} else value


def _asked(filters: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Filters as the API has them, an event's id among them."""
    return dict(filters) | ({"event_id": given["id"]} if "id" in given else {})


def utc_of(text: str, zone: tzinfo) -> str:
    """What a browser's field holds is a time of day where the reader is."""
    if not _is_local(text):
        return text
    try:
        return moment(datetime.fromisoformat(text).replace(tzinfo=zone)) or text
    except (ValueError, OverflowError):
        return text


def _shown(text: str, name: str, zone: tzinfo) -> str:
    """What the field shows: a shared address may hold the time in another zone."""
    if name not in {"since", "until"} or not text:
        return text
    try:
        return datetime.fromisoformat(text.replace(" ", "+")).astimezone(zone).strftime("%Y-%m-%dT%H:%M")
    except (ValueError, OverflowError):
        return ""


def _no_id() -> Problem:
    error = FieldError("id", "expected the id of an event or a delivery")
    return Problem(422, "invalid_request", "That is no id of an event or a delivery.", errors=[error])


def _only(given: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: given[name] for name in names if name in given}


def _pages(
    path: str, filters: Mapping[str, str], given: Mapping[str, str], rows: list[DeliveryAnswer], cursor: str | None
) -> tuple[str | None, str | None]:
    """Where the neighbours of this page are: the newer one, the older one."""

    def link(**cursors: str) -> str:
        query = urlencode(dict(filters) | cursors)
        return f"{path}?{query}" if query else path

    if "before" in given:
        newer = link(before=cursor) if cursor else link()
        return newer, link(after=rows[-1].id) if rows else link()
    newer = link(before=rows[0].id) if rows else link()
    return (newer if "after" in given else None), (link(after=cursor) if cursor else None)
