"""The catalogue: what each event type means, what its data looks like, and a handler to start from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

from aiohttp import web

from dispatcher.core.catalogue import EventType
from dispatcher.core.rendering import TYPE_BYTES_MAX
from dispatcher.model import BodyStyle
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.schemas import fields
from dispatcher.web.dashboard.snippets import snippets
from dispatcher.web.dashboard.visits import session_of
from dispatcher.web.problems import not_found

TYPE: Final = rf"/event-types/{{name:[a-z0-9_.]{{1,{TYPE_BYTES_MAX}}}}}"


class TypePages:
    """The pages."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [
            self._desk.page("/event-types", self.browse),
            self._desk.page(TYPE, self.show),
            self._desk.page(f"{TYPE}/test", self.test),
        ]

    async def browse(self, request: web.Request) -> web.StreamResponse:
        """The catalogue."""
        groups = _groups(self._desk.parts.catalogue)
        return self._desk.templates.page(request, "event-types.html", groups=groups)

    async def show(self, request: web.Request) -> web.StreamResponse:
        """One type."""
        kind = self._found(request)
        style = BodyStyle.PYTHON if request.query.get("style") == BodyStyle.PYTHON else BodyStyle.COMPACT
        webhooks = await self._desk.stores.overview.webhooks(session_of(request).owner.account_id)
        return self._desk.templates.page(
            request,
            "event-type.html",
            kind=kind,
            fields=fields(kind.schema),
            style=style,
            snippets=snippets(kind, style, self._desk.parts.header_prefix),
            webhooks=webhooks,
        )

    async def test(self, request: web.Request) -> web.StreamResponse:
        """Lead to the test page of the chosen webhook, with this type chosen there."""
        webhook = request.query.get("webhook", "")
        if not webhook.isascii() or not webhook.replace("_", "").replace("-", "").isalnum():
            raise not_found("webhook")
        raise web.HTTPSeeOther(f"/webhooks/{quote(webhook)}/test?type={quote(self._found(request).name)}")

    def _found(self, request: web.Request) -> EventType:
        kind = self._desk.parts.catalogue.get(request.match_info["name"])
        if kind is None:
            raise not_found("event type in the catalogue")
        return kind


def _groups(kinds: Iterable[EventType]) -> dict[str, list[EventType]]:
    """By the first word of their names, in the order of the catalogue."""
    found: dict[str, list[EventType]] = {}
    for kind in kinds:
        found.setdefault(kind.name.partition(".")[0], []).append(kind)
    return found
