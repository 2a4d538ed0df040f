"""The client on a wire of our own: bytes in, bytes out, no sockets, and a clock that moves when told to."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from typing import Any

from dispatcher.core.addresses import Guard, Target
from dispatcher.core.attempt import Attempt
from dispatcher.engine import dialer
from dispatcher.engine.connection import Connection
from dispatcher.engine.dialer import Phase
from dispatcher.engine.transport import Origin, Transport, TransportSettings

REQUEST = b"POST /hook HTTP/1.1\r\nHost: receiver.test\r\nContent-Length: 2\r\n\r\n{}"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
GUARD = Guard(allow=["127.0.0.0/8"], allow_http=True)
TARGET = GUARD.check_url("http://127.0.0.1:9/hook")

# Reading the system's trust store takes 20 ms, and many a test makes a transport.
dialer._tls_context = functools.cache(dialer._tls_context)


class StillLoop:
    """The part of an event loop that the transport uses without dialling."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.soon: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.timers: list[StillTimer] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        self.soon.append((callback, args))

    def call_later(self, delay: float, callback: Callable[[], None]) -> StillTimer:
        self.timers.append(StillTimer(self.now + delay, callback))
        return self.timers[-1]

    def create_task(self, _: None, *, name: str) -> StillTask:
        return StillTask()

    def turn(self) -> None:
        """Run what was scheduled for the next turn."""
        soon, self.soon = self.soon, []
        for callback, args in soon:
            callback(*args)

    def advance(self, seconds: float) -> None:
        """Let time pass, timers fire, and what they schedule run."""
        end = self.now + seconds
        while due := [timer for timer in self.timers if not timer.cancelled and timer.when <= end]:
            timer = min(due, key=lambda timer: timer.when)
            self.timers.remove(timer)
            self.now = timer.when
            timer.callback()
            self.turn()
        self.now = end


class StillTimer:
    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class StillTask:
    """A dial under way, for ever."""

    def add_done_callback(self, _: Callable[..., Any]) -> None:
        """It is never done."""

    def cancel(self) -> bool:
        """Nor does it listen."""
        return False


class StillPipe(asyncio.Transport):
    """What a connection writes to; says whether and how it was closed."""

    def __init__(self, sock: socket.socket | None = None) -> None:
        super().__init__({"socket": sock})
        self.written: list[bytes] = []
        self.unsent_bytes = 0
        self.closed = self.aborted = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


class Wire:
    """One origin with one connection, and what its requests came to."""

    def __init__(self, **settings: Any) -> None:
        self.loop = StillLoop()
        self.transport = Transport(settings=TransportSettings(**settings), guard=GUARD, loop=self.loop)  # type: ignore[arg-type]
        self.begun: list[Origin] = []  # a dial each; none ever ends
        self.transport._dialer = self  # type: ignore[assignment]
        self.origin = self.transport.origin(TARGET)
        self.came: list[tuple[Any, Attempt]] = []
        self.pipe = StillPipe()
        self.connection = self.open(self.origin, self.pipe)

    def dial(self, _target: Target, make: functools.partial[Connection], progress: Callable[[Phase], None]) -> None:
        """In the dialer's place: a dial that connects and never ends."""
        progress(Phase.CONNECT)
        self.begun.append(make.args[0])

    def open(self, origin: Origin, pipe: StillPipe) -> Connection:
        connection = Connection(origin)
        connection.connection_made(pipe)
        origin.welcome(connection)
        self.transport._arm()
        return connection

    def submit(self, token: Any = None, timeout_s: float = 30.0) -> None:
        self.origin.submit(REQUEST, timeout_s, self.done, token)

    def done(self, token: Any, attempt: Attempt) -> None:
        self.came.append((token, attempt))

    def lose(self, exc: Exception | None = None) -> None:
        self.connection.connection_lost(exc)
        self.loop.turn()

    def feed(self, *chunks: bytes) -> None:
        for chunk in chunks:
            if not self.pipe.is_closing():  # as event loops do
                self.connection.data_received(chunk)
        self.loop.turn()

    def end(self) -> None:
        """The peer closes."""
        if not self.pipe.is_closing():
            self.connection.eof_received()
        self.lose()

    @property
    def attempt(self) -> Attempt:
        """What the one request came to."""
        assert len(self.came) == 1, self.came
        return self.came[0][1]

    @property
    def is_reusable(self) -> bool:
        return self.origin.idle == [self.connection]


def answer(*chunks: bytes, **settings: Any) -> Wire:
    """Send one request on a fresh connection and let the peer say `chunks`."""
    wire = Wire(**settings)
    wire.submit()
    wire.feed(*chunks)
    return wire
