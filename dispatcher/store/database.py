"""Connections, named statements and migrations: how everything else here reaches PostgreSQL.

Two kinds of connection exist. The engine owns a few for its lifetime, with planner settings pinned to the index paths
its statements were written for; the outside (API, command lines) borrows from a pool. Foreign exceptions are mapped
at this door: whoever cannot connect gets DatabaseUnreachable with the reason and the place, never with the password.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg

from dispatcher.errors import DatabaseUnreachable, SchemaMismatch

LOCK_CLASS: Final = 1953656688
"""First key of every advisory lock of ours ("trkp"); the schema's wake() trigger spells the same number."""

MIGRATION_LOCK: Final = 1
SERVER_VERSION_MIN: Final = 140000

TROUBLE: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)
"""What a statement may raise when the database is away, overloaded, full or restarting: try on a new connection."""

COMMAND_TIMEOUT_S: Final = 30.0
"""A statement that takes longer than this has lost its server: every one of ours is bounded to milliseconds."""

CONNECT_TIMEOUT_S: Final = 10.0

# Statements prepared while a table was empty keep a sequential scan or hash join and run 3-9 x slower once it is not.
# The engine's statements are all written for index paths, so it leaves the planner no other.
_ENGINE_SETTINGS: Final = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_sort": "off",
    # A lost host is noticed by the server too, so that its session locks (the lease among them) come free.
    "client_connection_check_interval": "500ms",
    "idle_session_timeout": "0",  # an engine with nothing to write is not gone
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}
_SETTINGS: Final = {"jit": "off", "timezone": "UTC", "search_path": "pg_catalog, pg_temp"}

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


def raise_if_cancelled() -> None:
    """For loops that survive TROUBLE: end if the task was cancelled, and a clean-up's failure took its place."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@functools.cache
def statements(file: str) -> Mapping[str, str]:
    """The named statements of `sql/<file>.sql`, each under its `-- name: …` header."""
    text = (resources.files("dispatcher.store") / "sql" / f"{file}.sql").read_text()
    parts = _NAME.split(text)
    return dict(zip(parts[1::2], (part.strip().rstrip(";") for part in parts[2::2]), strict=True))


def place(dsn: str) -> str:
    """Where a DSN points, for people: host, port and database; never user or password."""
    if "://" not in dsn:
        return " ".join(word for word in dsn.split() if word.startswith(("host=", "port=", "dbname=")))
    parts = urlsplit(dsn)
    host = parts.netloc.rpartition("@")[2] or re.sub(r".*\bhost=([^&]*).*", r"\1", parts.query)
    return f"{host}{parts.path}"


def _explain(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


async def connect(dsn: str, *, name: str, engine: bool = False, settings: Mapping[str, str] | None = None) -> Any:
    """A new connection, its purpose shown in pg_stat_activity as `name`.

    `engine` pins the planner. Raises DatabaseUnreachable.
    """
    server_settings = {
        **_SETTINGS,
        **(_ENGINE_SETTINGS if engine else {}),
        **(settings or {}),
        "application_name": name,
    }
    try:
        return await asyncpg.connect(
            dsn, timeout=CONNECT_TIMEOUT_S, command_timeout=COMMAND_TIMEOUT_S, server_settings=server_settings
        )
    except (*TROUBLE, ValueError) as error:
        raise DatabaseUnreachable(f"cannot connect to PostgreSQL at {place(dsn)}: {_explain(error)}") from error


async def close(connection: Any, timeout_s: float) -> None:
    """End a connection: politely if that can be done within `timeout_s`, else at once. Raises nothing of its own.

    asyncpg's own timeout begins only when a cancelled statement has ended, which on a dead network it does not.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await connection.close()
    except Exception:  # noqa: BLE001  whatever state it is in, it ends here
        connection.terminate()


async def open_pool(dsn: str, *, size: int, name: str = "dispatcher web") -> Any:
    """A pool for the outside. Raises DatabaseUnreachable when not even one connection can be made."""
    try:
        return await asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=size,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            server_settings={**_SETTINGS, "application_name": name},
        )
    except (*TROUBLE, ValueError) as error:
        raise DatabaseUnreachable(f"cannot connect to PostgreSQL at {place(dsn)}: {_explain(error)}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema: `version` counts from 1 without gaps; `checksum` tells an edited file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """Every migration this program knows, in order."""
    folder = resources.files("dispatcher.store") / "sql" / "migrations"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    found = tuple(
        Migration(int(file.name[:4]), file.name[5:-4].replace("_", " "), file.read_text(encoding="utf-8"))
        for file in files
    )
    assert [m.version for m in found] == list(range(1, len(found) + 1)), "migrations are numbered without gaps"
    return found


async def migrate(dsn: str, *, dry_run: bool = False) -> list[Migration]:
    """Bring the schema up, all or nothing, and return what was (or with `dry_run` would be) applied.

    Safe to run twice, and from two hosts at once: the second waits, then finds nothing to do. Raises SchemaMismatch if
    the schema is newer than this program or the server too old, DatabaseUnreachable when it cannot be reached.
    """
    connection = await connect(dsn, name="dispatcher migrate")
    try:
        _check_server(connection)
        await _lock_migrations(connection)
        missing = _missing(await _applied(connection))
        if dry_run:
            return missing
        async with connection.transaction():
            await connection.execute(
                "CREATE SCHEMA IF NOT EXISTS dispatcher;"
                "CREATE TABLE IF NOT EXISTS dispatcher.migration (version integer PRIMARY KEY, name text NOT NULL,"
                " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
            )
            for migration in missing:
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO dispatcher.migration (version, name, checksum) VALUES ($1, $2, $3)",
                    migration.version,
                    migration.name,
                    migration.checksum,
                )
            await connection.execute("SELECT dispatcher.grant_producer()")
        return missing
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)


async def check_schema(connection: Any) -> None:
    """Raise SchemaMismatch unless the schema is exactly what this program was written for."""
    _check_server(connection)
    missing = _missing(await _applied(connection))
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


async def _applied(connection: Any) -> dict[int, str]:
    if await connection.fetchval("SELECT to_regclass('dispatcher.migration')") is None:
        return {}
    rows = await connection.fetch("SELECT version, checksum FROM dispatcher.migration")
    return {row["version"]: row["checksum"] for row in rows}


def _missing(applied: Mapping[int, str]) -> list[Migration]:
    known = migrations()
    newest = max(applied, default=0)
    if newest > len(known):
        raise SchemaMismatch(
            f"the schema is at version {newest}, this program knows {len(known)}: it was migrated by a newer release; "
            "install that release or newer"
        )
    for migration in known:
        if applied.get(migration.version, migration.checksum) != migration.checksum:
            raise SchemaMismatch(
                f"migration {migration.version} ({migration.name}) was applied with another text than this program has"
            )
    return [migration for migration in known if migration.version not in applied]
