"""pgqueuer with aiohttp: `fill EVENTS ENDPOINTS` or `work RECEIVER`; PostgreSQL comes from the PG* variables.

Settings: batches of 100, no more than 1,000 tasks at once, one session with unlimited connections, the job's own
statements in the largest batches it offers. Run by the interpreter of an environment that has pgqueuer, asyncpg,
aiohttp and uvloop.
"""

# What it imports is in an environment of its own.
# mypy: ignore-errors

import hashlib
import hmac
import json
import sys

import aiohttp
import asyncpg
import uvloop
from pgqueuer import AsyncpgDriver, PgQueuer, Queries

BODY = json.dumps({"type": "email.delivered", "version": "1.0", "data": {"text": "x" * 520}})


async def fill(events: int, endpoints: int) -> None:
    connection = await asyncpg.connect()
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    for at in range(0, events, 1000):
        numbers = range(at, min(at + 1000, events))
        jobs = [json.dumps({"n": n, "e": n % endpoints, "body": BODY}).encode() for n in numbers]
        await queries.enqueue(["deliver"] * len(jobs), jobs, [0] * len(jobs))
    print(await connection.fetchval("SELECT count(*) FROM pgqueuer"), flush=True)


async def work(receiver: str) -> None:
    queuer = PgQueuer.from_asyncpg_connection(await asyncpg.connect())
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60), cookie_jar=aiohttp.DummyCookieJar()
    )

    @queuer.entrypoint("deliver")
    async def deliver(job) -> None:
        event = json.loads(job.payload)
        body = event["body"].encode()
        headers = {
            "Content-Type": "application/json",
            "X-Trackpost-Signature": hmac.new(b"secret", body, hashlib.sha256).hexdigest(),
            "webhook-id": f"evt_{event['n']:032d}",
        }
        async with session.post(f"http://{receiver}/e{event['e']:05d}", data=body, headers=headers) as response:
            await response.read()
            response.raise_for_status()

    await queuer.run(batch_size=100, max_concurrent_tasks=1000)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["fill", events, endpoints]:
            uvloop.run(fill(int(events), int(endpoints)))
        case ["work", receiver]:
            uvloop.run(work(receiver))
