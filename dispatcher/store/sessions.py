"""Sessions of the dashboard: what a browser shows instead of the API key it signed in with.

A session is a random id; what is kept is its SHA-256, beside the key it stands for. It ends by signing out, when nobody
has used it for a while, after a week in any case, and at once when its key is revoked: every request looks both up.
Being a row, it outlives the daemon and is known to every daemon on the database.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from dispatcher.model import AccountId
from dispatcher.store.accounts import KeyOwner
from dispatcher.store.database import statements

ID_BYTES: Final = 32
IDLE: Final = timedelta(hours=12)
LIFE: Final = timedelta(days=7)
EXTEND_AFTER: Final = timedelta(minutes=10)  # so that not every page writes
PER_KEY_MAX: Final = 50

_is_id: Final = re.compile(r"[A-Za-z0-9_-]{43}").fullmatch


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Who is signed in. `hint` is the last four letters of the key, to tell keys apart."""

    owner: KeyOwner
    hint: str
    expires_at: datetime


class SessionStore:
    """All that touches sessions. `db` is a pool or a connection of asyncpg."""

    def __init__(self, db: Any) -> None:
        self._db = db
        self._sql = statements("session")

    async def begin(self, key_id: str) -> str:
        """Begin a session of a key; return its id, which is nowhere else."""
        session_id = secrets.token_urlsafe(ID_BYTES)
        await self._db.execute(self._sql["begin"], _hash(session_id), key_id, IDLE, LIFE, PER_KEY_MAX)
        return session_id

    async def find(self, session_id: str) -> Session | None:
        """The session of that id, kept alive by being used; None if there is none, or no longer."""
        if not _is_id(session_id):
            return None
        row = await self._db.fetchrow(self._sql["find"], _hash(session_id))
        if row is None:
            return None
        if row["expires_at"] < datetime.now(UTC) + IDLE - EXTEND_AFTER:
            await self._db.execute(self._sql["extend"], _hash(session_id), IDLE, LIFE)
        owner = KeyOwner(
            key_id=row["id"], account_id=AccountId(row["account_id"]), account=row["account"], mode=row["mode"]
        )
        return Session(owner=owner, hint=row["hint"], expires_at=row["expires_at"])

    async def end(self, session_id: str) -> None:
        """Sign out."""
        if _is_id(session_id):
            await self._db.execute(self._sql["end"], _hash(session_id))


def _hash(session_id: str) -> bytes:
    return hashlib.sha256(session_id.encode()).digest()
