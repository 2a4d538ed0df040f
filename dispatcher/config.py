"""Every setting of this program: one validated tree, made from a TOML file and the environment.

A key is declared once, as a field below: its type, default, what is expected of it, whether a running daemon can take a
new value, and whether it is secret all follow from that line. `config/dispatcher.toml` gives the reason for each
default.

*Where values come from*: `DISPATCHER_<SECTION>_<KEY>` in the environment beats the file, which beats the default. The
file is the one given, else `$DISPATCHER_CONFIG`, else `/etc/dispatcher/dispatcher.toml` if it exists, else none. In the
environment, lists are separated by commas or written as in TOML.

*Secrets* need not stand in either: a secret key takes `file:PATH`, or `credential:NAME` for a systemd credential
(`LoadCredential=NAME:…`), and its value is then what that file holds.

*Mistakes* are all collected before any is reported, each with key, value and what was expected; an unknown key or
variable is one too, because a misspelt setting that is silently ignored is found much later.

Relative paths begin at the directory of the file they stand in, or at the working directory.
"""

# No `from __future__ import annotations` here: the fields' annotations are objects that this module works with.

import dataclasses
import difflib
import ipaddress
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, Self
from urllib.parse import urlsplit

import msgspec

from dispatcher.durations import seconds_in
from dispatcher.errors import ConfigurationError

SYSTEM_FILE: Final = Path("/etc/dispatcher/dispatcher.toml")
PREFIX: Final = "DISPATCHER_"
NAME: Final = "dispatcher"  # of the directory below the user's state directory

DAY_S: Final = 86400.0
SCHEDULE_ENTRIES_MAX: Final = 50
SECRET_BYTES_MAX: Final = 64 << 10  # a DSN or a key; more is the wrong file

Value = str | int | float | bool | tuple[str, ...]
Check = Callable[[typing.Any], bool]


def host_and_port(text: str) -> tuple[str, int]:
    """Host and port of "127.0.0.1:8480", "[::1]:8480" or "localhost:8480". Raises ValueError on anything else."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/]+)):([0-9]{1,5})", text)
    if found is None or int(found[3]) > 65535:
        raise ValueError(f"{text!r} is no host:port")
    if found[1]:
        ipaddress.IPv6Address(found[1])
    return found[1] or found[2], int(found[3])


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """What a setting must be, beyond its type."""

    expected: str  # completes "expected …"
    check: Check = lambda _: True
    reload: bool = False  # a running daemon can take a new value
    secret: bool = False  # never printed; may be `file:…` or `credential:…`
    path: bool = False  # relative to where it was set


def _number(low: float, high: float, unit: str = "", *, reload: bool = False) -> Key:
    kind = "a whole number" if isinstance(low, int) else "a number"
    return Key(f"{kind} from {low:,g} to {high:,g}{unit}", lambda value: low <= value <= high, reload=reload)


def _holds(parse: Callable[[str], object]) -> Check:
    """Whether `parse` takes the value."""

    def check(value: str) -> bool:
        try:
            return parse(value) is not False
        except (ValueError, OSError):
            return False

    return check


def _duration(low: str, high: str, *, empty: str = "") -> Key:
    low_s, high_s = seconds_in(low), seconds_in(high)
    within = _holds(lambda text: low_s <= seconds_in(text) <= high_s)
    if not empty:
        return Key(f'a duration from "{low}" to "{high}"', within, reload=True)
    return Key(f'a duration from "{low}" to "{high}", or "" {empty}', lambda v: not v or within(v), reload=True)


def _schedule(entries: tuple[str, ...]) -> bool:
    within = _holds(lambda text: 1.0 <= seconds_in(text) <= 7 * DAY_S)
    return len(entries) <= SCHEDULE_ENTRIES_MAX and all(map(within, entries))


def _one_of(*words: str, reload: bool = False) -> Key:
    return Key(" or ".join(f'"{word}"' for word in words), lambda value: value in words, reload=reload)


def _like(pattern: str, expected: str) -> Key:
    return Key(expected, lambda value: re.fullmatch(pattern, value) is not None)


def _is_dsn(text: str) -> bool:
    parts = urlsplit(text)
    return parts.scheme in {"postgresql", "postgres"} and text.isprintable() and (parts.port is None or parts.port > 0)


def _is_proxy(text: str) -> bool:
    parts = urlsplit(text)
    return (
        parts.scheme in {"http", "https"}
        and bool(parts.hostname)
        and parts.port is not None
        and parts.path in {"", "/"}
    )


def _is_collector(text: str) -> bool:
    parts = urlsplit(text)
    return (
        parts.scheme in {"http", "https"}
        and bool(parts.hostname)
        and (parts.port is None or parts.port > 0)
        and not (parts.username or parts.query or parts.fragment)
    )


def _or_empty(check: Check) -> Check:
    return lambda value: value == "" or check(value)


_DSN: Final = Key('a URL like "postgresql://user@host/database"', _or_empty(_holds(_is_dsn)), secret=True)
_FILE: Final = Key(
    "a file that exists and can be read", _or_empty(_holds(lambda text: Path(text).open("rb").close())), path=True
)
# No colon: what looks like a URL or a reference would be shown in part where secrets are masked.
_OPERATOR_KEY: Final = Key(
    '24 to 256 letters, digits or any of _.~+/=-, or "" for no operator\'s page',
    _or_empty(lambda text: re.fullmatch(r"[A-Za-z0-9_.~+/=-]{24,256}", text) is not None),
    secret=True,
)
_ADDRESS: Final = 'host:port, like "127.0.0.1:8480" or "[::1]:8480"'


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file."""

    def __repr__(self) -> str:
        shown = (
            f"{name}={_shown(mask(str(value)) if key.secret else value)}"
            for name, (_, key) in _keys(type(self)).items()
            for value in (getattr(self, name),)
        )
        return f"{type(self).__name__}({', '.join(shown)})"


class Database(Section, frozen=True):
    """Where PostgreSQL is. Without `dsn`, an embedded one is kept in the state directory."""

    dsn: Annotated[str, _DSN] = ""
    listen_dsn: Annotated[str, _DSN] = ""  # as loaded: the same as `dsn` unless set
    pool_size: Annotated[int, _number(1, 200)] = 8


class Embedded(Section, frozen=True):
    """The PostgreSQL of our own."""

    bin: Annotated[str, Key("a directory", _or_empty(lambda text: Path(text).is_dir()), path=True)] = ""


class Server(Section, frozen=True):
    """API and dashboard."""

    listen: Annotated[str, Key(_ADDRESS, _holds(host_and_port))] = "127.0.0.1:8480"
    operator_key: Annotated[str, _OPERATOR_KEY] = ""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return host_and_port(self.listen)


class Metrics(Section, frozen=True):
    """Metrics and health."""

    listen: Annotated[str, Key(f'{_ADDRESS}, or "" for none', _or_empty(_holds(host_and_port)))] = "127.0.0.1:9464"

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port; None if switched off."""
        return host_and_port(self.listen) if self.listen else None


class Network(Section, frozen=True):
    """Which addresses may be called, and how they are reached."""

    allow: Annotated[
        tuple[str, ...],
        Key(
            'networks like "127.0.0.0/8" or "fd00::/8", without host bits',
            lambda networks: all(map(_holds(ipaddress.ip_network), networks)),
            reload=True,
        ),
    ] = ()
    allow_http: Annotated[bool, Key("true or false", reload=True)] = False
    ca_file: Annotated[str, _FILE] = ""
    proxy: Annotated[str, Key('a URL like "http://host:port"', _or_empty(_holds(_is_proxy)), secret=True)] = ""
    source_address: Annotated[str, Key("an IP address of this host", _or_empty(_holds(ipaddress.ip_address)))] = ""

    @property
    def allowed(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """The networks of `allow`, parsed."""
        return tuple(ipaddress.ip_network(network) for network in self.allow)


class Delivery(Section, frozen=True):
    """Limits of the engine."""

    timeout_s: Annotated[float, _number(1.0, 300.0, " seconds", reload=True)] = 30.0
    max_in_flight: Annotated[int, _number(1, 50_000, reload=True)] = 2000
    max_concurrency: Annotated[int, _number(1, 1000, reload=True)] = 16
    max_queued: Annotated[int, _number(100, 1_000_000, reload=True)] = 20_000
    drain_s: Annotated[float, _number(0.0, 3600.0, " seconds", reload=True)] = 30.0
    synchronous_commit: Annotated[bool, Key("true or false")] = True


class Retry(Section, frozen=True):
    """What happens after a failed attempt, unless the webhook has a schedule of its own."""

    schedule: Annotated[
        tuple[str, ...],
        Key(f'at most {SCHEDULE_ENTRIES_MAX} durations from "1s" to "7d", like ["1m", "10m"]', _schedule, reload=True),
    ] = ("1m", "10m", "1h")
    jitter: Annotated[float, _number(0.0, 0.9, reload=True)] = 0.1

    @property
    def schedule_s(self) -> tuple[float, ...]:
        """The delay before each retry, in seconds."""
        return tuple(map(seconds_in, self.schedule))


class Retention(Section, frozen=True):
    """How long history is kept."""

    events: Annotated[str, _duration("1d", "3650d")] = "30d"
    attempts: Annotated[str, _duration("1d", "3650d")] = "30d"

    @property
    def events_s(self) -> float:
        """Seconds that events are kept."""
        return seconds_in(self.events)

    @property
    def attempts_s(self) -> float:
        """Seconds that attempts are kept."""
        return seconds_in(self.attempts)


class AutoDisable(Section, frozen=True):
    """When a webhook that only fails is given up."""

    after: Annotated[str, _duration("1h", "365d", empty="for never")] = "5d"

    @property
    def after_s(self) -> float | None:
        """Seconds of nothing but failures; None: never."""
        return seconds_in(self.after) if self.after else None


class State(Section, frozen=True):
    """What this program keeps on disk."""

    directory: Annotated[str, Key("a path", path=True)] = ""  # as loaded: never empty


class Log(Section, frozen=True):
    """What is said, and how."""

    level: Annotated[str, _one_of("debug", "info", "warning", "error", reload=True)] = "info"
    format: Annotated[str, _one_of("auto", "text", "json", reload=True)] = "auto"
    failures: Annotated[bool, Key("true or false", reload=True)] = True
    successes: Annotated[float, _number(0.0, 1.0, reload=True)] = 0.0


class Otel(Section, frozen=True):
    """Export of spans to OpenTelemetry; needs the `otel` extra."""

    endpoint: Annotated[str, Key('a URL like "http://127.0.0.1:4318"', _or_empty(_holds(_is_collector)))] = ""
    service: Annotated[str, _like(r"[!-~](?:[ -~]{0,126}[!-~])?", "1 to 128 ASCII characters")] = "trackpost-dispatcher"


class Events(Section, frozen=True):
    """The operator's own event types."""

    catalogue: Annotated[
        tuple[str, ...],
        Key("files that exist and can be read", lambda files: all(map(_FILE.check, files)), reload=True, path=True),
    ] = ()


class Brand(Section, frozen=True):
    """The names that customers see."""

    name: Annotated[str, _like(r"[^\x00-\x1f\x7f]{1,64}", "1 to 64 printable characters")] = "TrackPost"
    header_prefix: Annotated[
        str,
        _like(r"(?!(?i:webhook|content)-)[A-Za-z][A-Za-z0-9-]{0,30}-", 'the start of a header name, like "X-Acme-"'),
    ] = "X-Trackpost-"
    key_prefix: Annotated[
        str, _like(r"[a-z][a-z0-9]{0,14}_", 'small letters and digits with "_" at the end, like "tp_"')
    ] = "tp_"
    user_agent: Annotated[str, _like(r"[!-~](?:[ -~]{0,126}[!-~])?", "1 to 128 ASCII characters")] = (
        "TrackPost-Webhooks/1.0"
    )


class Secrets(Section, frozen=True):
    """How the secrets of webhooks are kept."""

    key_file: Annotated[str, Key("a path", path=True)] = ""  # as loaded: never empty; made by its user if missing
    other_key_files: Annotated[
        tuple[str, ...], Key("files that exist and can be read", lambda files: all(map(_FILE.check, files)), path=True)
    ] = ()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration, valid by construction when it comes from `load`."""

    database: Database = Database()
    embedded: Embedded = Embedded()
    server: Server = Server()
    metrics: Metrics = Metrics()
    network: Network = Network()
    delivery: Delivery = Delivery()
    retry: Retry = Retry()
    retention: Retention = Retention()
    auto_disable: AutoDisable = AutoDisable()
    state: State = State()
    log: Log = Log()
    otel: Otel = Otel()
    events: Events = Events()
    brand: Brand = Brand()
    secrets: Secrets = Secrets()

    def with_dsn(self, dsn: str) -> Self:
        """The same, on the database at `dsn`: for the embedded PostgreSQL, whose address is known only at its start."""
        return msgspec.structs.replace(self, database=msgspec.structs.replace(self.database, dsn=dsn, listen_dsn=dsn))

    def masked(self) -> dict[str, dict[str, Value]]:
        """Section → key → value, without passwords."""
        return {
            section: {name: mask(str(value)) if key.secret else value for name, key, value in self._fields(section)}
            for section in KEYS
        }

    def masked_toml(self) -> str:
        """The effective configuration as a file, without passwords."""
        return "\n".join(
            f"[{section}]\n" + "".join(f"{name} = {to_toml(value)}\n" for name, value in keys.items())
            for section, keys in self.masked().items()
        )

    def _fields(self, section: str) -> Iterator[tuple[str, Key, Value]]:
        values = getattr(self, section)
        for name, (_, key) in KEYS[section].items():
            yield name, key, getattr(values, name)

    def reloadable_differences(self, other: Self) -> tuple[list[str], list[str]]:
        """Which keys have another value in `other`: those a running daemon can take over, and those it cannot."""
        differing = [
            (f"{section}.{name}", key.reload)
            for section in KEYS
            for name, key, value in self._fields(section)
            if value != getattr(getattr(other, section), name)
        ]
        return [name for name, reload in differing if reload], [name for name, reload in differing if not reload]

    def with_reloadable_of(self, other: Self) -> Self:
        """This one, with the values of `other` for every key that a running daemon can take over."""
        sections = {
            section: msgspec.structs.replace(
                getattr(self, section), **{name: value for name, key, value in other._fields(section) if key.reload}
            )
            for section in KEYS
        }
        return msgspec.structs.replace(self, **sections)


def _keys(section: type[Section]) -> dict[str, tuple[object, Key]]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: typing.get_args(hints[name]) for name in section.__struct_fields__}


KEYS: Final = {name: _keys(typing.get_type_hints(Config)[name]) for name in Config.__struct_fields__}
"""Section → key → (type, Key)."""

_VARIABLES: Final = {
    f"{PREFIX}{section}_{name}".upper(): (section, name) for section, keys in KEYS.items() for name in keys
}
_NO_SETTINGS: Final = ("DISPATCHER_CONFIG", "DISPATCHER_TEST_BIN")
# Kubernetes gives every pod such variables for a service whose name begins with "dispatcher".
_SERVICE_LINK: Final = re.compile(
    r"DISPATCHER_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_SERVICE_URL: Final = re.compile(r"(?:tcp|udp|sctp)://\S+")
_SUSPICIOUS: Final = re.compile(r"://|dsn|pass|secret|token|key", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class _Given:
    """One setting as somebody wrote it."""

    label: str  # how a problem names it
    value: object
    base: Path  # where relative paths begin


def configuration_file(path: Path | None, environ: Mapping[str, str], system_file: Path = SYSTEM_FILE) -> Path | None:
    """The file that `load` reads; None if there is none to read."""
    if path is not None:
        return path
    if named := environ.get("DISPATCHER_CONFIG"):
        return Path(named)
    return system_file if system_file.exists() else None


def load(path: Path | None, environ: Mapping[str, str], system_file: Path = SYSTEM_FILE) -> Config:
    """Read, merge and check everything.

    `path` is the file named on the command line, if any. Raises ConfigurationError with every mistake there is.
    """
    problems: list[str] = []
    given = _from_file(configuration_file(path, environ, system_file), problems)
    given |= _from_environment(environ, problems)
    sections: dict[str, dict[str, Value]] = {section: {} for section in KEYS}
    for (section, name), setting in given.items():
        try:
            sections[section][name] = _valid(setting, *KEYS[section][name], environ)
        except _Refused as refusal:
            shown = mask(str(setting.value)) if KEYS[section][name][1].secret else setting.value
            problems.append(f"{setting.label} = {_shown(shown)}: {refusal}")
    _complete(sections, environ, problems)
    _check_together(sections, problems)
    if problems:
        raise ConfigurationError(problems)
    return msgspec.convert(sections, Config)


def mask(text: str) -> str:
    """A secret as it may be shown: a URL without its passwords, `file:` and `credential:` as they are, else stars."""
    if not text or text.startswith(_REFERENCES):
        return text
    if "://" not in text:
        return _MASK
    text = re.sub(r"(?s)^(\w+://[^:/?#@]*):.*@", rf"\1:{_MASK}@", text)  # rather too much than too little
    return re.sub(r"(?i)([?&][^=&]*pass[^=&]*=)[^&]*", rf"\1{_MASK}", text)


_MASK: Final = "***"
_REFERENCES: Final = ("file:", "credential:")


class _Refused(Exception):
    """A setting is wrong; the message says what was expected."""


def _from_file(path: Path | None, problems: list[str]) -> dict[tuple[str, str], _Given]:
    given: dict[tuple[str, str], _Given] = {}
    if path is None:
        return given
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{path}: expected a file that can be read: {error.strerror}")
        return given
    except ValueError as error:  # not TOML, or not even UTF-8
        problems.append(f"{path}: expected TOML: {error}")
        return given
    base = path.absolute().parent
    for section, table in tables.items():
        if section not in KEYS or not isinstance(table, dict):
            problems.append(_unknown_section(path, section, table))
            continue
        for name, value in table.items():
            if name in KEYS[section]:
                given[section, name] = _Given(f"{path}: [{section}] {name}", value, base)
            else:
                problems.append(f"{path}: [{section}] {name} = {_guarded(name, value)}: {_hint(section, name)}")
    return given


def _unknown_section(path: Path, section: str, table: object) -> str:
    if not isinstance(table, dict):
        belongs = [known for known, keys in KEYS.items() if section in keys]
        where = f"it belongs under [{belongs[0]}]" if belongs else "expected it below a [section]"
        return f"{path}: {section} = {_guarded(section, table)}: {where}"
    near = difflib.get_close_matches(section, KEYS, 1)
    known = f"did you mean [{near[0]}]?" if near else f"expected one of {', '.join(KEYS)}"
    return f"{path}: [{section}]: no such section; {known}"


def _hint(section: str, name: str) -> str:
    elsewhere = [known for known, keys in KEYS.items() if name in keys]
    near = difflib.get_close_matches(name, KEYS[section], 1)
    if near:
        return f"no such key; did you mean {near[0]}?"
    if elsewhere:
        return f"no such key; it belongs under [{elsewhere[0]}]"
    return f"no such key; expected one of {', '.join(KEYS[section])}"


def _from_environment(environ: Mapping[str, str], problems: list[str]) -> dict[tuple[str, str], _Given]:
    given: dict[tuple[str, str], _Given] = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable in _NO_SETTINGS or _is_service_link(variable, text):
            continue
        if variable in _VARIABLES:
            section, name = _VARIABLES[variable]
            value = _from_text(text, KEYS[section][name][0])
            given[section, name] = _Given(variable, value, Path.cwd())
            continue
        near = difflib.get_close_matches(variable, _VARIABLES, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected {PREFIX}<SECTION>_<KEY>"
        problems.append(f"{variable} = {_guarded(variable, text)}: no such setting; {hint}")
    return given


def _is_service_link(variable: str, text: str) -> bool:
    if variable.endswith("_PORT") and _SERVICE_URL.fullmatch(text):
        return True
    return _SERVICE_LINK.fullmatch(variable) is not None


def _from_text(text: str, kind: object) -> object:
    """What a variable says, in the kinds that TOML has; text that cannot be read as that stays text, to be refused."""
    try:
        if kind != tuple[str, ...]:
            return msgspec.convert(text, kind, strict=False)
        if text.lstrip().startswith("["):
            return tomllib.loads(f"list = {text}")["list"]
        return [entry.strip() for entry in text.split(",") if entry.strip()]
    except ValueError:
        return text


def _valid(setting: _Given, kind: object, key: Key, environ: Mapping[str, str]) -> Value:
    try:
        value: Value = msgspec.convert(setting.value, kind)
    except msgspec.ValidationError:
        raise _Refused(f"expected {key.expected}") from None
    if key.secret:
        value = _revealed(str(value), setting.base, environ)
    elif key.path:
        value = _located(value, setting.base, environ)
    if not key.check(value):
        raise _Refused(f"expected {key.expected}")
    return value


def _revealed(text: str, base: Path, environ: Mapping[str, str]) -> str:
    """The secret itself."""
    if not text.startswith(_REFERENCES):
        return text
    path = _path(text.removeprefix("file:"), base, environ)
    try:
        with path.open("rb") as file:
            return file.read(SECRET_BYTES_MAX).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _Refused(f"expected a text file that can be read: {error}") from None


def _located(value: Value, base: Path, environ: Mapping[str, str]) -> Value:
    if isinstance(value, tuple):
        return tuple(str(_path(entry, base, environ)) for entry in value)
    return str(_path(value, base, environ)) if isinstance(value, str) and value else value


def _path(text: str, base: Path, environ: Mapping[str, str]) -> Path:
    if text.startswith("credential:"):
        directory, name = environ.get("CREDENTIALS_DIRECTORY"), text.removeprefix("credential:")
        if not directory or not re.fullmatch(r"[\w.@-]+", name) or name in {".", ".."}:
            raise _Refused("expected the name of a credential that systemd passes (LoadCredential=)")
        return Path(directory) / name
    try:
        return base / Path(text).expanduser()
    except RuntimeError:
        raise _Refused("expected a path without ~, because this user has no home directory") from None


def _complete(sections: dict[str, dict[str, Value]], environ: Mapping[str, str], problems: list[str]) -> None:
    """Fill in the defaults that depend on something else."""
    database, state, secrets = sections["database"], sections["state"], sections["secrets"]
    database["listen_dsn"] = database.get("listen_dsn") or database.get("dsn", "")
    directory = state.get("directory") or _state_directory(environ)
    if not directory:
        problems.append('[state] directory = "": expected a path, because there is no $STATE_DIRECTORY and no $HOME')
        return
    state["directory"] = directory
    secrets["key_file"] = secrets.get("key_file") or str(Path(str(directory)) / "secrets.key")


def _state_directory(environ: Mapping[str, str]) -> str:
    """systemd's, else by the XDG base directory specification; "" if there is neither."""
    if given := environ.get("STATE_DIRECTORY"):
        return given.split(":")[0]
    if (xdg := environ.get("XDG_STATE_HOME", "")).startswith("/"):
        return f"{xdg}/{NAME}"
    home = environ.get("HOME", "")
    return f"{home}/.local/state/{NAME}" if home.startswith("/") else ""


def _check_together(sections: dict[str, dict[str, Value]], problems: list[str]) -> None:
    database, defaults = sections["database"], Config()
    if database["listen_dsn"] and not database.get("dsn"):
        problems.append("[database] listen_dsn: expected [database] dsn to be set too")
    listen = str(sections["server"].get("listen", defaults.server.listen))
    if listen == sections["metrics"].get("listen", defaults.metrics.listen) and not listen.endswith(":0"):
        problems.append(f"[metrics] listen = {_shown(listen)}: expected another address than [server] listen")


def _guarded(name: str, value: object) -> str:
    """The value of a setting that does not exist, unless it looks like a secret in the wrong place."""
    return _shown(mask(str(value)) if _SUSPICIOUS.search(f"{name} {value}") else value)


def _shown(value: object) -> str:
    shown = to_toml(value) if isinstance(value, str | bool | int | float | list | tuple) else str(value)
    return shown if len(shown) <= 120 else f"{shown[:117]}…"


def to_toml(value: object) -> str:
    """A value as the file spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
