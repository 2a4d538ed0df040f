"""The database: its clock, its version and settings, what stands in between, our schema and key in it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import asyncpg

from dispatcher.cli.checkup.findings import Finding, advice, ok, problem
from dispatcher.cli.checkup.host import read_vault
from dispatcher.config import Config
from dispatcher.errors import ConfigurationError, DatabaseUnreachable, SchemaMismatch
from dispatcher.store.database import LOCK_CLASS, TROUBLE, connect, statements
from dispatcher.store.fleet import FleetStore
from dispatcher.store.schema import check_schema

SHARD_CONNECTIONS: Final = 7  # listener, reader, writer, retries, upkeep; retention and replays now and then
DAEMON_CONNECTIONS: Final = 1  # member
CLOCK_TRIES: Final = 3
CLOCK_S: Final = 1.0
CLOCK_WRONG_S: Final = 30.0
PROBE_LOCK: Final = 9  # second key of an advisory lock that nothing else takes
CHANNEL: Final = "dispatcher_doctor"
LONG_TRANSACTION_S: Final = 3600
OLD_XID: Final = 1_000_000_000  # autovacuum turns to force at 200 million, the server stops at 2 billion
WAL_KEPT_BYTES: Final = 1 << 30
LATEST: Final = 10_000  # events
NAMED: Final = 5
STATEMENT_MS: Final = 5_000  # the longest that a statement of ours may take on a busy server

SETTINGS: Final = (
    "fsync", "full_page_writes", "synchronous_commit", "autovacuum", "track_counts", "statement_timeout",
    "transaction_timeout", "idle_session_timeout",
)  # fmt: skip


async def look_at_database(config: Config, wall: Callable[[], float] = time.time) -> AsyncIterator[Finding]:
    """Everything on the database of `config`. Raises DatabaseUnreachable when it cannot be looked at."""
    connection = await connect(config.database.dsn, name="dispatcher doctor")
    try:
        # First: with a pooler in between, everything after it may fail for that reason alone.
        yield await look_in_between("[database] dsn", config.database.dsn)
        if config.database.listen_dsn != config.database.dsn:
            yield await look_in_between("[database] listen_dsn", config.database.listen_dsn)
        yield await look_at_clock(connection, wall)
        for finding in await look_at_server(connection, config):
            yield finding
        for finding in await look_at_schema(connection, config):
            yield finding
    finally:
        await connection.close(timeout=5)


def why_unreachable(error: DatabaseUnreachable) -> Finding:
    """What to do about a database that cannot be reached."""
    said = str(error)
    remedies = {
        "startup parameter": "a pooler is in between: give the direct address of PostgreSQL",
        "password": "the right user and password in [database] dsn",
        "pg_hba": "a line for this host and user in the server's pg_hba.conf",
        "does not exist": "create the database or the role, or mend the name",
        "too many": "raise max_connections, or lower [database] pool_size",
        "SSL": "sslmode= in the DSN that fits the server, and sslrootcert= for its certificate",
    }
    remedy = next((remedy for part, remedy in remedies.items() if part in said), "is it running, and is the way open?")
    return problem("database", said, remedy)


async def look_at_clock(connection: Any, wall: Callable[[], float] = time.time) -> Finding:
    """How far our clock and the database's are apart, by the quickest of a few round trips."""
    trips = []
    for _ in range(CLOCK_TRIES):
        began = wall()
        theirs = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        ended = wall()
        trips.append((ended - began, theirs - (began + ended) / 2))
    _, apart_s = min(trips)
    found = f"{abs(apart_s):.3f} s {'behind' if apart_s > 0 else 'ahead of'} the database's"
    if abs(apart_s) <= CLOCK_S:
        return ok("clock", found)
    remedy = "run chrony or systemd-timesyncd on both hosts: retries are due by these clocks, and subscribers refuse"
    judge = problem if abs(apart_s) > CLOCK_WRONG_S else advice
    return judge("clock", found, f"{remedy} signatures whose timestamp is minutes off")


# ── the server ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def look_at_server(connection: Any, config: Config) -> list[Finding]:
    """Version, settings, connections, what holds vacuum and WAL up."""
    rows = await connection.fetch("SELECT name, setting FROM pg_settings WHERE name = ANY ($1)", list(SETTINGS))
    found = [
        ok("PostgreSQL", f"version {connection.get_settings().server_version.split()[0]}"),
        *judge_settings(dict(rows)),
        await _look_at_connections(connection, config),
        await _look_at_vacuum(connection),
        await _look_at_wal(connection),
    ]
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        found.append(problem("PostgreSQL", "this server is a read-only standby", "the primary's address in the DSN"))
    return found


def judge_settings(settings: Mapping[str, str]) -> list[Finding]:
    """What speaks against these settings of the server, as `pg_settings` spells them."""
    return list(_complaints(settings)) or [ok("settings", "durable, vacuumed, and no timeout in our way")]


def _complaints(settings: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("fsync", "full_page_writes"):
        if settings.get(name) == "off":
            yield problem(name, "off: a crash of the server can destroy the database", f"ALTER SYSTEM SET {name} = on")
    if settings.get("synchronous_commit") == "off":
        yield advice(
            "synchronous_commit",
            "off: events that your application believes committed can be lost in a crash of the server",
            "ALTER SYSTEM SET synchronous_commit = on; [delivery] synchronous_commit = false spares the log alone",
        )
    for name in ("autovacuum", "track_counts"):
        if settings.get(name) == "off":
            yield problem(name, "off: what was deleted is never cleaned up", f"ALTER SYSTEM SET {name} = on")
    for name in ("statement_timeout", "transaction_timeout"):
        limit_ms = int(settings.get(name, "0"))
        if 0 < limit_ms < STATEMENT_MS:
            yield problem(
                name,
                f"{limit_ms} ms: writes of the ledger can be cut off",
                f"ALTER ROLE our_role SET {name} = '30s', or 0",
            )
    if int(settings.get("idle_session_timeout", "0")):
        yield advice(
            "idle_session_timeout",
            f"{settings['idle_session_timeout']} ms: connections of API and dashboard are cut when nobody calls",
            "ALTER ROLE our_role SET idle_session_timeout = 0",
        )


async def _look_at_connections(connection: Any, config: Config) -> Finding:
    row = await connection.fetchrow(
        """
        SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int AS most,
               (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'
                AND application_name NOT LIKE 'dispatcher %') AS others,
               (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS ours_at_most
        """
    )
    shards = 1
    with contextlib.suppress(asyncpg.UndefinedTableError, asyncpg.InsufficientPrivilegeError):  # as it begins
        shards = await FleetStore(connection).count()
    wanted = SHARD_CONNECTIONS * shards + DAEMON_CONNECTIONS + config.database.pool_size
    left = row["most"] - row["others"]
    if row["ours_at_most"] >= 0:
        left = min(left, row["ours_at_most"])
    found = f"{wanted} are wanted, {left} can be had"
    if wanted > left:
        return problem(
            "connections", found, "raise max_connections (or the role's limit), or lower [database] pool_size"
        )
    return ok("connections", found)


async def _look_at_vacuum(connection: Any) -> Finding:
    row = await connection.fetchrow(
        """
        SELECT (SELECT age(datfrozenxid) FROM pg_database WHERE datname = current_database()) AS xids,
               (SELECT extract(epoch FROM max(now() - xact_start))::float8 FROM pg_stat_activity
                WHERE backend_type = 'client backend') AS longest_s,
               (SELECT count(*) FROM pg_prepared_xacts WHERE prepared < now() - interval '1 hour') AS prepared
        """
    )
    if row["xids"] > OLD_XID:
        return problem(
            "vacuum", f"the oldest transaction id is {row['xids']:,} old", "find out what stops vacuum, soon"
        )
    if row["prepared"]:
        return advice("vacuum", f"{row['prepared']} prepared transactions are older than an hour", "end them")
    if (row["longest_s"] or 0) > LONG_TRANSACTION_S:
        return advice(
            "vacuum",
            f"a transaction has been open for {row['longest_s'] / 3600:.1f} h: nothing is cleaned meanwhile",
            "end it: SELECT pid, query FROM pg_stat_activity ORDER BY xact_start LIMIT 1",
        )
    return ok("vacuum", "nothing holds it up")


async def _look_at_wal(connection: Any) -> Finding:
    """What fills the server's disk although nobody writes: a slot that nobody reads."""
    rows = await connection.fetch(
        """
        SELECT slot_name, pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                                               ELSE pg_current_wal_lsn() END, restart_lsn)::bigint AS kept
        FROM pg_replication_slots WHERE NOT active AND restart_lsn IS NOT NULL
        """
    )
    kept = {row["slot_name"]: row["kept"] for row in rows if row["kept"] > WAL_KEPT_BYTES}
    if kept:
        name, size = max(kept.items(), key=lambda item: item[1])
        return advice(
            "WAL",
            f"the unused slot {name} keeps {size / (1 << 30):.1f} GiB of it",
            "drop the slot, or start its reader",
        )
    try:
        size = await connection.fetchval("SELECT coalesce(sum(size), 0)::bigint FROM pg_ls_waldir()")
    except asyncpg.InsufficientPrivilegeError:
        return ok("WAL", "no unused slot keeps any (its size is for pg_monitor to read)")
    return ok("WAL", f"{size / (1 << 20):,.0f} MiB, and no unused slot keeps any")


# ── our own ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def look_at_schema(connection: Any, config: Config) -> list[Finding]:
    """The schema's version; with it the key, the daemons and the partitions."""
    try:
        await check_schema(connection)
    except SchemaMismatch as mismatch:
        return [problem("schema", str(mismatch), "dispatcher migrate, with the newest version of this program in use")]
    settings = dict(await connection.fetch(statements("shard")["settings"]))
    return [
        ok("schema", "the one that this program was written for"),
        *_look_at_fingerprint(settings.get("key_fingerprint"), config),
        await _look_at_daemons(connection),
        await _look_at_partitions(connection),
        await _look_at_accounts(connection),
    ]


def _look_at_fingerprint(known: str | None, config: Config) -> Iterator[Finding]:
    if known is None:
        return
    ours = set()
    for path in (config.secrets.key_file, *config.secrets.other_key_files):
        with contextlib.suppress(OSError, ValueError, ConfigurationError):
            ours.add(read_vault(Path(path)).fingerprint)
    if known in ours:
        yield ok("key and database", "the secrets were encrypted with this key")
    else:
        yield problem(
            "key and database",
            f"the secrets were encrypted with another key (fingerprint {known}, ours: {', '.join(ours) or 'none'})",
            f"copy that key file to {config.secrets.key_file}",
        )


async def _look_at_daemons(connection: Any) -> Finding:
    rows = await connection.fetch(statements("shard")["instances"])
    roles = [row["role"] for row in rows]
    if not roles:
        return advice("daemons", "none is running on this database", "systemctl start dispatcher, or dispatcher run")
    here = sum(row["host"] == socket.gethostname() for row in rows)
    counted = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(sorted(roles)))
    return ok("daemons", f"{counted}; {here} of them on this host")


async def _look_at_accounts(connection: Any) -> Finding:
    rows = await connection.fetch(
        """
        SELECT account, count(*) AS events
        FROM (SELECT left(account, 65) AS account FROM dispatcher.outbox ORDER BY xid DESC, seq DESC LIMIT $1) AS latest
        WHERE NOT EXISTS (SELECT FROM dispatcher.account a WHERE a.name = latest.account)
        GROUP BY account ORDER BY count(*) DESC, account
        """,
        LATEST,
    )
    if not rows:
        return ok("accounts", "the latest events are for accounts that have a key")
    names = ", ".join(f"{row['account']!r:.80} ({row['events']})" for row in rows[:NAMED])
    return advice(
        "accounts",
        f"of the latest {LATEST:,} events some are for accounts that do not exist: {names}",
        "nobody receives or sees these: mend the name in the application, or dispatcher keys create --account NAME",
    )


async def _look_at_partitions(connection: Any) -> Finding:
    rows = dict(await connection.fetch(statements("shard")["partitions_until"]))
    days = min((until - time.time()) / 86400 for until in rows.values()) if len(rows) == 2 else 0.0
    if days < 1:
        return advice("partitions", "none is there for tomorrow", "a running daemon makes them; or: dispatcher prune")
    return ok("partitions", f"made {days:.0f} days ahead")


# ── in between ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def look_in_between(key: str, dsn: str) -> Finding:
    """Whether a session is ours from end to end: a pooler in transaction mode hands it to others between statements."""
    remedy = "the direct address of PostgreSQL, or a pooler in session mode: the lease and LISTEN belong to a session"
    try:
        lost = await _lost_by_a_session(dsn)
    except DatabaseUnreachable as error:
        return why_unreachable(error)
    except TROUBLE as error:  # a prepared statement that is not there any more, for one
        lost = [f"a session broke ({str(error).splitlines()[0] if str(error) else type(error).__name__})"]
    if lost:
        return problem(key, f"a pooler in transaction mode is in between: {', '.join(lost)}", remedy)
    return ok(key, "sessions are ours from end to end")


async def _lost_by_a_session(dsn: str) -> list[str]:
    """What does not outlive a statement.

    A second session is in a transaction meanwhile, or a pooler would lend the first one the same server again.
    """
    one = await connect(dsn, name="dispatcher doctor", engine=True)
    two = await connect(dsn, name="dispatcher doctor")
    heard: list[str] = []
    lost = []
    try:
        await one.add_listener(CHANNEL, lambda *arguments: heard.append(arguments[-1]))
        locked = await one.fetchval("SELECT pg_try_advisory_lock_shared($1, $2)", LOCK_CLASS, PROBE_LOCK)
        first = await one.fetchval("SELECT pg_backend_pid()")
        async with two.transaction():
            await two.execute("SELECT")
            pids = {first, await one.fetchval("SELECT pg_backend_pid()")}
            interval = await one.fetchval("SELECT current_setting('client_connection_check_interval')")
            held = await one.fetchval("SELECT pg_advisory_unlock_shared($1, $2)", LOCK_CLASS, PROBE_LOCK)
        await two.execute(f"NOTIFY {CHANNEL}, 'heard'")
        await one.execute("SELECT")  # what was sent before it has arrived with it
        if len(pids) > 1:
            lost.append("statements of one session reach several servers")
        if locked and not held:
            lost.append("session locks do not last")
        if not heard:
            lost.append("notifications do not arrive")
        if interval != "500ms":
            lost.append("settings of a session do not last")
    finally:
        for each in (one, two):
            each.terminate()
    return lost
