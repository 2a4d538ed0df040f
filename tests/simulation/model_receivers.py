"""The subscribers, and the TCP between them and us: they answer, refuse, hang, lie, drip, die and come back.

One receiver a webhook, at a port of its own on a virtual loopback. The engine's own transport and dialer talk to it:
the event loop gives them sockets that lead here. What a receiver is like changes with time (`Mood`); what each request
met is on record (`Arrival`), and `watch` hears of it at once.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import hashlib
import hmac
import random
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from virtual_loop import PROCESS, Process, VirtualLoop

PORTS_FROM = 20_000
GARBAGE = b"\x16\x03\x01 no such protocol\r\n\r\n"


class Mood(Enum):
    """What a receiver is like for a while."""

    WELL = "well"
    SLOW = "slow"
    BROKEN = "broken"  # 500
    MISSING = "missing"  # 404
    MOVED = "moved"  # 302
    DROWNING = "drowning"  # 503 or 429, with Retry-After in seconds or as a date
    REFUSING = "refusing"  # the port is closed
    UNREACHABLE = "unreachable"  # nothing answers the SYN
    HANGING = "hanging"  # takes the request and says nothing
    DRIPPING = "dripping"  # a byte now and then
    LYING = "lying"  # announces more than it sends
    GARBLED = "garbled"  # not HTTP
    DYING = "dying"  # closes on the request
    MOODY = "moody"  # any of these, request by request
    GONE = "gone"  # 410


PASSING = tuple(mood for mood in Mood if mood not in {Mood.WELL, Mood.GONE})


class Arrival:
    """One request as a receiver saw it."""

    __slots__ = (
        "at",
        "attempt",
        "by_legacy",
        "by_standard",
        "cut",
        "delivery_id",
        "done_at",
        "done_wall",
        "event_id",
        "place",
        "process",
        "receiver",
        "retry_after_s",
        "retry_at",
        "reused",
        "status",
        "wall",
        "wire",
    )  # fmt: skip

    def __init__(self, receiver: Receiver, wire: Wire, at: float, wall: float) -> None:
        self.receiver = receiver
        self.wire = wire
        self.process = wire.process
        self.reused = wire.requests > 1
        self.at = at
        self.wall = wall
        self.event_id = ""
        self.delivery_id = ""
        self.attempt = 0
        self.by_legacy = self.by_standard = -1  # number of the secret that signed; -1: none of ours
        self.status = 0  # sent in full; 0: not yet, or never
        self.retry_after_s = self.retry_at = 0.0  # asked for: a wait, or a Unix time
        self.done_at: float | None = None  # when it was over for the client
        self.done_wall = 0.0
        self.cut = False  # closed without a byte
        self.place = ("", 0, 0)  # process, reign, endpoint: the judge's


class Receiver:
    """One subscriber."""

    def __init__(self, port: int, dice: random.Random, *, latency_s: float) -> None:
        self.port = port
        self.mood = Mood.WELL
        self.dice = dice
        self.latency_s = latency_s
        self.connect_s = (0.0005, 0.003)
        self.secrets: list[str] = []  # all there ever were, the oldest first
        self.expects = -1  # the one its handler checks by; -1: it does not check
        self.closes_idle = 0.0  # how often it closes a connection it has just answered on

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def current(self) -> Mood:
        return self.dice.choice(PASSING[:-1]) if self.mood is Mood.MOODY else self.mood


class Watch:
    """Hears what arrives."""

    def arrived(self, arrival: Arrival) -> None: ...

    def ended(self, arrival: Arrival) -> None: ...


class Wire(asyncio.Transport):
    """The client's end of one connection."""

    def __init__(self, network: Internet, receiver: Receiver, protocol: Any, sock: socket.socket) -> None:
        super().__init__()
        self.network = network
        self.receiver = receiver
        self.protocol = protocol
        self.sock = sock
        self.process: Process | None = PROCESS.get()
        self.context = contextvars.copy_context()
        self.requests = 0
        self.arrival: Arrival | None = None
        self.ended = False  # the server has closed; we may not have heard of it
        self.closing = False

    # What the protocol asks for.

    def write(self, data: Any) -> None:
        if self.closing:
            raise RuntimeError("unable to perform operation on a closed transport")
        if not self.ended:
            self.requests += 1
            self.network.deliver(self, bytes(data))

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.closing:
            self.closing = self.ended = True
            self.settle()
            self.network.loop.call_soon(self._lost, None, context=self.context)

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 0

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    # What the server does.

    def send(self, delay_s: float, data: bytes) -> None:
        self.network.loop.call_later(delay_s, self._feed, data, context=self.context)

    def end(self, delay_s: float, error: Exception | None = None) -> None:
        """The server closes, now; the client hears of it after `delay_s`."""
        self.ended = True
        self.network.loop.call_later(delay_s, self._hear_end, error, context=self.context)

    def _feed(self, data: bytes) -> None:
        if not self.closing:
            self.protocol.data_received(data)

    def _hear_end(self, error: Exception | None) -> None:
        if not self.closing:
            self.closing = True
            self.settle()
            if error is None:
                self.protocol.eof_received()
            self._lost(error)

    def _lost(self, error: Exception | None) -> None:
        self.network.wires.pop(self, None)
        self.sock.close()
        self.protocol.connection_lost(error)

    def settle(self) -> None:
        """Its request is over, as far as the client can tell."""
        arrival, self.arrival = self.arrival, None
        if arrival is not None:
            arrival.done_at, arrival.done_wall = self.network.loop.now, self.network.wall()
            self.network.watch.ended(arrival)

    def vanish(self) -> None:
        """The process it belongs to is gone: the kernel closes."""
        if not self.closing:
            self.closing = self.ended = True
            self.settle()
            self.network.wires.pop(self, None)
            self.sock.close()


class Internet:
    """Every receiver, and the way there."""

    def __init__(self, loop: VirtualLoop, wall: Callable[[], float], dice: random.Random) -> None:
        self.loop = loop
        self.wall = wall
        self.dice = dice
        self.watch = Watch()
        self.receivers: dict[int, Receiver] = {}
        self.wires: dict[Wire, None] = {}
        self.local_trouble = False  # no port left on our side: our fault, not theirs
        self._dialled: dict[socket.socket, Receiver] = {}

    def receiver(self, latency_s: float) -> Receiver:
        port = PORTS_FROM + len(self.receivers)
        made = self.receivers[port] = Receiver(port, self.dice, latency_s=latency_s)
        return made

    # The loop's sockets.

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        receiver = self.receivers[address[1]]
        if self.local_trouble:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        mood = receiver.current()
        if mood is Mood.UNREACHABLE:
            await self.loop.create_future()
        await asyncio.sleep(self.dice.uniform(*receiver.connect_s))
        if mood is Mood.REFUSING:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        self._dialled[sock] = receiver

    async def create_connection(self, factory: Callable[[], Any], sock: socket.socket) -> tuple[Any, Any]:
        receiver = self._dialled.pop(sock)
        protocol = factory()
        wire = Wire(self, receiver, protocol, sock)
        self.wires[wire] = None
        protocol.connection_made(wire)
        await asyncio.sleep(0)
        return wire, protocol

    def close(self) -> None:
        for sock in self._dialled:
            sock.close()
        for wire in list(self.wires):
            wire.vanish()

    # A request.

    def deliver(self, wire: Wire, data: bytes) -> None:
        receiver = wire.receiver
        arrival = wire.arrival = Arrival(receiver, wire, self.loop.now, self.wall())
        head, _, body = data.partition(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        assert len(body) == int(fields[b"Content-Length"])
        arrival.event_id = fields[b"webhook-id"].decode()
        arrival.delivery_id = fields[b"X-Trackpost-Delivery"].decode()
        arrival.attempt = int(fields[b"X-Trackpost-Attempt"])
        legacy = fields.get(b"X-Trackpost-Signature", b"")
        for number, secret in enumerate(receiver.secrets):
            if hmac.new(secret.encode(), body, hashlib.sha256).hexdigest().encode() == legacy:
                arrival.by_legacy = number
        self.watch.arrived(arrival)
        self._answer(wire, arrival)

    def _answer(self, wire: Wire, arrival: Arrival) -> None:
        receiver, dice = wire.receiver, self.dice
        mood = receiver.current()
        delay_s = receiver.latency_s * dice.uniform(0.5, 2.0)
        match mood:
            case Mood.WELL if receiver.expects >= 0 and arrival.by_legacy != receiver.expects:
                self._respond(wire, delay_s, dice.choice((401, 403)))
            case Mood.WELL:
                self._respond(wire, delay_s, dice.choice((200, 200, 200, 204)))
            case Mood.SLOW:
                self._respond(wire, dice.uniform(0.3, 3.0), 200)
            case Mood.BROKEN:
                self._respond(wire, delay_s, 500)
            case Mood.MISSING:
                self._respond(wire, delay_s, dice.choice((400, 404, 422)))
            case Mood.MOVED:
                self._respond(wire, delay_s, 302)
            case Mood.DROWNING:
                self._drown(wire, arrival, delay_s)
            case Mood.DRIPPING:
                for n, byte in enumerate(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 40):
                    wire.send(delay_s + 0.9 * n, bytes((byte,)))
            case Mood.LYING:
                wire.send(delay_s, b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nshort")
                self.loop.call_later(delay_s + 0.01, wire.end, 0.001, context=_OUTSIDE)
            case Mood.GARBLED:
                wire.send(delay_s, GARBAGE)
            case Mood.DYING | Mood.REFUSING:
                arrival.cut = True
                wire.end(delay_s, ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))
            case Mood.GONE:
                self._respond(wire, delay_s, 410)
            case _:  # hangs until somebody's patience is over
                pass

    def _respond(self, wire: Wire, delay_s: float, status: int, extra: bytes = b"") -> None:
        arrival = wire.arrival
        assert arrival is not None
        dice = self.dice
        if status == 204:
            answer = b"HTTP/1.1 204 X\r\n%b\r\n" % extra
        elif dice.random() < 0.2:
            answer = b"HTTP/1.1 %d X\r\n%bTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" % (status, extra)
        else:
            answer = b"HTTP/1.1 %d X\r\n%bContent-Length: 2\r\n\r\nok" % (status, extra)
        if dice.random() < 0.2:  # in two pieces
            cut = dice.randrange(1, len(answer))
            wire.send(delay_s, answer[:cut])
            delay_s += 0.002
            answer = answer[cut:]
        self.loop.call_later(delay_s, self._finish, wire, arrival, answer, status, context=wire.context)

    def _finish(self, wire: Wire, arrival: Arrival, answer: bytes, status: int) -> None:
        if wire.closing or wire.arrival is not arrival:
            return
        arrival.status = status
        wire.settle()
        if self.dice.random() < wire.receiver.closes_idle:
            delay_s = self.dice.choice((0.0, 0.001, 0.5))
            self.loop.call_later(delay_s, self._close_idle, wire, context=_OUTSIDE)
        wire.protocol.data_received(answer)

    def _close_idle(self, wire: Wire) -> None:
        """The server closes a connection that is idle as far as it knows: a request may be on its way."""
        if not wire.closing and wire.arrival is None:
            wire.end(self.dice.uniform(0.0001, 0.005))

    def _drown(self, wire: Wire, arrival: Arrival, delay_s: float) -> None:
        wait_s = self.dice.choice((0, 1, 3, 8))
        status = self.dice.choice((429, 503))
        if self.dice.random() < 0.5:
            arrival.retry_after_s = float(wait_s)
            field = b"Retry-After: %d\r\n" % wait_s
        else:
            moment = datetime.fromtimestamp(int(self.wall() + delay_s) + wait_s, UTC)
            arrival.retry_at = moment.timestamp()
            field = moment.strftime("Retry-After: %a, %d %b %Y %H:%M:%S GMT\r\n").encode()
        self._respond(wire, delay_s, status, field)


_OUTSIDE = contextvars.Context()
