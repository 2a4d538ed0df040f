"""The outbox reader: every committed event exactly once, in pages, and never asleep while there is work."""

from __future__ import annotations

import asyncio
import contextlib
import random
import types
from typing import Any

import asyncpg
import pytest
from house import House, until

from dispatcher.engine.engine import Engine
from dispatcher.engine.outbox import OutboxReader
from dispatcher.store.database import connect
from dispatcher.store.outbox import BEGINNING, NEAR_ROWS, Cursor, OutboxPages, Page
from dispatcher.telemetry import Telemetry

INSERT = "INSERT INTO dispatcher.outbox (type, data) VALUES ('test.event', '{}') RETURNING id"


class Reading:
    """A reader that stops after each page, and may be killed there."""

    def __init__(self, dsn: str, limit: int) -> None:
        self._dsn = dsn
        self._limit = limit
        self._floor = BEGINNING
        self.seen: list[str] = []
        self.connection: Any = None
        self._pages: OutboxPages
        self.cursor: Cursor

    async def open(self) -> None:
        self.connection = await connect(self._dsn, name="reader", engine=True)
        self._pages = OutboxPages(self.connection, self._floor)
        await self._pages.prepare()

    async def start(self) -> None:
        await self.open()
        row = await self.connection.fetchrow("SELECT prev, prev_at FROM dispatcher.shard")
        self.cursor = Cursor(row["prev"], row["prev_at"])

    async def anchor(self) -> None:
        """Start from here, as after a restore: whatever is visible is read, and may bear ids of another cluster."""
        now = await self.connection.fetchval("SELECT clock_timestamp()")
        self._floor = now
        self.cursor = Cursor(await self.connection.fetchval("SELECT pg_current_snapshot()"), now)
        self._pages = OutboxPages(self.connection, now)
        await self._pages.prepare()

    async def page(self) -> bool:
        """Read a page; return whether the difference ends with it."""
        page = await self._pages.read(self.cursor, self._limit)
        self.seen += [row[5] for row in page.rows]
        self.cursor = page.after
        return page.complete

    async def catch_up(self) -> None:
        while not await self.page():
            pass

    async def restart(self) -> None:
        """Go on in another process, with what the shard's row keeps of the cursor."""
        await self.connection.close()
        c = self.cursor
        self.cursor = Cursor(c.prev, c.prev_at, c.cur, None, c.at_xid, c.at_seq)
        await self.open()


@pytest.fixture
async def reading(database: str) -> Any:
    reading = Reading(database, 3)
    await reading.start()
    yield reading
    await reading.connection.close()


async def test_rolled_back_event_is_never_seen(reading: Reading, database: str) -> None:
    producer = await asyncpg.connect(database)
    transaction = producer.transaction()
    await transaction.start()
    await producer.fetchval(INSERT)
    await reading.catch_up()
    await transaction.rollback()
    kept = await producer.fetchval(INSERT)
    await reading.catch_up()
    assert reading.seen == [kept]
    await producer.close()


async def test_long_transaction_delays_nothing_and_arrives_after_its_commit(reading: Reading, database: str) -> None:
    slow, quick = await asyncpg.connect(database), await asyncpg.connect(database)
    transaction = slow.transaction()
    await transaction.start()
    late = [await slow.fetchval(INSERT) for _ in range(5)]
    for _ in range(20):
        event = await quick.fetchval(INSERT)
        await reading.catch_up()
        assert reading.seen[-1] == event
    late += [await slow.fetchval(INSERT) for _ in range(5)]
    await transaction.commit()
    await reading.catch_up()
    assert reading.seen[-10:] == late
    assert len(reading.seen) == len(set(reading.seen)) == 30
    for connection in (slow, quick):
        await connection.close()


async def test_restart_in_the_middle_of_a_difference_repeats_and_skips_nothing(reading: Reading, database: str) -> None:
    producer = await asyncpg.connect(database)
    others = [await asyncpg.connect(database) for _ in range(3)]
    open_ = [other.transaction() for other in others]
    expected = []
    for transaction, other in zip(open_, others, strict=True):
        await transaction.start()
        expected += [await other.fetchval(INSERT) for _ in range(4)]
    expected += [await producer.fetchval(INSERT) for _ in range(10)]
    assert not await reading.page()
    await open_[0].commit()
    for _ in range(3):
        await reading.restart()
        await reading.page()
    await open_[1].commit()
    await open_[2].commit()
    await reading.restart()
    await reading.catch_up()
    await reading.catch_up()
    assert sorted(reading.seen) == sorted(expected)
    for connection in (producer, *others):
        await connection.close()


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_the_interleaving_each_committed_event_is_seen_once(database: str, seed: int) -> None:
    dice = random.Random(seed)
    reading = Reading(database, dice.choice([1, 2, 5, 50]))
    await reading.start()
    producers = [await asyncpg.connect(database) for _ in range(8)]
    open_: dict[Any, tuple[Any, list[str]]] = {}
    committed: set[str] = set()
    for _ in range(250):
        producer = dice.choice(producers)
        match dice.choice(["begin", "insert", "insert", "savepoint", "end", "end", "page", "page", "restart"]):
            case "begin" if producer not in open_:
                transaction = producer.transaction(isolation=dice.choice(["read_committed", "repeatable_read"]))
                await transaction.start()
                open_[producer] = (transaction, [])
            case "insert" if producer in open_:
                open_[producer][1].extend([await producer.fetchval(INSERT) for _ in range(dice.randrange(1, 7))])
            case "insert":
                committed.add(await producer.fetchval(INSERT))
            case "savepoint" if producer in open_:
                inner = producer.transaction()
                await inner.start()
                event = await producer.fetchval(INSERT)
                if dice.random() < 0.5:
                    await inner.commit()
                    open_[producer][1].append(event)
                else:
                    await inner.rollback()
            case "end" if producer in open_:
                transaction, events = open_.pop(producer)
                if dice.random() < 0.7:
                    await transaction.commit()
                    committed.update(events)
                else:
                    await transaction.rollback()
            case "page":
                await reading.page()
            case "restart" if dice.random() < 0.3:
                await reading.restart()
        assert set(reading.seen) <= committed
    for transaction, events in open_.values():
        await transaction.commit()
        committed.update(events)
    await reading.catch_up()
    await reading.catch_up()
    assert len(reading.seen) == len(set(reading.seen))
    assert set(reading.seen) == committed
    for connection in (reading.connection, *producers):
        await connection.close()


async def restored(connection: Any, xid: int) -> None:
    """An event that a restore brought along, with the id its transaction had in another cluster."""
    await connection.execute(
        "INSERT INTO dispatcher.outbox (type, data, xid, written_at)"
        " VALUES ('test.event', '{}', $1, now() - interval '1 hour')",
        xid,
    )


async def test_restored_row_is_not_read_under_the_id_of_a_later_transaction(reading: Reading, database: str) -> None:
    slow, other = await asyncpg.connect(database), await asyncpg.connect(database)
    await reading.anchor()
    transaction = slow.transaction()
    await transaction.start()
    await restored(other, await slow.fetchval("SELECT pg_current_xact_id()"))
    for _ in range(3):
        await reading.catch_up()
    assert reading.seen == []
    late = await slow.fetchval(INSERT)
    await transaction.commit()
    await reading.catch_up()
    assert reading.seen == [late]
    for connection in (slow, other):
        await connection.close()


async def test_restored_rows_are_shown_once_at_most_under_the_id_of_a_transaction_that_was_open_at_the_start(
    reading: Reading, database: str
) -> None:
    """They look like its own from before the start: whoever reads them has to see whether they are new."""
    slow, other = await asyncpg.connect(database), await asyncpg.connect(database)
    transaction = slow.transaction()
    await transaction.start()
    for _ in range(7):  # more than two pages
        await restored(other, await slow.fetchval("SELECT pg_current_xact_id()"))
    late = await slow.fetchval(INSERT)
    await reading.anchor()
    for _ in range(5):
        await reading.catch_up()
    await transaction.commit()
    await reading.catch_up()
    assert len(reading.seen) == len(set(reading.seen))
    assert reading.seen[-1] == late
    for connection in (slow, other):
        await connection.close()


class Interrupted:
    """A connection behind each of whose statements an application commits an event."""

    def __init__(self, connection: Any, application: Any) -> None:
        self._connection, self._application = connection, application

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetchval(self, *statement: Any) -> Any:
        value = await self._connection.fetchval(*statement)
        await self._application.fetchval(INSERT)
        return value

    async def fetchrow(self, *statement: Any) -> Any:
        row = await self._connection.fetchrow(*statement)
        await self._application.fetchval(INSERT)
        return row


class Counted:
    """A prepared statement that says how often it was asked."""

    def __init__(self, statement: Any) -> None:
        self._statement = statement
        self.asked = 0

    async def fetch(self, *arguments: Any) -> Any:
        self.asked += 1
        return await self._statement.fetch(*arguments)


async def test_beside_an_open_transaction_nothing_is_read_again_and_again(database: str) -> None:
    """One scan from the oldest open one on, but only while little was read of what is younger."""
    reading = Reading(database, 500)
    await reading.start()
    pages = reading._pages
    near, far = pages._first_near, pages._first = Counted(pages._first_near), Counted(pages._first)
    pages._first_near = near
    old, young = await asyncpg.connect(database), await asyncpg.connect(database)
    insert = "INSERT INTO dispatcher.outbox (id, type, data) VALUES ($1, 'a.b', '{}')"
    await reading.catch_up()
    held = old.transaction()
    await held.start()
    await old.execute(insert, "evt_old")
    await reading.catch_up()
    ids = [f"evt_{n}" for n in range(NEAR_ROWS + 10)]
    for n, id_ in enumerate(ids):
        await young.execute(insert, id_)
        await reading.catch_up()
        assert reading.seen == ids[: n + 1]
    assert far.asked == 9, "from the first poll that would have read more than NEAR_ROWS once more"
    await held.commit()
    await reading.catch_up()
    assert reading.seen == [*ids, "evt_old"]
    asked = far.asked
    await young.execute(insert, "evt_last")
    await reading.catch_up()
    await reading.catch_up()
    assert far.asked == asked, "nothing is open any more"
    assert reading.seen[-1] == "evt_last"
    for each in (old, young, reading.connection):
        await each.close()


@pytest.mark.interpreted
async def test_what_a_restored_cursor_does_not_see_was_written_after_its_time(database: str) -> None:
    """Or it would be taken for a row that came with the restore, and lost."""
    application = await asyncpg.connect(database)
    connection = await connect(database, name="reader", engine=True)
    anything: Any = types.SimpleNamespace(match=lambda *_: [], all_since=0, version=1)
    nothing: Any = None
    nobody: Any = types.SimpleNamespace(subscribers={}, holds_all=lambda _: False)
    reader = OutboxReader(
        Interrupted(connection, application),
        deliverer=nobody,
        ledger=nothing,
        telemetry=nothing,
        load_registry=nothing,
        dice=random.Random(1),
    )
    reader.registry = anything

    async def written() -> None:
        pass

    cursor = await reader.reread(BEGINNING, written)
    unseen = "SELECT min(written_at) FROM dispatcher.outbox WHERE NOT pg_visible_in_snapshot(xid, $1)"
    since = await connection.fetchval(unseen, cursor.prev)
    assert since is not None
    assert cursor.prev_at <= since
    for each in (connection, application):
        await each.close()


async def test_no_wake_up_is_lost_with_transactions_held_open_and_no_safety_poll(house: House) -> None:
    dice = random.Random(3)
    await house.webhook()
    rounds, producers = 200, [await house.connect() for _ in range(3)]

    def no_safety_net(engine: Engine) -> None:
        engine.safety_s = (3600.0, 3600.0)

    running = await house.start(no_safety_net)
    sent = 0

    async def burst(producer: Any, isolation: str, hold_s: float, many: int) -> None:
        async with producer.transaction(isolation=isolation):
            await producer.fetchval("SELECT 1")
            await producer.execute(
                "INSERT INTO dispatcher.outbox (type, data)"
                " SELECT 'test.event', '{\"n\": 1}' FROM generate_series(1, $1::integer)", many
            )  # fmt: skip
            await asyncio.sleep(hold_s)  # the load, not a wait for a result

    for _ in range(rounds):
        many = dice.choice([1, 1, 1, 80])  # the larger ones keep the reader awake for a while
        busy = producers[: dice.randrange(1, 4)]
        sent += many * len(busy)
        await asyncio.gather(
            *(burst(p, dice.choice(["read_committed", "repeatable_read"]), dice.uniform(0.0, 0.02), many) for p in busy)
        )
        # Each round is waited for: the next one's wake-up would hide that this one's was lost.
        await until(lambda all_=sent: len(house.receiver.arrivals) == all_)
        await asyncio.sleep(dice.choice([0.0, 0.0, 0.01, 0.04]))
    running.check()
    for producer in producers:
        await producer.close()


async def test_webhook_receives_exactly_what_commits_after_its_creation(house: House) -> None:
    await house.start()
    stop = asyncio.Event()
    noise = await house.connect()

    async def make_noise() -> None:
        while not stop.is_set():
            await noise.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('noise.event', '{}')")

    busy = asyncio.create_task(make_noise())
    other = await house.connect()
    for n in range(100):
        insert = f"INSERT INTO dispatcher.outbox (type, data) VALUES ('round.r{n}', '{{\"n\": %d}}')"
        await other.execute(insert % 1)
        open_ = other.transaction()
        if n % 2:  # begun before the webhook, committed after it
            await open_.start()
            await other.execute(insert % 2)
        await house.webhook(f"/{n}", events=[f"round.r{n}"])
        if n % 2:
            await open_.commit()
        else:
            await other.execute(insert % 2)
    stop.set()
    await busy
    await until(lambda: len(house.receiver.arrivals) >= 100)
    await until(lambda: house.settled(100))
    assert sorted((int(arrival.path[1:]), arrival.n) for arrival in house.receiver.arrivals) == [
        (n, 2) for n in range(100)
    ]
    for connection in (noise, other):
        await connection.close()


async def test_reader_sees_an_event_whose_producer_role_may_read_nothing(house: House) -> None:
    await house.webhook()
    await house.start()
    async with house.app.transaction():
        await house.app.execute("SET LOCAL ROLE dispatcher_producer")
        await house.app.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('test.event', '{\"n\": 1}')")
    await until(lambda: house.settled(1))


async def test_cursor_follows_in_the_database_once_everything_before_it_is_resolved(house: House) -> None:
    await house.webhook()
    await house.start()
    await house.emit(1, 20)
    await until(lambda: house.settled(20))
    newest = await house.app.fetchval("SELECT max(xid::text::bigint) FROM dispatcher.outbox")
    await until(lambda: _passed(house, newest))


async def test_cursor_stays_behind_a_delivery_that_is_neither_settled_nor_pending(house: House) -> None:
    await house.webhook()
    running = await house.start()
    forever = asyncio.get_running_loop().create_future()
    house.receiver.answer = lambda arrival: forever if arrival.n == 1 else 200
    await house.emit(1)
    await until(lambda: house.receiver.open == 1)
    await house.emit(2, 10)
    await until(lambda: len(house.receiver.arrivals) == 10)
    await until(lambda: not running.engine.ledger.buffered)
    oldest = await house.app.fetchval("SELECT min(xid::text::bigint) FROM dispatcher.outbox")
    assert await house.app.fetchval("SELECT count(*) FROM dispatcher.pending") or not await _passed(house, oldest)
    # Two seconds on it is insured by a pending row, and lets the cursor go.
    await until(lambda: _passed(house, oldest))
    assert await house.pending() == 1
    forever.set_result(200)
    await until(lambda: house.settled(10))


async def _passed(house: House, xid: int) -> bool:
    row = await house.app.fetchrow("SELECT pg_snapshot_xmin(prev)::text::bigint AS xmin FROM dispatcher.shard")
    return bool(row["xmin"] > xid)


@pytest.mark.interpreted
async def test_to_wait_for_endpoints_is_progress_and_to_wait_for_our_own_ledger_is_none() -> None:
    """What feeds the watchdog: a ledger that writes no more must not be kept alive by the reader that waits for it."""
    turns = 0

    def is_full() -> bool:
        nonlocal turns
        turns += 1
        return True

    ledger = types.SimpleNamespace(full=True)
    deliverer = types.SimpleNamespace(spill_slow=lambda *_: None)
    nothing: Any = None
    reader = OutboxReader(
        nothing,
        deliverer=deliverer,  # type: ignore[arg-type]
        ledger=ledger,  # type: ignore[arg-type]
        telemetry=nothing,
        load_registry=nothing,
        dice=random.Random(1),
    )
    reader._is_full = is_full  # type: ignore[method-assign]
    reader.progress_at = -1.0
    waiting = asyncio.create_task(reader._room())
    await until(lambda: turns > 3)
    assert reader.progress_at == -1.0
    ledger.full = False
    await until(lambda: reader.progress_at > 0)
    reader.stopping = True
    await waiting


SMALL, LARGE = '{"n": 1}', "x" * (4 << 20)


def _page(seqs: range, *, complete: bool, data: str = SMALL) -> Page:
    rows = [(None, None, None, n, 100 + n, f"evt_{n}", "default", "test.event", data, 0, 0, None) for n in seqs]
    return Page(rows, Cursor((1, 1, ()), BEGINNING), None, complete=complete)


ALONE = ["reads", "routes", "routed"] * 3
AHEAD = ["reads", "routes", "reads", "routed", "routes", "reads", "routed", "routes", "routed"]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("newest_known", "data", "expected", "limits", "slices"),
    [
        (None, SMALL, ALONE, [16, 64, 256], [2, 7, 26]),
        (4, SMALL, ALONE, [16, 64, 256], [2, 7, 26]),
        (-1, SMALL, AHEAD, [16, 16, 64], [2, 7, 26]),
        (-1, LARGE, AHEAD, [16, 1, 1], [1, 1, 1]),
        (None, LARGE, ALONE, [16, 1, 1], [1, 1, 1]),
    ],
    ids=["first", "doubtful", "new", "large", "first and large"],
)
async def test_the_next_page_is_read_while_one_is_routed_unless_the_database_is_asked_about_it(
    *,
    newest_known: int | None,
    data: str,
    expected: list[str],
    limits: list[int],
    slices: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    asked: list[int] = []
    cut: list[int] = []
    pages = iter([_page(range(start, start + 4), complete=start == 8, data=data) for start in (0, 4, 8)])

    class Pages:
        def __init__(self, *_: Any) -> None: ...
        async def prepare(self) -> None: ...
        async def read(self, _: Cursor, limit: int) -> Page:
            said.append("reads")
            asked.append(limit)
            return next(pages)

    async def route(page: Page, _: int, slice_rows: int) -> int:
        said.append("routes")
        cut.append(slice_rows)
        await asyncio.sleep(0)
        said.append("routed")
        return len(page.rows)

    async def end(*_: Any) -> None:
        reader.stop()

    monkeypatch.setattr("dispatcher.engine.outbox.OutboxPages", Pages)
    nothing: Any = None
    telemetry: Any = types.SimpleNamespace(timed=lambda _: contextlib.nullcontext())
    reader = OutboxReader(
        nothing, deliverer=nothing, ledger=nothing, telemetry=telemetry, load_registry=nothing, dice=random.Random(1)
    )
    reader._newest_known = newest_known
    for name, instead in {"_room": lambda: asyncio.sleep(0), "_route": route, "_pace": end}.items():
        setattr(reader, name, instead)
    await reader.run(Cursor((1, 1, ()), BEGINNING))
    assert said == expected
    assert asked == limits, "a page is no larger in bytes than one may be, as far as those before it tell"
    assert cut == slices, "no turn of the loop is longer than a slice, whatever has to be asked about a page"


@pytest.mark.interpreted
async def test_between_two_slices_of_a_page_the_loop_has_a_turn() -> None:
    turns, offered = 0, []
    endpoint: Any = types.SimpleNamespace(id=1)
    subscriber: Any = types.SimpleNamespace(lane=types.SimpleNamespace(todo=(), queued=0), backlog=False)
    deliverer: Any = types.SimpleNamespace(
        subscribers={}, holds_all=lambda _: False, subscriber=lambda _: subscriber, pump=lambda: None,
        lanes=types.SimpleNamespace(queued_max=10_000, room_for_lane=1),
        offer=lambda delivery: offered.append((delivery.event.seq, turns)),
    )  # fmt: skip
    nothing: Any = None
    reader = OutboxReader(
        nothing,
        deliverer=deliverer,
        ledger=nothing,
        telemetry=Telemetry(),
        load_registry=nothing,
        dice=random.Random(1),
    )
    reader.recovering = False
    registry: Any = types.SimpleNamespace(match=lambda *_: [endpoint], all_since=0)
    reader.registry = registry

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    page = _page(range(10), complete=True)
    assert await reader._route(page, 80, 4) == 10
    counting.cancel()
    assert [seq for seq, _ in offered] == list(range(10))
    assert len({turn for _, turn in offered}) == 3
    assert reader._open[0].left == 10


@pytest.mark.interpreted
async def test_a_pause_is_heeded_in_the_middle_of_a_long_difference(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first page of a difference shows the registry's version."""
    webhook = await house.webhook()
    running = await house.start()
    await house.emit(1)
    await until(lambda: house.settled(1))
    reader, read, paused = running.engine._reader, OutboxPages.read, []
    assert reader is not None

    async def watched(self: OutboxPages, cursor: Cursor, limit: int) -> Page:
        page = await read(self, cursor, 1)
        if not page.complete:
            lane = next(iter(running.engine.deliverer.subscribers.values())).lane
            if not paused:
                await house.change(webhook, status="paused")
                await until(lambda: reader.registry_changed)
            paused.append(lane.paused)
        return page

    monkeypatch.setattr(OutboxPages, "read", watched)
    async with house.app.transaction():
        await house.emit(2, 20)
    await until(lambda: len(paused) >= 10)
    assert paused[0] is False
    assert all(paused[3:]), "the page being read, and the one read ahead of it"
