"""The dashboard put together: its pages as routes of the listener, and problems as pages."""

from __future__ import annotations

from http import HTTPStatus
from typing import Protocol

from aiohttp import web

from dispatcher.web.dashboard.assets import Assets
from dispatcher.web.dashboard.deliveries import DeliveryPages
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.editing import Editing
from dispatcher.web.dashboard.events import EventPages
from dispatcher.web.dashboard.live import Live
from dispatcher.web.dashboard.log import LogPage
from dispatcher.web.dashboard.operator import OperatorPages
from dispatcher.web.dashboard.overview import Overview
from dispatcher.web.dashboard.rendering import Templates
from dispatcher.web.dashboard.replaying import ReplayPages
from dispatcher.web.dashboard.signin import SignIn
from dispatcher.web.dashboard.trial import TrialPage
from dispatcher.web.dashboard.types import TypePages
from dispatcher.web.dashboard.visits import Door
from dispatcher.web.dashboard.webhook import WebhookPages
from dispatcher.web.dashboard.webhooks import WebhookList
from dispatcher.web.parts import Log, Stores, Web
from dispatcher.web.problems import Problem


class Pages(Protocol):
    """What serves some pages."""

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""


class Dashboard:
    """All of it."""

    def __init__(self, parts: Web, log: Log, stores: Stores) -> None:
        assets = Assets()
        self._desk = Desk(
            parts=parts, log=log, stores=stores, door=Door(stores.sessions), templates=Templates(assets, parts.brand)
        )
        self._assets = assets
        self._live = Live(self._desk)
        self._pages: list[Pages] = [
            SignIn(self._desk),
            Overview(self._desk, self._live),
            WebhookList(self._desk, self._live),
            Editing(self._desk),
            WebhookPages(self._desk, self._live),
            LogPage(self._desk),
            TrialPage(self._desk),
            ReplayPages(self._desk),
            DeliveryPages(self._desk),
            EventPages(self._desk),
            TypePages(self._desk),
            self._live,
        ]
        if parts.operator is not None:
            self._pages.append(OperatorPages(self._desk, parts.operator))

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [*self._assets.routes(), *(route for page in self._pages for route in page.routes())]

    def close(self) -> None:
        """End every stream."""
        self._live.close()

    async def error_page(self, request: web.Request, problem: Problem) -> web.Response:
        """The page that tells a problem."""
        try:
            await self._desk.door.recognise(request)
        except Exception:  # noqa: BLE001  the database is away: a page that says so needs nobody signed in
            self._desk.door.receive(request)
        page = self._desk.templates.page(
            request,
            "error.html",
            status=problem.status,
            headers=problem.headers,
            title=HTTPStatus(problem.status).phrase,
            problem=problem,
        )
        self._desk.door.keep_guest(request, page)
        return page
