"""What was emitted: the list, newest first, and one event with everything that became of it."""

from __future__ import annotations

import dataclasses
import re
from typing import Final
from urllib.parse import urlencode

from aiohttp import web

from dispatcher.core.rendering import is_type
from dispatcher.store.events import EventPage
from dispatcher.web.answers import is_id
from dispatcher.web.asked import ID
from dispatcher.web.chronicle import Chronicle
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.payloads import exhibit
from dispatcher.web.dashboard.visits import session_of
from dispatcher.web.problems import not_found

SHOWN: Final = 25
DISCARDED: Final = "discarded"
PREVIEW_CHARS: Final = 160


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What the page's address asks for."""

    type: str
    status: str
    id: str
    after: str | None
    before: str | None

    @property
    def is_filtered(self) -> bool:
        """Whether some events are left out."""
        return bool(self.type or self.status)

    def path(self, **cursor: str) -> str:
        """The page with the same filters, somewhere else in the list."""
        chosen = {"type": self.type, "status": self.status, **cursor}
        query = urlencode({name: value for name, value in chosen.items() if value})
        return f"/events?{query}" if query else "/events"


class EventPages:
    """The pages."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._chronicle = Chronicle(desk.parts, desk.log)

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [
            self._desk.page("/events", self.browse),
            self._desk.page(f"/events/{ID}", self.show),
        ]

    async def browse(self, request: web.Request) -> web.StreamResponse:
        """The list. An id in the search field leads to its event."""
        asked, owner = _asked(request), session_of(request).owner
        error = {"id": "", "type": ""}
        if asked.id:
            if await self._desk.parts.events.get(owner.account, asked.id) is not None:
                raise web.HTTPSeeOther(f"/events/{asked.id}")
            error["id"] = "There is no such event; it may be older than events are kept."
        if asked.type and not is_type(asked.type):
            error["type"] = 'A type looks like "email.delivered".'
        is_wrong = any(error.values())
        page = EventPage([], None) if is_wrong else await self._page(owner.account, asked)
        newer, older = _neighbours(asked, page)
        return self._desk.templates.page(
            request,
            "events.html",
            status=422 if is_wrong else 200,
            asked=asked,
            error=error,
            events=page.events,
            newer=newer,
            older=older,
            is_first=newer is None,
            types=self._desk.parts.catalogue.names(),
            preview=_preview,
        )

    async def show(self, request: web.Request) -> web.StreamResponse:
        """One event and its deliveries."""
        owner = session_of(request).owner
        event = await self._desk.parts.events.get(owner.account, request.match_info["id"])
        if event is None:
            raise not_found("event")
        found = await self._desk.log.deliveries.everywhere(owner.account_id, owner.account, event.id)
        return self._desk.templates.page(
            request,
            "event.html",
            event=event,
            is_known=self._desk.parts.catalogue.get(event.type) is not None,
            data=None if event.data is None else exhibit(event.data.encode()),
            deliveries=[(one, self._chronicle.line(one.record, one.webhook_id)) for one in found],
        )

    async def _page(self, account: str, asked: Asked) -> EventPage:
        return await self._desk.parts.events.list(
            account,
            limit=SHOWN,
            after=asked.after,
            before=asked.before,
            type=asked.type or None,
            discarded=asked.status == DISCARDED,
        )


def _asked(request: web.Request) -> Asked:
    """What does not fit is as if it were not there: a link that somebody cut short still leads to the list."""
    query = {name: value.strip() for name, value in request.query.items()}
    after, before = (query.get(name) if is_id(query.get(name, "")) else None for name in ("after", "before"))
    return Asked(
        type=query.get("type", ""),
        status=DISCARDED if query.get("status") == DISCARDED else "",
        id=query.get("id", "") if is_id(query.get("id", "")) else "",
        after=None if before else after,
        before=before,
    )


def _neighbours(asked: Asked, page: EventPage) -> tuple[str | None, str | None]:
    """Where the newer and the older ones are; None: there are none."""
    first, last = (page.events[0].id, page.events[-1].id) if page.events else (None, None)
    if asked.before is not None:
        newer = page.reached and asked.path(before=page.reached)
        return newer or None, asked.path(after=last or asked.before)
    newest = asked.path(before=first or asked.after) if asked.after and (first or asked.after) else None
    return newest, page.reached and asked.path(after=page.reached)


def _preview(data: str | None) -> str:
    """The beginning of an event's data, in one line."""
    text = re.sub(r"\s+", " ", (data or "")[: 4 * PREVIEW_CHARS])
    return text if len(text) <= PREVIEW_CHARS else f"{text[:PREVIEW_CHARS]}…"
