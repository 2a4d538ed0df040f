"""The schema: how it grows under programs that are running, and which programs may run on it.

**Problem.** A rolling restart runs two releases on one schema, and DDL on a table that every transaction of the
application writes to stops the application for as long as it waits for its lock.

**Rule, expand and contract.** A migration either adds (nullable columns, tables, functions, views with more columns
at their end), and then programs written for the schema before run on as if nothing had happened; or it takes away what
no program of this release uses any more. Each says on a line of its own which is the oldest program that may run
beside it, by the schema that program was written for:

    -- oldest program: 2

Where that number rises, the migration *contracts*. It is postponed while a daemon older than that is running, and
this program runs without it as well as with it. So the order of an upgrade is always the same: migrate, restart one
daemon after the other, and migrate once more if something was postponed.

**Rule, downgrade.** A program runs on a schema newer than it knows as long as no migration it does not know names a
newer program as the oldest. Otherwise it refuses, and says which release is needed. Nothing is ever migrated down.

**Locks.** Each migration is one transaction under a short lock timeout, and is tried again until it comes through: a
producer behind a DDL statement that cannot have its lock waits for LOCK_TIMEOUT and no longer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import random
import re
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

import asyncpg

from dispatcher import __version__
from dispatcher.errors import MigrationBlocked, SchemaMismatch
from dispatcher.logs import get_logger
from dispatcher.store.database import CONNECT_TIMEOUT_S, LOCK_CLASS, connect, statements

MIGRATION_LOCK: Final = 1
SERVER_VERSION_MIN: Final = 140000

FIRST_RELEASE: Final = 2
"""The schema of the first release. Its programs do not say in their heartbeat what they were written for."""

LOCK_TIMEOUT: Final = "100ms"  # for each lock; what producers may wait behind DDL that has to give up
RETRY_S: Final = (0.2, 1.0)  # between two tries: producers catch up meanwhile
PATIENCE_S: Final = 300.0  # a report or a dump may hold the outbox for some minutes

_OLDEST: Final = re.compile(r"^-- oldest program: ([0-9]+)$", re.MULTILINE)

log = get_logger("dispatcher.schema")


@dataclasses.dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema. `checksum` tells an edited file.

    `oldest` is the schema version that the oldest program which may run beside this was written for.
    """

    version: int
    name: str
    sql: str
    oldest: int
    contracts: bool = False  # takes away what programs older than `oldest` use

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class _Applied:
    checksum: str
    oldest: int | None  # None: applied by the first release, which did not say
    program: str | None  # the release that applied it


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """Every migration this program knows, in order. Versions rise; a gap means nothing."""
    folder = resources.files("dispatcher.store") / "sql" / "migrations"
    found: list[Migration] = []
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name):
        sql = file.read_text(encoding="utf-8")
        version, declared = int(file.name[:4]), _OLDEST.search(sql)
        assert declared or version <= FIRST_RELEASE, f"{file.name} does not say which program may run beside it"
        oldest = int(declared[1]) if declared else version
        contracts = version > FIRST_RELEASE and oldest > max(m.oldest for m in found)
        found.append(Migration(version, file.name[5:-4].replace("_", " "), sql, oldest, contracts))
    assert len({m.version for m in found}) == len(found), "two migrations have the same number"
    return tuple(found)


def written_for() -> int:
    """The version of the schema that this program was written for."""
    return migrations()[-1].version


async def migrate(dsn: str, *, dry_run: bool = False, patience_s: float = PATIENCE_S) -> list[Migration]:
    """Bring the schema up, each migration whole or not at all; return those applied (`dry_run`: those missing).

    Safe to run twice, under load, and from two hosts at once: the second waits, then finds nothing to do. A migration
    that would break a running daemon is postponed: it stays missing. Raises SchemaMismatch if the schema is too new
    for this program or the server too old, MigrationBlocked when a transaction does not let go of a lock for
    `patience_s`, DatabaseUnreachable when the server cannot be reached.
    """
    connection = await connect(dsn, name="dispatcher migrate")
    try:
        _check_server(connection)
        if dry_run:
            return _missing(await _applied(connection))
        await _lock_migrations(connection)
        applied = []
        for migration in _missing(await _applied(connection)):
            if migration.contracts and (daemons := await _older(connection, migration.oldest)):
                log.warning("migration.postponed", version=migration.version, name=migration.name, daemons=daemons)
                continue  # nothing later may depend on it
            await _apply(connection, migration, patience_s)
            applied.append(migration)
        await connection.execute("SELECT dispatcher.grant_producer()")
        return applied
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)


async def check_schema(connection: Any) -> None:
    """Raise SchemaMismatch unless this program may run on the schema as it is."""
    _check_server(connection)
    missing = [migration for migration in _missing(await _applied(connection)) if not migration.contracts]
    if missing:
        what = "has no dispatcher schema yet" if missing[0].version == 1 else f"lacks migration {missing[0].version}"
        raise SchemaMismatch(f"the database {what}; run: dispatcher migrate")


def _check_server(connection: Any) -> None:
    version = connection.get_server_version()
    if version.major * 10000 < SERVER_VERSION_MIN:
        raise SchemaMismatch(f"PostgreSQL 14 or newer is needed; this server is {version.major}.{version.minor}")


async def _lock_migrations(connection: Any) -> None:
    # Try instead of wait: a statement that waits for a lock holds a snapshot and pins vacuum for the whole database.
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", LOCK_CLASS, MIGRATION_LOCK):  # noqa: ASYNC110
        await asyncio.sleep(0.1)


async def _apply(connection: Any, migration: Migration, patience_s: float) -> None:
    give_up_at = time.monotonic() + patience_s
    tries = 0
    while True:
        tries += 1
        try:
            async with connection.transaction():
                await connection.execute(statements("schema")["begin"].replace("$timeout", LOCK_TIMEOUT))
                await connection.execute(migration.sql)
                await connection.execute(
                    statements("schema")["applied"],
                    migration.version,
                    migration.name,
                    migration.checksum,
                    migration.oldest,
                    __version__,
                )
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            if time.monotonic() > give_up_at:
                raise MigrationBlocked(await _explain(connection, migration)) from error
            if tries == 1:
                log.info("migration.waiting", version=migration.version, name=migration.name, reason=str(error))
            await asyncio.sleep(random.uniform(*RETRY_S))  # noqa: S311  spreads load, guards nothing
        else:
            log.info("migration.applied", version=migration.version, name=migration.name, tries=tries)
            return


async def _explain(connection: Any, migration: Migration) -> str:
    rows = await connection.fetch(statements("schema")["holders"])
    holders = "; ".join(f"process {r['pid']} ({r['name'] or 'unnamed'}) since {r['since']:%H:%M:%S} UTC" for r in rows)
    return (
        f"migration {migration.version} ({migration.name}) cannot have its lock: transactions are open on the tables "
        f"of the schema: {holders or 'none any more'}. Nothing of it was applied; run: dispatcher migrate"
    )


async def _applied(connection: Any) -> dict[int, _Applied]:
    if await connection.fetchval("SELECT to_regclass('dispatcher.migration')") is None:
        return {}
    rows = await connection.fetch(statements("schema")["migrations"])
    return {row["version"]: _Applied(row["checksum"], row["oldest"], row["program"]) for row in rows}


async def _older(connection: Any, oldest: int) -> list[str]:
    """Running daemons that were written for a schema before `oldest`."""
    rows = await connection.fetch(statements("schema")["daemons"])
    return [
        f"{row['id']} ({row['version']}, written for schema {row['schema'] or FIRST_RELEASE})"
        for row in rows
        if (row["schema"] or FIRST_RELEASE) < oldest
    ]


def _missing(applied: Mapping[int, _Applied]) -> list[Migration]:
    known = migrations()
    _check_newer({version: a for version, a in applied.items() if version not in {m.version for m in known}})
    for migration in known:
        if migration.version in applied and applied[migration.version].checksum != migration.checksum:
            raise SchemaMismatch(
                f"migration {migration.version} ({migration.name}) was applied with another text than this program has"
            )
    return [migration for migration in known if migration.version not in applied]


def _check_newer(unknown: Mapping[int, _Applied]) -> None:
    """Refuse to run where a migration of a later release left programs like this one behind."""
    breaking = [version for version, a in unknown.items() if (a.oldest or version) > written_for()]
    if not breaking:
        return
    newest = max(unknown)
    releases: Sequence[str] = [a.program for _, a in sorted(unknown.items()) if a.program]
    needed = f"dispatcher {releases[-1]}" if releases else "the release that migrated it"
    raise SchemaMismatch(
        f"the schema is at version {newest}, migrated by a newer release ({needed}); this is dispatcher {__version__}, "
        f"written for version {written_for()}, and migration {min(breaking)} took away what it needs. "
        f"Install {needed} or newer. A schema is never migrated down: to go back, restore a backup from before"
    )
