"""What every page is made with."""

from __future__ import annotations

import dataclasses

from aiohttp import web

from dispatcher.web.dashboard.rendering import Templates
from dispatcher.web.dashboard.visits import Door, Handler
from dispatcher.web.parts import Log, Stores, Web

"""The path of one webhook's pages."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """The API's parts, and what pages need besides."""

    parts: Web
    log: Log
    stores: Stores
    door: Door
    templates: Templates

    def page(self, path: str, handler: Handler) -> web.RouteDef:
        """Serve a page to those who are signed in."""
        return web.get(path, self.door.signed_in(handler))

    def form(self, path: str, handler: Handler) -> web.RouteDef:
        """Take a form from those who are signed in, once its token has been checked."""
        return web.post(path, self.door.signed_in(handler))
