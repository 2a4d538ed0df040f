"""The engine for real: on a fresh database, towards a scripted receiver on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from dispatcher.core.addresses import Guard
from dispatcher.core.backoff import PRESETS
from dispatcher.core.ids import DeliveryIds
from dispatcher.engine.engine import Engine, EngineSettings
from dispatcher.engine.transport import Transport, TransportSettings
from dispatcher.model import BodyStyle
from dispatcher.store.endpoints import EndpointChange, EndpointDefaults, EndpointRecord, EndpointStore
from dispatcher.store.vault import Vault

PATIENCE_S = 40.0
VAULT = Vault(b"k" * 32)
IDS = DeliveryIds(b"1" * 16)
SECRET = "whsec_" + "a" * 32


async def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition, synchronous or not, and return what it came to."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = condition()
            if inspect.isawaitable(answer):
                answer = await answer
            if answer:
                return answer
            await asyncio.sleep(0.003)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request as the receiver saw it."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float  # loop time

    @property
    def event_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def attempt(self) -> int:
        return int(self.headers["X-Trackpost-Attempt"])

    @property
    def data(self) -> Any:
        return json.loads(self.body)["data"]

    @property
    def n(self) -> int:
        return int(self.data.get("n", -1))  # events of our own about webhooks carry none


Answer = int | tuple[int, str] | Awaitable[int]
"""A status; with header lines; or something to wait for first. An endless wait is an endpoint that hangs."""


class Receiver:
    """An HTTP/1.1 server that answers as it is told and remembers everything."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.answer: Callable[[Arrival], Answer] = lambda arrival: 200
        self.open = 0  # requests not answered yet
        self.open_most = 0
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._serve(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the client went, or the test is over
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers["Content-Length"]))
        arrival = Arrival(head[0].split()[1], headers, body, asyncio.get_running_loop().time())
        self.arrivals.append(arrival)
        self.open += 1
        self.open_most = max(self.open_most, self.open)
        try:
            answer = self.answer(arrival)
            if inspect.isawaitable(answer):
                answer = await answer
        finally:
            self.open -= 1
        status, extra = answer if isinstance(answer, tuple) else (answer, "")
        writer.write(f"HTTP/1.1 {status} X\r\n{extra}Content-Length: 2\r\n\r\nok".encode())
        await writer.drain()
        return True

    def of(self, event_id: str) -> list[Arrival]:
        return [arrival for arrival in self.arrivals if arrival.event_id == event_id]

    def at(self, path: str) -> list[Arrival]:
        return [arrival for arrival in self.arrivals if arrival.path == path]

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclasses.dataclass
class Running:
    """An engine and the task it runs in."""

    engine: Engine
    task: asyncio.Task[None]
    may_lose: bool = False  # the database, that is: the test takes it away

    def check(self) -> None:
        self.engine.deliverer.lanes.check()
        assert self.engine.deliverer.balance == 0, "deliveries nobody can account for"
        assert self.may_lose or not self.engine.losses, "a session broke that nobody touched"


class House:
    """One database, one receiver, and the engines on them."""

    def __init__(self, dsn: str, receiver: Receiver, app: Any) -> None:
        self.dsn = dsn
        self.receiver = receiver
        self.app = app  # the application's connection
        self.endpoints = EndpointStore(app, VAULT)
        self.engines: list[Running] = []
        self.account = 0

    # ── the application ──────────────────────────────────────────────────────────────────────────────────────────

    async def webhook(self, path: str = "/", **changes: Any) -> EndpointRecord:
        settings: dict[str, Any] = {
            "url": self.receiver.url + path, "description": "", "events": ["test.*"], "headers": {}, "retry": None,
            "body_style": BodyStyle.COMPACT, "max_concurrency": None, "rate_limit": None, "ordered": False,
            "timeout_s": None,
        }  # fmt: skip
        settings.update(changes)
        return await self.endpoints.create(self.account, EndpointChange(**settings), SECRET)

    async def key(self, webhook: EndpointRecord) -> int:
        return int(await self.app.fetchval("SELECT id FROM dispatcher.endpoint WHERE public_id = $1", webhook.id))

    async def change(self, webhook: EndpointRecord, **columns: Any) -> None:
        names = ", ".join(f"{name} = ${i}" for i, name in enumerate(columns, 2))
        await self.app.execute(
            f"UPDATE dispatcher.endpoint SET {names} WHERE public_id = $1", webhook.id, *columns.values()
        )

    async def emit(self, first: int = 1, last: int | None = None, *, db: Any = None, **more: Any) -> list[str]:
        """Write events numbered from `first` to `last` in one statement; return their ids in that order."""
        rows = await (db or self.app).fetch(
            "INSERT INTO dispatcher.outbox (type, data) SELECT 'test.event', json_build_object('n', n, 'x', $3::text)"
            " FROM generate_series($1::integer, $2::integer) n RETURNING id, seq",
            first,
            last or first,
            more.get("x", ""),
        )
        return [row["id"] for row in sorted(rows, key=lambda row: row["seq"])]

    async def connect(self) -> Any:
        return await asyncpg.connect(self.dsn)

    # ── the engine ───────────────────────────────────────────────────────────────────────────────────────────────

    def launch(
        self,
        prepare: Callable[[Engine], None] = lambda engine: None,
        *,
        shard: int = 0,
        shards: int = 1,
        **settings: Any,
    ) -> Running:
        guard = Guard(["127.0.0.0/8"], allow_http=True)
        given: dict[str, Any] = {"dsn": self.dsn, "listen_dsn": self.dsn, "jitter": 0.0, "drain_s": 10.0}
        given["defaults"] = EndpointDefaults((60.0,), PRESETS, 16, 30.0)
        engine = Engine(
            EngineSettings(**given | settings),
            transport=Transport(settings=TransportSettings(), guard=guard),
            guard=guard,
            vault=VAULT,
            ids=IDS,
            shard=shard,
            shards=shards,
            dice=random.Random(1),
        )
        prepare(engine)
        running = Running(engine, asyncio.create_task(engine.run(), name="engine"))
        self.engines.append(running)
        return running

    async def start(self, prepare: Callable[[Engine], None] = lambda engine: None, **settings: Any) -> Running:
        running = self.launch(prepare, **settings)
        await self.active(running)
        return running

    async def active(self, running: Running) -> None:
        await until(lambda: running.engine.role == "active" or running.task.done())
        assert not running.task.done(), running.task

    async def stop(self, running: Running) -> None:
        """Drain it."""
        running.engine.stop()
        await asyncio.wait_for(running.task, PATIENCE_S)
        await running.engine.deliverer._transport.close()
        self.engines.remove(running)
        running.check()

    async def crash(self, running: Running) -> None:
        """End it at once, wherever it stands: nothing is flushed."""
        self.engines.remove(running)
        running.engine.deliverer.running = False
        running.task.cancel()
        await asyncio.wait([running.task])

    async def cut(self, *names: str) -> int:
        """Have the server close connections of the engine; return how many there were."""
        for running in self.engines:
            running.may_lose = True
        return int(
            await self.app.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = ANY ($1)",
                [f"dispatcher {name}" for name in names],
            )
        )

    # ── what is on record ────────────────────────────────────────────────────────────────────────────────────────

    async def log(self) -> list[tuple[int, int, int, str]]:
        """(event sequence, endpoint, attempt, state) of every attempt, in order."""
        rows = await self.app.fetch(
            "SELECT event_seq, endpoint_id, attempt, state FROM dispatcher.attempt"
            " ORDER BY event_seq, endpoint_id, attempt, at"
        )
        return [tuple(row) for row in rows]

    async def states(self) -> Counter[str]:
        return Counter(state for _, _, _, state in await self.log())

    async def pending(self) -> int:
        return int(await self.app.fetchval("SELECT count(*) FROM dispatcher.pending"))

    def busy(self, running: Running) -> bool:
        """Whether the engine has anything under way or waiting."""
        now = running.engine.snapshot()
        return bool(now.queued or now.in_flight or now.buffered or now.retries_waiting or not now.events)

    async def settled(self, many: int) -> bool:
        """Whether so many deliveries are settled and nothing else is left."""
        states = await self.states()
        return states.total() - states["retrying"] >= many and await self.pending() == 0
