"""Signing in with an API key, signing out, and how somebody likes to read."""

from __future__ import annotations

import asyncio
import math

from aiohttp import web

from dispatcher.web.auth import LOOK_UP_TIMEOUT_S
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.rendering import duration
from dispatcher.web.dashboard.visits import THEME_COOKIE, THEMES, local_path, read_form, set_preference, visit_of


class SignIn:
    """The pages."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        door = self._desk.door
        return [
            web.get("/sign-in", door.for_all(self.show)),
            web.post("/sign-in", door.for_all(self.sign_in)),
            self._desk.form("/sign-out", self.sign_out),
            web.post("/theme", door.for_all(self.theme)),
        ]

    async def show(self, request: web.Request) -> web.StreamResponse:
        """The form; who is signed in already goes on."""
        back = local_path(request.query.get("next", "/"))
        if visit_of(request).session is not None:
            raise web.HTTPSeeOther(back)
        return self._page(request, back)

    async def sign_in(self, request: web.Request) -> web.StreamResponse:
        """Begin a session, if the key is valid."""
        form = await read_form(request)
        back, key = local_path(form.get("next", "/")), form.get("key", "").strip()
        wait_s = self._desk.door.count_attempt(request)
        if wait_s > 0.0:
            error = f"Too many attempts. Try again in {duration(math.ceil(wait_s))}."
            return self._page(request, back, 429, error, {"Retry-After": str(math.ceil(wait_s))})
        if not key:
            return self._page(request, back, 422, "Enter an API key.")
        async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
            owner = await self._desk.parts.accounts.find_key(key)
        if owner is None:
            return self._page(request, back, 422, "This API key is unknown or revoked.")
        response = web.Response(status=303, headers={"Location": back})
        await self._desk.door.let_in(request, owner.key_id, response)
        return response

    async def sign_out(self, request: web.Request) -> web.StreamResponse:
        """End the session."""
        response = web.Response(status=303, headers={"Location": "/sign-in", "Clear-Site-Data": '"cache"'})
        await self._desk.door.let_out(request, response)
        return response

    async def theme(self, request: web.Request) -> web.StreamResponse:
        """Light, dark, or what the system prefers; scripts set the same cookie without asking us."""
        form = await read_form(request)
        response = web.Response(status=303, headers={"Location": local_path(form.get("next", "/"))})
        chosen = form.get("theme", "")
        set_preference(request, response, THEME_COOKIE, chosen if chosen in THEMES else "")
        return response

    def _page(
        self, request: web.Request, back: str, status: int = 200, error: str = "", headers: dict[str, str] | None = None
    ) -> web.Response:
        return self._desk.templates.page(
            request, "sign-in.html", status=status, headers=headers, back=back, error=error
        )
