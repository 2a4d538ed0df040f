"""`/live`: tells open pages when to look again.

A page that hears `change` fetches itself once more and takes over what is marked as live: so there is one way to render
anything, and what moves is escaped like what stands. One that hears `away` says that the database cannot be asked. One
loop per account asks it for its pulse, however many pages are open, and none runs when nobody looks. A page looks once
more when its stream opens: by then every change is noticed, and what happened in between is on the page.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Hashable, Iterator
from typing import Final

from aiohttp import web

from dispatcher.logs import get_logger
from dispatcher.store.accounts import KeyOwner
from dispatcher.store.database import TROUBLE
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.visits import session_of
from dispatcher.web.problems import Problem

LOOKING: Final = "X-Looking"  # "again": a page that was told to
PULSE_S: Final = 1.0
BEGIN_S: Final = 5.0  # the database takes longer than this only when it is away
TROUBLE_S: Final = 3.0
HEARTBEAT_S: Final = 15.0
WRITE_S: Final = 30.0  # until a page that reads nothing is gone
PAGES_MAX: Final = 500
ACCOUNT_PAGES_MAX: Final = 50
RETRY_AFTER_S: Final = 10

_HELLO: Final = b"retry: 2000\n: looking\n\n"
_CHANGE: Final = b"event: change\ndata:\n\n"
_HEARTBEAT: Final = b": heartbeat\n\n"
_AWAY: Final = b"event: away\ndata:\n\n"
_OVER: Final = b"event: over\ndata:\n\n"

log = get_logger("dispatcher.web.dashboard")


class Watch:
    """One account's pulse, for all of its pages: `beat` counts the changes."""

    def __init__(self, desk: Desk, owner: KeyOwner) -> None:
        self.beat = 0
        self.pages = 0
        self.is_away = False  # the database: nobody knows what has changed
        self._desk = desk
        self._owner = owner
        self._stirred = asyncio.Event()
        self._begun = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="dashboard pulse")

    async def begun(self) -> None:
        """Wait until everything that changes from now on will be noticed. Raises TimeoutError."""
        async with asyncio.timeout(BEGIN_S):
            await self._begun.wait()

    async def changed(self, seen: int, timeout_s: float) -> int:
        """Wait until there is news behind the beat `seen`, or the time is up; return the beat."""
        if self.beat == seen:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._stirred.wait()
        return self.beat

    def end(self) -> None:
        """Look no more."""
        self._task.cancel()

    def stir(self) -> None:
        """Let every page look at once."""
        self.beat += 1
        self._stirred.set()
        self._stirred = asyncio.Event()

    async def _run(self) -> None:
        last = ""
        while True:
            pause_s = PULSE_S
            try:
                pulse = await self._desk.stores.overview.pulse(self._owner.account_id, self._owner.account)
                if (last and pulse != last) or self.is_away:
                    self.is_away = False
                    self.stir()
                last = pulse
                self._begun.set()
            except TROUBLE as error:
                log.warning("pulse.waiting", error=str(error) or type(error).__name__)
                if not self.is_away:
                    self.is_away = True
                    self.stir()
                pause_s = TROUBLE_S
            await asyncio.sleep(pause_s)


class Live:
    """The stream."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._watches: dict[int, Watch] = {}
        self._is_closed = False

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [web.get("/live", self._desk.door.signed_in(self.stream), allow_head=False)]

    def moment(self, request: web.Request) -> Hashable:
        """A key under which an answer may be shared: by all pages that look because of the same change, and else by
        nobody, so that whoever has just done something sees what came of it.
        """
        owner = session_of(request).owner
        watch = self._watches.get(owner.account_id)
        is_told = request.headers.get(LOOKING) == "again"
        # The watch itself, and not the account: the next one counts from nought again.
        return (watch, watch.beat) if watch is not None and is_told else object()

    def close(self) -> None:
        """End every stream: pages come back to whoever serves then."""
        self._is_closed = True
        for watch in self._watches.values():
            watch.stir()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Say `change` whenever the account's pages may look different, `away` when the database cannot be asked, and
        `over` when the session is.
        """
        owner = session_of(request).owner
        with self._watching(owner) as watch:
            await watch.begun()
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
            await response.prepare(request)
            with contextlib.suppress(ConnectionError, TimeoutError):
                await _write(response, _HELLO)
                await self._tell(request, response, watch)
        return response

    async def _tell(self, request: web.Request, response: web.StreamResponse, watch: Watch) -> None:
        loop, seen = asyncio.get_running_loop(), watch.beat
        beat_at = loop.time() + HEARTBEAT_S
        while not self._is_closed:
            beat = await watch.changed(seen, max(0.0, beat_at - loop.time()))
            if self._is_closed or (request.transport is None or request.transport.is_closing()):
                return
            if beat != seen:
                seen = beat
                await _write(response, _AWAY if watch.is_away else _CHANGE)
            if loop.time() >= beat_at:
                if await self._is_over(request):
                    await _write(response, _OVER)
                    return
                await _write(response, _HEARTBEAT)
                beat_at = loop.time() + HEARTBEAT_S

    async def _is_over(self, request: web.Request) -> bool:
        try:
            return await self._desk.door.is_over(request)
        except TROUBLE:
            return False  # nobody knows; the next heartbeat asks again

    @contextlib.contextmanager
    def _watching(self, owner: KeyOwner) -> Iterator[Watch]:
        watch = self._watches.get(owner.account_id)
        total = sum(each.pages for each in self._watches.values())
        if total >= PAGES_MAX or (watch is not None and watch.pages >= ACCOUNT_PAGES_MAX):
            wait = {"Retry-After": str(RETRY_AFTER_S)}
            raise Problem(429, "too_many_pages", "Too many pages are open to be kept up to date.", headers=wait)
        if watch is None:
            watch = self._watches[owner.account_id] = Watch(self._desk, owner)
        watch.pages += 1
        try:
            yield watch
        finally:
            watch.pages -= 1
            if not watch.pages:
                watch.end()
                del self._watches[owner.account_id]


async def _write(response: web.StreamResponse, text: bytes) -> None:
    async with asyncio.timeout(WRITE_S):
        await response.write(text)
