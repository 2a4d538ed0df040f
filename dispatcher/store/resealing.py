"""Replacing the key that webhook secrets are sealed with, while daemons run.

Every secret is opened with whichever key the vault knows and sealed anew with the one it seals with, a few hundred rows
at a time and only where the row still is what was read: a change that comes in between stands, and the next pass looks
at it again. When a pass finds nothing left to do, the database's fingerprint becomes the new key's.
"""

from __future__ import annotations

from typing import Any, Final

from dispatcher.store.database import statements
from dispatcher.store.vault import Vault

ROWS_MAX: Final = 500  # of one statement: 2 ms of its row locks, and one reload of the registry


async def reseal(db: Any, vault: Vault) -> int:
    """Seal every secret with the vault's key; return how many webhooks that took. Doing it twice is no mistake.

    Raises ConfigurationError, with the database as good as before, for a secret that none of the vault's keys opens.
    """
    resealed, found = 0, 1
    while found:
        found, done = await _pass(db, vault)
        resealed += done
    await db.execute(statements("shard")["change_key"], vault.fingerprint)
    return resealed


async def _pass(db: Any, vault: Vault) -> tuple[int, int]:
    """Look at every webhook; return how many were sealed with another key, and how many of these no longer are."""
    sql, after, found, done = statements("endpoint"), 0, 0, 0
    while rows := await db.fetch(sql["sealed"], after, ROWS_MAX):
        after = rows[-1]["id"]
        stale = []
        for id_, owner, *sealed in rows:
            renewed = [vault.renew(each, owner) for each in sealed]
            if renewed != sealed:
                stale.append((id_, *sealed, *renewed))
        if stale:
            found += len(stale)
            done += len(await db.fetch(sql["reseal"], *zip(*stale, strict=True)))
    return found, done
