from __future__ import annotations

import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.config import KEYS, Config, host_and_port, load, mask
from dispatcher.errors import ConfigurationError

REFERENCE = Path(__file__).parent.parent / "config" / "dispatcher.toml"
HOME = {"HOME": "/home/somebody"}
NOWHERE = Path("/nonexistent/dispatcher.toml")

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "dispatcher.toml"
        path.write_text(text)
        return path

    return write


def loaded(path: Path | None = None, **variables: str) -> Config:
    return load(path, HOME | variables, NOWHERE)


def problems(path: Path | None = None, **variables: str) -> list[str]:
    with pytest.raises(ConfigurationError) as raised:
        loaded(path, **variables)
    return raised.value.problems


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def defaults() -> dict[str, dict[str, Any]]:
    return {
        section: {name: plain(getattr(getattr(Config(), section), name)) for name in keys}
        for section, keys in KEYS.items()
    }


# The reference file


def test_the_reference_file_has_every_key_with_its_default_and_no_other() -> None:
    shown = re.sub(r"(?m)^#(?=\w+ = )", "", REFERENCE.read_text())
    assert tomllib.loads(shown) == defaults()


def test_the_reference_file_as_shipped_changes_nothing() -> None:
    assert loaded(REFERENCE) == loaded()


def test_the_reference_file_says_which_keys_are_secret_and_which_reload() -> None:
    comment: list[str] = []
    section = ""
    marks = {}
    for line in REFERENCE.read_text().splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
        elif key := re.match(r"#(\w+) = ", line):
            assert comment, f"{key[1]} has no reason"
            marks[section, key[1]] = (comment[0].startswith("# Secret."), comment[0].startswith("# Reload."))
        comment = [*comment, line] if line.startswith("# ") else []
    assert marks == {
        (section, name): (key.secret, key.reload) for section, keys in KEYS.items() for name, (_, key) in keys.items()
    }


# Where values come from


def test_without_a_file_the_defaults_hold() -> None:
    config = loaded()
    assert config.server.address == ("127.0.0.1", 8480)
    assert config.retry.schedule_s == (60.0, 600.0, 3600.0)
    assert config.auto_disable.after_s == 432000.0
    assert config.database.dsn == ""


def test_the_environment_beats_the_file_and_the_file_beats_the_default(write: Write) -> None:
    path = write("[delivery]\ntimeout_s = 20\nmax_in_flight = 7\n")
    config = loaded(path, DISPATCHER_DELIVERY_TIMEOUT_S="12.5")
    assert (config.delivery.timeout_s, config.delivery.max_in_flight, config.delivery.max_concurrency) == (12.5, 7, 16)


def test_every_key_has_a_variable() -> None:
    variables = {
        f"DISPATCHER_{section}_{name}".upper(): ",".join(value) if isinstance(value, list) else str(value).lower()
        for section, keys in defaults().items()
        for name, value in keys.items()
        if section not in {"brand", "server", "metrics"}  # capitals matter there
    }
    assert loaded(None, **variables) == loaded()


@pytest.mark.parametrize("text", ["5s,2m", " 5s , 2m ", '["5s", "2m"]'])
def test_a_list_in_the_environment_is_separated_by_commas_or_toml(text: str) -> None:
    assert loaded(None, DISPATCHER_RETRY_SCHEDULE=text).retry.schedule_s == (5.0, 120.0)


def test_an_empty_list_is_a_list() -> None:
    assert loaded(None, DISPATCHER_RETRY_SCHEDULE="").retry.schedule == ()


def test_the_file_is_the_one_given_then_the_variables_then_the_systems(tmp_path: Path) -> None:
    files = {}
    for name in ("given", "variable", "system"):
        files[name] = tmp_path / f"{name}.toml"
        files[name].write_text(f'[brand]\nname = "{name}"\n')
    environ = HOME | {"DISPATCHER_CONFIG": str(files["variable"])}
    assert load(files["given"], environ, files["system"]).brand.name == "given"
    assert load(None, environ, files["system"]).brand.name == "variable"
    assert load(None, HOME, files["system"]).brand.name == "system"
    assert load(None, HOME, NOWHERE).brand.name == "TrackPost"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "XDG_STATE_HOME": "/x", "HOME": "/h"}, "/var/lib/a"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/dispatcher"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/dispatcher"),
        ({"HOME": "/h"}, "/h/.local/state/dispatcher"),
    ],
)
def test_state_is_kept_where_systemd_or_xdg_say(environ: dict[str, str], expected: str) -> None:
    config = load(None, environ, NOWHERE)
    assert config.state.directory == expected
    assert config.secrets.key_file == f"{expected}/secrets.key"


def test_without_any_place_for_state_one_must_be_named() -> None:
    with pytest.raises(ConfigurationError, match=r"\[state\] directory"):
        load(None, {}, NOWHERE)
    assert load(None, {"DISPATCHER_STATE_DIRECTORY": "/s"}, NOWHERE).state.directory == "/s"


def test_relative_paths_begin_where_they_are_written(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    config = loaded(write('[state]\ndirectory = "state"\n'), DISPATCHER_SECRETS_KEY_FILE="etc/key")
    assert config.state.directory == str(tmp_path / "state")
    assert config.secrets.key_file == "/etc/key"


# Secrets


def test_a_secret_comes_from_a_file_or_a_credential(write: Write, tmp_path: Path) -> None:
    (tmp_path / "dsn").write_text("postgresql://u:secret@db/app\n")
    path = write('[database]\ndsn = "file:dsn"\nlisten_dsn = "credential:dsn"\n')
    config = loaded(path, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert config.database.dsn == config.database.listen_dsn == "postgresql://u:secret@db/app"


def test_the_key_file_may_be_a_credential() -> None:
    config = loaded(None, CREDENTIALS_DIRECTORY="/run/credentials/x", DISPATCHER_SECRETS_KEY_FILE="credential:key")
    assert config.secrets.key_file == "/run/credentials/x/key"


@pytest.mark.parametrize(
    "name", ["credential:", "credential:../dsn", "credential:a/b", "credential:..", "file:missing"]
)
def test_a_secret_that_cannot_be_read_is_a_problem(name: str, tmp_path: Path) -> None:
    (problem,) = problems(None, DISPATCHER_DATABASE_DSN=name, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert problem.startswith(f'DISPATCHER_DATABASE_DSN = "{name}": expected ')


def test_a_credential_without_systemd_is_a_problem() -> None:
    (problem,) = problems(None, DISPATCHER_DATABASE_DSN="credential:dsn")
    assert "LoadCredential" in problem


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:pw@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u@h/db", "postgresql://u@h/db"),
        ("postgresql://u@h/db?password=pw&sslmode=require", "postgresql://u@h/db?password=***&sslmode=require"),
        ("postgresql://u:p/w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p@w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p#w?@h/db", "postgresql://u:***@h/db"),
        ("host=h password=pw", "***"),
        ("file:/run/dsn", "file:/run/dsn"),
        ("", ""),
    ],
)
def test_passwords_are_masked(text: str, shown: str) -> None:
    assert mask(text) == shown


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(lambda text: f"~{text}~"))
def test_no_password_survives_masking(password: str) -> None:
    assert password not in mask(f"postgresql://user:{password}@host/db")


def test_nothing_that_shows_a_configuration_shows_a_password() -> None:
    config = loaded(
        None, DISPATCHER_DATABASE_DSN="postgresql://u:hush@h/db", DISPATCHER_NETWORK_PROXY="http://u:hush@proxy:3128"
    )
    for shown in (repr(config), repr(config.database), str(config.masked()), config.masked_toml()):
        assert "hush" not in shown
        assert "***" in shown


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DISPATCHER_DATABASE_DSN", "mysql://u:hush@h/db"),
        ("DISPATCHER_DATABASE_DSN", "host=h password=hush"),
        ("DISPATCHER_DATABSE_DSN", "postgresql://u:hush@h/db"),
        ("DISPATCHER_DATABASE_PASSWORD", "hush"),
        ("DISPATCHER_NETWORK_PROXY", "socks5://u:hush@proxy:1080"),
    ],
)
def test_no_problem_shows_a_password(variable: str, value: str) -> None:
    (problem,) = problems(None, **{variable: value})
    assert "hush" not in problem
    assert variable in problem


def test_the_masked_configuration_is_toml_and_says_the_same() -> None:
    config = loaded(None, DISPATCHER_BRAND_NAME='A "quoted" \\ näme', DISPATCHER_NETWORK_ALLOW="10.0.0.0/8,fd00::/8")
    read = tomllib.loads(config.masked_toml())
    assert read == {
        section: {name: plain(value) for name, value in keys.items()} for section, keys in config.masked().items()
    }


# Mistakes


@pytest.mark.parametrize(
    ("section", "name", "text", "expected"),
    [
        ("database", "dsn", '"mysql://h/db"', "postgresql://"),
        ("database", "dsn", '"postgresql://h:x/db"', "postgresql://"),
        ("database", "pool_size", "0", "1 to 200"),
        ("database", "pool_size", "true", "a whole number"),
        ("database", "pool_size", "2.5", "a whole number"),
        ("embedded", "bin", '"/nonexistent"', "a directory"),
        ("server", "listen", '"8480"', "host:port"),
        ("server", "listen", '"unix:/run/x"', "host:port"),
        ("server", "listen", '"127.0.0.1:65536"', "host:port"),
        ("server", "listen", '"::1:8480"', "host:port"),
        ("server", "listen", '""', "host:port"),
        ("network", "allow", '["10.0.0.1/8"]', "without host bits"),
        ("network", "allow", '"10.0.0.0/8"', "networks"),
        ("network", "allow", "[10]", "networks"),
        ("network", "allow_http", '"yes"', "true or false"),
        ("network", "ca_file", '"missing.pem"', "a file that exists"),
        ("network", "proxy", '"proxy:3128"', "http://host:port"),
        ("network", "source_address", '"here"', "an IP address"),
        ("delivery", "timeout_s", "nan", "1 to 300 seconds"),
        ("delivery", "timeout_s", "inf", "1 to 300 seconds"),
        ("delivery", "timeout_s", '"30s"', "a number"),
        ("delivery", "max_in_flight", "0", "1 to 50,000"),
        ("retry", "schedule", '["1m", "8d"]', '"1s" to "7d"'),
        ("retry", "schedule", '["0s"]', '"1s" to "7d"'),
        ("retry", "schedule", str(["1m"] * 51), "at most 50"),
        ("retry", "jitter", "0.91", "0 to 0.9"),
        ("retention", "events", '"1h"', '"1d" to "3650d"'),
        ("retention", "events", '""', '"1d" to "3650d"'),
        ("auto_disable", "after", '"5"', "for never"),
        ("log", "level", '"verbose"', '"debug" or "info"'),
        ("events", "catalogue", '["missing.json"]', "files that exist"),
        ("brand", "name", r'"a\nb"', "printable"),
        ("brand", "header_prefix", '"X-Acme"', "X-Acme-"),
        ("brand", "header_prefix", '"Webhook-"', "X-Acme-"),
        ("brand", "header_prefix", r'"X-\r\n-"', "X-Acme-"),
        ("brand", "key_prefix", '"TP_"', "small letters"),
        ("brand", "user_agent", r'"a\r\nb"', "ASCII"),
    ],
)
def test_a_bad_value_is_named_with_key_value_and_expectation(
    section: str, name: str, text: str, expected: str, write: Write
) -> None:
    path = write(f"[{section}]\n{name} = {text}\n")
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: [{section}] {name} = ")
    assert f"expected {KEYS[section][name][1].expected}" in problem
    assert expected in problem


def test_every_mistake_is_reported_at_once(write: Write) -> None:
    path = write("[delivery]\ntimout_s = 30\nmax_in_flight = 0\n[retri]\n[log]\nlevel = 3\n")
    found = problems(path, DISPATCHER_RETRY_JITTER="much", DISPATCHER_DELIVRY_DRAIN_S="1")
    assert found == [
        f"{path}: [delivery] timout_s = 30: no such key; did you mean timeout_s?",
        f"{path}: [retri]: no such section; did you mean [retry]?",
        'DISPATCHER_DELIVRY_DRAIN_S = "1": no such setting; did you mean DISPATCHER_DELIVERY_DRAIN_S?',
        f"{path}: [delivery] max_in_flight = 0: expected a whole number from 1 to 50,000",
        f'{path}: [log] level = 3: expected "debug" or "info" or "warning" or "error"',
        'DISPATCHER_RETRY_JITTER = "much": expected a number from 0 to 0.9',
    ]


def test_a_key_in_the_wrong_section_is_told_where_it_belongs(write: Write) -> None:
    path = write("[log]\njitter = 0.2\n")
    assert problems(path) == [f"{path}: [log] jitter = 0.2: no such key; it belongs under [retry]"]


def test_a_key_outside_any_section_is_told_where_it_belongs(write: Write) -> None:
    (problem,) = problems(write("jitter = 0.2\n"))
    assert problem.endswith("jitter = 0.2: it belongs under [retry]")


@pytest.mark.parametrize("content", [b"[log\n", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_not_toml_is_one_problem(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "dispatcher.toml"
    path.write_bytes(content)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: expected TOML: ")


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "missing.toml"
    assert problems(path) == problems(None, DISPATCHER_CONFIG=str(path))
    assert problems(path) == [f"{path}: expected a file that can be read: No such file or directory"]


def test_two_listeners_need_two_addresses() -> None:
    (problem,) = problems(None, DISPATCHER_METRICS_LISTEN="127.0.0.1:8480")
    assert "another address than [server] listen" in problem
    loaded(None, DISPATCHER_METRICS_LISTEN="127.0.0.1:0", DISPATCHER_SERVER_LISTEN="127.0.0.1:0")


def test_a_connection_to_listen_on_needs_a_database() -> None:
    (problem,) = problems(None, DISPATCHER_DATABASE_LISTEN_DSN="postgresql://h/db")
    assert "expected [database] dsn" in problem


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DISPATCHER_SERVICE_HOST", "10.0.0.1"),
        ("DISPATCHER_SERVICE_PORT_METRICS", "9464"),
        ("DISPATCHER_PORT", "tcp://10.0.0.1:8480"),
        ("DISPATCHER_PORT_8480_TCP_ADDR", "10.0.0.1"),
        ("DISPATCHER_METRICS_PORT", "tcp://10.0.0.1:9464"),
        ("DISPATCHER_TEST_BIN", "/usr/lib/postgresql/15/bin"),
        ("OTHER_DISPATCHER_RETRY", "x"),
    ],
)
def test_variables_that_are_no_settings_are_left_alone(variable: str, value: str) -> None:
    assert loaded(None, **{variable: value}) == loaded()


def test_a_port_that_somebody_meant_as_a_setting_is_not_taken_for_kubernetes() -> None:
    (problem,) = problems(None, DISPATCHER_SERVER_PORT="8080")
    assert "no such setting" in problem


NAMES = st.sampled_from(sorted({name for keys in KEYS.values() for name in keys})) | st.from_regex(
    "[a-z_]{1,9}", fullmatch=True
)


@given(st.dictionaries(st.sampled_from(sorted(KEYS)), st.dictionaries(NAMES, st.integers(), max_size=3)))
def test_no_unknown_key_passes_unnoticed_and_no_known_one_is_called_unknown(
    tmp_path_factory: pytest.TempPathFactory, tables: dict[str, dict[str, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    lines = (
        (f"[{section}]", *(f"{name} = {value}" for name, value in keys.items())) for section, keys in tables.items()
    )
    path.write_text("\n".join(line for table in lines for line in table))
    unknown = {f"[{section}] {name}" for section, keys in tables.items() for name in keys if name not in KEYS[section]}
    found: list[str] = []
    try:
        loaded(path)
    except ConfigurationError as error:
        found = error.problems
    named = {problem.removeprefix(f"{path}: ").partition(" = ")[0] for problem in found if "no such key" in problem}
    assert named == unknown


# Reloading


def test_a_reload_tells_what_it_takes_over_and_what_it_cannot() -> None:
    before = loaded()
    after = loaded(
        None, DISPATCHER_LOG_LEVEL="debug", DISPATCHER_SERVER_LISTEN="[::]:8480", DISPATCHER_RETRY_JITTER="0"
    )
    assert before.reloadable_differences(after) == (["retry.jitter", "log.level"], ["server.listen"])
    assert before.reloadable_differences(before) == ([], [])


def test_what_was_taken_over_no_longer_differs_and_the_rest_stays() -> None:
    before = loaded()
    after = loaded(None, DISPATCHER_LOG_LEVEL="debug", DISPATCHER_SERVER_LISTEN="[::]:8480")
    running = before.with_reloadable_of(after)
    assert running.reloadable_differences(after) == ([], ["server.listen"])
    assert (running.log.level, running.server.listen) == ("debug", "127.0.0.1:8480")


def test_the_embedded_database_takes_both_places() -> None:
    config = loaded().with_dsn("postgresql://postgres@/dispatcher?host=/x")
    assert config.database.dsn == config.database.listen_dsn == "postgresql://postgres@/dispatcher?host=/x"


# Small languages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8480", ("127.0.0.1", 8480)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:80", ("localhost", 80)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, expected: tuple[str, int]) -> None:
    assert host_and_port(text) == expected


def test_files_that_are_there_but_closed_are_problems(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert stat.S_ISDIR(folder.stat().st_mode)
    (problem,) = problems(None, DISPATCHER_NETWORK_CA_FILE=str(folder))
    assert "a file that exists and can be read" in problem
