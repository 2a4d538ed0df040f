"""The door of a listener: how many connections it holds, and how long one may take to ask for something.

Whoever opens connections and asks for nothing, or lets a request's head arrive a byte at a time, must not keep the
others out, and must not use up the descriptors that deliveries need. So a connection has a while to bring its first
request's head, another to bring the next one, and when there are too many, those that have kept us waiting longest make
room. Who has sent a head is being served and is never put out.

Bodies have a deadline of their own, where they are read.

What is no request gets a problem like any other mistake. Neither the answer nor the log repeats a byte of it: a
misspelt header may well be the one with the key.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from dispatcher.logs import get_logger
from dispatcher.web.problems import Problem

CONNECTIONS_MAX: Final = 1000
"""Of one listener: ≈ 30 KiB and a descriptor each, and many times what its callers have open at once."""

HEAD_S: Final = 15.0  # from a connection's opening to the end of its first request's head
IDLE_S: Final = 75.0  # from an answer to the end of the next head: longer than reverse proxies keep theirs

log = get_logger("dispatcher.web")


class Connection(web.RequestHandler):
    """One connection of a caller."""

    __slots__ = ("_door",)

    def __init__(self, door: Door, server: web.Server, *, idle_s: float) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, access_log=None, keepalive_timeout=idle_s)  # type: ignore[arg-type]
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        super().connection_made(transport)
        self._door.admit(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        self._door.forget(self)
        super().connection_lost(exc)

    def put_out(self) -> None:
        """Close at once, whatever there is still to send."""
        if self.transport is not None:
            self.transport.abort()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Tell of what broke outside of all handlers: of callers whose body nobody can read, as of other mistakes."""
        error = kw.get("exc_info")
        if isinstance(error, web.RequestPayloadError):
            log.debug("request.malformed", reason=type(error).__name__)
        else:
            super().log_exception(*args, **kw)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer for what no handler got to see, or none could answer for."""
        if status < 500:
            log.debug("request.malformed", status=status, reason=type(exc).__name__)
            problem = Problem(status, "bad_request", "This is not a request as RFC 9112 has it.")
        else:
            log.error("request.failed", exc_info=exc)
            if request.writer.output_size > 0:
                raise ConnectionError("an answer has begun already")
            problem = Problem(status, "internal_error", "This is our fault. It was logged.")
        response = problem.response()
        response.headers["Server"] = "dispatcher"  # or else it says which versions run here
        response.force_close()
        return response


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
        super().__init__(app, access_log=None, handle_signals=False, **options)
        self._connections_max = connections_max
        self._head_s = head_s
        self._idle_s = idle_s
        self._connections: set[web.RequestHandler] = set()
        self._waiting: dict[web.RequestHandler, None] = {}  # whoever keeps us waiting, longest first
        self._patience: dict[web.RequestHandler, asyncio.TimerHandle] = {}  # with those yet to send their first head

    def __repr__(self) -> str:
        return f"<Door {len(self._connections)} connections, {len(self._waiting)} waiting>"

    @property
    def server(self) -> Any:
        """What makes the protocol of each new connection; None before `setup`."""
        server = super().server
        return None if server is None else functools.partial(Connection, self, server, idle_s=self._idle_s)

    def admit(self, connection: Connection) -> None:
        """Let a connection in, and another one out if there are too many: this one, if all others are being served."""
        self._connections.add(connection)
        self._waiting[connection] = None
        loop = asyncio.get_running_loop()
        self._patience[connection] = loop.call_later(self._head_s, connection.put_out)
        if len(self._connections) > self._connections_max:
            longest = next(iter(self._waiting))
            assert isinstance(longest, Connection)
            self.forget(longest)
            longest.put_out()

    def forget(self, connection: Connection) -> None:
        """A connection is gone, or as good as that."""
        self._connections.discard(connection)
        self._attended(connection)

    def _attended(self, connection: web.RequestHandler) -> None:
        self._waiting.pop(connection, None)
        timer = self._patience.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _attend(self) -> Callable[..., Awaitable[web.StreamResponse]]:
        @web.middleware
        async def attend(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            connection = request.protocol
            self._attended(connection)
            try:
                return await handler(request)
            finally:
                if connection in self._connections:
                    self._waiting[connection] = None

        return attend
