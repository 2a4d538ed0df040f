"""Accounts and their API keys.

A key is shown once, when it is made; what is kept is its SHA-256. Its letters carry 196 random bits, so there is
nothing to guess and nothing to stretch: one fast hash, one look-up by a unique index. That is safe against timing too,
without a comparison in constant time: the index compares hashes, and who does not know a key cannot choose guesses
whose hashes come closer and closer to that of the key.

Nothing is remembered between look-ups, so a revoked key is refused from the next request on.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import time
from datetime import datetime
from typing import Any, Final, Literal

import msgspec

from dispatcher.model import AccountId, new_id
from dispatcher.store.database import statements

ID_PREFIX: Final = "key_"
KEY_LETTERS: Final = 33  # of 62: 196 bits, and a double click selects all of it
HINT_LETTERS: Final = 4
PAGE_MAX: Final = 1000

Mode = Literal["live", "test"]

is_account_name: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}").fullmatch

_ALPHABET: Final = string.ascii_letters + string.digits
# What can be a key under any brand, so that obvious rubbish never reaches the database.
_is_key: Final = re.compile(r"[!-~]{16,128}").fullmatch


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A key as its operator sees it; `hint` is its last four letters, to tell keys apart."""

    id: str
    account: str
    mode: str
    hint: str
    created_at: datetime
    revoked_at: datetime | None


class KeyOwner(msgspec.Struct, frozen=True, kw_only=True):
    """Who presents a key that is valid."""

    key_id: str
    account_id: AccountId
    account: str  # its name, as the outbox spells it
    mode: str


class AccountStore:
    """All that touches accounts and keys. `db` is a pool or a connection of asyncpg."""

    def __init__(self, db: Any, key_prefix: str = "tp_") -> None:
        self._db = db
        self._key_prefix = key_prefix
        self._sql = statements("account")

    async def create_key(self, account: str, mode: Mode = "live") -> tuple[KeyRecord, str]:
        """Make a key, and the account if it is new; return the record and, this once, the key itself.

        Raises ValueError when that is no name for an account.
        """
        if not is_account_name(account):
            raise ValueError(
                "an account's name is 1 to 64 letters, digits, '_', '.' or '-', the first a letter or digit, "
                f"not {account!r:.80}"
            )
        key = f"{self._key_prefix}{mode}_{''.join(secrets.choice(_ALPHABET) for _ in range(KEY_LETTERS))}"
        key_id = new_id(ID_PREFIX, time.time(), secrets.token_bytes(10))
        row = await self._db.fetchrow(self._sql["create_key"], account, key_id, mode, _hash(key), key[-HINT_LETTERS:])
        return KeyRecord(**row), key

    async def exists(self, account: str) -> bool:
        """Whether anybody can see and receive events of this account."""
        return bool(await self._db.fetchval(self._sql["exists"], account))

    async def list_keys(self, *, after: str = "", limit: int = PAGE_MAX) -> list[KeyRecord]:
        """Keys of every account, revoked ones included, oldest first; those behind the id `after`."""
        return [KeyRecord(**row) for row in await self._db.fetch(self._sql["list_keys"], after, limit)]

    async def revoke_key(self, key_id: str) -> KeyRecord | None:
        """Refuse a key from now on; None if there is none of this id. Doing it twice is no mistake."""
        row = await self._db.fetchrow(self._sql["revoke_key"], key_id)
        return None if row is None else KeyRecord(**row)

    async def find_key(self, key: str) -> KeyOwner | None:
        """Whose key this is; None if nobody's, or no longer."""
        if not _is_key(key):
            return None
        row = await self._db.fetchrow(self._sql["find_key"], _hash(key))
        if row is None:
            return None
        return KeyOwner(
            key_id=row["id"], account_id=AccountId(row["account_id"]), account=row["account"], mode=row["mode"]
        )


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
