"""What one request costs: our client, aiohttp as well tuned as it gets, and a bare Protocol with httptools.

    python -m bench.transport                       the whole table
    python -m bench.transport --clients ours --shapes 100x8 --requests 200000

Signed-size POSTs (600 bytes of body) over warm keep-alive connections to a receiver in a process of its own, which
answers 200 with two bytes and does nothing else. A closed loop: every finished request starts the next one. The figure
that counts is CPU per request of the client's process; requests per second depend on the second core too. Each cell
runs in a process of its own. `bare` is no client (no pool, no deadline, no bounds): it is what the event loop and the
parser cost.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httptools
import uvloop

BODY = b'{"id":"evt_01h455vb4pex5vsknk084sn02q","type":"email.delivered","data":"' + b"x" * 526 + b'"}'
SHAPES = ("1x32", "100x8", "1000x1")  # endpoints x requests in flight to each
REQUESTS = 100_000
ROUNDS = 5
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"


def post(host: str) -> bytes:
    """Return the bytes of one request, headers as a delivery has them."""
    head = (
        f"POST /hook HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nUser-Agent: TrackPost-Webhooks/1.0\r\n"
        f"X-Trackpost-Signature: {'0' * 64}\r\nX-Trackpost-Event: email.delivered\r\n"
        f"X-Trackpost-Delivery: dlv_01h455vb4pex5vsknk084sn02q\r\nX-Trackpost-Attempt: 1\r\n"
        f"webhook-id: evt_01h455vb4pex5vsknk084sn02q\r\nwebhook-timestamp: 1700000000\r\n"
        f"webhook-signature: v1,{'0' * 44}\r\nContent-Length: {len(BODY)}\r\n\r\n"
    )
    return head.encode() + BODY


def host(number: int) -> str:
    return f"e{number:04}.bench.test"


# The receiver.


class Receiver(asyncio.Protocol):
    """Answers whenever the end of a body has arrived: a request ends with BODY's last bytes and nothing else does."""

    __slots__ = ("write",)

    def connection_made(self, transport: Any) -> None:
        self.write = transport.write

    def data_received(self, data: bytes) -> None:
        if data.endswith(b'"}'):
            self.write(ANSWER)


async def receive(tls_directory: str | None) -> None:
    """Serve until standard input ends. The port is the first line of standard output."""
    loop = asyncio.get_running_loop()
    context = None
    if tls_directory is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(Path(tls_directory) / "server.pem")
    server = await loop.create_server(Receiver, "127.0.0.1", 0, ssl=context, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


@asynccontextmanager
async def receiver(tls_directory: str | None) -> AsyncIterator[int]:
    """Run the receiver in a process of its own and yield its port."""
    arguments = ["receive", *([tls_directory] if tls_directory else [])]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.transport",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield int(await process.stdout.readline())
    finally:
        process.stdin.close()
        await process.wait()


def make_certificates(directory: str) -> None:
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(Path(directory) / "ca.pem")
    authority.issue_cert("*.bench.test").private_key_and_cert_chain_pem.write_to_path(Path(directory) / "server.pem")


# The clients. Each takes the load and gives back a coroutine function that sends a number of requests.

Send = Callable[[int], Awaitable[None]]


class Load:
    """What a client is asked to do."""

    def __init__(self, port: int, endpoints: int, each: int, tls_directory: str | None) -> None:
        self.port = port
        self.endpoints = endpoints
        self.each = each
        self.ca_file = None if tls_directory is None else str(Path(tls_directory) / "ca.pem")
        self.scheme = "http" if tls_directory is None else "https"

    @property
    def in_flight(self) -> int:
        return self.endpoints * self.each

    def context(self) -> ssl.SSLContext | None:
        return None if self.ca_file is None else ssl.create_default_context(cafile=self.ca_file)


class Countdown:
    """Starts `in_flight` requests, another for each that ends, and says when the last one has ended."""

    def __init__(self, in_flight: int) -> None:
        self.in_flight = in_flight
        self.ended = asyncio.Event()
        self.to_start = self.to_end = 0
        self.failure = ""

    def reset(self, requests: int) -> int:
        """Return how many to start at once."""
        self.ended.clear()
        first = min(self.in_flight, requests)
        self.to_start, self.to_end = requests - first, requests
        return first

    def fail(self, words: str) -> None:
        """One has gone wrong: the run is void."""
        self.failure = words
        self.ended.set()

    async def wait(self) -> None:
        await self.ended.wait()
        if self.failure:
            raise RuntimeError(self.failure)

    def next(self) -> bool:
        """One has ended: may another start?"""
        self.to_end -= 1
        if self.to_end == 0:
            self.ended.set()
        if self.to_start == 0:
            return False
        self.to_start -= 1
        return True


@asynccontextmanager
async def ours(load: Load) -> AsyncIterator[Send]:
    from dispatcher.core.addresses import Guard
    from dispatcher.core.attempt import Attempt
    from dispatcher.engine.transport import Transport, TransportSettings

    class Loopback:
        async def resolve(self, host: str) -> Sequence[str]:
            return ("127.0.0.1",)

        async def close(self) -> None:
            pass

    guard = Guard(allow=["127.0.0.0/8"], allow_http=True)
    settings = TransportSettings(ca_file=load.ca_file, idle_connections_max=load.in_flight)
    transport = Transport(settings=settings, guard=guard, resolver=Loopback(), clock=time.monotonic)
    lanes = [
        (transport.origin(guard.check_url(f"{load.scheme}://{host(n)}:{load.port}/hook")), post(host(n)))
        for n in range(load.endpoints)
    ]
    countdown = Countdown(load.in_flight)

    def done(lane: Any, attempt: Attempt) -> None:
        if attempt.error is not None or attempt.status != 200:
            countdown.fail(repr(attempt))
        elif countdown.next():
            origin, request = lane
            origin.submit(request, 30.0, done, lane)

    async def send(requests: int) -> None:
        for number in range(countdown.reset(requests)):
            lane = lanes[number % load.endpoints]
            lane[0].submit(lane[1], 30.0, done, lane)
        await countdown.wait()

    yield send
    await transport.close()


class BareConnection(asyncio.Protocol):
    """The least that sends a request, parses what comes, and calls back."""

    __slots__ = ("done", "feed", "parser", "write")

    def __init__(self, done: Callable[[Any, int], None]) -> None:
        self.done = done

    def connection_made(self, transport: Any) -> None:
        self.write = transport.write
        self.parser = httptools.HttpResponseParser(self)
        self.feed = self.parser.feed_data

    def data_received(self, data: bytes) -> None:
        self.feed(data)

    def on_message_complete(self) -> None:
        self.done(self, self.parser.get_status_code())


@asynccontextmanager
async def bare(load: Load) -> AsyncIterator[Send]:
    loop = asyncio.get_running_loop()
    countdown = Countdown(load.in_flight)
    request, context = post(host(0)), load.context()

    def done(connection: BareConnection, status: int) -> None:
        assert status == 200
        if countdown.next():
            connection.write(request)

    connections = []
    for _ in range(load.in_flight):
        transport, connection = await loop.create_connection(
            lambda: BareConnection(done),
            "127.0.0.1",
            load.port,
            ssl=context,
            server_hostname=host(0) if context else None,
        )
        connections.append((transport, connection))

    async def send(requests: int) -> None:
        for _, connection in connections[: countdown.reset(requests)]:
            connection.write(request)
        await countdown.wait()

    yield send
    for transport, _ in connections:
        transport.abort()


@asynccontextmanager
async def tuned_aiohttp(load: Load) -> AsyncIterator[Send]:
    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult

    class Loopback(AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
            return [ResolveResult(hostname=host, host="127.0.0.1", port=port, family=2, proto=0, flags=0)]

        async def close(self) -> None:
            pass

    connector = aiohttp.TCPConnector(limit=0, resolver=Loopback(), ssl=load.context() or False, keepalive_timeout=60)
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=30),
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
    )
    head, _, _ = post("").partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[2:])
    urls = [f"{load.scheme}://{host(n)}:{load.port}/hook" for n in range(load.endpoints)]
    countdown = Countdown(load.in_flight)

    async def lane(url: str) -> None:
        more = True
        while more:
            async with session.post(url, data=BODY, headers=headers, allow_redirects=False) as response:
                await response.read()
                assert response.status == 200
            more = countdown.next()

    async def send(requests: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(countdown.reset(requests)):
                group.create_task(lane(urls[number % load.endpoints]))

    yield send
    await session.close()


CLIENTS = {"bare": bare, "ours": ours, "aiohttp": tuned_aiohttp}


async def run(
    client: str, *, tls: bool = False, endpoints: int = 100, each: int = 8, requests: int = REQUESTS
) -> dict[str, Any]:
    """Send `requests` in this process and loop after warming up; return CPU µs per request and requests per second.

    They are sent in rounds and the best one counts: what else the machine does only ever adds.
    """
    with tempfile.TemporaryDirectory() as directory:
        if tls:
            make_certificates(directory)
        tls_directory = directory if tls else None
        async with receiver(tls_directory) as port:
            load = Load(port, endpoints, each, tls_directory)
            async with CLIENTS[client](load) as send:
                await send(load.in_flight * 5)
                settle_memory()
                rounds = [await timed(send, requests // ROUNDS) for _ in range(ROUNDS)]
    cpu_us, rate = min(cpu for cpu, _ in rounds), max(rate for _, rate in rounds)
    return {
        "client": client,
        "tls": tls,
        "endpoints": endpoints,
        "each": each,
        "requests": requests,
        "cpu_us": cpu_us,
        "rate": rate,
    }


async def timed(send: Send, requests: int) -> tuple[float, float]:
    """Return CPU µs per request and requests per second of one round."""
    wall, cpu = time.perf_counter(), time.process_time()
    await send(requests)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu / requests * 1e6, requests / wall


def settle_memory() -> None:
    """What the daemon does at its start, for every client alike: collect less, and keep read buffers on the heap."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    block = bytes(16 << 20)
    del block


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The results as text, each with its CPU in proportion to the bare loop's."""
    floor = {(c["tls"], c["endpoints"], c["each"]): c["cpu_us"] for c in cells if c["client"] == "bare"}
    lines = [f"{'':24}{'client':>10}{'CPU µs':>9}{'1/s':>10}{'bare/this':>11}"]
    for cell in cells:
        shape = f"{'TLS' if cell['tls'] else 'plain'}, {cell['endpoints']} x {cell['each']}"
        bottom = floor.get((cell["tls"], cell["endpoints"], cell["each"]))
        ratio = f"{bottom / cell['cpu_us']:.2f}" if bottom else "-"
        lines.append(f"{shape:24}{cell['client']:>10}{cell['cpu_us']:>9.1f}{cell['rate']:>10,.0f}{ratio:>11}")
    return "\n".join(lines)


def measure(client: str, tls: bool, shape: str, requests: int) -> dict[str, Any]:
    """Run one cell in a process of its own."""
    return asyncio.run(measure_apart(client, tls, shape, requests))


async def measure_apart(client: str, tls: bool, shape: str, requests: int) -> dict[str, Any]:
    """Run one cell in a process of its own, which is ended with this. Raises CalledProcessError."""
    command = [sys.executable, "-m", "bench.transport", "cell", client, "tls" if tls else "plain", shape, str(requests)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, process_group=0
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    cell: dict[str, Any] = json.loads(said)
    return cell


def main() -> None:
    match sys.argv[1:]:
        case ["receive", *directory]:
            uvloop.run(receive(directory[0] if directory else None))
            return
        case ["cell", client, security, shape, requests]:
            endpoints, each = map(int, shape.split("x"))
            tls = security == "tls"
            cell = uvloop.run(run(client, tls=tls, endpoints=endpoints, each=each, requests=int(requests)))
            print(json.dumps(cell))
            return
    parser = argparse.ArgumentParser(description="CPU per request of HTTP clients.")
    parser.add_argument("--clients", nargs="+", choices=list(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="endpoints x in flight to each, as 100x8")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="per cell; a tenth for aiohttp")
    parser.add_argument("--security", nargs="+", choices=["plain", "tls"], default=["plain", "tls"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cells = [
        measure(client, security == "tls", shape, options.requests // (10 if client == "aiohttp" else 1))
        for security in options.security
        for shape in options.shapes
        for client in options.clients
    ]
    print(json.dumps(cells, indent=1) if options.json else table(cells))


if __name__ == "__main__":
    os.environ.pop("SSLKEYLOGFILE", None)
    main()
