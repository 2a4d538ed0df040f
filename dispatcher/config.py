"""Every setting of this program: one validated tree, made from a TOML file and the environment.

A key is declared once, as a field below: its type, default, what is expected of it, whether a running daemon can take a
new value, and whether it is secret all follow from that line. `config/dispatcher.toml` says why each default is what it is.

*Where values come from*: `DISPATCHER_<SECTION>_<KEY>` in the environment beats the file, which beats the default. The
file is the one given, else `$DISPATCHER_CONFIG`, else `/etc/dispatcher/dispatcher.toml` if it exists, else none. In the
environment, lists are separated by commas or written as in TOML.

*Secrets* need not stand in either: a secret key takes `file:PATH`, or `credential:NAME` for a systemd credential
(`LoadCredential=NAME:…`), and its value is then what that file holds.

*Mistakes* are all collected before any is reported, each with key, value and what was expected; an unknown key or
variable is one too, because a misspelt setting that is silently ignored is found much later.

Relative paths begin at the directory of the file they stand in, or at the working directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import msgspec

from dispatcher.errors import ConfigurationError

SYSTEM_FILE: Final = Path("/etc/dispatcher/dispatcher.toml")
PREFIX: Final = "DISPATCHER_"
NAME: Final = "dispatcher"  # of the directory below the user's state directory

MINUTE_S: Final = 60.0
HOUR_S: Final = 3600.0
DAY_S: Final = 86400.0
SCHEDULE_ENTRIES_MAX: Final = 50
SECRET_BYTES_MAX: Final = 64 << 10  # a DSN or a key; more is the wrong file

Value = str | int | float | bool | list[str]
Check = Callable[[typing.Any], bool]


def duration_s(text: str) -> float:
    """Seconds in a duration like "90s", "10m", "1h30m", "30d" or "250ms".

    Whole numbers, each with a unit, from the largest unit to the smallest. Raises ValueError on anything else.
    """
    found = _DURATION.fullmatch(text)
    if not text or found is None:
        raise ValueError(f"{text!r} is no duration: expected something like 90s, 10m, 1h30m or 30d")
    return sum(int(number) * unit_s for number, unit_s in zip(found.groups(), _UNITS_S, strict=True) if number)


_UNITS_S: Final = (DAY_S, HOUR_S, MINUTE_S, 1.0, 0.001)
_DURATION: Final = re.compile(
    "".join(rf"(?:([0-9]{{1,9}}){unit})?" for unit in ("d", "h", "m(?!s)", "s", "ms")), re.ASCII
)


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
    low_s, high_s = duration_s(low), duration_s(high)
    within = _holds(lambda text: low_s <= duration_s(text) <= high_s)
    if not empty:
        return Key(f'a duration from "{low}" to "{high}"', within, reload=True)
    return Key(f'a duration from "{low}" to "{high}", or "" {empty}', lambda v: not v or within(v), reload=True)


def _schedule(entries: list[str]) -> bool:
    within = _holds(lambda text: 1.0 <= duration_s(text) <= 7 * DAY_S)
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
    return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port is not None and parts.path in {"", "/"}


def _or_empty(check: Check) -> Check:
    return lambda value: value == "" or check(value)


_DSN: Final = Key('a URL like "postgresql://user@host/database"', _or_empty(_holds(_is_dsn)), secret=True)
_FILE: Final = Key("a file that exists and can be read", _or_empty(_holds(lambda text: Path(text).open("rb").close())), path=True)
_ADDRESS: Final = 'host:port, like "127.0.0.1:8480" or "[::1]:8480"'


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file."""


class Database(Section):
    """Where PostgreSQL is. Without `dsn`, an embedded one is kept in the state directory."""

    dsn: Annotated[str, _DSN] = ""
    listen_dsn: Annotated[str, _DSN] = ""  # as loaded: the same as `dsn` unless set
    pool_size: Annotated[int, _number(1, 200)] = 8


class Embedded(Section):
    """The PostgreSQL of our own."""

    bin: Annotated[str, Key("a directory", _or_empty(lambda text: Path(text).is_dir()), path=True)] = ""


class Server(Section):
    """API and dashboard."""

    listen: Annotated[str, Key(_ADDRESS, _holds(host_and_port))] = "127.0.0.1:8480"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return host_and_port(self.listen)


class Metrics(Section):
    """Metrics and health."""

    listen: Annotated[str, Key(f'{_ADDRESS}, or "" for none', _or_empty(_holds(host_and_port)))] = "127.0.0.1:9464"

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port; None if switched off."""
        return host_and_port(self.listen) if self.listen else None


class Network(Section):
    """Which addresses may be called, and how they are reached."""

    allow: Annotated[
        list[str],
        Key(
            'networks like "127.0.0.0/8" or "fd00::/8", without host bits',
            lambda networks: all(map(_holds(ipaddress.ip_network), networks)),
            reload=True,
        ),
    ] = []
    allow_http: Annotated[bool, Key("true or false", reload=True)] = False
    ca_file: Annotated[str, _FILE] = ""
    proxy: Annotated[str, Key('a URL like "http://host:port"', _or_empty(_holds(_is_proxy)), secret=True)] = ""
    source_address: Annotated[str, Key("an IP address of this host", _or_empty(_holds(ipaddress.ip_address)))] = ""

    @property
    def allowed(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """The networks of `allow`, parsed."""
        return tuple(ipaddress.ip_network(network) for network in self.allow)


class Delivery(Section):
    """Limits of the engine."""

    timeout_s: Annotated[float, _number(1.0, 300.0, " seconds", reload=True)] = 30.0
    max_in_flight: Annotated[int, _number(1, 50_000, reload=True)] = 2000
    max_concurrency: Annotated[int, _number(1, 1000, reload=True)] = 16
    max_queued: Annotated[int, _number(100, 1_000_000, reload=True)] = 20_000
    drain_s: Annotated[float, _number(0.0, 3600.0, " seconds", reload=True)] = 30.0
    synchronous_commit: Annotated[bool, Key("true or false")] = True


class Retry(Section):
    """What happens after a failed attempt, unless the webhook has a schedule of its own."""

    schedule: Annotated[
        list[str],
        Key(f'at most {SCHEDULE_ENTRIES_MAX} durations from "1s" to "7d", like ["1m", "10m"]', _schedule, reload=True),
    ] = ["1m", "10m", "1h"]
    jitter: Annotated[float, _number(0.0, 0.9, reload=True)] = 0.1

    @property
    def schedule_s(self) -> tuple[float, ...]:
        """The delay before each retry, in seconds."""
        return tuple(map(duration_s, self.schedule))


class Retention(Section):
    """How long history is kept."""

    events: Annotated[str, _duration("1d", "3650d")] = "30d"
    attempts: Annotated[str, _duration("1d", "3650d")] = "30d"

    @property
    def events_s(self) -> float:
        """Seconds that events are kept."""
        return duration_s(self.events)

    @property
    def attempts_s(self) -> float:
        """Seconds that attempts are kept."""
        return duration_s(self.attempts)


class AutoDisable(Section):
    """When a webhook that only fails is given up."""

    after: Annotated[str, _duration("1h", "365d", empty="for never")] = "5d"

    @property
    def after_s(self) -> float | None:
        """Seconds of nothing but failures; None: never."""
        return duration_s(self.after) if self.after else None


class State(Section):
    """What this program keeps on disk."""

    directory: Annotated[str, Key("a path", path=True)] = ""  # as loaded: never empty


class Log(Section):
    """What is said, and how."""

    level: Annotated[str, _one_of("debug", "info", "warning", "error", reload=True)] = "info"
    format: Annotated[str, _one_of("auto", "text", "json", reload=True)] = "auto"


class Events(Section):
    """The operator's own event types."""

    catalogue: Annotated[
        list[str],
        Key("files that exist and can be read", lambda files: all(map(_FILE.check, files)), reload=True, path=True),
    ] = []


class Brand(Section):
    """The names that customers see."""

    name: Annotated[str, _like(r"[^\x00-\x1f\x7f]{1,64}", "1 to 64 printable characters")] = "TrackPost"
    header_prefix: Annotated[
        str, _like(r"(?!(?i:webhook|content)-)[A-Za-z][A-Za-z0-9-]{0,30}-", 'the start of a header name, like "X-Acme-"')
    ] = "X-Trackpost-"
    key_prefix: Annotated[
        str, _like(r"[a-z][a-z0-9]{0,14}_", 'small letters and digits with "_" at the end, like "tp_"')
    ] = "tp_"
    user_agent: Annotated[str, _like(r"[!-~](?:[ -~]{0,126}[!-~])?", "1 to 128 ASCII characters")] = (
        "TrackPost-Webhooks/1.0"
    )


class Secrets(Section):
    """How the secrets of webhooks are kept."""

    key_file: Annotated[str, Key("a path", path=True)] = ""  # as loaded: never empty; made by its user if missing


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
    events: Events = Events()
    brand: Brand = Brand()
    secrets: Secrets = Secrets()

    def __repr__(self) -> str:
        return f"Config({self.masked()})"

    def with_dsn(self, dsn: str) -> Config:
        """The same, on the database at `dsn`: for the embedded PostgreSQL, whose address is known only at its start."""
        return msgspec.structs.replace(
            self, database=msgspec.structs.replace(self.database, dsn=dsn, listen_dsn=dsn)
        )

    def masked(self) -> dict[str, dict[str, Value]]:
        """Section → key → value, without passwords."""
        return {
            section: {
                name: mask(value) if key.secret else value
                for name, key, value in _fields(getattr(self, section))
            }
            for section in SECTIONS
        }

    def masked_toml(self) -> str:
        """The effective configuration as a file, without passwords."""
        return "\n".join(
            f"[{section}]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in keys.items())
            for section, keys in self.masked().items()
        )

    def reloadable_differences(self, other: Config) -> tuple[list[str], list[str]]:
        """Which keys have another value in `other`: those a running daemon can take over, and those it cannot."""
        differing = [
            (f"{section}.{name}", key)
            for section in SECTIONS
            for name, key, value in _fields(getattr(self, section))
            if value != getattr(getattr(other, section), name)
        ]
        return [name for name, key in differing if key.reload], [name for name, key in differing if not key.reload]

    def with_reloadable_of(self, other: Config) -> Config:
        """This one, with the values of `other` for every key that a running daemon can take over."""
        return Config(
            **{
                section: msgspec.structs.replace(
                    getattr(self, section),
                    **{name: value for name, key, value in _fields(getattr(other, section)) if key.reload},
                )
                for section in SECTIONS
            }
        )
