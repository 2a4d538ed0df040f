"""Several daemons as real processes on one database: they share the shards out, and nothing is lost by any change."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from daemons import DISPATCHER, PATIENCE_S, Program, connected, subscribe

from dispatcher.store.schema import written_for

SHARDS = 4
MOST = 3  # requests at once, for each webhook that is not ordered


class Request:
    """One arrival: which webhook, which event, by which daemon."""

    def __init__(self, path: str, n: int, daemon: str) -> None:
        self.path, self.n, self.daemon = path, n, daemon


class Peer(asyncio.Protocol):
    """A connection of the receiver: it knows at once when its daemon is killed."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._data = b""
        self._open: Request | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._receiver.connections.add(self._transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        if not end or len(body) < int(headers["Content-Length"]):
            return
        self._data = b""
        self._open = Request(lines[0].split()[1], json.loads(body)["data"].get("n", 0), headers["User-Agent"])
        self._receiver.arrive(self._open)
        asyncio.get_running_loop().call_later(self._receiver.dice.uniform(0.0, 0.02), self._answer)

    def _answer(self) -> None:
        if self._open is not None:
            self._close()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def connection_lost(self, _: Exception | None) -> None:
        self._receiver.connections.discard(self._transport)
        if self._open is not None:
            self._close()

    def _close(self) -> None:
        assert self._open is not None
        self._receiver.open[self._open.path].remove(self._open)
        self._open = None


class Receiver:
    """The ledger: every arrival in order, and what must never be."""

    def __init__(self) -> None:
        self.arrivals: list[Request] = []
        self.open: defaultdict[str, list[Request]] = defaultdict(list)
        self.wrong: list[str] = []
        self.connections: set[Any] = set()
        self.dice = random.Random(1)
        self.url = ""

    def arrive(self, request: Request) -> None:
        self.arrivals.append(request)
        now = self.open[request.path]
        now.append(request)
        if len(now) > (1 if "ordered" in request.path else MOST):
            self.wrong.append(f"{len(now)} requests at once at {request.path}")
        if len(found := {each.daemon for each in now}) > 1:
            self.wrong.append(f"{request.path} is called by {found} at once")

    def firsts(self, path: str) -> list[int]:
        """Events in the order in which each came for the first time."""
        return list(dict.fromkeys(each.n for each in self.arrivals if each.path == path and each.n))

    def repeated(self) -> list[list[str]]:
        """For each delivery that came more than once: the daemons that sent it."""
        by: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
        for each in self.arrivals:
            if each.n:
                by[each.path, each.n].append(each.daemon)
        return [daemons for daemons in by.values() if len(daemons) > 1]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    it = Receiver()
    server = await asyncio.get_running_loop().create_server(lambda: Peer(it), "127.0.0.1", 0)
    it.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield it
    server.close()
    for connection in list(it.connections):
        connection.abort()
    while it.connections:
        await asyncio.sleep(0)


@pytest.fixture
def program(tmp_path: Path, database: str) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def make(name: str, *arguments: str) -> Program:
        made.append(Program(tmp_path, database, DISPATCHER_BRAND_USER_AGENT=name, DISPATCHER_RETRY_SCHEDULE="1s,1s"))
        made[-1].start(*arguments)
        return made[-1]

    yield make
    for each in made:
        each.end()


def shards(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DISPATCHER, "shards", *arguments, "--json"],
        env={**os.environ, "DISPATCHER_DATABASE_DSN": dsn},
        capture_output=True,
        text=True,
        check=False,
    )


async def held(connection: Any) -> dict[int, list[int]]:
    """Shards that each live daemon says it runs, by process."""
    rows = await connection.fetch(
        "SELECT pid, snapshot FROM dispatcher.instance WHERE heartbeat_at > now() - interval '3 seconds'"
        " AND role <> 'web'"
    )
    return {row["pid"]: json.loads(row["snapshot"])["shards"] for row in rows}


async def until_shared(connection: Any, *programs: Program) -> None:
    """Wait until these and only these run all shards, each its fair share and each shard once."""
    pids = {program.process.pid for program in programs if program.process is not None}
    found: dict[int, list[int]] = {}
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await held(connection)
                shares = [len(each) for each in found.values()]
                shards_held = sorted(shard for each in found.values() for shard in each)
                # What a daemon says may be a second old: a shard can seem to be with two while it moves.
                if found.keys() == pids and shards_held == [1, 2, 3, 4] and max(shares) - min(shares) <= 1:
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        logs = "\n".join(program.log.read_text()[-2000:] for program in programs)
        pytest.fail(f"{found} and not all shards evenly among {pids}\n{logs}")


class Load:
    """An application that commits an event every so often, numbered from 1."""

    def __init__(self, dsn: str) -> None:
        self.count = 0
        self._dsn = dsn
        self._ending = asyncio.Event()

    async def run(self) -> None:
        async with connected(self._dsn) as application:
            while not self._ending.is_set():
                self.count += 1
                await application.fetchval(
                    "SELECT dispatcher.emit('email.sent', json_build_object('n', $1::int))", self.count
                )
                await asyncio.sleep(0.04)

    def end(self) -> None:
        self._ending.set()


async def settled(connection: Any, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (
            await connection.fetchval(
                "SELECT count(DISTINCT (event_seq, endpoint_id)) FROM dispatcher.attempt WHERE state = 'delivered'"
            )
            < count
        ):
            await asyncio.sleep(0.05)
        while await connection.fetchval("SELECT count(*) FROM dispatcher.pending"):
            await asyncio.sleep(0.05)


async def test_four_daemons_share_the_shards_and_lose_nothing_by_joining_leaving_dying_and_hanging(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    assert shards(database, str(SHARDS)).returncode == 0
    paths = [f"/many/{n}" for n in range(8)] + [f"/ordered/{n}" for n in range(4)]
    async with connected(database) as connection:
        one = program("one")
        await until_shared(connection, one)
        how: dict[bool, dict[str, Any]] = {True: {"ordered": True}, False: {"max_concurrency": MOST}}
        await subscribe(database, one, {f"{receiver.url}{path}": how["ordered" in path] for path in paths})
        spread = await connection.fetch("SELECT shard, count(*) FROM dispatcher.endpoint GROUP BY shard")
        assert len(spread) == SHARDS, "every shard has webhooks"
        load = Load(database)
        loading = asyncio.create_task(load.run())

        two, three, four = program("two"), program("three"), program("four")
        await until_shared(connection, one, two, three, four)
        assert shards(database, "2").returncode == 1, "the number changes only while nobody runs"

        four.signal(signal.SIGTERM)
        assert await four.ended() == 0
        await until_shared(connection, one, two, three)
        assert not receiver.repeated(), "joining and leaving repeat nothing"

        three.signal(signal.SIGKILL)
        await three.ended()
        await until_shared(connection, one, two)
        four = program("five")
        await until_shared(connection, one, two, four)

        two.signal(signal.SIGSTOP)
        await until_shared(connection, one, four)
        two.signal(signal.SIGCONT)
        await until_shared(connection, one, two, four)

        load.end()
        await loading
        await settled(connection, load.count * len(paths))

    assert not receiver.wrong
    numbers = list(range(1, load.count + 1))
    for path in paths:
        first = receiver.firsts(path)
        assert sorted(first) == numbers, f"lost at {path}"
        if "ordered" in path:
            assert first == numbers, f"out of order at {path}"
    repeated = receiver.repeated()
    # Nothing is repeated but what had come from the one that was killed and the one that hung, and that once.
    assert {daemons[0] for daemons in repeated} <= {"three", "two"}
    assert all(len(daemons) == 2 for daemons in repeated)
    senders = Counter(each.daemon for each in receiver.arrivals)
    assert senders.keys() == {"one", "two", "three", "four", "five"}, "each has worked"
    print(f"{load.count} events, {len(receiver.arrivals)} requests by {dict(senders)}, {len(repeated)} repeated")


async def test_engine_and_web_run_apart(program: Callable[..., Program], receiver: Receiver, database: str) -> None:
    web, engine = program("web", "--only", "web"), program("engine", "--only", "engine")
    await web.is_ready(role="web")
    await engine.is_ready()
    await subscribe(database, web, {f"{receiver.url}/many/1": {}})
    async with connected(database) as connection, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"http://{engine.api}/docs")
        await connection.fetchval("SELECT dispatcher.emit('email.sent', '{\"n\": 1}')")
        await settled(connection, 1)
        async with asyncio.timeout(PATIENCE_S):
            roles: list[str] = []
            while roles != ["active", "web"]:  # told each second
                rows = await connection.fetch("SELECT role, snapshot FROM dispatcher.instance ORDER BY role")
                roles = [row["role"] for row in rows]
        written = {json.loads(row["snapshot"])["schema"] for row in rows}
        assert written == {written_for()}, "or no migration that takes something away would ever be applied beside them"
        assert [each.daemon for each in receiver.arrivals] == ["engine"]
        async with session.get(f"http://{web.metrics}/metrics") as answer:
            assert 'dispatcher_deliveries_total{state="delivered"} 0.0' in await answer.text(), "or a sum counts twice"
        async with session.get(f"http://{engine.metrics}/metrics") as answer:
            assert 'dispatcher_deliveries_total{state="delivered"} 1.0' in await answer.text()
        for each in (web, engine):
            each.signal(signal.SIGTERM)
            assert await each.ended() == 0
        assert await connection.fetchval("SELECT count(*) FROM dispatcher.instance") == 0


async def test_the_number_of_shards_changes_with_a_backlog_and_loses_nothing(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    one = program("one")
    await one.is_ready()
    paths = [f"/many/{n}" for n in range(6)] + ["/ordered/0"]
    await subscribe(database, one, {f"{receiver.url}{path}": {"ordered": "ordered" in path} for path in paths})
    numbers: list[int] = []
    async with connected(database) as connection:
        for count in (3, 1):
            async with connection.transaction():
                for _ in range(100):
                    numbers.append(len(numbers) + 1)
                    await connection.execute("SELECT dispatcher.emit('email.sent', $1)", json.dumps({"n": numbers[-1]}))
            async with asyncio.timeout(PATIENCE_S):
                while len(receiver.arrivals) < len(numbers):  # in the middle of it
                    await asyncio.sleep(0.005)
            one.signal(signal.SIGKILL)
            await one.ended()
            async with asyncio.timeout(PATIENCE_S):
                while (done := shards(database, str(count))).returncode:  # until its sessions are gone
                    await asyncio.sleep(0.05)
            assert [row["webhooks"] for row in json.loads(done.stdout)["shards"]] != []
            one.start()
            await one.is_ready()
        await settled(connection, len(numbers) * len(paths))
        twice = await connection.fetchval(
            "SELECT count(*) FROM (SELECT FROM dispatcher.attempt WHERE state = 'delivered'"
            " GROUP BY event_seq, endpoint_id HAVING count(*) > 1) t"
        )
    assert twice == 0, "an outcome was logged twice"
    for path in paths:
        assert sorted(receiver.firsts(path)) == numbers, f"lost at {path}"
    assert receiver.firsts("/ordered/0") == numbers
    assert isinstance(connection, asyncpg.Connection)
