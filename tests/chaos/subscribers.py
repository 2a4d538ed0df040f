"""The subscribers' side: a thread that answers requests and keeps the ledger of every one of them.

What a path does stands in its name: `/prompt/…` answers 200 at once, `/slow/…` after a moment, `/failing/…` answers 500
to the first attempt of every fourth event, `/mute/…` never answers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvloop

SLOW_S = 0.1
TURNS = 10


class Key(NamedTuple):
    """What may come once: one attempt of one event for one webhook."""

    path: str
    event: str
    attempt: int


@dataclasses.dataclass(slots=True)
class Arrival:
    """One request."""

    key: Key
    delivery: str
    daemon: str
    answered: int = 0  # the status, once it was written to a connection that was open


def fails(key: Key) -> bool:
    """Whether this attempt is answered by 500."""
    return key.path.startswith("/failing") and key.attempt == 1 and zlib.crc32(key.event.encode()) % 4 == 0


class Subscribers:
    """A listener for any number of webhooks. Its thread writes; whoever reads takes a copy."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.answered: Counter[tuple[str, str]] = Counter()  # path and event, by 200
        self.connections: set[Any] = set()
        self.most_open = 0  # of these at once
        self.url = ""
        self._dice = random.Random(1)

    def delay_s(self, path: str) -> float | None:
        if path.startswith("/mute"):
            return None
        return self._dice.uniform(0, SLOW_S) if path.startswith("/slow") else 0.0

    async def caught_up(self) -> None:
        """Return when all that was sent before is in the ledger: accepted in one turn of the loop, read in the next."""

        async def turns() -> None:
            for _ in range(TURNS):
                await asyncio.sleep(0)

        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(turns(), self._loop))

    @contextmanager
    def open(self) -> Iterator[Subscribers]:
        loop, ready = uvloop.new_event_loop(), threading.Event()
        self._loop = loop

        async def serve() -> None:
            server = await loop.create_server(lambda: Peer(self, loop), "127.0.0.1", 0, backlog=4096)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ending = asyncio.Event()
            self._end = lambda: loop.call_soon_threadsafe(ending.set)
            ready.set()
            await ending.wait()
            server.close()
            for connection in list(self.connections):
                connection.abort()
            while self.connections:
                await asyncio.sleep(0)

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="subscribers")
        thread.start()
        ready.wait()
        try:
            yield self
        finally:
            self._end()
            thread.join()
            loop.close()


class Peer(asyncio.Protocol):
    """A connection. Requests come one at a time, with a Content-Length."""

    def __init__(self, subscribers: Subscribers, loop: asyncio.AbstractEventLoop) -> None:
        self._subscribers = subscribers
        self._loop = loop
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        open_now = self._subscribers.connections
        open_now.add(transport)
        self._subscribers.most_open = max(self._subscribers.most_open, len(open_now))

    def connection_lost(self, _: Exception | None) -> None:
        self._subscribers.connections.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        if not end or len(body) < int(headers["Content-Length"]):
            return
        self._data = b""
        key = Key(lines[0].split()[1], headers["webhook-id"], int(headers["X-Trackpost-Attempt"]))
        arrival = Arrival(key, headers["X-Trackpost-Delivery"], headers["User-Agent"])
        self._subscribers.arrivals.append(arrival)
        delay_s = self._subscribers.delay_s(key.path)
        if delay_s == 0.0:
            self._answer(arrival)
        elif delay_s is not None:
            self._loop.call_later(delay_s, self._answer, arrival)

    def _answer(self, arrival: Arrival) -> None:
        if self._transport.is_closing():
            return
        status = 500 if fails(arrival.key) else 200
        self._transport.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nok" % status)
        arrival.answered = status
        if status == 200:
            self._subscribers.answered[arrival.key.path, arrival.key.event] += 1
