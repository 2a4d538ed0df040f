"""A model of PostgreSQL, as far as the dispatcher can tell: what is committed when, and who sees it.

**Faithful.** Transaction ids are given at the first write and committed in any order; `pg_current_snapshot()` has the
xmin, xmax and list of a real one, latest completed id included, and events are visible by it. A reading statement sees
what was committed at its instant. A writing one takes its row locks in order of arrival, and what it does, it does all
at once at its commit: one of the schedules READ COMMITTED allows, and the only one in which nobody sees a half. Session
locks end with the server process, which may outlive the client's connection; notifications leave at the commit; a
crash aborts what is in progress, forgets ids nobody wrote down, and what was committed asynchronously.

**Not modelled.** Planning, TOAST, roles; of partitions only that retention drops a day. Statements are known by name
(`model_statements`), so their text may change; `test_model.py` asks this model and a real server the same
questions and compares the answers.

The tables are plain dictionaries of what is committed. `watch` hears of every commit that matters.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from dispatcher.core.shards import shard_numbers, shard_of
from dispatcher.moments import of_datetime

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
        self.attempted: dict[tuple[int, int], datetime] = {}  # (endpoint, seq) of generation 0 -> at
        self.pending: dict[
            Key, tuple[Any, ...]
        ] = {}  # (endpoint, seq, generation, xid, at, state, attempts, due, error)
        self.held: dict[int, list[tuple[int, int]]] = {}  # endpoint -> (seq, generation), sorted
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
            bisect.insort(self.held.setdefault(key[0], []), key[1:])

    def drop_pending(self, key: Key) -> None:
        self._unhold(key, self.pending.pop(key, None))

    def _unhold(self, key: Key, old: tuple[Any, ...] | None) -> None:
        if old is not None and old[7] is HELD:
            held = self.held[key[0]]
            del held[bisect.bisect_left(held, key[1:])]
            if not held:
                del self.held[key[0]]

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
