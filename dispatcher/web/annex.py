"""The dashboard's place in the listener. Its code is loaded when somebody first looks at a page.

With its templates it is a twentieth of an idle daemon, and of the daemons that share a database people look at one.
Loading takes a tenth of a second, once, in a thread: that holds deliveries up for 35 ms, where doing it on the event
loop would for 90. Each version has a directory of its own, so what is loaded late belongs to what runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from dispatcher.web.boundary import problem_of
from dispatcher.web.parts import Log, Stores, Web

if TYPE_CHECKING:
    from dispatcher.web.dashboard.app import Dashboard

PROGRAMS: Final = ("/v1", "/docs", "/openapi.json")  # what is said there is said in JSON


class Annex(web.DynamicResource):
    """Every path that nobody else serves. `middleware` belongs inside the boundary."""

    def __init__(self, parts: Web, log: Log, stores: Stores) -> None:
        super().__init__("/{path:.*}")
        self._parts = parts
        self._log = log
        self._stores = stores
        self._dashboard: Dashboard | None = None
        self._router = web.UrlDispatcher()

    async def resolve(self, request: web.Request) -> tuple[web.UrlMappingMatchInfo | None, set[str]]:
        """Which page is meant, and else with which methods there would be one."""
        await self._loaded()
        found = await self._router.resolve(request)
        match found.http_exception:
            case None:
                return found, set()
            case web.HTTPMethodNotAllowed(allowed_methods=allowed):
                return None, set(allowed)
            case _:
                return None, set()

    def middleware(self) -> Middleware:
        """Turns what goes wrong into a page, where people look."""

        @web.middleware
        async def as_page(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            try:
                return await handler(request)
            except Exception as error:
                if not _is_for_people(request):
                    raise
                dashboard = await self._loaded()
                return await dashboard.error_page(request, problem_of(request, error))

        return as_page

    async def close(self, _app: web.Application) -> None:
        """End every stream."""
        if self._dashboard is not None:
            self._dashboard.close()

    async def _loaded(self) -> Dashboard:
        if self._dashboard is None:
            made_of = await asyncio.to_thread(_load)
            if self._dashboard is None:  # nobody else was quicker
                self._dashboard = made_of(self._parts, self._log, self._stores)
                self._router.add_routes(self._dashboard.routes())
        return self._dashboard


def _load() -> type[Dashboard]:
    from dispatcher.web.dashboard.app import Dashboard

    return Dashboard


def _is_for_people(request: web.Request) -> bool:
    return "text/html" in request.headers.get("Accept", "") and not request.path.startswith(PROGRAMS)
