"""Deliveries as their account sees them: listed, looked at, made anew.

There is no row per delivery. One that was attempted stands where its last attempt does, and that row carries its state;
one that waits for its first attempt stands in its pending row. What is only in memory (queued or in flight for the
first time) is on no record yet and comes into sight when it is settled, fails, or is insured against a crash, which is
after two seconds. That a request is out is on no record either: whoever makes the store says which are.

The order of a webhook's list: first what waits for its first attempt, the newest event in front; then the others, the
latest change in front. A delivery that is attempted while somebody turns the pages moves to the front; no page shows
anything twice that did not move. Whatever a filter passes over is bounded: a page may hold few, and still not be the
last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence, Set
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from dispatcher.model import DeliveryKey, DeliveryState, EndpointId, EndpointStatus
from dispatcher.moments import BEGINNING
from dispatcher.store.database import statements
from dispatcher.store.events import DATA_BYTES_MAX

CHUNK_ROWS: Final = 500  # looked at in one statement where a filter may pass most of them over
LOOK_MAX: Final = 5000  # rows one listing looks at: about 50 ms
OF_EVENT_MAX: Final = 1000  # rows about one event at one webhook; each replay adds a few
EVENT_SHOWN_MAX: Final = 200  # deliveries of one event at all webhooks
ATTEMPTS_MAX: Final = 200  # of one delivery: no schedule has as many
STATS_ROWS_MAX: Final = 50_000  # ≈ 100 ms from memory

_UNSETTLED: Final = frozenset({DeliveryState.PENDING, DeliveryState.RETRYING})
_END: Final = datetime(9998, 12, 31, tzinfo=UTC)
_LAST_SEQ: Final = (1 << 63) - 1
_LAST_GENERATION: Final = (1 << 31) - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a delivery stands in its webhook's list; `at` is None for what waits for its first attempt."""

    at: datetime | None
    event_seq: int
    generation: int

    @property
    def _rank(self) -> tuple[bool, datetime, int, int]:
        return (self.at is None, self.at or BEGINNING, self.event_seq, self.generation)

    def __lt__(self, other: Place) -> bool:
        return self._rank < other._rank


_NEWEST: Final = Place(None, _LAST_SEQ, _LAST_GENERATION)
_NEWEST_ATTEMPTED: Final = Place(_END, _LAST_SEQ, _LAST_GENERATION)
_OLDEST_WAITING: Final = Place(None, -1, 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFilter:
    """What to list. `since` and `until` are about the last change; where there is none yet, about the event."""

    status: DeliveryState | None = None
    type: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    result: str | None = None
    event_id: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether (almost) every row passes."""
        return self.status is None and self.type is None and self.result is None


class DeliveryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery. What is about the event is None once retention has dropped it."""

    key: DeliveryKey
    place: Place
    state: DeliveryState
    attempts: int
    result: str | None  # of the last attempt
    status: int | None  # code of the last response
    error: str | None
    updated_at: datetime  # its last change; before the first attempt, when its event was written
    next_attempt_at: datetime | None  # None: settled, or held until its webhook can take it
    event_id: str | None = None
    event_type: str | None = None
    created_at: datetime | None = None  # when its event was written


class EventDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery of an event that is at hand already, and the webhook it goes to."""

    record: DeliveryRecord
    webhook_id: str
    url: str
    webhook_status: EndpointStatus


class DeliveryPage(msgspec.Struct, frozen=True):
    """Deliveries in the order of the list. `reached` is where to go on, the same way; None: nothing is further."""

    deliveries: list[DeliveryRecord]
    reached: Place | None


class AttemptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the log. Without a result no request was made: the delivery was settled without one."""

    at: datetime  # when its outcome was written down
    attempt: int
    state: DeliveryState
    result: str | None
    status: int | None
    duration_us: int
    error: str | None
    response_head: bytes | None
    response_body: bytes | None


class DeliveryDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery with all that is on record about it."""

    record: DeliveryRecord
    webhook_id: str
    log: list[AttemptRecord]
    event_xid: int
    event_created_at: datetime | None
    data: str | None  # JSON text as it was written
    traceparent: str | None = None  # as its application left it, at most a character too long


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of the log, summed up. `retrying` counts failed attempts that another one followed, or will."""

    attempts: int
    delivered: int
    exhausted: int
    discarded: int
    retrying: int
    p50_ms: float | None
    p95_ms: float | None


Out = Callable[[int], Set[tuple[int, int]]]
"""Which deliveries to an endpoint have a request out, by (event sequence, generation)."""

NOTHING: Final = Tally(attempts=0, delivered=0, exhausted=0, discarded=0, retrying=0, p50_ms=None, p95_ms=None)


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """A window of one webhook's log. `oldest` is set when there were too many rows: the sums begin there."""

    whole: Tally
    results: dict[str, int]
    buckets: dict[datetime, Tally]  # without the empty ones
    oldest: datetime | None


class DeliveryStore:
    """All that reads deliveries for their accounts, and makes them anew. `db` is a pool or a connection of asyncpg."""

    def __init__(
        self,
        db: Any,
        *,
        out: Out = lambda endpoint_id: frozenset(),
        look_max: int = LOOK_MAX,
        chunk_rows: int = CHUNK_ROWS,
        stats_rows_max: int = STATS_ROWS_MAX,
    ) -> None:
        self._db = db
        self._out = out
        self._look_max = look_max
        self._chunk_rows = chunk_rows
        self._stats_rows_max = stats_rows_max
        self._sql = statements("delivery")

    async def endpoint(self, account_id: int, webhook_id: str) -> EndpointId | None:
        """The key of an account's webhook; None if it has no such."""
        row = await self._db.fetchrow(self._sql["endpoint"], account_id, webhook_id)
        return None if row is None else EndpointId(row["id"])

    # -- lists

    async def browse(
        self,
        endpoint_id: int,
        account: str,
        wanted: DeliveryFilter,
        *,
        limit: int,
        after: Place | None = None,
        before: Place | None = None,
    ) -> DeliveryPage:
        """`limit` deliveries at most: those that follow `after`, or the nearest ones in front of `before`."""
        if wanted.event_id is not None:
            seqs = [row["seq"] for row in await self._db.fetch(self._sql["seqs"], account, wanted.event_id)]
            return await self._list_some(endpoint_id, seqs, wanted, limit=limit, after=after, before=before)
        if wanted.status is DeliveryState.IN_FLIGHT:
            seqs = [seq for seq, _ in self._out(endpoint_id)]
            return await self._list_some(endpoint_id, seqs, wanted, limit=limit, after=after, before=before)
        start = before or after or _NEWEST
        found: list[DeliveryRecord] = []
        looked = 0
        for section in self._sections(wanted, start, is_backward=before is not None):
            place: Place | None = section
            while place is not None:
                chunk = limit + 1 if wanted.is_plain else self._chunk_rows
                rows = await self._read(endpoint_id, wanted, place, chunk, is_backward=before is not None)
                found += await self._pick(endpoint_id, rows, wanted, limit + 1 - len(found))
                if len(found) > limit:
                    return _page(found[:limit], found[limit - 1].place, before)
                looked += len(rows)
                place = _place(rows[-1], place) if len(rows) == chunk else None
                if place is not None and looked >= self._look_max:
                    return _page(found, place, before)
        return _page(found, None, before)

    def _sections(self, wanted: DeliveryFilter, start: Place, *, is_backward: bool) -> Iterable[Place]:
        """Where to begin in each part of the list that may hold what is wanted, in the order they are read."""
        in_waiting = wanted.status in (None, DeliveryState.PENDING) and wanted.result is None
        in_attempted = wanted.status is not DeliveryState.PENDING
        if is_backward:
            if start.at is not None and in_attempted:
                yield start
            if in_waiting:
                yield start if start.at is None else _OLDEST_WAITING
        else:
            if start.at is None and in_waiting:
                yield start
            if in_attempted:
                yield start if start.at is not None else _NEWEST_ATTEMPTED

    async def _read(
        self, endpoint_id: int, wanted: DeliveryFilter, place: Place, rows: int, *, is_backward: bool
    ) -> Sequence[Any]:
        direction = "before" if is_backward else "after"
        if place.at is None:
            statement = self._sql["waiting_before" if direction == "before" else "waiting_after"]
            return await self._db.fetch(statement, endpoint_id, place.event_seq, place.generation, rows)  # type: ignore[no-any-return]
        if is_backward:
            at, seq, generation = max(place, Place(wanted.since or BEGINNING, -1, 0))._rank[1:]
            bound, statement = wanted.until or _END, self._sql["attempted_before"]
        else:
            at, seq, generation = min(place, Place(wanted.until or _END, -1, 0))._rank[1:]
            bound, statement = wanted.since or BEGINNING, self._sql["attempted_after"]
        return await self._db.fetch(statement, endpoint_id, at, seq, generation, bound, rows)  # type: ignore[no-any-return]

    async def _pick(
        self, endpoint_id: int, rows: Sequence[Any], wanted: DeliveryFilter, most: int
    ) -> list[DeliveryRecord]:
        """What of these rows is a delivery and wanted, `most` at most, with its event."""
        out = self._out(endpoint_id)
        kept = [row for row in rows if row["is_last"] and _passes(row, _state_of(row, out), wanted)]
        if wanted.type is None:
            kept = kept[:most]
        if not kept:
            return []
        pairs = ([row["event_xid"] for row in kept], [row["event_seq"] for row in kept])
        events = {row["seq"]: row for row in await self._db.fetch(self._sql["events"], *pairs)}
        records = [_seen(_record(endpoint_id, row, events.get(row["event_seq"])), out) for row in kept]
        return [record for record in records if wanted.type in (None, record.event_type)][:most]

    async def _list_some(
        self,
        endpoint_id: int,
        seqs: Sequence[int],
        wanted: DeliveryFilter,
        *,
        limit: int,
        after: Place | None,
        before: Place | None,
    ) -> DeliveryPage:
        """The deliveries of some events: few enough to be read as a whole."""
        rows = await self._db.fetch(self._sql["of_event"], endpoint_id, seqs, OF_EVENT_MAX) if seqs else []
        rows = [row for row in rows if row["is_last"] and _in_time(row, wanted)]
        found = await self._pick(endpoint_id, rows, wanted, len(rows))
        found.sort(key=lambda record: record.place, reverse=before is None)
        if after is not None:
            found = [record for record in found if record.place < after]
        if before is not None:
            found = [record for record in found if before < record.place]
        return _page(found[:limit], found[limit - 1].place if len(found) > limit else None, before)

    async def everywhere(self, account_id: int, account: str, event_id: str) -> list[EventDelivery]:
        """The deliveries of one event at all of an account's webhooks, EVENT_SHOWN_MAX at most, the latest in front."""
        seqs = [row["seq"] for row in await self._db.fetch(self._sql["seqs"], account, event_id)]
        rows = await self._db.fetch(self._sql["everywhere"], account_id, seqs, EVENT_SHOWN_MAX) if seqs else []
        return [
            EventDelivery(
                record=_seen(_record(row["endpoint_id"], row, None), self._out(row["endpoint_id"])),
                webhook_id=row["webhook_id"],
                url=row["url"],
                webhook_status=EndpointStatus(row["webhook_status"]),
            )
            for row in rows
        ]

    # -- one

    async def find(self, account_id: int, key: DeliveryKey) -> DeliveryDetail | None:
        """Everything about one delivery; None if there is no such, or its webhook is another account's, or gone."""
        endpoint_id, seq, _ = key
        owner = await self._db.fetchrow(self._sql["owner"], account_id, endpoint_id)
        if owner is None:
            return None
        # The pending row first: what is settled in between is then found in the log.
        pending = await self._db.fetchrow(self._sql["pending"], *key)
        log = await self._db.fetch(self._sql["attempts"], *key, ATTEMPTS_MAX)
        if pending is None and not log:
            return None
        xid = pending["event_xid"] if pending is not None else log[0]["event_xid"]
        event = await self._db.fetchrow(self._sql["event"], xid, seq, DATA_BYTES_MAX)
        is_settled = bool(log) and log[-1]["state"] != DeliveryState.RETRYING
        return DeliveryDetail(
            record=_seen(_one(key, None if is_settled else pending, log, event), self._out(endpoint_id)),
            webhook_id=owner["public_id"],
            log=[AttemptRecord(**{name: row[name] for name in AttemptRecord.__struct_fields__}) for row in log],
            event_xid=xid,
            event_created_at=event["created_at"] if event else None,
            data=event["data"] if event else None,
            traceparent=event["traceparent"] if event else None,
        )

    async def redeliver(self, detail: DeliveryDetail) -> DeliveryKey | None:
        """Make a new delivery of a delivery's event, and tell the engine; None if the webhook is disabled or gone, or
        retention has dropped the event.
        """
        endpoint_id, seq, _ = detail.record.key
        row = await self._db.fetchrow(self._sql["redeliver"], endpoint_id, seq, detail.event_xid)
        return None if row is None else (endpoint_id, seq, row["generation"])

    # -- many

    async def stats(
        self, endpoint_id: int, since: datetime, until: datetime, bucket: timedelta, rows_max: int | None = None
    ) -> Stats:
        """A webhook's log from `since` to before `until`, by buckets counted from the year 2000."""
        most = rows_max or self._stats_rows_max
        rows = await self._db.fetch(self._sql["stats"], endpoint_id, since, until, bucket, most)
        whole = next(row for row in rows if row["kind"] == 3)
        return Stats(
            whole=_tally(whole),
            results={row["result"]: row["attempts"] for row in rows if row["kind"] == 2 and row["result"] is not None},
            buckets={row["bucket"]: _tally(row) for row in rows if row["kind"] == 1},
            oldest=whole["oldest"] if whole["rows"] == most else None,
        )


def _page(found: list[DeliveryRecord], reached: Place | None, before: Place | None) -> DeliveryPage:
    return DeliveryPage(found if before is None else found[::-1], reached)


def _place(row: Any, section: Place) -> Place:
    return Place(None if section.at is None else row["at"], row["event_seq"], row["generation"])


def _state_of(row: Any, out: Set[tuple[int, int]]) -> str:
    """The state of a delivery's last row, in whose place another attempt may be under way."""
    is_out = row["state"] in _UNSETTLED and (row["event_seq"], row["generation"]) in out
    return DeliveryState.IN_FLIGHT.value if is_out else row["state"]


def _seen(record: DeliveryRecord, out: Set[tuple[int, int]]) -> DeliveryRecord:
    """What is on record, and whether a request is out."""
    if record.state not in _UNSETTLED or record.key[1:] not in out:
        return record
    return msgspec.structs.replace(record, state=DeliveryState.IN_FLIGHT, next_attempt_at=None)


def _passes(row: Any, state: str, wanted: DeliveryFilter) -> bool:
    return (
        wanted.status in (None, state)
        and wanted.result in (None, row["result"])
        and (row["attempts"] > 0 or row["state"] != DeliveryState.PENDING or _in_time(row, wanted))
    )


def _in_time(row: Any, wanted: DeliveryFilter) -> bool:
    return (wanted.since is None or row["at"] >= wanted.since) and (wanted.until is None or row["at"] < wanted.until)


def _record(endpoint_id: int, row: Any, event: Any) -> DeliveryRecord:
    state = DeliveryState(row["state"])
    seq, generation = row["event_seq"], row["generation"]
    return DeliveryRecord(
        key=(endpoint_id, seq, generation),
        place=Place(None if state is DeliveryState.PENDING else row["at"], seq, generation),
        state=state,
        attempts=row["attempts"],
        result=row["result"],
        status=row["status"],
        error=row["error"],
        updated_at=row["at"],
        next_attempt_at=row["due_at"],
        event_id=event["id"] if event else None,
        event_type=event["type"] if event else None,
        created_at=event["written_at"] if event else None,
    )


def _one(key: DeliveryKey, pending: Any, log: Sequence[Any], event: Any) -> DeliveryRecord:
    last: Any = log[-1] if log else None
    at = last["at"] if last else pending["event_at"]
    return DeliveryRecord(
        key=key,
        place=Place(last["at"] if last else None, key[1], key[2]),
        state=DeliveryState(pending["state"] if pending else last["state"]),
        attempts=pending["attempts"] if pending else last["attempt"],
        result=last["result"] if last else None,
        status=last["status"] if last else None,
        error=last["error"] if last else pending["last_error"],
        updated_at=at,
        next_attempt_at=pending["due_at"] if pending else None,
        event_id=event["id"] if event else None,
        event_type=event["type"] if event else None,
        created_at=event["written_at"] if event else None,
    )


def _tally(row: Any) -> Tally:
    return Tally(**{name: row[name] for name in Tally.__struct_fields__})
