"""The model of PostgreSQL and PostgreSQL agree: the same acts, chosen at random, through the engine's own stores.

What has another name on each side (transaction ids, ids of webhooks, moments) is compared by what it stands for: events
by their ids, pages by their content and order, snapshots by what is read from them on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from model_driver import Driver, Weather
from model_postgres import HELD, ModelPostgres

from dispatcher.core.backoff import PRESETS
from dispatcher.errors import Fenced
from dispatcher.model import BodyStyle
from dispatcher.moments import to_datetime
from dispatcher.store.database import connect, statements
from dispatcher.store.endpoints import EndpointChange, EndpointDefaults, EndpointHealth, EndpointStore
from dispatcher.store.outbox import OutboxPages
from dispatcher.store.pending import PendingStore
from dispatcher.store.shard import Batch, ShardStore
from dispatcher.store.vault import Vault

ACTS = 120
VAULT = Vault(b"k" * 32)
DEFAULTS = EndpointDefaults((60.0,), PRESETS, 16, 30.0)
DUE = datetime(2030, 1, 1, tzinfo=UTC)
CHANNELS = ("dispatcher_wake", "dispatcher_registry", "dispatcher_pending")


class Producer:
    """One transaction in progress."""

    async def emit(self, name: str, kind: str) -> None: ...

    async def end(self, commits: bool) -> None: ...


class Side:
    """A database, and everything of the engine's that talks to it."""

    def __init__(self, reading: Any, writing: Any, office: Any) -> None:
        self.reading, self.writing = reading, writing
        self.office = office
        self.pages = OutboxPages(reading)
        self.shard = ShardStore(writing, 0)
        self.pending = PendingStore(reading, 0)
        self.learning = EndpointStore(writing, VAULT)
        self.endpoints = EndpointStore(office, VAULT)
        self.account = 0
        self.cursor: Any = None
        self.epochs: list[int] = []
        self.batch = 0
        self.producers: list[Any] = []
        self.events: dict[str, tuple[int, int, datetime]] = {}  # id -> seq, xid, written_at
        self.names: dict[int, str] = {}  # seq -> id
        self.webhooks: list[Any] = []  # records, in the order of their creation
        self.keys: list[int] = []  # their ids
        self.heard: list[str] = []

    async def start(self) -> None:
        await self.pages.prepare()
        await self.pending.prepare()
        for channel in CHANNELS:
            await self.reading.add_listener(channel, lambda *heard: self.heard.append(heard[2]))
        self.cursor = (await self.shard.state()).cursor

    def name(self, row: Any) -> None:
        """Call an event by its id; our own news, whose ids are made there, by when it was seen first."""
        seq, xid, event_id, _, kind = row[3:8]
        name = self.names.setdefault(seq, f"{kind} {len(self.names)}" if kind.startswith("webhook.") else event_id)
        self.events[name] = (seq, xid, to_datetime(row[10]))

    def producer(self) -> Awaitable[Producer]:
        raise NotImplementedError

    async def key_of(self, public_id: str) -> int:
        raise NotImplementedError

    async def settle(self) -> None:
        """Let notifications come in."""
        raise NotImplementedError


class RealProducer(Producer):
    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def emit(self, name: str, kind: str) -> None:
        await self.connection.execute(
            "INSERT INTO dispatcher.outbox (id, type, data) VALUES ($1, $2, '{\"n\": 1}')", name, kind
        )

    async def end(self, commits: bool) -> None:
        await self.connection.execute("COMMIT" if commits else "ROLLBACK")
        await self.connection.close()


class Real(Side):
    def __init__(self, dsn: str, *connections: Any) -> None:
        super().__init__(*connections)
        self.dsn = dsn

    async def producer(self) -> Producer:
        connection = await connect(self.dsn, name="producer")
        await connection.execute("BEGIN")
        return RealProducer(connection)

    async def key_of(self, public_id: str) -> int:
        return int(await self.office.fetchval("SELECT id FROM dispatcher.endpoint WHERE public_id = $1", public_id))

    async def settle(self) -> None:
        # A session hears what was told before its own notification, which it hears before its statement ends.
        await self.reading.execute("SELECT pg_notify('dispatcher_pending', 'mark')")
        while not self.heard or self.heard[-1] != "dispatcher_pending":
            await asyncio.sleep(0.001)
        self.heard.pop()


class ModelProducer(Producer):
    def __init__(self, server: ModelPostgres) -> None:
        self.transaction = server.begin()

    async def emit(self, name: str, kind: str) -> None:
        self.transaction.emit(kind, '{"n": 1}', name)

    async def end(self, commits: bool) -> None:
        if commits:
            self.transaction.commit()
        else:
            self.transaction.abort()


class Modelled(Side):
    def __init__(self, server: ModelPostgres, *connections: Any) -> None:
        super().__init__(*connections)
        self.server = server

    async def producer(self) -> Producer:
        return ModelProducer(self.server)

    async def key_of(self, public_id: str) -> int:
        [key] = [key for key, row in self.server.endpoints.items() if row["public_id"] == public_id]
        return key

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def sides(database: str) -> AsyncIterator[tuple[Real, Modelled]]:
    real = Real(database, *[await connect(database, name=name, engine=True) for name in ("reader", "writer", "office")])
    server = ModelPostgres(lambda: datetime.now(UTC))
    driver = Driver(server, Weather())
    modelled = Modelled(server, *[await driver.connect() for _ in range(3)])
    for side in (real, modelled):
        await side.start()
    real.account = await real.office.fetchval("SELECT id FROM dispatcher.account")
    modelled.account = 1
    yield real, modelled
    for producer in real.producers:
        await producer.end(False)
    for side in (real, modelled):
        for connection in (side.reading, side.writing, side.office):
            await connection.close()


# ── acts: each returns what both sides must agree on ────────────────────────────────────────────────────────────────


class Acts:
    """What may happen. The dice are thrown once; both sides act on the same throw."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.number = 0
        self.open = 0  # producers
        self.webhooks = 0
        self.asleep = 0

    def draw(self) -> tuple[str, Callable[[Any], Awaitable[Any]]]:
        acts = [
            self.begin, self.emit, self.emit, self.emit, self.end, self.end, self.poll, self.poll, self.poll,
            self.flush, self.flush, self.flush_again, self.flush_fenced, self.take_over, self.refill, self.fetch,
            self.pull, self.overview, self.known, self.create, self.change, self.registry, self.learn, self.redeliver,
            self.sleep, self.wake, self.restart,
        ]  # fmt: skip
        act = self.dice.choice(acts)
        return act.__name__, act()

    # producers

    def begin(self) -> Callable[[Any], Awaitable[Any]]:
        self.open += 1

        async def act(side: Any) -> None:
            side.producers.append(await side.producer())

        return act

    def emit(self) -> Callable[[Any], Awaitable[Any]]:
        if not self.open:
            return self.begin()
        which = self.dice.randrange(self.open)
        self.number += 1
        name, kind = f"evt_{self.number:05d}", self.dice.choice(("a.one", "b.two"))

        async def act(side: Any) -> None:
            await side.producers[which].emit(name, kind)

        return act

    def end(self) -> Callable[[Any], Awaitable[Any]]:
        if not self.open:
            return self.begin()
        self.open -= 1
        which, commits = self.dice.randrange(self.open + 1), self.dice.random() < 0.8

        async def act(side: Any) -> list[str]:
            side.heard.clear()
            await side.producers.pop(which).end(commits)
            await side.settle()
            return sorted(set(side.heard))

        return act

    # the reader

    def poll(self) -> Callable[[Any], Awaitable[Any]]:
        limit = self.dice.choice((1, 3, 100))

        async def act(side: Any) -> Any:
            before = side.cursor
            page = await side.pages.read(before, limit)
            side.cursor = page.after
            for row in page.rows:
                side.name(row)
            return [(side.names[row[3]], row[6], row[7]) for row in page.rows], page.complete, page.registry is None

        return act

    def restart(self) -> Callable[[Any], Awaitable[Any]]:
        async def act(side: Any) -> None:
            side.cursor = (await side.shard.state()).cursor
            side.pages = OutboxPages(side.reading)
            await side.pages.prepare()

        return act

    def known(self) -> Callable[[Any], Awaitable[Any]]:
        async def act(side: Any) -> Any:
            pairs = [(key, seq) for key in (1, 2, 3) for seq, _, _ in side.events.values()]
            rows = await side.reading.fetch(
                statements("outbox")["known"], [p[0] for p in pairs], [p[1] for p in pairs], DUE - timedelta(days=9999)
            )
            newest = await side.reading.fetchval(statements("outbox")["newest_known"])
            return sorted((row[0], side.names[row[1]]) for row in rows), side.names.get(newest, 0)

        return act

    def sleep(self) -> Callable[[Any], Awaitable[Any]]:
        self.asleep += 1

        async def act(side: Any) -> Any:
            return await side.reading.fetchval(statements("shard")["fall_asleep"])

        return act

    def wake(self) -> Callable[[Any], Awaitable[Any]]:
        if not self.asleep:
            return self.sleep()
        self.asleep -= 1

        async def act(side: Any) -> Any:
            return await side.reading.fetchval(statements("shard")["wake_up"])

        return act

    # the ledger

    def _batch(self, side: Any, throw: int, number: int) -> Batch:
        dice = random.Random(throw)
        ids = sorted(side.events)
        attempts, pending, settled = [], {}, []
        for name in dice.sample(ids, min(len(ids), 4)):
            seq, xid, at = side.events[name]
            key = (dice.randint(1, 3), seq, dice.choice((0, 1000)))
            what = dice.choice(("due", "held", "settled", "delivered"))
            if what == "settled":
                settled.append(key)
            elif what == "delivered":
                attempts.append((seq, xid, key[0], key[2], 1, "delivered", "2xx", 200, 5, None, b"h", b""))
            else:
                due = (
                    HELD if what == "held" else DUE + timedelta(seconds=dice.randint(0, 20), microseconds=len(pending))
                )
                error = dice.choice((None, "500"))
                pending[key] = (*key, xid, at, "pending", dice.randint(0, 3), due, error)
        cursor = side.cursor if dice.random() < 0.5 else None
        discarded = [(side.events[ids[0]][0], "no")] if ids and dice.random() < 0.2 else []
        return Batch(number, attempts, list(pending.values()), settled, discarded, cursor)

    def flush(self, ahead: int = 1, epoch: int = -1) -> Callable[[Any], Awaitable[Any]]:
        throw = self.dice.getrandbits(32)

        async def act(side: Any) -> Any:
            if not side.epochs:
                side.epochs.append(await side.shard.take_over())
            number = side.batch + ahead
            try:
                written = await side.shard.flush(side.epochs[epoch], self._batch(side, throw, number))
            except Fenced:
                return "fenced"
            side.batch = max(side.batch, number)
            state = await side.shard.state()
            return written, state.batch - side.batch, state.epoch - side.epochs[0]

        return act

    def flush_again(self) -> Callable[[Any], Awaitable[Any]]:
        return self.flush(ahead=0)

    def flush_fenced(self) -> Callable[[Any], Awaitable[Any]]:
        return self.flush(epoch=0)

    def take_over(self) -> Callable[[Any], Awaitable[Any]]:
        async def act(side: Any) -> Any:
            side.epochs.append(await side.shard.take_over())
            return side.epochs[-1] - side.epochs[0]

        return act

    # pending rows

    def refill(self) -> Callable[[Any], Awaitable[Any]]:
        start, length = DUE + timedelta(seconds=self.dice.randint(0, 15)), timedelta(seconds=self.dice.randint(1, 10))
        limit = self.dice.choice((2, 50))

        async def act(side: Any) -> Any:
            rows = await side.pending.refill(start, start + length, limit)
            return [(row[0], side.names[row[1]], row[2], row[3]) for row in rows]

        return act

    @staticmethod
    def _plain(side: Any, rows: list[Any]) -> list[Any]:
        return [
            (
                r[0],
                side.names[r[1]],
                r[2],
                r[3],
                r[4],
                r[5],
                side.events[side.names[r[1]]][1:] == (r[6], to_datetime(r[7])),
                *r[9:11],
            )
            for r in rows
        ]

    def fetch(self) -> Callable[[Any], Awaitable[Any]]:
        throw = self.dice.getrandbits(32)

        async def act(side: Any) -> Any:
            dice = random.Random(throw)
            keys = [(dice.randint(1, 3), side.events[name][0], dice.choice((0, 1000))) for name in sorted(side.events)]
            return self._plain(side, await side.pending.fetch(keys))

        return act

    def pull(self) -> Callable[[Any], Awaitable[Any]]:
        throw = self.dice.getrandbits(32)

        async def act(side: Any) -> Any:
            dice = random.Random(throw)
            ids = sorted(side.events)
            after = side.events[dice.choice(ids)][0] if ids else 0
            positions = [(1, -1, -1, dice.choice((1, 50))), (2, after, 0, 3), (3, after, 1, 50)]
            rows = await side.pending.pull(positions)
            return sorted(self._plain(side, rows), key=lambda row: row[0])  # stable: within a webhook the order counts

        return act

    def overview(self) -> Callable[[Any], Awaitable[Any]]:
        async def act(side: Any) -> Any:
            heads = await side.pending.heads()
            named = {key: (side.names[head[1]], head[2]) for key, head in heads.items()}
            oldest = (await side.reading.fetchrow(statements("shard")["gauges"]))[1]
            by_at = {at: name for name, (_, _, at) in side.events.items()}
            return await side.pending.held_endpoints(), named, by_at.get(oldest, oldest)

        return act

    def redeliver(self) -> Callable[[Any], Awaitable[Any]]:
        throw = self.dice.getrandbits(32)

        async def act(side: Any) -> Any:
            dice, ids = random.Random(throw), sorted(side.events)
            if not ids or not side.keys:
                return None
            seq, xid, _ = side.events[dice.choice(ids)]
            side.heard.clear()
            row = await side.office.fetchrow(statements("delivery")["redeliver"], dice.choice(side.keys), seq, xid)
            await side.settle()
            return row and row["generation"], sorted(set(side.heard))

        return act

    # webhooks

    def create(self) -> Callable[[Any], Awaitable[Any]]:
        dice = self.dice
        if self.webhooks >= 3:
            return self.registry()
        self.webhooks += 1
        change = EndpointChange(
            url=f"http://127.0.0.1/{self.webhooks}", description="", events=[dice.choice(("*", "a.*"))], headers={},
            body_style=BodyStyle.COMPACT, retry=None, max_concurrency=dice.choice((None, 3)), rate_limit=None,
            ordered=dice.random() < 0.5, timeout_s=None,
        )  # fmt: skip

        async def act(side: Any) -> Any:
            side.heard.clear()
            record = await side.endpoints.create(side.account, change, "s" * 32)
            side.webhooks.append(record)
            side.keys.append(await side.key_of(record.id))
            await side.settle()
            return _same(record), sorted(set(side.heard))

        return act

    def change(self) -> Callable[[Any], Awaitable[Any]]:
        if not self.webhooks:
            return self.create()
        which, stale = self.dice.randrange(self.webhooks), self.dice.random() < 0.2
        name = self.dice.choice(("pause", "pause", "resume", "resume", "rotate", "rotate", "update", "delete"))
        grace = timedelta(seconds=self.dice.choice((0, 60)))

        async def act(side: Any) -> Any:
            record = side.webhooks[which]
            version = record.version - stale
            side.heard.clear()
            match name:
                case "rotate":
                    found = await side.endpoints.rotate(side.account, record.id, "t" * 32, grace, version=version)
                case "update":
                    change = EndpointChange(**{f: getattr(record, f) for f in EndpointChange.__struct_fields__})
                    found = await side.endpoints.update(
                        side.account, record.id, change, secret="u" * 32, version=version
                    )
                case _:
                    found = await getattr(side.endpoints, name)(side.account, record.id, version=version)
            if found and found is not True:
                side.webhooks[which] = found
            await side.settle()
            return name, _same(found), sorted(set(side.heard))

        return act

    def registry(self) -> Callable[[Any], Awaitable[Any]]:
        async def act(side: Any) -> Any:
            found, version = await side.learning.registry(DEFAULTS)
            health = await side.learning.health()
            plain = []
            for e in sorted(found, key=lambda e: e.id):
                seen = {name for name, (_, xid, _) in side.events.items() if _is_visible(xid, e.created_snapshot)}
                is_rotating = e.previous_secret_expires_at is not None
                plain.append(
                    (e.url, e.events, e.status, e.secret, e.previous_secret, is_rotating, e.ordered, sorted(seen))
                )
            known = {key: (h.failing_since, h.exhausted_at, h.last_error) for key, h in health.items()}
            return plain, version, known

        return act

    def learn(self) -> Callable[[Any], Awaitable[Any]]:
        if not self.webhooks:
            return self.create()
        which, disables = self.dice.randrange(self.webhooks), self.dice.random() < 0.3
        exhausted = self.dice.choice((None, DUE))

        async def act(side: Any) -> Any:
            key = side.keys[which]
            side.heard.clear()
            await side.learning.learn({key: "gone"} if disables else {}, [EndpointHealth(key, DUE, exhausted, "500")])
            await side.settle()
            record = await side.endpoints.get(side.account, side.webhooks[which].id)
            if record is not None:
                side.webhooks[which] = record
            return _same(record), sorted(set(side.heard))

        return act


def _is_visible(xid: int, snapshot: Any) -> bool:
    xmin, xmax, running = snapshot
    return xid < xmin or (xid < xmax and xid not in running)


def _same(record: Any) -> Any:
    """Of a webhook's record what is the same on both sides."""
    if record is None or isinstance(record, bool):
        return record
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    for name in ("id", "created_at", "updated_at", "previous_secret_expires_at"):
        fields[name] = fields[name] is None
    return fields


@dataclasses.dataclass
class Step:
    number: int
    name: str
    real: Any
    modelled: Any


@pytest.mark.parametrize("seed", range(12))
async def test_model_does_what_postgres_does(sides: tuple[Real, Modelled], seed: int) -> None:
    acts = Acts(random.Random(f"{seed}/model"))
    done: list[Step] = []
    for number in range(ACTS):
        name, act = acts.draw()
        real, modelled = [await act(side) for side in sides]
        done.append(Step(number, name, real, modelled))
        assert real == modelled, f"seed {seed}: {[step.name for step in done]}"
