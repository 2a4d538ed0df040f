"""The REST API as an application: `/v1` behind authentication, inside the boundary."""

from __future__ import annotations

from aiohttp import web

from dispatcher.web.auth import authentication
from dispatcher.web.bodies import BODY_BYTES_MAX
from dispatcher.web.boundary import boundary, finish_head
from dispatcher.web.events import Events
from dispatcher.web.parts import Web
from dispatcher.web.webhooks import Webhooks


def build_api_app(parts: Web) -> web.Application:
    """Everything of the API's listener."""
    v1 = web.Application(middlewares=[authentication(parts.accounts, parts.rate_limit)])
    v1.add_routes([*Webhooks(parts).routes(), *Events(parts).routes()])
    app = web.Application(middlewares=[boundary], client_max_size=BODY_BYTES_MAX)
    app.add_subapp("/v1", v1)
    app.on_response_prepare.append(finish_head)
    return app
