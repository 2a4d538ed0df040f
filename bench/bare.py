"""The floor: the least that can be done for an event by anything in Python that LISTEN wakes. `light` runs it.

Each commit notifies, each notification reads what is new, each row becomes one request on one connection. No log of
attempts, no limits, no retries, and a transaction that commits out of turn is missed: what this costs, nobody saves.

One JSON order comes on standard input: `dsn` and the `receiver`'s address. `ready` is said when it listens; it ends
with its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Final

import asyncpg
import uvloop

from bench.ledger import endpoint_path

TABLE: Final = "bench_bare"
CREATE: Final = f"""
    CREATE TABLE {TABLE} (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id text, type text, data json);
    CREATE FUNCTION {TABLE}_wake() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_notify('{TABLE}', ''); RETURN NULL; END $$;
    CREATE TRIGGER wake AFTER INSERT ON {TABLE} FOR EACH STATEMENT EXECUTE FUNCTION {TABLE}_wake();
"""
READ: Final = f"SELECT seq, id, data FROM {TABLE} WHERE seq > $1 ORDER BY seq"


async def serve() -> None:
    """Do as ordered."""
    loop = asyncio.get_running_loop()
    order = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    host, _, port = order["receiver"].partition(":")
    http, _ = await loop.create_connection(asyncio.Protocol, host, int(port))  # nobody cares for the answers
    database = await asyncpg.connect(order["dsn"])
    news = await database.prepare(READ)
    notified = asyncio.Event()
    await database.add_listener(TABLE, lambda *_: notified.set())
    head = f"POST {endpoint_path(0)} HTTP/1.1\r\nHost: {order['receiver']}\r\nContent-Type: application/json\r\n"
    print("ready", flush=True)
    ended = loop.run_in_executor(None, sys.stdin.readline)
    ended.add_done_callback(lambda _: notified.set())
    seq = 0
    while not ended.done():
        await notified.wait()
        notified.clear()
        for row in await news.fetch(seq):
            seq, id_, data = row
            http.write(f"{head}webhook-id: {id_}\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode())
    await database.close()


if __name__ == "__main__":
    uvloop.run(serve())
