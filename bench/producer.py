"""The application's side: a process of its own that commits events on a schedule, whatever becomes of them.

**Open loop.** When an event is due is settled before the run begins, and its latency counts from that moment. A
producer that waited for the system under test would slow down with it and hide its worst moments (coordinated
omission, G. Tene).

**Pace.** Events loops sleep in whole milliseconds, which is more than what is measured here; so each stream has a
thread that sleeps precisely (about 0.06 ms) and wakes the loop. Within its slot each event is due at random, so that
no rhythm of ours meets one of the dispatcher's. How late the INSERTs really went out is reported: a late producer
voids nothing, since lateness counts as latency.

One JSON order comes on standard input: `dsn`, the ledger, and `streams`. `ready` is said when all connections are
prepared; a second line starts it. The last line out says how late it was.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import asyncpg
import uvloop

from bench.histogram import Histogram
from bench.ledger import GROUP_DIGITS, ID_DIGITS, ID_PREFIX, TYPE_PREFIX, Ledger

DATA: Final = json.dumps(
    {
        "email_id": "msg_def456",
        "from": "hello@example.com",
        "to": "someone@example.org",
        "subject": "Your order has been shipped",
        "message_id": "<01020194c2a3-7c1d5f0e@mail.example.com>",
        "tags": ["transactional", "shipping"],
        "delivered_at": "2025-01-15T10:30:02Z",
        "smtp": {"code": 250, "response": "2.0.0 OK 1736937002 a1si1234567qtx.42 - gsmtp", "mx": "mx1.example.org"},
        "metadata": {"order": "12345", "customer": "cus_9f8e7d", "region": "eu-central-1", "campaign": "spring"},
    }
)
"""600 bytes when rendered with the envelope: an ordinary e-mail event."""

ONE: Final = "INSERT INTO {table} (id, type, data) VALUES ($1, $2, $3)"
MANY: Final = """
    INSERT INTO {table} (id, type, data)
    SELECT * FROM unnest($1::text[], $2::text[], array_fill($3::text, ARRAY[cardinality($1::text[])])::json[])
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Events `first` to `first + count - 1`, `rate` a second, in transactions of `batch`, to groups in turn."""

    first: int
    count: int
    rate: float
    groups: int = 1  # how many, from `group` on
    group: int = 0
    batch: int = 1
    connections: int = 4
    table: str = "dispatcher.outbox"

    @property
    def numbers(self) -> range:
        """The events."""
        return range(self.first, self.first + self.count)

    def group_of(self, number: int) -> int:
        """Which group gets an event."""
        return self.group + (number - self.first) % self.groups


class _Pace(threading.Thread):
    """Calls `fire` in the loop at each moment due."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, stream: Stream, start_ns: int, dice: random.Random, fire: Any
    ) -> None:
        super().__init__(name="pace", daemon=True)
        self._loop, self._stream, self._start_ns, self._dice, self._fire = loop, stream, start_ns, dice, fire

    def run(self) -> None:
        stream = self._stream
        gap_ns = 1e9 * stream.batch / stream.rate
        for turn, first in enumerate(range(stream.first, stream.first + stream.count, stream.batch)):
            due_ns = self._start_ns + int((turn + self._dice.random()) * gap_ns)
            while (wait_ns := due_ns - time.monotonic_ns()) > 0:
                time.sleep(wait_ns / 1e9)
            numbers = range(first, min(first + stream.batch, stream.first + stream.count))
            self._loop.call_soon_threadsafe(self._fire, (due_ns, numbers))


class _Lane:
    """One stream with its connections."""

    def __init__(self, stream: Stream, ledger: Ledger) -> None:
        self.stream, self.ledger = stream, ledger
        self.late = Histogram()
        self._due: asyncio.Queue[tuple[int, range]] = asyncio.Queue()
        self._writers: list[Any] = []

    async def open(self, dsn: str) -> None:
        for _ in range(self.stream.connections):
            connection = await asyncpg.connect(dsn, server_settings={"application_name": "bench producer"})
            insert = (ONE if self.stream.batch == 1 else MANY).format(table=self.stream.table)
            self._writers.append((connection, await connection.prepare(insert)))

    async def run(self, start_ns: int, dice: random.Random) -> None:
        _Pace(asyncio.get_running_loop(), self.stream, start_ns, dice, self._due.put_nowait).start()
        turns = -(-self.stream.count // self.stream.batch)
        left = iter(range(turns))
        async with asyncio.TaskGroup() as group:
            for _, statement in self._writers:
                group.create_task(self._write(statement, left))
        for connection, _ in self._writers:
            await connection.close()

    async def _write(self, statement: Any, left: Any) -> None:
        ledger, stream, late = self.ledger, self.stream, []
        for _ in left:
            due_ns, numbers = await self._due.get()
            late.append(time.monotonic_ns() - due_ns)
            for number in numbers:
                ledger.due[number] = due_ns
            ids = [f"{ID_PREFIX}{n:0{ID_DIGITS}d}" for n in numbers]
            types = [f"{TYPE_PREFIX}{stream.group_of(n):0{GROUP_DIGITS}d}" for n in numbers]
            if stream.batch == 1:
                await statement.fetch(ids[0], types[0], DATA)
            else:
                await statement.fetch(ids, types, DATA)
            acked_ns = time.monotonic_ns()
            for number in numbers:
                ledger.acked[number] = acked_ns
        self.late.record(late)


async def produce(order: dict[str, Any]) -> None:
    """Do as ordered."""
    ledger = Ledger(Path(order["ledger"]), order["events"], order["fanout"])
    lanes = [_Lane(Stream(**stream), ledger) for stream in order["streams"]]
    for lane in lanes:
        await lane.open(order["dsn"])
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    start_ns = time.monotonic_ns() + 5_000_000
    async with asyncio.TaskGroup() as group:
        for number, lane in enumerate(lanes):
            group.create_task(lane.run(start_ns, random.Random(order["seed"] + number)))
    late = Histogram()
    for lane in lanes:
        late.add(lane.late)
    print(json.dumps({"late": late.to_json()}), flush=True)


if __name__ == "__main__":
    uvloop.run(produce(json.loads(sys.stdin.readline())))
