"""The model of what the engine asks: the outbox, its shard, pending rows, retention."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import asyncpg
from model_postgres import (
    FOREVER_AGO,
    HELD,
    SYSTEM,
    Backend,
    Event,
    Key,
    ModelPostgres,
    Record,
    Transaction,
)
from model_statements import reads, writes

from dispatcher.moments import of_datetime
from dispatcher.store.schema import migrations

# -- the schema


@reads("", "SELECT to_regclass('dispatcher.migration')")
def _regclass(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [("dispatcher.migration",)]


@reads("schema", "migrations")
def _migrations(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [
        Record(version=each.version, checksum=checksum, oldest=each.oldest, program="1.0")
        for each, checksum in _checksums()
    ]


@functools.cache
def _checksums() -> list[tuple[Any, str]]:
    return [(each, each.checksum) for each in migrations()]


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


@reads("outbox", "first_page")
def _first_page(server: ModelPostgres, backend: Backend, *bounds: Any) -> list[Any]:
    running, xmax, at_xid, at_seq, since_running, since, limit = bounds
    header = (server.snapshot(), server.clock(), server.registry_version, *(None,) * 9)
    found = _difference(server, running, xmax, (at_xid, at_seq), (since_running, since))
    return [header, *((None, None, None, *event.columns) for event, _ in zip(found, range(limit), strict=False))]


@reads("outbox", "first_page_near")
def _first_page_near(server: ModelPostgres, backend: Backend, *bounds: Any) -> list[Any]:
    prev, oldest, since, limit = bounds
    header = (server.snapshot(), server.clock(), server.registry_version, *(None,) * 9)
    found = _difference(server, (), oldest, (0, 0), (since, since))
    unread = (event for event in found if not server.visible(event.xid, prev))
    return [header, *((None, None, None, *event.columns) for event, _ in zip(unread, range(limit), strict=False))]


@reads("outbox", "next_page")
def _next_page(server: ModelPostgres, backend: Backend, *bounds: Any) -> list[Any]:
    running, xmax, at_xid, at_seq, since_running, since, limit, cur = bounds
    found = _difference(server, running, xmax, (at_xid, at_seq), (since_running, since))
    seen = (event for event in found if server.visible(event.xid, cur))
    return [(None, None, None, *event.columns) for event, _ in zip(seen, range(limit), strict=False)]


@reads("outbox", "newest_known")
def _newest_known(server: ModelPostgres, backend: Backend) -> list[Any]:
    newest = max((row[1] for row in server.attempts), default=0)
    return [(max(newest, max((key[1] for key in server.pending), default=0)),)]


@reads("outbox", "known")
def _known(
    server: ModelPostgres, backend: Backend, endpoints: Sequence[int], seqs: Sequence[int], since: datetime
) -> list[Any]:
    return [
        (endpoint, seq)
        for endpoint, seq in zip(endpoints, seqs, strict=True)
        if (endpoint, seq, 0) in server.pending or server.attempted.get((endpoint, seq), FOREVER_AGO) >= since
    ]


# -- the shard


@reads("shard", "identity")
def _identity(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [Record(system=SYSTEM, standby=False)]


@reads("shard", "try_lease")
def _try_lease(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    holder = server.leases.setdefault(shard, backend)
    if holder is backend:
        backend.leases[shard] = None
    return [(holder is backend,)]


@writes("shard", "take_over", locks=("shard",))
def _take_over(server: ModelPostgres, transaction: Transaction, shard: int) -> list[Any]:
    row = server.shards[shard]
    row["epoch"] += 1
    server.saved(transaction, None)
    server.watch.taken_over(transaction.backend, shard, row["epoch"])
    return [(row["epoch"],)]


@reads("shard", "cursor")
def _cursor(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    return [Record(**server.shards[shard], is_ahead=False)]


@reads("shard", "fall_asleep")
def _fall_asleep(server: ModelPostgres, backend: Backend) -> list[Any]:
    if server.collides():
        return [(False,)]
    server.sleepers[backend] += 1
    return [(True,)]


@reads("shard", "wake_up")
def _wake_up(server: ModelPostgres, backend: Backend) -> list[Any]:
    had = server.sleepers[backend] > 0
    server.sleepers[backend] -= had
    return [(had,)]


@writes("shard", "own_xid")
def _own_xid(server: ModelPostgres, transaction: Transaction) -> list[Any]:
    return [(transaction.number(),)]


@reads("shard", "gauges")
def _gauges(server: ModelPostgres, backend: Backend) -> list[Any]:
    oldest = min(server.pending, key=lambda key: key[1], default=None)
    return [(max(server.seq, 1), None if oldest is None else server.pending[oldest][4], 1, 0)]


@reads("shard", "partitions_until")
def _partitions_until(server: ModelPostgres, backend: Backend) -> list[Any]:
    return []


@reads("shard", "heartbeat")
def _heartbeat(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return ["INSERT 0 1"]


@reads("shard", "forget_instances")
def _forget_instances(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return ["DELETE 1"]


@reads("shard", "instances")
def _instances(server: ModelPostgres, backend: Backend) -> list[Any]:
    return []


@reads("fleet", "join")
def _join(server: ModelPostgres, backend: Backend, member: int) -> list[Any]:
    backend.membership = member
    return [(True,)]


@reads("fleet", "call")
def _call(server: ModelPostgres, backend: Backend) -> list[Any]:
    server.notify("dispatcher_fleet", "")
    return [("",)]


@reads("fleet", "view")
def _view(server: ModelPostgres, backend: Backend, silent: timedelta) -> list[Any]:
    since = server.clock() - silent
    rows = [("shards", len(server.shards), None)]
    rows += [
        ("member", each.membership, None) for each in server.backends if each.membership and each.spoke_at >= since
    ]
    rows += [("lease", n, each.member) for n, each in server.leases.items() if each.spoke_at >= since]
    return [Record(what=what, key=key, member=member) for what, key, member in rows]


@reads("fleet", "sign")
def _sign(server: ModelPostgres, backend: Backend, member: int) -> list[Any]:
    backend.member = member
    return [(True,)]


@reads("fleet", "part")
def _part(server: ModelPostgres, backend: Backend) -> list[Any]:
    backend.let_go()
    server.notify("dispatcher_fleet", "")
    return [(None, None)]


@reads("fleet", "renew")
def _renew(server: ModelPostgres, backend: Backend) -> list[Any]:
    return []


@reads("fleet", "evict")
def _evict(server: ModelPostgres, backend: Backend, shard: int, silent: timedelta) -> list[Any]:
    holder = server.leases.get(shard)
    if holder is None or holder.spoke_at >= server.clock() - silent:
        return [(0,)]
    holder.end()
    return [(1,)]


@writes("shard", "flush", locks=("shard",))
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
            server.attempted[row[2], row[0]] = now
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
    held = {endpoint: list(places) for endpoint, places in server.held.items()}
    attempted, discarded = dict(server.attempted), dict(server.discarded_events)

    def undo() -> None:
        server.shards, server.pending, server.held = shards, pending, held
        server.attempted, server.discarded_events = attempted, discarded
        del server.attempts[attempts:]

    return undo


# -- pending rows


@reads("pending", "refill")
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


@reads("pending", "fetch")
def _fetch(server: ModelPostgres, backend: Backend, *columns: Sequence[int]) -> list[Any]:
    rows = [server.pending.get(key) for key in zip(*columns, strict=True)]  # type: ignore[call-overload]
    return [_with_event(server, row) for row in rows if row is not None and row[7] is not HELD]


@reads("pending", "pull")
def _pull(server: ModelPostgres, backend: Backend, *columns: Sequence[int]) -> list[Any]:
    found: list[Any] = []
    for endpoint, seq, generation, most in zip(*columns, strict=True):
        held = server.held.get(endpoint, [])
        place = bisect.bisect_right(held, (seq, generation))
        found += [_with_event(server, server.pending[endpoint, *key]) for key in held[place : place + most]]
    return found


@reads("pending", "held_endpoints")
def _held_endpoints(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    return [(endpoint,) for endpoint in sorted(server.held) if server.shard_of(endpoint) == shard]


@reads("pending", "heads")
def _heads(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    heads: dict[int, Key] = {}
    for key, row in server.pending.items():
        webhook = server.endpoints.get(key[0])
        if webhook is not None and webhook["shard"] == shard and webhook["ordered"] and row[7] is not HELD:
            heads[key[0]] = min(key, heads.get(key[0], key))
    return [heads[endpoint] for endpoint in sorted(heads)]


@writes("delivery", "redeliver", locks=("generation",))
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


# -- retention: of events; attempts are kept


@reads("retention", "make_partitions")
def _make_partitions(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return [(0,)]


@reads("retention", "partitions")
def _partitions(server: ModelPostgres, backend: Backend, table: str) -> list[Any]:
    days = sorted({event.written_at.date() for _, _, event in server.events}) if table == "outbox" else []
    return [Record(name=f"outbox_{day:%Y%m%d}", day=day) for day in days]


@reads("retention", "needed_from")
def _needed_from(server: ModelPostgres, backend: Backend) -> list[Any]:
    oldest = min(server.pending, key=lambda key: key[1], default=None)
    cursor = min(shard["prev_at"] for shard in server.shards.values())
    return [Record(cursor=cursor, pending=None if oldest is None else server.pending[oldest][4])]


@reads("retention", "now")
def _now(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [(server.clock(),)]


@reads("retention", "take_turn", "end_turn")
def _turn(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return [(True,)]


@reads("retention", "astray_outbox", "astray_attempt", "sizes")
def _nothing_there(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return []


@reads("retention", "prune_outbox_default", "prune_attempt_default", "prune_idempotency", "prune_discarded_event")
def _prune(server: ModelPostgres, backend: Backend, *_: Any) -> list[Any]:
    return ["DELETE 0"]
