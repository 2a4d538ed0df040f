"""The subscriber's side: a process of its own that answers as told and keeps the ledger.

    python -m bench.receiver serve          orders as JSON lines on standard input, answers on standard output
    python -m bench.receiver drive PORT S   a bare keep-alive loop against it, which shows what it can take

It must never be what limits a run: one Protocol on uvloop, answers made beforehand, nothing logged, per request a
look-up of the event's number and type, and four integers written; one event in 64 is examined. What it can take is
measured at the start of every run and stands in the report.

It understands what HTTP/1.1 clients send as long as the request has a Content-Length and does not pipeline.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hmac
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import uvloop

from bench.ledger import (
    ACCEPTED,
    ASTRAY,
    DISTINCT,
    EXAMINED,
    FOREIGN,
    FORGED,
    GROUP_DIGITS,
    ID_DIGITS,
    OPEN,
    REPEATS_MAX,
    REQUESTS,
    TYPE_PREFIX,
    Ledger,
    endpoint_path,
    event_id,
    event_type,
)

NUMBER_DIGITS: Final = 15  # of the id's digits, those that are looked at
PATH_AT: Final = len("POST /e")
ID: Final = b"webhook-id: evt_"
LENGTH: Final = b"ontent-Length: "
TYPE: Final = f"-Event: {TYPE_PREFIX}".encode()
EXAMINED_EVERY: Final = 64  # events: 10 µs each
DRIVERS: Final = 64  # connections of the bare loop


@dataclasses.dataclass(frozen=True, slots=True)
class Behaviour:
    """How endpoints answer; those numbered `first` to `last` unless all do."""

    delay_s: float = 0.0
    status: int = 200
    hangs: bool = False  # never answers
    fails_first: bool = False  # `status` once per delivery, then 200
    first: int = 0
    last: int = 10**GROUP_DIGITS - 1


PROMPT: Final = Behaviour()


@dataclasses.dataclass(slots=True)
class Told:
    """What the harness wants; looked at by every request."""

    ledger: Ledger | None = None
    by_endpoint: dict[int, Behaviour] = dataclasses.field(default_factory=dict)
    everybody: Behaviour = PROMPT
    turns: int = 0  # not 0: an event goes to the webhook of its number modulo this, and says nothing of its type
    secret: bytes = b""  # what signs; none: nothing is examined
    data: Any = None  # of every event
    opened: int = 0

    def order(self, line: dict[str, Any]) -> None:
        """Take a new ledger and new behaviours."""
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = Ledger(Path(line["ledger"]), line["events"], line["fanout"])
        self.ledger.head[OPEN] = self.opened
        self.turns, self.secret, self.data = line["turns"], base64.b64decode(line["secret"]), line["data"]
        self.behave([Behaviour(**each) for each in line["behaviours"]])

    def behave(self, behaviours: Sequence[Behaviour]) -> None:
        self.everybody = PROMPT
        self.by_endpoint = {}
        for each in behaviours:
            if (each.first, each.last) == (PROMPT.first, PROMPT.last):
                self.everybody = PROMPT if each == PROMPT else each
            else:
                self.by_endpoint |= dict.fromkeys(range(each.first, each.last + 1), each)

    def count_open(self, change: int) -> None:
        self.opened += change
        if self.ledger is not None:
            self.ledger.head[OPEN] = self.opened
            self.ledger.head[ACCEPTED] += change > 0


def answer(status: int) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok" % status


ANSWERS: Final = {status: answer(status) for status in (200, 400, 410, 429, 500, 503)}
OK: Final = ANSWERS[200]


class Connection(asyncio.Protocol):
    """One connection. The ordinary request comes whole in one piece."""

    __slots__ = ("_began_ns", "_loop", "_parts", "_told", "_transport", "_write")

    def __init__(self, told: Told) -> None:
        self._told = told
        self._parts = b""
        self._began_ns = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._write = transport.write
        self._loop = asyncio.get_running_loop()
        self._told.count_open(1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._told.count_open(-1)

    # One long function: the calls of three short ones cost 0.4 of its 2 µs.
    def data_received(self, data: bytes) -> None:  # noqa: PLR0912
        if self._parts:
            data = self._parts + data
        else:
            self._began_ns = time.monotonic_ns()
        end = data.find(b"\r\n\r\n")
        at = data.find(LENGTH, 0, end)
        length = int(data[at + len(LENGTH) : data.find(b"\r", at)]) if at > 0 else _length(data, end)
        if end < 0 or len(data) < end + 4 + length:
            self._parts = data
            return
        self._parts = b""
        told, ledger = self._told, self._told.ledger
        at = data.find(ID, 0, end) + len(ID) + ID_DIGITS
        if ledger is None or at < len(ID) + ID_DIGITS:
            self._write(OK)  # before there is a ledger, or a stranger
            return
        endpoint = int(data[PATH_AT : PATH_AT + GROUP_DIGITS])
        number = int(data[at - NUMBER_DIGITS : at])
        head = ledger.head
        head[REQUESTS] += 1
        if number >= ledger.events:
            head[FOREIGN] += 1
            self._write(OK)
            return
        if told.turns:
            is_astray = endpoint != number % told.turns
        else:
            at = data.find(TYPE, 0, end) + len(TYPE)
            is_astray = at < len(TYPE) or int(data[at : at + GROUP_DIGITS]) != endpoint // ledger.fanout
        if is_astray:
            head[ASTRAY] += 1
            self._write(OK)
            return
        if number % EXAMINED_EVERY == 0 and told.secret:
            head[EXAMINED] += 1
            head[FORGED] += not is_genuine(data[:end], data[end + 4 : end + 4 + length], told, number, endpoint)
        cell = number * ledger.fanout + endpoint % ledger.fanout
        before = ledger.count[cell]
        if not before:
            head[DISTINCT] += 1
            ledger.first[cell] = ledger.last[cell] = self._began_ns
            ledger.count[cell] = 1
        else:
            ledger.last[cell] = self._began_ns
            ledger.count[cell] = min(before + 1, REPEATS_MAX)
        behaviour = told.by_endpoint.get(endpoint, told.everybody)
        if behaviour is PROMPT:
            self._write(OK)
        else:
            self._answer(behaviour, before)

    def _answer(self, behaviour: Behaviour, before: int) -> None:
        if behaviour.hangs:
            return
        status = 200 if behaviour.fails_first and before else behaviour.status
        if behaviour.delay_s:
            self._loop.call_later(behaviour.delay_s, self._write_if_open, ANSWERS[status])
        else:
            self._write(ANSWERS[status])

    def _write_if_open(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._write(data)


def is_genuine(head: bytes, body: bytes, told: Told, number: int, endpoint: int) -> bool:
    """Whether a request is what a subscriber is promised: signed as Standard Webhooks say, and the event itself."""
    assert told.ledger is not None
    fields = dict(line.partition(b": ")[::2] for line in head.split(b"\r\n")[1:])
    signed = b".".join([*(fields.get(name, b"") for name in (b"webhook-id", b"webhook-timestamp")), body])
    wanted = b"v1," + base64.b64encode(hmac.digest(told.secret, signed, "sha256"))
    if wanted not in fields.get(b"webhook-signature", b"").split():
        return False
    try:
        event = json.loads(body)
        return bool(
            (event["id"], event["type"], event["data"])
            == (event_id(number), event_type(endpoint // told.ledger.fanout), told.data)
        )
    except (ValueError, KeyError, TypeError):
        return False


def _length(data: bytes, end: int) -> int:
    """The Content-Length of a head that spells it in its own way."""
    at = data[: max(0, end)].lower().find(LENGTH.lower())
    if at < 0:
        return 0
    stop = data.find(b"\r\n", at)
    return int(data[at + len(LENGTH) : stop])


async def serve() -> None:
    """Serve until standard input ends. The port is the first line out; each order is answered with a line."""
    loop = asyncio.get_running_loop()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    told = Told()
    server = await loop.create_server(lambda: Connection(told), "127.0.0.1", 0, backlog=8192)
    _say(port=server.sockets[0].getsockname()[1])
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        order = json.loads(line)
        if "behave" in order:
            told.behave([Behaviour(**each) for each in order["behave"]])
        else:
            told.order(order)
        _say(done=True)
    server.close()


def _say(**words: object) -> None:
    print(json.dumps(words), flush=True)


# The bare loop.


class Driver(asyncio.Protocol):
    """Sends the next request when an answer has come."""

    __slots__ = ("_request", "_write", "sent")

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.sent = 0

    def connection_made(self, transport: Any) -> None:
        self._write = transport.write
        self._write(self._request)

    def data_received(self, data: bytes) -> None:
        self.sent += 1
        self._write(self._request)


async def drive(port: int, seconds: float) -> None:
    """Print how many requests per second the receiver took."""
    loop = asyncio.get_running_loop()
    body = b"{" + b" " * 598 + b"}"
    request = (
        f"POST {endpoint_path(0)} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"User-Agent: TrackPost-Webhooks/1.0\r\nX-Trackpost-Event: {event_type(0)}\r\n"
        f"X-Trackpost-Signature: {'0' * 64}\r\nwebhook-id: {event_id(0)}\r\n"
        f"webhook-timestamp: 1700000000\r\nwebhook-signature: v1,{'0' * 44}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    made = [await loop.create_connection(lambda: Driver(request), "127.0.0.1", port) for _ in range(DRIVERS)]
    await asyncio.sleep(seconds / 5)
    before, began = sum(driver.sent for _, driver in made), time.perf_counter()
    await asyncio.sleep(seconds)
    rate = (sum(driver.sent for _, driver in made) - before) / (time.perf_counter() - began)
    for transport, _ in made:
        transport.abort()
    _say(rate=rate)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            uvloop.run(serve())
        case ["drive", port, seconds]:
            uvloop.run(drive(int(port), float(seconds)))
        case _:
            sys.exit(__doc__)
