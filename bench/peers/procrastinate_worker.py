"""procrastinate with aiohttp: `fill EVENTS ENDPOINTS` or `work RECEIVER`; PostgreSQL comes from the PG* variables.

Settings: 100 jobs at once over a pool of 20 connections, finished jobs deleted. Run by the interpreter of an
environment that has procrastinate, psycopg[binary,pool], aiohttp and uvloop.
"""

# What it imports is in an environment of its own.
# mypy: ignore-errors

import asyncio
import hashlib
import hmac
import json
import sys

import aiohttp
import procrastinate
import uvloop

BODY = json.dumps({"type": "email.delivered", "version": "1.0", "data": {"text": "x" * 520}})
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo="", min_size=20, max_size=20))
session: aiohttp.ClientSession
receiver = ""


@app.task(name="deliver")
async def deliver(n: int, e: int, body: str) -> None:
    data = body.encode()
    headers = {
        "Content-Type": "application/json",
        "X-Trackpost-Signature": hmac.new(b"secret", data, hashlib.sha256).hexdigest(),
        "webhook-id": f"evt_{n:032d}",
    }
    async with session.post(f"http://{receiver}/e{e:05d}", data=data, headers=headers) as response:
        await response.read()
        response.raise_for_status()


async def fill(events: int, endpoints: int) -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for at in range(0, events, 1000):
            numbers = range(at, min(at + 1000, events))
            await deliver.batch_defer_async(*({"n": n, "e": n % endpoints, "body": BODY} for n in numbers))
        row = await app.connector.execute_query_one_async("SELECT count(*) AS jobs FROM procrastinate_jobs")
        print(row["jobs"], flush=True)


async def work(address: str) -> None:
    global receiver, session  # noqa: PLW0603  tasks of procrastinate are plain functions
    receiver = address
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60), cookie_jar=aiohttp.DummyCookieJar()
    )
    async with app.open_async():
        await app.run_worker_async(concurrency=100, delete_jobs="always", install_signal_handlers=False)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["fill", events, endpoints]:
            uvloop.run(fill(int(events), int(endpoints)))
        case ["work", address]:
            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
            asyncio.run(work(address))
