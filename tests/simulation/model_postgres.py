"""A model of PostgreSQL, as far as the dispatcher can tell: what is committed when, and who sees it.

**Faithful.** Transaction ids are given at the first write and committed in any order; `pg_current_snapshot()` has the
xmin, xmax and list of a real one, latest completed id included, and events are visible by it. A reading statement sees
what was committed at its instant. A writing one takes its row locks in order of arrival, and what it does, it does all
at once at its commit: one of the schedules READ COMMITTED allows, and the only one in which nobody sees a half. Session
locks end with the server process, which may outlive the client's connection; notifications leave at the commit; a
crash aborts what is in progress, forgets ids nobody wrote down, and what was committed asynchronously.

**Not modelled.** Planning, TOAST, roles; of partitions only that retention drops a day. Statements are known by name
(`dispatcher.store.database`), so their text may change; `test_model.py` asks this model and a real server the same
questions and compares the answers.

The tables are plain dictionaries of what is committed. `watch` hears of every commit that matters.
"""

from __future__ import annotations

import bisect
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg

from dispatcher.core.shards import shard_numbers, shard_of
from dispatcher.moments import of_datetime
from dispatcher.store.database import statements
from dispatcher.store.schema import migrations

SYSTEM: Final = "7"  # the cluster's identifier
HELD: Final = datetime.max  # noqa: DTZ901  as asyncpg spells infinity
FOREVER_AGO: Final = datetime(1, 1, 1, tzinfo=UTC)
ACCOUNT: Final = (1, "default")

Snapshot = tuple[int, int, tuple[int, ...]]
Key = tuple[int, int, int]


class Record(tuple[Any, ...]):
    """A row with names, as asyncpg's."""

    names: tuple[str, ...]

    def __new__(cls, **columns: Any) -> Record:
        made = super().__new__(cls, columns.values())
        made.names = tuple(columns)
        return made

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self.names.index(key) if isinstance(key, str) else key)

    def keys(self) -> tuple[str, ...]:
        return self.names


class Event:
    """A row of the outbox."""

    __slots__ = ("account", "created_at", "data", "id", "seq", "type", "written_at", "xid")

    def __init__(self, seq: int, xid: int, written_at: datetime, *, name: str, kind: str, data: str) -> None:
        self.seq = seq
        self.xid = xid
        self.written_at = written_at
        self.created_at: datetime | None = written_at
        self.id = name
        self.account = ACCOUNT[1]
        self.type = kind
        self.data = data

    @property
    def columns(self) -> tuple[Any, ...]:
        times = (self.created_us, of_datetime(self.written_at))
        return (self.seq, self.xid, self.id, self.account, self.type, self.data, *times, None)

    @property
    def created_us(self) -> int | None:
        return None if self.created_at is None else of_datetime(self.created_at)


class Transaction:
    """One in progress: what it will have done, and whom it will have told."""

    __slots__ = ("acts", "backend", "done", "events", "locks", "notes", "server", "xid")

    def __init__(self, server: ModelPostgres, backend: Backend | None) -> None:
        self.server = server
        self.backend = backend
        self.xid = 0
        self.events: list[Event] = []
        self.acts: list[Callable[[], Any]] = []
        self.notes: dict[tuple[str, str], None] = {}
        self.locks: list[str] = []
        self.done = False

    def number(self) -> int:
        """Its id, given at the first write."""
        if not self.xid:
            self.xid = self.server.next_xid
            self.server.next_xid += 1
            self.server.running[self.xid] = self
        return self.xid

    def emit(self, kind: str, data: str, name: str | None = None) -> Event:
        """INSERT INTO dispatcher.outbox, its trigger included."""
        server = self.server
        xid = self.number()
        seq = server.next_seq()
        event = Event(seq, xid, server.clock(), name=name or f"evt_{seq:05d}", kind=kind, data=data)
        self.events.append(event)
        self.wake()
        return event

    def wake(self) -> None:
        """The trigger: whoever cannot have the exclusive lock tells the sleepers."""
        if self.server.sleepers.total() or self.server.collides():
            self.notes["dispatcher_wake", ""] = None

    def commit(self) -> list[Any]:
        """Everything happens now."""
        assert not self.done
        self.done = True
        results = [act() for act in self.acts]
        self.server.committed(self)
        return results

    def abort(self) -> None:
        """Nothing happens."""
        if not self.done:
            self.done = True
            self.server.ended(self)


class Backend:
    """A server process: its session locks and the channels it listens on."""

    def __init__(self, server: ModelPostgres, name: str, deliver: Callable[[str, str], None]) -> None:
        self.server = server
        self.name = name
        self.deliver = deliver
        self.channels: dict[str, None] = {}
        self.leases: dict[int, None] = {}
        self.alive = True
        self.spoke_at = server.clock()  # when its last statement ended
        self.membership = 0  # of a fleet
        self.member = 0  # whose leases it holds
        self.transaction: Transaction | None = None
        self.asynchronous = False  # synchronous_commit = off
        self.on_end: Callable[[], None] = lambda: None
        self.owner: object = None  # whose client it serves, for whoever watches

    def __repr__(self) -> str:
        return f"<Backend {self.name}>"

    def end(self) -> None:
        """Exit: abort, let go of every lock."""
        if not self.alive:
            return
        self.alive = False
        server = self.server
        if self.transaction is not None:
            self.transaction.abort()
            self.transaction = None
        self.let_go()
        del server.backends[self]
        self.on_end()

    def let_go(self) -> None:
        """Every advisory lock of the session."""
        self.server.sleepers.pop(self, None)
        self.membership = 0
        for lease in self.leases:
            del self.server.leases[lease]
        self.leases.clear()


class Watch:
    """Hears what happens; the judge of a simulation is one."""

    def committed(self, transaction: Transaction) -> None:
        """A transaction with events has committed."""

    def registry_changed(self) -> None:
        """A webhook has changed."""

    def flushed(
        self, backend: Backend | None, shard: int, epoch: int, rows: dict[str, list[tuple[Any, ...]]], moved: bool
    ) -> None:
        """A flush has committed."""

    def taken_over(self, backend: Backend | None, shard: int, epoch: int) -> None:
        """The epoch of a shard was raised."""

    def rolled_back(self) -> None:
        """A crash has undone what was committed asynchronously."""

    def dropped(self, seqs: set[int]) -> None:
        """Retention has dropped these events."""

    def queued(self, keys: list[Key]) -> None:
        """A replay's step has committed."""

    def told_registry(self, backend: Backend | None, shard: int, version: int) -> None:
        """Somebody has read a shard's part of the registry."""


class ModelPostgres:
    """One database."""

    def __init__(self, clock: Callable[[], datetime], shards: int = 1) -> None:
        self.clock = clock
        self.watch = Watch()
        self.collides: Callable[[], bool] = lambda: False  # another producer holds the probe's lock this instant
        self.next_xid = 750
        self.latest_completed = 749
        self.running: dict[int, Transaction] = {}  # by id, ascending
        self.seq = 0
        self.generation = 0
        self.backends: dict[Backend, None] = {}
        self.leases: dict[int, Backend] = {}
        self.sleepers: Counter[Backend] = Counter()
        self._durable_xid = self._unsaved_xid = 749  # the newest on record; of those committed asynchronously
        self._locks: dict[str, deque[tuple[Transaction, Callable[[], None]]]] = {}
        # tables
        self.events: list[tuple[int, int, Event]] = []  # by (xid, seq)
        self.event_by_seq: dict[int, Event] = {}  # those that retention dropped, too
        self.dropped: set[int] = set()
        self.endpoints: dict[int, dict[str, Any]] = {}
        self.endpoint_ids = 0
        self.health: dict[int, tuple[Any, ...]] = {}
        self.registry_version = 1
        self.shards: dict[int, dict[str, Any]] = {
            number: {
                "epoch": 0, "batch": 0, "prev": self.snapshot(), "prev_at": clock(), "cur": None, "at_xid": 0,
                "at_seq": 0, "system": SYSTEM, "floor": datetime(2000, 1, 1, tzinfo=UTC), "shards": shards,
            }
            for number in shard_numbers(shards)
        }  # fmt: skip
        self.attempts: list[tuple[Any, ...]] = []  # (at, seq, xid, endpoint, generation, attempt, state, …)
        self._attempted: dict[tuple[int, int], datetime] = {}  # (endpoint, seq) of generation 0 -> at
        self.pending: dict[
            Key, tuple[Any, ...]
        ] = {}  # (endpoint, seq, generation, xid, at, state, attempts, due, error)
        self._held: dict[int, list[tuple[int, int]]] = {}  # endpoint -> (seq, generation), sorted
        self.discarded_events: dict[int, str] = {}
        self.replays: dict[str, dict[str, Any]] = {}
        self._unsaved: list[Callable[[], None]] = []  # undoes what was committed asynchronously, the last one last

    # ── transactions ───────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, backend: Backend | None = None) -> Transaction:
        return Transaction(self, backend)

    def shard_of(self, endpoint: int) -> int:
        """dispatcher.shard_of()."""
        return shard_of(endpoint, len(self.shards))

    def snapshot(self) -> Snapshot:
        """pg_current_snapshot()."""
        xmax = self.latest_completed + 1
        running = tuple(xid for xid in self.running if xid < xmax)
        return (running[0] if running else xmax, xmax, running)

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq

    def committed(self, transaction: Transaction) -> None:
        for event in transaction.events:
            bisect.insort(self.events, (event.xid, event.seq, event))
            self.event_by_seq[event.seq] = event
        self.ended(transaction)
        if transaction.events:
            self.saved(transaction, None)
            self.watch.committed(transaction)
        for channel, payload in transaction.notes:
            self.notify(channel, payload)

    def notify(self, channel: str, payload: str) -> None:
        for backend in self.backends:
            if channel in backend.channels:
                backend.deliver(channel, payload)

    def ended(self, transaction: Transaction) -> None:
        if transaction.xid:
            self.running.pop(transaction.xid, None)
            self.latest_completed = max(self.latest_completed, transaction.xid)
        for name in transaction.locks:
            self._release(name, transaction)

    def lock(self, transaction: Transaction, name: str, then: Callable[[], None]) -> None:
        """Take a row's lock, in order of arrival; `then` is called with it held."""
        queue = self._locks.setdefault(name, deque())
        queue.append((transaction, then))
        transaction.locks.append(name)
        if len(queue) == 1:
            then()

    def is_locked(self, name: str) -> bool:
        """Whether SKIP LOCKED would skip it."""
        return bool(self._locks.get(name))

    def _release(self, name: str, transaction: Transaction) -> None:
        queue = self._locks[name]
        was_first = queue[0][0] is transaction
        for entry in queue:
            if entry[0] is transaction:
                queue.remove(entry)
                break
        if was_first and queue:
            queue[0][1]()

    def crash(self, *, reuse_ids: bool, lose_unsaved: bool) -> None:
        """Immediate stop and recovery: every session ends, ids that nobody wrote down are given again."""
        for backend in list(self.backends):
            backend.end()
        for transaction in list(self.running.values()):
            transaction.abort()
        if not lose_unsaved:
            self.save()
        elif self._unsaved:
            for undo in reversed(self._unsaved):
                undo()
            self._unsaved.clear()
            self.watch.rolled_back()
        if reuse_ids:
            self.next_xid = self._durable_xid + 1
        self.latest_completed = self.next_xid - 1

    def saved(self, transaction: Transaction, undo: Callable[[], None] | None) -> None:
        """A transaction with effects is committed: on record, unless it was asynchronous, and with all before it."""
        if undo is None:
            self.save()  # what was written before is on record with it
            self._durable_xid = max(self._durable_xid, transaction.xid)
        else:
            self._unsaved.append(undo)
            self._unsaved_xid = transaction.xid

    def save(self) -> None:
        """The WAL writer came by."""
        self._unsaved.clear()
        self._durable_xid = max(self._durable_xid, self._unsaved_xid)

    # ── tables ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def put_pending(self, row: tuple[Any, ...]) -> None:
        """INSERT … ON CONFLICT DO UPDATE, as the flush writes it."""
        key = (row[0], row[1], row[2])
        old = self.pending.get(key)
        if old is not None:
            row = (*key, old[3], old[4], row[5], row[6], row[7], old[8] if row[8] is None else row[8])
        self._unhold(key, old)
        self.pending[key] = row
        if row[7] is HELD:
            bisect.insort(self._held.setdefault(key[0], []), key[1:])

    def drop_pending(self, key: Key) -> None:
        self._unhold(key, self.pending.pop(key, None))

    def _unhold(self, key: Key, old: tuple[Any, ...] | None) -> None:
        if old is not None and old[7] is HELD:
            held = self._held[key[0]]
            del held[bisect.bisect_left(held, key[1:])]
            if not held:
                del self._held[key[0]]

    def visible(self, xid: int, snapshot: Snapshot) -> bool:
        """pg_visible_in_snapshot() for a transaction that committed."""
        xmin, xmax, running = snapshot
        return xid < xmin or (xid < xmax and xid not in running)

    def drop(self, transaction: Transaction, events: Sequence[Event]) -> None:
        """Retention: these are old enough."""
        gone = {event.seq for event in events}
        self.events = [entry for entry in self.events if entry[1] not in gone]
        self.dropped |= gone
        self.saved(transaction, None)
        self.watch.dropped(gone)

    def change_registry(self, transaction: Transaction) -> None:
        """The trigger on the table of webhooks, which fires for a statement that changed nothing, too."""
        self.registry_version += 1
        transaction.notes["dispatcher_registry", ""] = None
        self.watch.registry_changed()


# ── statements ─────────────────────────────────────────────────────────────────────────────────────────────────────
# A reading one is `act(server, backend, *arguments)` and returns its rows. A writing one also takes its transaction, is
# called when that has its locks and commits, and names them.

Act = Callable[..., list[Any]]


class Statement:
    """How one named statement of ours behaves."""

    __slots__ = ("act", "locks", "name", "prepare", "writes")

    def __init__(
        self, name: str, act: Act, *, writes: bool, locks: Sequence[str] = (), prepare: Callable[..., Any] | None = None
    ) -> None:
        self.name = name
        self.act = act
        self.writes = writes
        self.locks = locks
        self.prepare = prepare  # called as the statement begins: what it takes along to its commit


_BY_NAME: dict[tuple[str, str], Statement] = {}


def _reads(file: str, *names: str) -> Callable[[Act], Act]:
    def note(act: Act) -> Act:
        for name in names:
            _BY_NAME[file, name] = Statement(name, act, writes=False)
        return act

    return note


def _writes(
    file: str, *names: str, locks: Sequence[str] = (), prepare: Callable[..., Any] | None = None
) -> Callable[[Act], Act]:
    def note(act: Act) -> Act:
        for name in names:
            _BY_NAME[file, name] = Statement(name, act, writes=True, locks=locks, prepare=prepare)
        return act

    return note


def statement_of(sql: str) -> Statement:
    """The model of a statement, by its text."""
    known = _by_text()
    found = known.get(sql)
    if found is None and sql.startswith(("SET ", "RESET ", "LOCK TABLE ", "DROP TABLE ")):
        return _NOTHING
    if found is None and (leaf := re.search(r'dispatcher\."outbox_(\d{8})"', sql)):
        return _of_leaf(sql, datetime.strptime(leaf[1], "%Y%m%d").replace(tzinfo=UTC))
    assert found is not None, f"the model does not know this statement: {sql:.300}"
    return found


_TEXTS: dict[str, Statement] = {}


def _by_text() -> dict[str, Statement]:
    if not _TEXTS:
        for (file, name), statement in _BY_NAME.items():
            _TEXTS[statements(file)[name] if file else name] = statement
    return _TEXTS


_NOTHING: Final = Statement("set", lambda server, backend, *_: ["SET"], writes=False)


def _of_leaf(sql: str, day: datetime) -> Statement:
    """TRUNCATE of one day of the outbox, or the question whether all of it is read."""

    def rows(server: ModelPostgres) -> list[Event]:
        return [event for _, _, event in server.events if event.written_at.date() == day.date()]

    def is_unread(server: ModelPostgres, backend: Backend) -> list[Any]:
        unread = [
            event for event in rows(server) for shard in server.shards.values()
            if event.written_at >= shard["floor"] and not server.visible(event.xid, shard["prev"])
        ]  # fmt: skip
        return [(bool(unread),)]

    def truncate(server: ModelPostgres, backend: Backend) -> list[Any]:
        transaction = _block(backend)
        transaction.number()
        transaction.acts.append(lambda: server.drop(transaction, rows(server)))
        return ["TRUNCATE TABLE"]

    return Statement("leaf", truncate if sql.startswith("TRUNCATE") else is_unread, writes=False)


# -- the schema


@_reads("", "SELECT to_regclass('dispatcher.migration')")
def _regclass(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [("dispatcher.migration",)]


@_reads("schema", "migrations")
def _migrations(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [
        Record(version=each.version, checksum=checksum, oldest=each.oldest, program="1.0")
        for each, checksum in _checksums()
    ]


def _checksums(known: list[Any] = []) -> list[Any]:  # noqa: B006
    if not known:
        known += [(each, each.checksum) for each in migrations()]
    return known


# -- the outbox


def _difference(
    server: ModelPostgres, running: Sequence[int], xmax: int, at: tuple[int, int], since: tuple[datetime, datetime]
) -> Iterator[Event]:
    """What is behind the cursor, in the order of the page."""
    events = server.events
    for xid in running:
        place = bisect.bisect_left(events, (xid, at[1] + 1 if xid == at[0] else 0))
        while place < len(events) and events[place][0] == xid:
            if events[place][2].written_at >= since[0]:
                yield events[place][2]
            place += 1
    place = max(bisect.bisect_left(events, (at[0], at[1] + 1)), bisect.bisect_left(events, (xmax, 0)))
    for _, _, event in events[place:]:
        if event.written_at >= since[1]:
            yield event


@_reads("outbox", "first_page")
def _first_page(server: ModelPostgres, backend: Backend, *bounds: Any) -> list[Any]:
    running, xmax, at_xid, at_seq, since_running, since, limit = bounds
    header = (server.snapshot(), server.clock(), server.registry_version, *(None,) * 9)
    found = _difference(server, running, xmax, (at_xid, at_seq), (since_running, since))
    return [header, *((None, None, None, *event.columns) for event, _ in zip(found, range(limit), strict=False))]


@_reads("outbox", "first_page_near")
def _first_page_near(server: ModelPostgres, backend: Backend, *bounds: Any) -> list[Any]:
    prev, oldest, since, limit = bounds
    header = (server.snapshot(), server.clock(), server.registry_version, *(None,) * 9)
    found = _difference(server, (), oldest, (0, 0), (since, since))
    unread = (event for event in found if not server.visible(event.xid, prev))
    return [header, *((None, None, None, *event.columns) for event, _ in zip(unread, range(limit), strict=False))]


@_reads("outbox", "next_page")
def _next_page(server: ModelPostgres, backend: Backend, *bounds: Any) -> list[Any]:
    running, xmax, at_xid, at_seq, since_running, since, limit, cur = bounds
    found = _difference(server, running, xmax, (at_xid, at_seq), (since_running, since))
    seen = (event for event in found if server.visible(event.xid, cur))
    return [(None, None, None, *event.columns) for event, _ in zip(seen, range(limit), strict=False)]


@_reads("outbox", "newest_known")
def _newest_known(server: ModelPostgres, backend: Backend) -> list[Any]:
    newest = max((row[1] for row in server.attempts), default=0)
    return [(max(newest, max((key[1] for key in server.pending), default=0)),)]


@_reads("outbox", "known")
def _known(
    server: ModelPostgres, backend: Backend, endpoints: Sequence[int], seqs: Sequence[int], since: datetime
) -> list[Any]:
    return [
        (endpoint, seq)
        for endpoint, seq in zip(endpoints, seqs, strict=True)
        if (endpoint, seq, 0) in server.pending or server._attempted.get((endpoint, seq), FOREVER_AGO) >= since
    ]


# -- the shard


@_reads("shard", "identity")
def _identity(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [Record(system=SYSTEM, standby=False)]


@_reads("shard", "try_lease")
def _try_lease(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    holder = server.leases.setdefault(shard, backend)
    if holder is backend:
        backend.leases[shard] = None
    return [(holder is backend,)]


@_writes("shard", "take_over", locks=("shard",))
def _take_over(server: ModelPostgres, transaction: Transaction, shard: int) -> list[Any]:
    row = server.shards[shard]
    row["epoch"] += 1
    server.saved(transaction, None)
    server.watch.taken_over(transaction.backend, shard, row["epoch"])
    return [(row["epoch"],)]


@_reads("shard", "cursor")
def _cursor(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    return [Record(**server.shards[shard], is_ahead=False)]


@_reads("shard", "fall_asleep")
def _fall_asleep(server: ModelPostgres, backend: Backend) -> list[Any]:
    if server.collides():
        return [(False,)]
    server.sleepers[backend] += 1
    return [(True,)]


@_reads("shard", "wake_up")
def _wake_up(server: ModelPostgres, backend: Backend) -> list[Any]:
    had = server.sleepers[backend] > 0
    server.sleepers[backend] -= had
    return [(had,)]


@_writes("shard", "own_xid")
def _own_xid(server: ModelPostgres, transaction: Transaction) -> list[Any]:
    return [(transaction.number(),)]


@_reads("shard", "gauges")
def _gauges(server: ModelPostgres, backend: Backend) -> list[Any]:
    oldest = min(server.pending, key=lambda key: key[1], default=None)
    return [(max(server.seq, 1), None if oldest is None else server.pending[oldest][4], 1, 0)]


@_reads("shard", "partitions_until")
def _partitions_until(server: ModelPostgres, backend: Backend) -> list[Any]:
    return []


@_reads("shard", "heartbeat")
def _heartbeat(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return ["INSERT 0 1"]


@_reads("shard", "forget_instances")
def _forget_instances(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return ["DELETE 1"]


@_reads("shard", "instances")
def _instances(server: ModelPostgres, backend: Backend) -> list[Any]:
    return []


@_reads("fleet", "join")
def _join(server: ModelPostgres, backend: Backend, member: int) -> list[Any]:
    backend.membership = member
    return [(True,)]


@_reads("fleet", "call")
def _call(server: ModelPostgres, backend: Backend) -> list[Any]:
    server.notify("dispatcher_fleet", "")
    return [("",)]


@_reads("fleet", "view")
def _view(server: ModelPostgres, backend: Backend, silent: timedelta) -> list[Any]:
    since = server.clock() - silent
    rows = [("shards", len(server.shards), None)]
    rows += [
        ("member", each.membership, None) for each in server.backends if each.membership and each.spoke_at >= since
    ]
    rows += [("lease", n, each.member) for n, each in server.leases.items() if each.spoke_at >= since]
    return [Record(what=what, key=key, member=member) for what, key, member in rows]


@_reads("fleet", "sign")
def _sign(server: ModelPostgres, backend: Backend, member: int) -> list[Any]:
    backend.member = member
    return [(True,)]


@_reads("fleet", "part")
def _part(server: ModelPostgres, backend: Backend) -> list[Any]:
    backend.let_go()
    server.notify("dispatcher_fleet", "")
    return [(None, None)]


@_reads("fleet", "renew")
def _renew(server: ModelPostgres, backend: Backend) -> list[Any]:
    return []


@_reads("fleet", "evict")
def _evict(server: ModelPostgres, backend: Backend, shard: int, silent: timedelta) -> list[Any]:
    holder = server.leases.get(shard)
    if holder is None or holder.spoke_at >= server.clock() - silent:
        return [(0,)]
    holder.end()
    return [(1,)]


@_writes("shard", "flush", locks=("shard",))
def _flush(server: ModelPostgres, transaction: Transaction, *arguments: Any) -> list[Any]:
    number, epoch, batch, prev, prev_at, cur, at_xid, at_seq = arguments[:8]
    shard = server.shards[number]
    if epoch != shard["epoch"]:
        fenced = asyncpg.PostgresError(f"fenced: epoch {epoch} of shard {number} is over")
        fenced.sqlstate = "P0F01"
        raise fenced
    if batch <= shard["batch"]:
        return [(False,)]
    backend = transaction.backend
    undo = _undo(server) if backend is not None and backend.asynchronous else None
    shard["batch"] = batch
    if prev is not None:
        shard.update(prev=prev, prev_at=prev_at, cur=cur, at_xid=at_xid, at_seq=at_seq)
    rows = {
        "attempts": list(zip(*_whole(arguments[8:20], arguments[34]), strict=True)),
        "pending": list(zip(*_whole(arguments[20:29], arguments[35]), strict=True)),
        "settled": list(zip(*arguments[29:32], strict=True)),
        "discarded": list(zip(*arguments[32:34], strict=True)),
    }
    now = server.clock()
    for row in rows["attempts"]:
        server.attempts.append((now, *row))
        if row[3] == 0:
            server._attempted[row[2], row[0]] = now
    for row in rows["pending"]:
        server.put_pending(row)
    for key in rows["settled"]:
        server.drop_pending(key)
    for seq, reason in rows["discarded"]:
        server.discarded_events.setdefault(seq, reason)
    server.saved(transaction, undo)
    server.watch.flushed(backend, number, epoch, rows, prev is not None)
    return [(True,)]


def _whole(columns: Sequence[Sequence[Any]], alike: Sequence[int]) -> list[Sequence[Any]]:
    """Columns as the statement makes them: behind the key, the first element may stand for many rows."""
    key, *rest = columns
    return [
        key,
        *([*column[:1] * run, *column[1:]] if run > 1 else column for column, run in zip(rest, alike, strict=True)),
    ]


def _undo(server: ModelPostgres) -> Callable[[], None]:
    shards = {number: dict(row) for number, row in server.shards.items()}
    pending, attempts = dict(server.pending), len(server.attempts)
    held = {endpoint: list(places) for endpoint, places in server._held.items()}
    attempted, discarded = dict(server._attempted), dict(server.discarded_events)

    def undo() -> None:
        server.shards, server.pending, server._held = shards, pending, held
        server._attempted, server.discarded_events = attempted, discarded
        del server.attempts[attempts:]

    return undo


# -- pending rows


@_reads("pending", "refill")
def _refill(server: ModelPostgres, backend: Backend, *bounds: Any) -> list[Any]:
    shard, start, end, limit = bounds
    due = [
        (*key, row[7])
        for key, row in server.pending.items()
        if row[7] is not HELD and start <= row[7] < end and server.shard_of(key[0]) == shard
    ]
    return sorted(due, key=lambda row: row[3])[:limit]


def _with_event(server: ModelPostgres, row: tuple[Any, ...]) -> tuple[Any, ...]:
    endpoint, seq, generation, xid, at, state, attempts, due, _ = row
    event = server.event_by_seq.get(seq)
    if event is None or seq in server.dropped or event.xid != xid or event.written_at != at:
        found: tuple[Any, ...] = (None,) * 6
    else:
        found = (event.id, event.account, event.type, event.data, event.created_us, None)
    return (endpoint, seq, generation, attempts, due, state, xid, of_datetime(at), *found)


@_reads("pending", "fetch")
def _fetch(server: ModelPostgres, backend: Backend, *columns: Sequence[int]) -> list[Any]:
    rows = [server.pending.get(key) for key in zip(*columns, strict=True)]  # type: ignore[call-overload]
    return [_with_event(server, row) for row in rows if row is not None and row[7] is not HELD]


@_reads("pending", "pull")
def _pull(server: ModelPostgres, backend: Backend, *columns: Sequence[int]) -> list[Any]:
    found: list[Any] = []
    for endpoint, seq, generation, most in zip(*columns, strict=True):
        held = server._held.get(endpoint, [])
        place = bisect.bisect_right(held, (seq, generation))
        found += [_with_event(server, server.pending[endpoint, *key]) for key in held[place : place + most]]
    return found


@_reads("pending", "held_endpoints")
def _held_endpoints(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    return [(endpoint,) for endpoint in sorted(server._held) if server.shard_of(endpoint) == shard]


@_reads("pending", "heads")
def _heads(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    heads: dict[int, Key] = {}
    for key, row in server.pending.items():
        webhook = server.endpoints.get(key[0])
        if webhook is not None and webhook["shard"] == shard and webhook["ordered"] and row[7] is not HELD:
            heads[key[0]] = min(key, heads.get(key[0], key))
    return [heads[endpoint] for endpoint in sorted(heads)]


@_writes("delivery", "redeliver", locks=("generation",))
def _redeliver(server: ModelPostgres, transaction: Transaction, endpoint: int, seq: int, xid: int) -> list[Any]:
    webhook, event = server.endpoints.get(endpoint), server.event_by_seq.get(seq)
    is_there = event is not None and event.xid == xid and seq not in server.dropped
    if webhook is None or webhook["status"] == "disabled" or event is None or not is_there:
        return []
    transaction.number()
    server.generation += 1
    key = (endpoint, seq, server.generation)
    server.put_pending((*key, xid, event.written_at, "pending", 0, HELD, None))
    transaction.notes["dispatcher_pending", f"{endpoint} {server.registry_version}"] = None
    server.saved(transaction, None)
    return [Record(generation=server.generation, pg_notify="")]


# -- transactions of more than one statement, which are those of replays


@_reads("", "BEGIN")
def _begin(server: ModelPostgres, backend: Backend) -> list[Any]:
    backend.transaction = server.begin(backend)
    return ["BEGIN"]


@_reads("", "COMMIT")
def _commit(server: ModelPostgres, backend: Backend) -> list[Any]:
    transaction, backend.transaction = _block(backend), None
    transaction.commit()
    return ["COMMIT"]


@_reads("", "ROLLBACK")
def _rollback(server: ModelPostgres, backend: Backend) -> list[Any]:
    transaction, backend.transaction = _block(backend), None
    transaction.abort()
    return ["ROLLBACK"]


def _block(backend: Backend) -> Transaction:
    assert backend.transaction is not None
    return backend.transaction


@_writes("replay", "create", locks=("replay",))
def _begin_replay(server: ModelPostgres, transaction: Transaction, *columns: Any) -> list[Any]:
    job_id, endpoint, selection, types, since, until, most = columns
    webhook = server.endpoints.get(endpoint)
    running = [job for job in server.replays.values() if job["endpoint_id"] == endpoint and job["status"] == "running"]
    if webhook is None or webhook["status"] == "disabled" or len(running) >= most:
        return []
    transaction.number()
    server.generation += 1
    job = server.replays[job_id] = {
        "id": job_id, "endpoint_id": endpoint, "generation": server.generation, "selection": selection, "types": types,
        "since": since, "until": until, "status": "running", "reason": None, "reached_at": None, "first_seq": None,
        "reached_seq": None, "newest_seq": None, "looked": 0, "queued": 0, "created_at": server.clock(),
        "finished_at": None, "after_id": "",
    }  # fmt: skip
    transaction.notes["dispatcher_pending", "replay"] = None
    server.saved(transaction, None)
    return [Record(**job)]


@_reads("replay", "running")
def _replays(server: ModelPostgres, backend: Backend, most: int) -> list[Any]:
    return [Record(id=key) for key, job in server.replays.items() if job["status"] == "running"][:most]


@_reads("replay", "begin")
def _begin_step(server: ModelPostgres, backend: Backend, job_id: str, most: int) -> list[Any]:
    job, name = server.replays.get(job_id), f"replay {job_id}"
    if job is None or job["status"] != "running" or server.is_locked(name):
        return []
    server.lock(_block(backend), name, lambda: None)
    webhook = server.endpoints[job["endpoint_id"]]
    return [
        Record(
            **job, endpoint_status=webhook["status"], shard=webhook["shard"], events=webhook["events"],
            created_snapshot=webhook["created_snapshot"], account=ACCOUNT[1],
            held=min(most, len(server._held.get(webhook["id"], ()))),
        )
    ]  # fmt: skip


@_reads("replay", "look")
def _look(server: ModelPostgres, backend: Backend, *bounds: Any) -> list[Any]:
    account, after_id, since, until, limit, endpoint, filters, types, born, passed, first_day, end_day = bounds
    behind = sorted(
        (
            event
            for _, _, event in server.events
            if event.account == account and event.id > after_id and first_day <= event.written_at < end_day
        ),
        key=lambda event: event.id,
    )
    rows = []
    for place, event in enumerate(behind[:passed], 1):
        is_within = since <= event.written_at < until
        if not is_within and place != passed:
            continue
        ends = [row[6] for row in server.attempts if row[1] == event.seq and row[3] == endpoint]
        rows.append(
            Record(
                id=event.id, seq=event.seq, xid=event.xid, written_at=event.written_at,
                place=place, is_within=is_within,
                is_wanted=is_within and _wants(filters, event.type) and (types is None or _wants(types, event.type)),
                best=max(({"delivered": 3, "retrying": 1}.get(end, 2) for end in ends), default=None),
                waits=any(key[:2] == (endpoint, event.seq) for key in server.pending) or None,
                is_refused=event.seq in server.discarded_events or None,
                is_older=server.visible(event.xid, born),
            )
        )  # fmt: skip
    return rows[:limit]


def _wants(filters: Sequence[str], kind: str) -> bool:
    return any(f in {"*", kind} or (f.endswith(".*") and kind.startswith(f[:-1])) for f in filters)


@_reads("replay", "queue")
def _queue(
    server: ModelPostgres, backend: Backend, endpoint: int, generation: int, shard: int, *columns: Any
) -> list[Any]:
    transaction = _block(backend)
    transaction.number()
    rows = [(endpoint, seq, generation, xid, at) for seq, xid, at in zip(*columns, strict=True)]
    rows = [row for row in rows if row[:3] not in server.pending]

    def queue() -> None:
        for row in rows:
            server.put_pending((*row, "pending", 0, HELD, None))
        server.saved(transaction, None)
        server.watch.queued([row[:3] for row in rows])

    transaction.acts.append(queue)
    transaction.notes["dispatcher_pending", f"{endpoint} {server.registry_version}"] = None
    return [(len(rows), "")]


@_reads("replay", "advance")
def _advance(server: ModelPostgres, backend: Backend, *columns: Any) -> list[Any]:
    job_id, after_id, reached_at, looked, queued, status, _, _ = columns

    def advance() -> None:
        job = server.replays.get(job_id)
        if job is not None:
            job.update(
                after_id=after_id, reached_at=reached_at or job["reached_at"], looked=job["looked"] + looked,
                queued=job["queued"] + queued, status=status,
            )  # fmt: skip
        server.saved(transaction, None)

    transaction = _block(backend)
    transaction.number()
    transaction.acts.append(advance)
    return ["UPDATE 1"]


@_reads("replay", "cancel")
def _cancel(server: ModelPostgres, backend: Backend, job_id: str, reason: str) -> list[Any]:
    def cancel() -> None:
        if job_id in server.replays:
            server.replays[job_id].update(status="cancelled", reason=reason)
        server.saved(transaction, None)

    transaction = _block(backend)
    transaction.number()
    transaction.acts.append(cancel)
    return ["UPDATE 1"]


# -- webhooks

_DEFAULTS: Final = {
    "shard": 0, "status": "active", "disabled_reason": None, "previous_secret": None,
    "previous_secret_expires_at": None, "version": 1,
}  # fmt: skip


@_reads("endpoint", "registry")
def _registry(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    version = server.registry_version
    server.watch.told_registry(backend, shard, version)
    rows = [row for row in server.endpoints.values() if row["shard"] == shard]
    return [Record(registry_version=version, account=ACCOUNT[1], **row) for row in rows] or [
        Record(registry_version=version, id=None)
    ]


@_reads("endpoint", "health")
def _health(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [(endpoint, *row) for endpoint, row in server.health.items()]


def _tell(transaction: Transaction, kind: str, endpoint: dict[str, Any], reason: str | None) -> None:
    transaction.emit(kind, json.dumps({"webhook_id": endpoint["public_id"], "url": endpoint["url"], "reason": reason}))


@_writes("endpoint", "learn", locks=("health",))
def _learn(server: ModelPostgres, transaction: Transaction, *columns: Sequence[Any]) -> list[Any]:
    transaction.number()
    transaction.wake()
    for endpoint_id, since, exhausted, error in zip(*columns, strict=True):
        endpoint = server.endpoints.get(endpoint_id)
        if endpoint is None:
            continue
        before = server.health.get(endpoint_id)
        server.health[endpoint_id] = (since, exhausted, error)
        if exhausted is not None and (before is None or before[1] is None):
            _tell(transaction, "webhook.failing", endpoint, error)
    server.saved(transaction, None)
    return [f"INSERT 0 {len(transaction.events)}"]


@_writes("endpoint", "disable", locks=("registry",))
def _disable(server: ModelPostgres, transaction: Transaction, ids: Sequence[int], reasons: Sequence[str]) -> list[Any]:
    transaction.number()
    transaction.wake()
    for endpoint_id, reason in zip(ids, reasons, strict=True):
        endpoint = server.endpoints.get(endpoint_id)
        if endpoint is not None and endpoint["status"] != "disabled":
            _change(server, endpoint, status="disabled", disabled_reason=reason)
            _tell(transaction, "webhook.disabled", endpoint, reason)
    server.change_registry(transaction)
    server.saved(transaction, None)
    return [f"INSERT 0 {len(transaction.events)}"]


def _change(server: ModelPostgres, endpoint: dict[str, Any], **columns: Any) -> None:
    server.endpoints[endpoint["id"]] = {
        **endpoint, **columns, "version": endpoint["version"] + 1, "updated_at": server.clock(),
    }  # fmt: skip


def _born(server: ModelPostgres) -> Snapshot:
    return server.snapshot()


@_writes("endpoint", "create", locks=("registry",), prepare=_born)
def _create(server: ModelPostgres, transaction: Transaction, born: Snapshot, *columns: Any) -> list[Any]:
    names = (
        "public_id", "account_id", "url", "description", "events", "secret", "headers", "body_style", "retry",
        "max_concurrency", "rate_limit", "ordered", "timeout_s",
    )  # fmt: skip
    transaction.number()
    server.endpoint_ids += 1
    now = server.clock()
    made = {"id": server.endpoint_ids, **_DEFAULTS, **dict(zip(names, columns, strict=True))}
    made["shard"] = server.shard_of(made["id"])
    server.endpoints[made["id"]] = {**made, "created_at": now, "updated_at": now, "created_snapshot": born}
    server.change_registry(transaction)
    server.saved(transaction, None)
    return [_webhook(server, made["id"])]


def _webhook(server: ModelPostgres, endpoint_id: int) -> Record:
    since, _, error = server.health.get(endpoint_id, (None, None, None))
    return Record(**server.endpoints[endpoint_id], failing_since=since, last_error=error)


def _found(server: ModelPostgres, account: int, public_id: str, version: int | None) -> dict[str, Any] | None:
    for row in server.endpoints.values():
        if row["account_id"] == account and row["public_id"] == public_id and version in {None, row["version"]}:
            return row
    return None


@_reads("endpoint", "get")
def _get(server: ModelPostgres, backend: Backend, account: int, public_id: str) -> list[Any]:
    found = _found(server, account, public_id, None)
    return [] if found is None else [_webhook(server, found["id"])]


def _alter(server: ModelPostgres, transaction: Transaction, found: dict[str, Any] | None, **columns: Any) -> list[Any]:
    if found is not None:
        _change(server, found, **columns)
    transaction.number()
    server.change_registry(transaction)
    server.saved(transaction, None)
    return [] if found is None else [_webhook(server, found["id"])]


@_writes("endpoint", "pause", locks=("registry",))
def _pause(server: ModelPostgres, transaction: Transaction, account: int, public_id: str, version: int) -> list[Any]:
    found = _found(server, account, public_id, version)
    if found is not None and found["status"] != "active":
        found = None
    return _alter(server, transaction, found, status="paused")


@_writes("endpoint", "resume", locks=("registry",))
def _resume(server: ModelPostgres, transaction: Transaction, account: int, public_id: str, version: int) -> list[Any]:
    found = _found(server, account, public_id, version)
    if found is not None and found["status"] == "active":
        found = None
    if found is not None:
        server.health.pop(found["id"], None)
    return _alter(server, transaction, found, status="active", disabled_reason=None)


@_writes("endpoint", "rotate", locks=("registry",))
def _rotate(server: ModelPostgres, transaction: Transaction, *columns: Any) -> list[Any]:
    account, public_id, secret, grace, version = columns
    found = _found(server, account, public_id, version)
    if found is None:
        return _alter(server, transaction, None)
    has_grace = grace > timedelta(0)
    expires = server.clock() + grace if has_grace and found["secret"] is not None else None
    previous = found["secret"] if has_grace else None
    return _alter(
        server, transaction, found, secret=secret, previous_secret=previous, previous_secret_expires_at=expires
    )


@_writes("endpoint", "update", locks=("registry",))
def _update(server: ModelPostgres, transaction: Transaction, *columns: Any) -> list[Any]:
    (account, public_id, url, description, events, secret, headers, style, retry, most, rate, ordered, timeout_s,
     is_given, version) = columns  # fmt: skip
    given = {"secret": secret, "previous_secret": None, "previous_secret_expires_at": None} if is_given else {}
    return _alter(
        server, transaction, _found(server, account, public_id, version), url=url, description=description,
        events=events, headers=headers, body_style=style, retry=retry, max_concurrency=most, rate_limit=rate,
        ordered=ordered, timeout_s=timeout_s, **given,
    )  # fmt: skip


@_writes("endpoint", "delete", locks=("registry",))
def _delete(server: ModelPostgres, transaction: Transaction, account: int, public_id: str, version: int) -> list[Any]:
    found = _found(server, account, public_id, version)
    if found is not None:
        del server.endpoints[found["id"]]
        server.health.pop(found["id"], None)
        server.replays = {key: job for key, job in server.replays.items() if job["endpoint_id"] != found["id"]}
    transaction.number()
    server.change_registry(transaction)
    server.saved(transaction, None)
    return [] if found is None else [(found["id"],)]


# -- retention: of events; attempts are kept


@_reads("retention", "make_partitions")
def _make_partitions(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return [(0,)]


@_reads("retention", "partitions")
def _partitions(server: ModelPostgres, backend: Backend, table: str) -> list[Any]:
    days = sorted({event.written_at.date() for _, _, event in server.events}) if table == "outbox" else []
    return [Record(name=f"outbox_{day:%Y%m%d}", day=day) for day in days]


@_reads("retention", "needed_from")
def _needed_from(server: ModelPostgres, backend: Backend) -> list[Any]:
    oldest = min(server.pending, key=lambda key: key[1], default=None)
    cursor = min(shard["prev_at"] for shard in server.shards.values())
    return [Record(cursor=cursor, pending=None if oldest is None else server.pending[oldest][4])]


@_reads("retention", "now")
def _now(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [(server.clock(),)]


@_reads("retention", "take_turn", "end_turn")
def _turn(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return [(True,)]


@_reads("retention", "astray_outbox", "astray_attempt", "sizes")
def _nothing_there(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return []


@_reads("retention", "prune_outbox_default", "prune_attempt_default", "prune_idempotency", "prune_discarded_event")
def _prune(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return ["DELETE 0"]
