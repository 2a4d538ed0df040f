"""`dispatcher doctor`, with conditions that are really bad."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from shell import Ended, Shell
from transaction_pooler import TransactionPooler

from dispatcher.cli.checkup.database import (
    judge_settings,
    look_at_clock,
    look_at_schema,
    look_at_server,
    look_in_between,
    why_unreachable,
)
from dispatcher.cli.checkup.findings import Finding, Verdict
from dispatcher.cli.checkup.host import look_at_disk, look_at_key, look_at_ports, look_at_trust
from dispatcher.config import Config, load
from dispatcher.daemon import files_wanted
from dispatcher.errors import DatabaseUnreachable
from dispatcher.snapshot import Snapshot
from dispatcher.store.database import statements
from dispatcher.store.vault import Vault
from dispatcher.web.metrics import build_metrics_app
from dispatcher.web.server import serve

KEY = "0f" * 32


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "secrets.key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


def configured(**variables: str) -> Config:
    return load(None, {"HOME": "/nonexistent", **variables}, Path("/nonexistent"))


def free_ports() -> dict[str, str]:
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(f"127.0.0.1:{probe.getsockname()[1]}")
    return {"DISPATCHER_SERVER_LISTEN": ports[0], "DISPATCHER_METRICS_LISTEN": ports[1]}


def verdicts(ended: Ended) -> dict[str, str]:
    return {finding["subject"]: finding["verdict"] for finding in json.loads(ended.out)["findings"]}


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


# The command


def test_an_installation_that_is_well_exits_0(shell: Shell) -> None:
    env = free_ports()
    assert shell.run("dispatcher", "migrate", env=env).code == 0
    ended = shell.run("dispatcher", "doctor", env=env)
    found = verdicts(ended)
    assert ended.code == 0, ended.out
    assert {subject for subject, verdict in found.items() if verdict != "ok"} == {"secrets key", "daemons"}, (
        "no start yet"
    )
    assert {"clock", "file limit", "TLS trust", "settings", "connections", "vacuum", "WAL", "schema"} <= set(found)
    assert found["[database] dsn"] == "ok"


def test_people_get_a_line_each_and_what_to_do(shell: Shell) -> None:
    ended = shell.run_on_terminal("dispatcher", "doctor", env=free_ports())
    assert ended.code == 0
    assert "✓ file limit" in ended.out
    assert "→ the first start makes it" in ended.out


def test_a_low_file_limit_exits_1_and_names_the_number(shell: Shell) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    with shell.start("dispatcher", "doctor", env=free_ports(), preexec_fn=limited) as process:
        out, err = process.communicate(timeout=60)
    ended = Ended(process.returncode, out, err)
    assert ended.code == 1, err
    assert verdicts(ended)["file limit"] == "problem"
    assert f"LimitNOFILE={files_wanted(Config())}" in out


def test_a_database_that_is_away_exits_3_and_the_host_is_looked_at_anyway(shell: Shell) -> None:
    dsn = "postgresql://somebody:hush@127.0.0.1:1/app"
    ended = shell.run("dispatcher", "doctor", env={**free_ports(), "DISPATCHER_DATABASE_DSN": dsn})
    found = verdicts(ended)
    assert ended.code == 3
    assert (found["database"], found["file limit"]) == ("problem", "ok")
    assert "hush" not in ended.out + ended.err


def test_a_mistake_in_the_configuration_exits_2(shell: Shell) -> None:
    ended = shell.run("dispatcher", "doctor", env={"DISPATCHER_DELIVERY_TIMOUT_S": "1"})
    assert ended.code == 2
    assert "DISPATCHER_DELIVERY_TIMEOUT_S" in ended.err


def test_a_missing_migration_exits_1_and_names_the_command(shell: Shell, empty_database: str) -> None:
    ended = shell.run("dispatcher", "doctor", env={**free_ports(), "DISPATCHER_DATABASE_DSN": empty_database})
    assert ended.code == 1
    assert verdicts(ended)["schema"] == "problem"
    assert "dispatcher migrate" in ended.out


# The host


def test_a_key_for_its_owner_only_is_well(key: Path) -> None:
    assert look_at_key(key, {}).verdict is Verdict.OK


def test_a_key_that_others_may_read_is_a_problem_unless_systemd_keeps_them_out(key: Path) -> None:
    key.chmod(0o640)
    finding = look_at_key(key, {})
    assert (finding.verdict, finding.remedy) == (Verdict.PROBLEM, f"chmod 600 {key}")
    assert "0640" in finding.found
    assert look_at_key(key, {"CREDENTIALS_DIRECTORY": str(key.parent)}).verdict is Verdict.OK


@pytest.mark.parametrize("content", ["", "0f", "zz" * 32, KEY * 2])
def test_a_file_that_holds_no_key_is_a_problem(key: Path, content: str) -> None:
    key.write_text(content)
    finding = look_at_key(key, {})
    assert finding.verdict is Verdict.PROBLEM
    assert "holds no key" in finding.found
    assert not content or content not in finding.found


def test_a_key_that_is_no_file_cannot_be_read(tmp_path: Path) -> None:
    assert look_at_key(tmp_path, {}).found.endswith("cannot be read: Is a directory")


def test_a_key_that_is_not_there_yet_is_made_later(tmp_path: Path) -> None:
    assert look_at_key(tmp_path / "none", {}).verdict is Verdict.ADVICE
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"


@pytest.mark.parametrize(
    ("free", "verdict"), [(100 << 20, Verdict.PROBLEM), (500 << 20, Verdict.ADVICE), (2 << 30, Verdict.OK)]
)
def test_room_on_the_disk(free: int, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=free))
    assert look_at_disk(tmp_path / "not" / "yet").verdict is verdict


def test_a_trust_store_with_nothing_in_it_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none.pem").touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    finding = look_at_trust("")
    assert finding.verdict is Verdict.PROBLEM
    assert "ca-certificates" in finding.remedy


@pytest.mark.parametrize(
    ("days", "verdict", "said"), [(30, Verdict.OK, "1 certificate"), (-1, Verdict.PROBLEM, "expired")]
)
def test_a_bundle_of_ones_own_is_looked_into(days: int, verdict: Verdict, said: str, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_bytes(_authority(datetime.now(UTC) + timedelta(days=days)))
    finding = look_at_trust(str(file))
    assert finding.verdict is verdict
    assert said in finding.found
    file.write_text("no certificate")
    assert look_at_trust(str(file)).verdict is Verdict.PROBLEM


def _authority(until: datetime) -> bytes:
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    builder = x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(until - timedelta(days=60)).not_valid_after(until)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_somebody_else_has_is_a_problem(taken: int) -> None:
    config = configured(**{**free_ports(), "DISPATCHER_SERVER_LISTEN": f"127.0.0.1:{taken}"})
    server, metrics = look_at_ports(config)
    assert (server.verdict, metrics.verdict) == (Verdict.PROBLEM, Verdict.OK)
    assert f"sport = :{taken}" in server.remedy


def test_an_address_of_another_host_is_a_problem() -> None:
    server, _ = look_at_ports(configured(**{**free_ports(), "DISPATCHER_SERVER_LISTEN": "192.0.2.1:80"}))
    assert server.verdict is Verdict.PROBLEM


async def test_a_port_that_a_daemon_has_is_well() -> None:
    runner = await serve(build_metrics_app(Snapshot), "127.0.0.1:0", key="[metrics] listen")
    listen = f"127.0.0.1:{runner.addresses[0][1]}"
    config = configured(**{**free_ports(), "DISPATCHER_METRICS_LISTEN": listen})
    _, metrics = await asyncio.to_thread(lambda: tuple(look_at_ports(config)))
    await runner.cleanup()
    assert metrics == Finding("[metrics] listen", Verdict.OK, f"{listen}: a dispatcher listens there already")


# The database


@pytest.mark.parametrize(
    ("ahead_s", "verdict", "said"),
    [
        (0.0, Verdict.OK, ""),
        (5.0, Verdict.ADVICE, "ahead of"),
        (-5.0, Verdict.ADVICE, "behind"),
        (120.0, Verdict.PROBLEM, "ahead of"),
    ],
)
async def test_clocks_that_differ(ahead_s: float, verdict: Verdict, said: str, connection: asyncpg.Connection) -> None:
    finding = await look_at_clock(connection, lambda: time.time() + ahead_s)
    assert finding.verdict is verdict
    assert said in finding.found


GOOD = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "autovacuum": "on", "track_counts": "on"}


@pytest.mark.parametrize(
    ("setting", "value", "verdict"),
    [
        ("fsync", "off", Verdict.PROBLEM),
        ("full_page_writes", "off", Verdict.PROBLEM),
        ("autovacuum", "off", Verdict.PROBLEM),
        ("track_counts", "off", Verdict.PROBLEM),
        ("synchronous_commit", "off", Verdict.ADVICE),
        ("statement_timeout", "1000", Verdict.PROBLEM),
        ("transaction_timeout", "1000", Verdict.PROBLEM),
        ("idle_session_timeout", "60000", Verdict.ADVICE),
    ],
)
def test_settings_of_the_server_that_do_harm(setting: str, value: str, verdict: Verdict) -> None:
    assert [finding.verdict for finding in judge_settings(GOOD)] == [Verdict.OK]
    (finding,) = judge_settings({**GOOD, setting: value})
    assert (finding.subject, finding.verdict) == (setting, verdict)


async def test_settings_of_the_role_or_the_database_count(database: str) -> None:
    connection = await asyncpg.connect(database)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET statement_timeout = '2s'")
    await connection.close()
    connection = await asyncpg.connect(database)
    found = {finding.subject for finding in await look_at_server(connection, Config())}
    await connection.close()
    assert {"PostgreSQL", "statement_timeout", "connections", "vacuum", "WAL"} <= found


async def test_more_connections_than_the_role_may_have_are_a_problem(
    connection: asyncpg.Connection, database: str
) -> None:
    user = f"poor_{connection.get_server_pid()}"
    await connection.execute(f"CREATE ROLE {user} LOGIN CONNECTION LIMIT 5")
    poor = await asyncpg.connect(database, user=user)
    found = {finding.subject: finding for finding in await look_at_server(poor, Config())}
    await poor.close()
    await connection.execute(f"DROP ROLE {user}")
    assert found["connections"].verdict is Verdict.PROBLEM
    assert found["connections"].found == "16 are wanted, 5 can be had"
    assert "pg_monitor" in found["WAL"].found


async def test_a_key_that_is_not_the_databases_is_a_problem(connection: asyncpg.Connection, key: Path) -> None:
    config = configured(DISPATCHER_SECRETS_KEY_FILE=str(key))
    await connection.fetchval(statements("shard")["claim_key"], Vault(bytes.fromhex(KEY)).fingerprint)
    well = {finding.subject: finding.verdict for finding in await look_at_schema(connection, config)}
    assert well["key and database"] is Verdict.OK
    key.write_text("1e" * 32)
    ill = {finding.subject: finding.verdict for finding in await look_at_schema(connection, config)}
    assert ill["key and database"] is Verdict.PROBLEM
    older = key.with_name("older.key")
    older.write_text(KEY)
    config = configured(DISPATCHER_SECRETS_KEY_FILE=str(key), DISPATCHER_SECRETS_OTHER_KEY_FILES=str(older))
    replaced = {finding.subject: finding.verdict for finding in await look_at_schema(connection, config)}
    assert replaced["key and database"] is Verdict.OK, "while the key is being replaced"


async def test_partitions_that_end_are_noticed(connection: asyncpg.Connection, key: Path) -> None:
    config = configured(DISPATCHER_SECRETS_KEY_FILE=str(key))
    await connection.execute(
        "DO $$ DECLARE leaf text; BEGIN FOR leaf IN SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent ="
        " 'dispatcher.outbox'::regclass AND inhrelid::regclass::text ~ '[0-9]{8}$' LOOP EXECUTE 'DROP TABLE ' || leaf;"
        " END LOOP; END $$"
    )
    found = {finding.subject: finding.verdict for finding in await look_at_schema(connection, config)}
    assert found["partitions"] is Verdict.ADVICE


async def test_events_for_an_account_that_nobody_made_are_noticed(connection: asyncpg.Connection, key: Path) -> None:
    config = configured(DISPATCHER_SECRETS_KEY_FILE=str(key))
    emit = "SELECT dispatcher.emit('email.sent', '{}', account => $1)"
    await connection.execute(emit, "default")
    found = {finding.subject: finding for finding in await look_at_schema(connection, config)}
    assert found["accounts"].verdict is Verdict.OK
    for _ in range(2):
        await connection.execute(emit, "acmee")
    found = {finding.subject: finding for finding in await look_at_schema(connection, config)}
    assert found["accounts"].verdict is Verdict.ADVICE
    assert "'acmee' (2)" in found["accounts"].found


async def test_a_direct_connection_is_ours_from_end_to_end(database: str) -> None:
    assert (await look_in_between("[database] dsn", database)).verdict is Verdict.OK


async def test_a_pooler_in_transaction_mode_is_told_apart(database: str) -> None:
    parts = urlsplit(database)
    (directory,) = parse_qs(parts.query)["host"]
    pooler = TransactionPooler(f"{directory}/.s.PGSQL.5432")
    port = await pooler.start()
    try:
        name = parts.path.lstrip("/")
        finding = await look_in_between("[database] dsn", f"postgresql://postgres@127.0.0.1:{port}/{name}")
    finally:
        await pooler.stop()
    assert finding.verdict is Verdict.PROBLEM, finding
    assert finding.found == (
        "a pooler in transaction mode is in between: statements of one session reach several servers, "
        "session locks do not last, notifications do not arrive"
    )
    assert "direct address" in finding.remedy


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("unsupported startup parameter: jit", "a pooler is in between"),
        ('password authentication failed for user "u"', "password"),
        ("sorry, too many clients already", "max_connections"),
        ("Connect call failed", "is it running"),
    ],
)
def test_why_a_database_cannot_be_reached(said: str, remedy: str) -> None:
    assert remedy in why_unreachable(DatabaseUnreachable(f"cannot connect to PostgreSQL at h/d: {said}")).remedy
