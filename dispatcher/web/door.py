"""The door of a listener: how many connections it holds, and how long one may take to ask for something.

Whoever opens connections and asks for nothing, or lets a request's head arrive a byte at a time, must not keep the
others out, and must not use up the descriptors that deliveries need. So a connection has a while to bring its first
request's head, another to bring the next one, and when there are too many, those that have kept us waiting longest make
room. Who has sent a head is being served and is never put out.

Bodies have a deadline of their own, where they are read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

CONNECTIONS_MAX: Final = 1000
"""Of one listener: ≈ 30 KiB and a descriptor each, and many times what its callers have open at once."""

HEAD_S: Final = 15.0  # from a connection's opening to the end of its first request's head
IDLE_S: Final = 75.0  # from an answer to the end of the next head: longer than reverse proxies keep theirs


class Door(web.AppRunner):
    """Runs an application behind a door. Times in seconds."""

    def __init__(
        self,
        app: web.Application,
        *,
        connections_max: int = CONNECTIONS_MAX,
        head_s: float = HEAD_S,
        idle_s: float = IDLE_S,
        **options: Any,
    ) -> None:
        app.middlewares.insert(0, self._attend())
        super().__init__(app, keepalive_timeout=idle_s, **options)
        self._connections_max = connections_max
        self._head_s = head_s
        # Who keeps us waiting, longest first, and whether for its first head. Some may be gone already.
        self._waiting: dict[web.RequestHandler, bool] = {}

    def __repr__(self) -> str:
        return f"<Door {len(self._waiting)} waiting>"

    @property
    def server(self) -> Any:
        """What makes the protocol of each new connection; None before `setup`."""
        return None if super().server is None else self._admit

    def _admit(self) -> web.RequestHandler:
        server = super().server
        assert server is not None, "the listener was set up"
        loop = asyncio.get_running_loop()
        admitted: web.RequestHandler = server()
        connected = len(server.connections)
        if connected >= self._connections_max:
            # With everybody else being served, the newcomer makes room itself, once it is connected.
            loop.call_soon(_put_out, self._longest_waiting() or admitted)
        elif len(self._waiting) > connected:
            self._waiting = {each: first for each, first in self._waiting.items() if each.transport is not None}
        self._waiting[admitted] = True
        loop.call_later(self._head_s, self._lose_patience, admitted)
        return admitted

    def _longest_waiting(self) -> web.RequestHandler | None:
        while self._waiting:
            connection = next(iter(self._waiting))
            del self._waiting[connection]
            if connection.transport is not None:
                return connection
        return None

    def _lose_patience(self, connection: web.RequestHandler) -> None:
        if self._waiting.get(connection):
            _put_out(connection)

    def _attend(self) -> Callable[..., Awaitable[web.StreamResponse]]:
        @web.middleware
        async def attend(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            connection = request.protocol
            self._waiting.pop(connection, None)
            try:
                return await handler(request)
            finally:
                if connection.transport is not None:
                    self._waiting[connection] = False

        return attend


def _put_out(connection: web.RequestHandler) -> None:
    if connection.transport is not None:
        connection.transport.abort()
