"""The whole way of a delivery towards hostile peers, over real sockets: lane, deliverer, transport, ledger.

Only the database is left out: what the ledger would write is kept on a shelf. Beside the hostile endpoint there is
always a healthy one, which has to be served all the while as if nothing were wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from desk import Shelf, endpoint

from dispatcher.core.addresses import Guard
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.lanes import Lanes
from dispatcher.core.rendering import Payload
from dispatcher.engine import dialer
from dispatcher.engine.deliverer import Deliverer
from dispatcher.engine.delivery import Delivery, Event
from dispatcher.engine.ledger import Ledger
from dispatcher.engine.transport import Transport, TransportSettings
from dispatcher.model import Endpoint, Result
from dispatcher.moments import of_datetime
from dispatcher.telemetry import Telemetry

# Reading the system's trust store takes 20 ms, and each test makes a transport.
dialer._tls_context = functools.cache(dialer._tls_context)

PATIENCE_S = 60.0  # for what must happen; nothing here asserts how fast
TIMEOUT_S = 0.4  # of the hostile endpoint's requests
HEALTHY_MIN = 3  # deliveries beside each ordeal, however short
GROWTH_BYTES_MAX = 32 << 20  # of this process, both ends of each connection included

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One attempt as the ledger logs it."""

    endpoint_id: int
    number: int
    state: str
    result: Result
    status: int
    duration_s: float
    error: str
    head: bytes
    body: bytes

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> Self:
        _, _, endpoint_id, _, number, state, result, status, duration_us, error, head, body = row
        return cls(endpoint_id, number, state, Result(result), status or 0, duration_us / 1e6, error or "", head, body)


class Host:
    """Listens on loopback and treats each connection as its script says, until the stage is taken down."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server
        self.connections = 0
        self.port = 0

    async def start(self, tls: ssl.SSLContext | None = None, **options: Any) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=tls, backlog=1024, **options)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
            pass  # the client had enough, or the test is over
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Stage:
    """Webhooks, the peers behind them, and all that stands between. The first webhook is the healthy one."""

    def __init__(self, transport: Transport, guard: Guard, *, in_flight_max: int) -> None:
        loop = asyncio.get_running_loop()
        self.transport = transport
        self.shelf = Shelf()
        self.ledger = Ledger(Telemetry(), loop, buffered_max=100_000)
        self.deliverer = Deliverer(
            lanes=Lanes(
                queued_max=100_000, lane_queued_max=100_000, retries_queued_max=1000, in_flight_max=in_flight_max
            ),
            ledger=self.ledger,
            transport=transport,
            guard=guard,
            telemetry=Telemetry(),
            ids=DeliveryIds(b"1" * 16),
            loop=loop,
            jitter=0.0,
            user_agent="T",
            header_prefix="X-T-",
        )
        self.deliverer.running = True
        self.healthy: Endpoint
        self.hosts: list[Host] = []
        self._numbers = itertools.count(1)

    async def host(self, script: Script, **options: Any) -> Host:
        host = Host(script)
        await host.start(**options)
        self.hosts.append(host)
        return host

    def webhook(self, port: int, *, scheme: str = "http", host: str = "127.0.0.1", **settings: Any) -> Endpoint:
        settings = {"schedule_s": (), "timeout_s": TIMEOUT_S, "secret": "whsec_" + "a" * 32, **settings}
        return endpoint(next(self._numbers), url=f"{scheme}://{host}:{port}/hook", **settings)

    async def against(self, script: Script, *, options: dict[str, Any] | None = None, **settings: Any) -> Endpoint:
        """A webhook whose peer follows `script`."""
        return self.webhook((await self.host(script, **(options or {}))).port, **settings)

    def emit(self, *webhooks: Endpoint, data: str = "{}") -> None:
        """One event for each of these webhooks."""
        number = next(self._numbers)
        now = datetime.now(UTC)
        event = Event(number, number, of_datetime(now), Payload(f"evt_{number}", "test.event", now, data))
        for webhook in webhooks:
            self.deliverer.offer(Delivery(event, self.deliverer.subscriber(webhook), None))
        self.deliverer.pump()

    async def log(self, webhook: Endpoint) -> list[Entry]:
        """The attempts made for a webhook so far."""
        await self.ledger.flush(self.shelf, SimpleNamespace(learn=_learn_nothing), 1)  # type: ignore[arg-type]
        assert self.deliverer.balance == 0, "deliveries nobody can account for"
        return [Entry.of(row) for row in self.shelf.attempts if row[2] == webhook.id]

    async def serve_healthy(self) -> None:
        """One event for the healthy webhook, which arrives at the first attempt."""
        before = len(await self.log(self.healthy))
        self.emit(self.healthy)
        async with asyncio.timeout(PATIENCE_S):
            while len(entries := await self.log(self.healthy)) == before:
                await asyncio.sleep(0.001)
        assert [(entry.result, entry.number) for entry in entries[before:]] == [(Result.OK, 1)]

    async def deliver(self, webhook: Endpoint, *, events: int = 1, data: str = "{}") -> list[Entry]:
        """What became of so many events for a hostile webhook, while the healthy one got its own."""
        before = len(await self.log(webhook))
        grown = Growth()
        for _ in range(events):
            self.emit(webhook, data=data)
        async with asyncio.timeout(PATIENCE_S):
            for served in itertools.count(1):
                await self.serve_healthy()
                grown.check()
                entries = (await self.log(webhook))[before:]
                if served >= HEALTHY_MIN and len(entries) >= events:
                    break
        assert len(entries) == events
        assert all(entry.duration_s < webhook.timeout_s + PATIENCE_S / 2 for entry in entries)
        return entries

    async def only(self, webhook: Endpoint, **more: Any) -> Entry:
        (entry,) = await self.deliver(webhook, **more)
        return entry


class Growth:
    """Watches the memory of this process."""

    def __init__(self) -> None:
        self._before = resident_bytes()

    def check(self, bytes_max: int = GROWTH_BYTES_MAX) -> None:
        grown = resident_bytes() - self._before
        assert grown <= bytes_max, f"grew by {grown >> 20} MiB"


def resident_bytes(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _learn_nothing(*_: Any) -> None:
    pass


@contextlib.asynccontextmanager
async def open_stage(
    *, allow: str = "127.0.0.0/8", in_flight_max: int = 1000, resolver: Any = None, **settings: Any
) -> AsyncIterator[Stage]:
    guard = Guard([allow], allow_http=True)
    transport = Transport(settings=TransportSettings(**{"tick_s": 0.02, **settings}), guard=guard, resolver=resolver)
    stage = Stage(transport, guard, in_flight_max=in_flight_max)
    try:
        stage.healthy = await stage.against(answer_well, timeout_s=PATIENCE_S)
        yield stage
    finally:
        await transport.close()
        for host in stage.hosts:
            await host.stop()
    assert not transport.connections


# ── what peers do ────────────────────────────────────────────────────────────────────────────────────────────────────


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(int(head.lower().rpartition(b"content-length: ")[2]))


async def answer_well(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()


async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    while await reader.read(65_536):
        pass
