"""Following the outbox, live: every committed event of some accounts, once, and from any point on again.

**Problem.** Sequence numbers and ids are drawn before a transaction commits, so "greater than the last" misses what
commits late.

**Rule.** A position is a transaction id `xmax` below which everything has been seen, except for the transactions in
`open`, of which only the rows up to a sequence number have been. A page shows, in one statement and so in one snapshot,
what has become visible of `open`, then what began from `xmax` on. Behind any row of a page the next position follows
from that page's snapshot alone: what was in progress is open, the row's own transaction is open from the row on. So
each event can carry the position behind it, and whoever resumes there misses nothing and sees nothing twice.

**Edge.** Almost always that position is the event itself: nothing older was in progress. Then its id is enough to name
it. Otherwise the id is followed by a full stop and the position, encrypted: transaction ids tell how busy everybody is.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dispatcher.model import DeliveryKey
from dispatcher.store.database import statements
from dispatcher.store.outbox import CLOCK_SLACK, Snapshot

LOOK_MAX: Final = 1000
"""Rows that one page looks at, whoever they belong to: about 3 ms."""

OPEN_MAX: Final = 200
"""Transactions a sealed position may name: more of them than connections a server usually has, and 3 KiB of header."""

AGAIN_MAX: Final = 100  # deliveries sent again that one look finds, for each webhook
AGAIN_OVERLAP: Final = timedelta(seconds=2)
"""A flush is dated by its beginning and seen after its end; what took longer than this in between is not noticed."""

_NONCE_BYTES: Final = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """What has been seen: all below `xmax`, but of `open` (transaction id, sequence number) only up to the latter."""

    open: tuple[tuple[int, int], ...]  # by ascending transaction id
    xmax: int
    since: datetime  # nothing from xmax on was written before

    def behind(self, snapshot: Snapshot, xid: int, seq: int) -> Position:
        """The position behind a row of the page that was read from here in this snapshot."""
        waiting = [(running, 0) for running in snapshot[2] if running < xid]
        if xid >= self.xmax:
            return Position((*waiting, (xid, seq)), xid + 1, self.since)
        later = [(x, s) for x, s in self.open if x > xid]
        return Position((*waiting, (xid, seq), *later), self.xmax, self.since)

    def has(self, xid: int) -> bool:
        """Whether all of a transaction has been seen."""
        return xid < self.xmax and all(xid != x for x, _ in self.open)


def all_of(snapshot: Snapshot, at: datetime) -> Position:
    """The position behind everything that a snapshot shows."""
    return Position(tuple((xid, 0) for xid in snapshot[2]), snapshot[1], at - CLOCK_SLACK)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One event as the outbox has it, and the position behind it: None for what was sent again and has none."""

    event_id: str
    account: str
    type: str
    data: str | None
    created_at: datetime | None
    xid: int
    behind: Position | None


@dataclasses.dataclass(frozen=True, slots=True)
class TailPage:
    """Rows of the accounts asked for, the position behind all that was looked at, and whether that is everything."""

    rows: list[Row]
    after: Position
    is_last: bool


class Tail:
    """Reads pages. `db` is a pool or a connection of asyncpg."""

    def __init__(self, db: Any, *, look_max: int = LOOK_MAX) -> None:
        self._db = db
        self._look_max = look_max
        self._sql = statements("tail")
        self._cipher: AESGCM | None = None

    async def now(self) -> Position:
        """The position behind everything that is committed."""
        return all_of(*await self._db.fetchrow(self._sql["now"]))

    async def read(self, position: Position, accounts: Collection[str]) -> TailPage:
        """What follows a position, of these accounts."""
        xids, seqs = [xid for xid, _ in position.open], [seq for _, seq in position.open]
        rows = await self._db.fetch(
            self._sql["page"], xids, seqs, position.xmax, position.since, list(accounts), self._look_max
        )
        head = rows[0]
        snapshot: Snapshot = head["snapshot"]
        is_last = head["looked"] < self._look_max
        after = (
            all_of(snapshot, head["at"]) if is_last else position.behind(snapshot, head["last_xid"], head["last_seq"])
        )
        found = [_row(row, position.behind(snapshot, row["xid"], row["seq"])) for row in rows if row["id"] is not None]
        return TailPage(found, after, is_last)

    async def again(self, since: datetime, accounts: Collection[str]) -> tuple[list[tuple[DeliveryKey, Row]], datetime]:
        """What was sent again (by hand, by a replay) since a moment, and the moment to ask from next.

        Looks overlap, so a key may come again.
        """
        rows = await self._db.fetch(self._sql["again"], list(accounts), since, AGAIN_MAX)
        found: list[tuple[DeliveryKey, Row]] = [
            ((row["endpoint_id"], row["event_seq"], row["generation"]), _row(row, None))
            for row in rows
            if row["id"] is not None
        ]
        now: datetime = rows[0]["now"]
        return found, now - AGAIN_OVERLAP

    async def newest_generation(self) -> int:
        """The newest of those that retries by hand and replays have drawn."""
        return await self._db.fetchval(self._sql["newest_generation"])  # type: ignore[no-any-return]

    async def made_again(self, generation: int, accounts: Collection[str]) -> list[tuple[DeliveryKey, Row]]:
        """Retries by hand that were made behind a generation and still wait for their first attempt."""
        rows = await self._db.fetch(self._sql["made_again"], list(accounts), generation, AGAIN_MAX)
        return [((row["endpoint_id"], row["event_seq"], row["generation"]), _row(row, None)) for row in rows]

    # ── positions as texts ─────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self) -> None:
        """Learn the key that positions are sealed with: the database's own, so that every daemon on it opens them."""
        if self._cipher is None:
            key = await self._db.fetchval(self._sql["key"])
            self._cipher = AESGCM(hashlib.sha256(b"tail position" + key.encode()).digest())

    def name(self, row: Row) -> str:
        """The text that `find` takes: the event's id, and more only where transactions overlapped."""
        assert row.behind is not None, "what was sent again has no position"
        *older, (xid, _) = row.behind.open
        if not older and xid == row.xid and row.behind.xmax == xid + 1:
            return row.event_id
        return f"{row.event_id}.{self._seal(row.behind, row.account)}"

    async def find(self, account: str, name: str) -> Position | None:
        """The position behind an event, by its id or what `name` made of it; None for what cannot be found any more."""
        event_id, dot, sealed = name.partition(".")
        if dot:
            return self._unseal(sealed, account)
        row = await self._db.fetchrow(self._sql["place"], account, event_id)
        if row is None:
            return None
        xid = row["xid"]
        return Position(((xid, row["seq"]),), xid + 1, row["written_at"] - CLOCK_SLACK)

    def _seal(self, position: Position, account: str) -> str:
        assert self._cipher is not None, "prepare() was called"
        plain = msgspec.json.encode([position.xmax, int(position.since.timestamp()), position.open[-OPEN_MAX:]])
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, plain, account.encode())
        return base64.urlsafe_b64encode(nonce + sealed).rstrip(b"=").decode()

    def _unseal(self, text: str, account: str) -> Position | None:
        assert self._cipher is not None, "prepare() was called"
        try:
            raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            plain = self._cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], account.encode())
        except (ValueError, InvalidTag):
            return None
        xmax, since, open_ = msgspec.json.decode(plain, type=tuple[int, int, tuple[tuple[int, int], ...]])
        return Position(open_, xmax, datetime.fromtimestamp(since, UTC))


def _row(row: Any, behind: Position | None) -> Row:
    return Row(
        row["id"],
        row["account"],
        row["type"],
        row["data"],
        row["created_at"],
        0 if behind is None else row["xid"],
        behind,
    )
