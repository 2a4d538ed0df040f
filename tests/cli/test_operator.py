from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import click
import pytest
from click.testing import CliRunner
from shell import Ended, Shell

from dispatcher.cli.operator import main
from dispatcher.cli.output import Program

HEAVY = ("asyncpg", "aiohttp", "asyncio", "rich", "uvloop", "msgspec", "structlog", "orjson", "cryptography")


@pytest.fixture
def operator(shell: Shell, database: str) -> Shell:
    """A shell whose configuration names the test's database."""
    shell.environ |= {"DISPATCHER_DATABASE_DSN": database, "DISPATCHER_STATE_DIRECTORY": str(shell.home / "state")}
    return shell


def fetch(dsn: str, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
    async def act() -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(dsn)
        try:
            return [tuple(row) for row in await connection.fetch(statement, *arguments)]
        finally:
            await connection.close()

    return asyncio.run(act())


def assert_said(ended: Ended, code: int, *words: str) -> None:
    """It failed with this code and a few words, not with a traceback."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


# ── help ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("module", ["dispatcher.cli.operator", "dispatcher.cli.customer"])
def test_help_loads_nothing_but_click(module: str) -> None:
    code = f"import {module}, sys; print(*(set(sys.modules) & set({HEAVY!r})))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_every_command_says_what_it_is_for() -> None:
    runner = CliRunner()
    for path in (*((name,) for name in main.commands), ("keys", "create"), ("keys", "list"), ("keys", "revoke")):
        shown = runner.invoke(main, [*path, "--help"])
        assert shown.exit_code == 0
        assert "Usage:" in shown.output


def test_version_is_that_of_the_package() -> None:
    from dispatcher import __version__

    assert __version__ in CliRunner().invoke(main, ["--version"]).output


@pytest.mark.parametrize(
    "arguments", [["emitt"], ["emit"], ["run", "--port", "1"], ["keys", "create"], ["status", "x"]]
)
def test_usage_mistakes_exit_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


# ── configuration ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_config_prints_what_is_in_effect_without_secrets(shell: Shell) -> None:
    file = shell.home / "dispatcher.toml"
    file.write_text('[database]\ndsn = "postgresql://app:hunter2@db/app"\n[delivery]\ntimeout_s = 20\n')
    shown = shell.run("dispatcher", "check-config", str(file))
    assert shown.code == 0
    assert "hunter2" not in shown.out
    assert tomllib.loads(shown.out)["delivery"]["timeout_s"] == 20
    as_json = shell.run("dispatcher", "check-config", "--json", env={"DISPATCHER_CONFIG": str(file)}).json()
    assert as_json["database"]["dsn"] == "postgresql://app:***@db/app"


def test_check_config_names_every_mistake_with_key_value_and_expectation(shell: Shell) -> None:
    file = shell.home / "dispatcher.toml"
    file.write_text('[delivery]\ntimeout_s = 9000\nmax_inflight = 5\n[events]\ncatalogue = ["types.json"]\n')
    ended = shell.run("dispatcher", "check-config", str(file))
    assert_said(ended, 2, "timeout_s = 9000", "from 1 to 300", "did you mean max_in_flight?", "types.json")
    assert len(ended.err.splitlines()) == 3


def test_check_config_reads_the_catalogues_it_names(shell: Shell) -> None:
    (shell.home / "types.json").write_text('{"event_types": [{"name": "Paid"}]}')
    file = shell.home / "dispatcher.toml"
    file.write_text('[events]\ncatalogue = ["types.json"]\n')
    assert_said(shell.run("dispatcher", "check-config", str(file)), 2, "types.json", "sample: missing")


@pytest.mark.parametrize("text", ["[delivery\n", b"\xff"])
def test_what_is_no_toml_is_one_line(shell: Shell, text: str | bytes) -> None:
    file = shell.home / "dispatcher.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    ended = shell.run("dispatcher", "run", "--config", str(file))
    assert_said(ended, 2, "dispatcher.toml: expected TOML")
    assert len(ended.err.splitlines()) == 1


def test_missing_configuration_file_exits_2(shell: Shell) -> None:
    assert_said(shell.run("dispatcher", "migrate", "--config", "nowhere.toml"), 2, "nowhere.toml")


# ── database ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", [["run"], ["migrate"], ["keys", "list"]])
def test_database_that_is_away_exits_3_and_hides_the_password(shell: Shell, command: list[str]) -> None:
    with socket.socket() as probe:  # bound, but nobody listens
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        dsn = f"postgresql://app:hunter2@127.0.0.1:{port}/app"
        ended = shell.run("dispatcher", *command, env={"DISPATCHER_DATABASE_DSN": dsn})
    assert_said(ended, 3, f"127.0.0.1:{port}/app")
    assert "hunter2" not in ended.err


def test_migrate_applies_once_and_dry_run_applies_nothing(shell: Shell, empty_database: str) -> None:
    shell.environ["DISPATCHER_DATABASE_DSN"] = empty_database
    assert_said(shell.run("dispatcher", "keys", "list"), 2, "dispatcher migrate")
    planned = shell.run("dispatcher", "migrate", "--dry-run").json()
    assert planned["applied"] == []
    assert planned["missing"][0] == {"version": 1, "name": "first light"}
    assert fetch(empty_database, "SELECT to_regnamespace('dispatcher')") == [(None,)]
    assert shell.run("dispatcher", "migrate").json()["applied"] == planned["missing"]
    assert shell.run("dispatcher", "migrate").json()["applied"] == []
    assert shell.run("dispatcher", "keys", "list").json() == []


def test_prune_says_what_it_dropped(operator: Shell) -> None:
    nothing = {"made": [], "dropped": [], "kept": [], "postponed": [], "moved": {}, "astray": {}, "deleted": {}}
    assert operator.run("dispatcher", "prune").json() == {"dry_run": False, **nothing}
    assert operator.run("dispatcher", "prune", "--dry-run").json() == {"dry_run": True, **nothing}


# ── keys ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_key_is_printed_once_and_stored_as_a_hash(operator: Shell, database: str) -> None:
    made = operator.run("dispatcher", "keys", "create", "--account", "acme", "--json").json()
    assert list(made) == ["id", "account", "key", "mode"]
    assert made["account"] == "acme"
    assert made["mode"] == "live"
    assert made["key"].startswith("tp_live_")
    listed = operator.run("dispatcher", "keys", "list").json()
    assert [key["id"] for key in listed] == [made["id"]]
    assert made["key"] not in json.dumps(listed)
    assert made["key"] not in str(fetch(database, "SELECT * FROM dispatcher.api_key"))


def test_test_keys_say_so(operator: Shell) -> None:
    made = operator.run("dispatcher", "keys", "create", "--account", "acme", "--test").json()
    assert made["mode"] == "test"
    assert made["key"].startswith("tp_test_")


def test_revoked_key_shows_when(operator: Shell) -> None:
    made = operator.run("dispatcher", "keys", "create", "--account", "acme").json()
    assert operator.run("dispatcher", "keys", "revoke", made["id"]).json()["revoked_at"] is not None
    shown = operator.run_on_terminal("dispatcher", "keys", "list")
    assert made["id"] in shown.out
    assert "–" not in shown.out
    assert_said(operator.run("dispatcher", "keys", "revoke", "key_none"), 1, "key_none")


def test_account_names_are_checked(operator: Shell) -> None:
    assert_said(operator.run("dispatcher", "keys", "create", "--account", "a b"), 2, "--account", "'a b'")


# ── emit ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_emit_writes_the_data_as_it_was_given(operator: Shell, database: str) -> None:
    (operator.home / "data.json").write_text('{"b": 1.0, "a": 2}')
    first = operator.run("dispatcher", "emit", "a.b", "--data", "@data.json", "--account", "acme").json()
    second = operator.run("dispatcher", "emit", "a.b", "--data", "-", given='{"x":  3}').json()
    rows = fetch(database, "SELECT id, account, type, data::text FROM dispatcher.outbox ORDER BY seq")
    assert rows == [(first["id"], "acme", "a.b", '{"b": 1.0, "a": 2}'), (second["id"], "default", "a.b", '{"x":  3}')]


def test_emit_for_an_account_that_nobody_made_says_so(operator: Shell) -> None:
    emit = ("dispatcher", "emit", "a.b", "--data", "{}", "--account")
    assert "nobody has a key" not in operator.run_on_terminal(*emit, "default").out
    assert "nobody has a key for the account acmee" in operator.run_on_terminal(*emit, "acmee").out


def test_emit_on_a_terminal_prints_the_id_alone(operator: Shell, database: str) -> None:
    shown = operator.run_on_terminal("dispatcher", "emit", "a.b", "--data", "{}")
    assert shown.out.splitlines() == [id_ for (id_,) in fetch(database, "SELECT id FROM dispatcher.outbox")]


def test_same_key_and_data_is_the_same_event_and_other_data_fails(operator: Shell, database: str) -> None:
    emit = ("dispatcher", "emit", "a.b", "--idempotency-key", "k", "--data")
    first, again = operator.run(*emit, "{}").json(), operator.run(*emit, "{}").json()
    assert first["id"] == again["id"]
    assert (first["created"], again["created"]) == (True, False)
    assert_said(operator.run(*emit, '{"other": 1}'), 1, first["id"])
    assert fetch(database, "SELECT count(*) FROM dispatcher.outbox") == [(1,)]


@pytest.mark.parametrize(
    ("type_", "data", "reason"),
    [
        ("Email", "{}", "lower-case"),
        ("a.b", "{", "--data"),
        ("a.b", "[]", "object"),
        ("a.b", '{"a": NaN}', "--data"),
        ("a.b", '{"a": 9007199254740993}', "--data"),
        ("a.b", "@missing.json", "missing.json"),
    ],
)
def test_what_could_not_be_delivered_is_refused_before_anything_is_written(type_: str, data: str, reason: str) -> None:
    refused = CliRunner().invoke(main, ["emit", type_, "--data", data])
    assert refused.exit_code == 2
    assert reason in refused.stderr


# ── the daemon ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_port_that_is_taken_is_named(operator: Shell, taken_port: int) -> None:
    env = {"DISPATCHER_SERVER_LISTEN": f"127.0.0.1:{taken_port}", "DISPATCHER_METRICS_LISTEN": ""}
    assert_said(operator.run("dispatcher", "run", env=env), 2, "[server] listen", str(taken_port), "in use")


@pytest.mark.parametrize("error", [asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError])
def test_statements_that_a_pooler_mixes_up_are_no_fault_of_the_program(
    error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    @click.group(cls=Program)
    def program() -> None: ...

    @program.command()
    def act() -> None:
        raise error("prepared statement")

    with pytest.raises(SystemExit) as end:
        program.main(["act"])
    assert end.value.code == 2
    assert "a pooler in transaction mode is in between" in capsys.readouterr().err


def test_state_directory_that_cannot_be_written_is_named(operator: Shell) -> None:
    (operator.home / "file").touch()
    ended = operator.run("dispatcher", "run", env={"DISPATCHER_STATE_DIRECTORY": str(operator.home / "file")})
    assert_said(ended, 2, "key_file", str(operator.home / "file"))


def test_status_without_a_daemon_says_so(operator: Shell) -> None:
    ended = operator.run("dispatcher", "status")
    assert ended.code == 1
    assert json.loads(ended.out) == {"instances": []}
    assert "no daemon is running" in ended.err


def test_status_without_anything_starts_no_database(shell: Shell) -> None:
    assert shell.run("dispatcher", "status").code == 1
    assert list(shell.home.rglob("postgres")) == []


def _ready(daemon: Any) -> dict[str, Any]:
    """Read the log until the daemon says that it is ready; return that line."""
    for line in daemon.stderr:
        entry: dict[str, Any] = json.loads(line)
        if entry["event"] == "ready":
            return entry
    raise AssertionError("it ended before it was ready")


def test_running_daemon_is_seen_by_status_and_drains_on_sigterm(operator: Shell) -> None:
    env = {"DISPATCHER_SERVER_LISTEN": "127.0.0.1:0", "DISPATCHER_METRICS_LISTEN": "127.0.0.1:0"}
    with operator.start("dispatcher", "run", env=env) as daemon:
        try:
            _ready(daemon)
            while not (seen := operator.run("dispatcher", "status")).out.startswith('{"instances":[{'):
                pass  # until its first heartbeat
            (instance,) = seen.json()["instances"]
            shown = operator.run_on_terminal("dispatcher", "status")
            with operator.start("dispatcher", "status", "--watch") as watch:
                watched = [json.loads(watch.stdout.readline()) for _ in range(2)]
                watch.send_signal(signal.SIGINT)
                watch.communicate(timeout=30)  # a pipe closed under a line being written would be its own exit code
            daemon.send_signal(signal.SIGTERM)
            _, rest = daemon.communicate(timeout=30)
        finally:
            daemon.kill()
    assert daemon.returncode == 0, rest
    assert instance["pid"] == daemon.pid
    assert instance["role"] == "active"
    assert instance["outbox_backlog"] == 0
    assert set(instance["per_second"]) == {"events", "attempts", "delivered", "failed"}
    assert watch.returncode == 0
    assert [seen["instances"][0]["pid"] for seen in watched] == [daemon.pid] * 2
    assert f"process {daemon.pid}" in shown.out
    assert "in flight" in shown.out


def test_wait_outlives_a_database_that_is_away_and_sigterm_ends_it(shell: Shell, tmp_path: Path) -> None:
    dsn = f"postgresql://app@/app?host={tmp_path}&port=5432"
    with shell.start("dispatcher", "run", "--wait", env={"DISPATCHER_DATABASE_DSN": dsn}) as daemon:
        try:
            waiting = json.loads(daemon.stderr.readline())
            daemon.send_signal(signal.SIGTERM)
            daemon.communicate(timeout=30)
        finally:
            daemon.kill()
    assert waiting["event"] == "database.waiting"
    assert daemon.returncode == 0


def test_without_a_dsn_everything_meets_in_an_embedded_database(shell: Shell) -> None:
    state = shell.home / "state"
    shell.environ |= {
        "DISPATCHER_STATE_DIRECTORY": str(state),
        "DISPATCHER_SERVER_LISTEN": "127.0.0.1:0",
        "DISPATCHER_METRICS_LISTEN": "",
    }
    with shell.start("dispatcher", "run") as daemon:
        try:
            _ready(daemon)
            emitted = shell.run("dispatcher", "emit", "a.b", "--data", "{}")
            daemon.send_signal(signal.SIGINT)
            daemon.communicate(timeout=30)
        finally:
            daemon.kill()
    assert emitted.json()["id"].startswith("evt_")
    assert daemon.returncode == 0
    assert not (state / "postgres" / "data" / "postmaster.pid").exists()
