"""API and dashboard as one application: `/v1` behind authentication, pages behind sessions, all inside the boundary."""

from __future__ import annotations

from aiohttp import web

from dispatcher.web.annex import Annex
from dispatcher.web.auth import authentication
from dispatcher.web.bodies import BODY_BYTES_MAX
from dispatcher.web.boundary import boundary, finish_head
from dispatcher.web.deliveries import Deliveries
from dispatcher.web.docs import Docs
from dispatcher.web.events import Events
from dispatcher.web.listen import Listen
from dispatcher.web.parts import Log, Web
from dispatcher.web.replays import Replays
from dispatcher.web.stats import StatsOf
from dispatcher.web.trials import Trials
from dispatcher.web.webhooks import Webhooks


def build_api_app(parts: Web) -> web.Application:
    """Everything of the listener."""
    listen = Listen(parts, parts.events.tail())
    v1 = web.Application(middlewares=[authentication(parts.accounts, parts.rate_limit)])
    v1.add_routes([*Webhooks(parts).routes(), *Events(parts).routes(), *listen.routes()])
    if parts.log is not None:
        v1.add_routes(_routes_of_log(parts, parts.log))
    app = web.Application(middlewares=[boundary], client_max_size=BODY_BYTES_MAX)
    docs = Docs(parts)
    app.add_routes(docs.routes())  # before /v1, which would ask for a key
    app.add_subapp("/v1", v1)
    docs.app = app
    if parts.log is not None and parts.stores is not None:
        dashboard = Annex(parts, parts.log, parts.stores)
        app.middlewares.append(dashboard.middleware())
        app.router.register_resource(dashboard)
        app.on_shutdown.append(dashboard.close)
    app.on_response_prepare.append(finish_head)
    app.on_shutdown.append(listen.close)
    return app


def _routes_of_log(parts: Web, log: Log) -> list[web.RouteDef]:
    calls = (Deliveries(parts, log), Replays(parts, log), Trials(parts, log), StatsOf(log))
    return [route for each in calls for route in each.routes()]
