"""Events as their account sees them: emitted over HTTP, looked up, listed."""

from __future__ import annotations

import secrets
import time
from datetime import datetime
from typing import Any, Final

import asyncpg
import msgspec

from dispatcher.errors import DispatcherError
from dispatcher.model import new_id
from dispatcher.store.database import statements
from dispatcher.store.tail import Tail

ID_PREFIX: Final = "evt_"

LOOK_MAX: Final = 5000
"""Events one listing looks at for a filter: about 50 ms when none of them is in memory."""

DATA_BYTES_MAX: Final = 1 << 20
"""Larger data is not shown. Nothing above a quarter of this is ever delivered, but an application may insert it."""

_NEWEST: Final = "~"  # sorts behind every id


class IdempotencyConflict(DispatcherError):
    """The key was used within 24 hours with another type or other data; the message names the event it made."""


class EventRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An event. `reason` is why it was discarded, None unless it was."""

    id: str
    type: str
    created_at: datetime | None  # None: an application dated it where no calendar reaches
    data: str | None  # JSON text as it was written; None: more than DATA_BYTES_MAX of it
    reason: str | None = None


class EventPage(msgspec.Struct, frozen=True):
    """Events, newest first. `reached` is where to go on, the same way; None when there is nothing further.

    With a filter a page may hold few events, or none, and still not be the last.
    """

    events: list[EventRecord]
    reached: str | None


class EventStore:
    """All that reads and writes events for their accounts. `db` is a pool or a connection of asyncpg."""

    def __init__(self, db: Any, *, look_max: int = LOOK_MAX) -> None:
        self._db = db
        self._look_max = look_max
        self._sql = statements("event")

    async def emit(
        self,
        account: str,
        type: str,  # noqa: A002
        data: str,
        idempotency_key: str | None = None,
        *,
        traceparent: str | None = None,
    ) -> tuple[EventRecord, bool]:
        """Write an event; return it, and whether it is new: with a key that was used before, it is the first one.

        `traceparent` names the trace it belongs to.

        Raises IdempotencyConflict when it was used for something else.
        """
        made = new_id(ID_PREFIX, time.time(), secrets.token_bytes(10))
        try:
            row = await self._db.fetchrow(self._sql["emit"], account, type, data, idempotency_key, made, traceparent)
        except asyncpg.UniqueViolationError as error:
            raise IdempotencyConflict(error.detail or "another event was made with it") from None
        if row["id"] == made:
            return EventRecord(id=made, type=type, created_at=row["created_at"], data=data), True
        first = await self.get(account, row["id"])
        # Retention may have dropped the first one's day already; its id and contents are known all the same.
        return first or EventRecord(id=row["id"], type=type, created_at=None, data=data), False

    def tail(self) -> Tail:
        """What follows the events of accounts live."""
        return Tail(self._db)

    async def get(self, account: str, event_id: str) -> EventRecord | None:
        """One event of an account; None if it has no such, or no longer."""
        row = await self._db.fetchrow(self._sql["get"], account, event_id, DATA_BYTES_MAX)
        return None if row is None else EventRecord(**row)

    async def list(
        self,
        account: str,
        *,
        limit: int,
        after: str | None = None,
        before: str | None = None,
        type: str | None = None,  # noqa: A002
        discarded: bool = False,
    ) -> EventPage:
        """Newest first, `limit` at most: those older than the id `after`, or the nearest newer than the id `before`.

        `type` and `discarded` pick some of them.
        """
        statement = "list_after" if before is None else "list_before"
        start = after or before or _NEWEST
        look = self._look_max if type is not None or discarded else limit + 1
        rows = await self._db.fetch(
            self._sql[statement], account, start, limit + 1, look, type, DATA_BYTES_MAX, discarded
        )
        looked, looked_to = rows[0]["looked"], rows[0]["looked_to"]
        events = [_record(row) for row in rows if row["id"] is not None]
        reached: str | None = looked_to if looked == look else None
        if len(events) > limit:
            events = events[:limit]
            reached = events[-1].id
        return EventPage(events if before is None else events[::-1], reached)


def _record(row: Any) -> EventRecord:
    return EventRecord(
        id=row["id"], type=row["type"], created_at=row["created_at"], data=row["data"], reason=row["reason"]
    )
