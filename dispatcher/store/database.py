"""Connections and named statements: how everything else here reaches PostgreSQL.

Two kinds of connection exist. The engine owns a few for its lifetime, with planner settings pinned to the index paths
its statements were written for; the outside (API, command lines) borrows from a pool. Foreign exceptions are mapped
at this door: whoever cannot connect gets DatabaseUnreachable with the reason and the place, never with the password.
"""

from __future__ import annotations

import asyncio
import functools
import operator
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg

from dispatcher.errors import DatabaseUnreachable

LOCK_CLASS: Final = 1953656688
"""First key of every advisory lock of ours ("trkp"); the schema's wake() trigger spells the same number."""

TROUBLE: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)
"""What a statement may raise when the database is away, overloaded, full or restarting: try on a new connection."""

COMMAND_TIMEOUT_S: Final = 30.0
"""A statement that takes longer than this has lost its server: every one of ours is bounded to milliseconds."""

CONNECT_TIMEOUT_S: Final = 10.0
RELEASE_S: Final = 2.0

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
_FRAGMENT = re.compile(r"/\* (_\w+) \*/")


def raise_if_cancelled() -> None:
    """For loops that survive TROUBLE: end if the task was cancelled and a failing clean-up took the place of that."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@functools.cache
def statements(file: str) -> Mapping[str, str]:
    """The named statements of `sql/<file>.sql`, each under its `-- name: …` header.

    What several have in common is a part of its own, `_name`, and stands where they say `/* _name */`.
    """
    text = (resources.files("dispatcher.store") / "sql" / f"{file}.sql").read_text()
    parts = _NAME.split(text)
    named = dict(zip(parts[1::2], (part.strip().rstrip(";") for part in parts[2::2]), strict=True))
    return {
        name: _FRAGMENT.sub(lambda place: named[place[1]], sql)
        for name, sql in named.items()
        if not name.startswith("_")
    }


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

    `engine` pins the planner, and what is of type `timestamp` (no column is, only what a statement casts) comes as a
    moment of `moments.py`. Raises DatabaseUnreachable.
    """
    server_settings = {
        **_SETTINGS,
        **(_ENGINE_SETTINGS if engine else {}),
        **(settings or {}),
        "application_name": name,
    }
    connection = None
    try:
        connection = await asyncpg.connect(
            dsn, timeout=CONNECT_TIMEOUT_S, command_timeout=COMMAND_TIMEOUT_S, server_settings=server_settings
        )
        if engine:
            await connection.set_type_codec(
                "timestamp",
                schema="pg_catalog",
                encoder=lambda moment_us: (moment_us,),
                decoder=operator.itemgetter(0),
                format="tuple",
            )
    except (*TROUBLE, ValueError) as error:
        if connection is not None:
            connection.terminate()
        raise DatabaseUnreachable(f"cannot connect to PostgreSQL at {place(dsn)}: {_explain(error)}") from error
    return connection


async def close(connection: Any, timeout_s: float) -> None:
    """End a connection: politely if that can be done within `timeout_s`, else at once. Raises nothing of its own.

    asyncpg's own timeout begins only when a cancelled statement has ended, which on a dead network it does not.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await connection.close()
    except Exception:  # noqa: BLE001  whatever state it is in, it ends here
        connection.terminate()


class _Pool(asyncpg.Pool):  # type: ignore[misc]  # asyncpg tells mypy nothing
    """Ends a connection that cannot be handed back in time.

    asyncpg's own waits for as long as the cancelled statement of a server that hangs, and whoever cancelled it with it.
    """

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:
        await super().release(connection, timeout=RELEASE_S if timeout is None else timeout)


async def open_pool(dsn: str, *, size: int, name: str = "dispatcher web") -> Any:
    """A pool for the outside. Raises DatabaseUnreachable when not even one connection can be made."""
    try:
        return await _Pool(
            dsn,
            min_size=0,
            max_size=size,
            max_queries=50_000,  # this one and the next as in asyncpg.create_pool
            max_inactive_connection_lifetime=300.0,
            loop=None,
            connection_class=asyncpg.Connection,
            record_class=asyncpg.Record,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            server_settings={**_SETTINGS, "application_name": name},
        )
    except (*TROUBLE, ValueError) as error:
        raise DatabaseUnreachable(f"cannot connect to PostgreSQL at {place(dsn)}: {_explain(error)}") from error
