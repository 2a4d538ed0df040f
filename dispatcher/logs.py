"""Logging: one line per thing that happened, text for people and JSON for machines, secrets for nobody.

**Two doors.** Structlog renders what the program says about itself; records of other libraries come through as well.
What is said once per delivery takes `Wide`: the same line by the same rules, for a sixth of the price.

**No line can forge another.** What comes from outside (errors that quote a peer, paths, names) is escaped: a JSON line
is plain ASCII, a line of text holds no character that is not printable, and a traceback is indented.

**No secret.** Bodies and secrets are never handed to a logger in the first place; what looks like a credential is
masked here as a second line.

**Nobody waits for the log.** Lines go to a bounded queue and from there, by a thread, to the stream. Where the stream
is a pipe nobody reads, or a file on a full disk, lines are dropped and counted, and the next line that gets through
says how many.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import io
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import orjson

from dispatcher.config import Log


@contextlib.contextmanager
def _not_found(*names: str) -> Iterator[None]:
    """Whoever tries to import one of these packages meanwhile is told that it is not installed."""
    modules: dict[str, Any] = sys.modules
    missing = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(missing))  # None is how the import system is told
    try:
        yield
    finally:
        for name in missing:
            del modules[name]


# Structlog loads these because they are there, for tracebacks and threads that we have no use for: 4 MB of an idle
# daemon, most of it rich, which only the command lines need. So nobody but this module imports structlog.
with _not_found("better_exceptions", "greenlet", "rich", "twisted"):
    import structlog

get_logger: Final = structlog.get_logger
bound_contextvars: Final = structlog.contextvars.bound_contextvars

LINES_MAX: Final = 10_000  # waiting to be written: ≈ 4 MB
WRITE_BYTES: Final = 64 << 10  # a pipe's worth
FLUSH_S: Final = 1.0  # what the end of the program waits for the last lines
RETRY_S: Final = 0.5

_Render = Callable[[dict[str, Any]], str]

_FIRST: Final = ("timestamp", "level", "event", "logger")
"""What every line has comes first, so that columns of raw logs align."""

_SECRET: Final = re.compile(
    r"(?<=://)[^\s/?#@:]*:[^\s/?#]*(?=@)"  # user and password of a URL
    r"|whsec_[\w+/=-]{6,}"  # signing secrets
    r"|\b[a-z][a-z0-9]{0,14}_(?:live|test)_[\w-]{12,}"  # API keys
    r"|(?<=\bBearer )[\w.~+/=-]{6,}",
    re.ASCII,
)


# ── what a line may hold ───────────────────────────────────────────────────────────────────────────────────────────


_SIGNS: Final = ("://", "whsec_", "_live_", "_test_", "Bearer ")

_encode: Final = json.JSONEncoder(default=str, separators=(",", ":")).encode


def _without_secrets(text: str) -> str:
    # Five looks cost a fifth of a search that finds nothing.
    for sign in _SIGNS:
        if sign in text:
            return _SECRET.sub("***", text)
    return text


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def printable(text: str) -> str:
    """The text on one line: what is not printable is escaped, as Python would write it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _masked(_: Any, __: str, event: Any) -> Any:
    for key, value in event.items():
        if type(value) is str:
            event[key] = _without_secrets(value)
    return event


def _printable(_: Any, __: str, event: Any) -> Any:
    for key, value in event.items():
        if type(value) is str and key != "exception":
            event[key] = printable(value)
    return event


def _indented_traceback(stream: TextIO, exc_info: Any) -> None:
    """A traceback without local variables (they hold secrets, keys, payloads), no line of which begins like a log's."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    lines = _without_secrets(text.getvalue()).splitlines()
    stream.write("\n".join(f"    {printable(line)}" for line in lines))


def _json(_: Any, __: str, event: Any) -> str:
    if next(iter(event), "") != _FIRST[0]:  # those of Wide are in order already
        event = {key: event.pop(key) for key in _FIRST if key in event} | event
    try:
        text = orjson.dumps(event, default=str)
    except TypeError:  # lone surrogates, integers beyond 64 bits
        text = b"\xff"
    # ASCII only: nothing in a line moves a cursor, ends the line, or turns the reading direction.
    if text.isascii() and b"\x7f" not in text:
        return text.decode("ascii")
    return _encode(event).replace("\x7f", "\\u007f")


# ── the stream ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Outlet:
    """Writes lines to a file descriptor, by a thread of its own; `put` never waits and never raises."""

    def __init__(self, descriptor: int, *, lines_max: int = LINES_MAX) -> None:
        self._descriptor = descriptor
        self._lines_max = lines_max
        self._lines: collections.deque[str] = collections.deque()
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._is_torn = False  # a line was written in part
        self.dropped = 0  # lines, ever
        self._told = 0  # of these
        self.tell: Callable[[int], str] = lambda dropped: f"{dropped} lines dropped"
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, line: str) -> None:
        """Have a line written soon, or count it as dropped."""
        if len(self._lines) >= self._lines_max:
            self.dropped += 1
            return
        self._idle.clear()
        self._lines.append(line)
        self._wake.set()

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until everything is written or dropped; False when time is over first."""
        return self._idle.wait(timeout_s)

    def _run(self) -> None:
        while True:
            if not self._lines:
                self._idle.set()
                self._wake.wait()
            self._wake.clear()
            batch: list[str] = []
            size = 0
            while self._lines and size < WRITE_BYTES:
                batch.append(self._lines.popleft())
                size += len(batch[-1])
            if batch:
                self._write(batch)

    def _write(self, batch: list[str]) -> None:
        dropped = self.dropped
        if dropped > self._told:
            batch.insert(0, self.tell(dropped - self._told))
        text = ("\n" if self._is_torn else "") + "\n".join(batch) + "\n"
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while rest:
                written = self._push(rest)
                rest = rest[written:]
                self._is_torn = bool(rest)
        except OSError:  # the disk is full, nobody reads the pipe any more, the descriptor was closed
            self.dropped += len(batch) - (dropped > self._told)
            time.sleep(RETRY_S)
        else:
            self._told = dropped

    def _push(self, data: memoryview) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # somebody who shares the stream made it non-blocking
                select.select([], [self._descriptor], [], RETRY_S)


class _Direct:
    """For streams that are no file: memory, in tests and notebooks."""

    dropped = 0
    tell: Callable[[int], str]

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def put(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        return True


class _State:
    """Where lines go, and how they look; set by `start_logging`."""

    stream: TextIO | None = None
    outlet: Outlet | _Direct | None = None
    render: _Render | None = None


def _outlet_of(stream: TextIO) -> Outlet | _Direct:
    if _State.outlet is None or _State.stream is not stream:
        try:
            _State.outlet = Outlet(stream.fileno())
        except (OSError, ValueError):
            _State.outlet = _Direct(stream)
        _State.stream = stream
    return _State.outlet


def dropped_lines() -> int:
    """Lines that could not be written, since the start of the process."""
    return _State.outlet.dropped if _State.outlet is not None else 0


@atexit.register
def flush_log() -> None:
    """Wait a moment until what was said is written."""
    if _State.outlet is not None:
        _State.outlet.flush()


# ── the doors ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Render a record and hand it over."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  a line that cannot be rendered costs nothing but itself
            line = f"a line of {record.name} could not be rendered"
        assert _State.outlet is not None, "a handler is installed by start_logging only"
        _State.outlet.put(line)


class Wide:
    """A logger for what happens once per delivery: 8 µs a line instead of 50."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger = logging.getLogger(name)

    def is_on(self, level: int) -> bool:
        """Whether a line of this level would be written."""
        return _State.render is not None and self._logger.isEnabledFor(level)

    def write(self, level: int, event: str, fields: Mapping[str, object]) -> None:
        """Write a line if its level is on."""
        if not self.is_on(level):
            return
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        name = logging.getLevelName(level).lower()
        line: dict[str, Any] = {"timestamp": now, "level": name, "event": event, "logger": self._name, **fields}
        assert _State.render is not None and _State.outlet is not None, "is_on says so"  # noqa: PT018
        _State.outlet.put(_State.render(line))


def start_logging(settings: Log, stream: TextIO | None = None) -> None:
    """Log to `stream` (standard error) from now on. Calling it again applies changed settings."""
    out = stream or sys.stderr
    level = getattr(logging, settings.level.upper())
    is_terminal = out.isatty()
    as_text = settings.format == "text" or (settings.format == "auto" and is_terminal)
    first: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = (
        [
            _masked,
            _printable,
            structlog.dev.ConsoleRenderer(colors=is_terminal, exception_formatter=_indented_traceback),
        ]
        if as_text
        else [structlog.processors.format_exc_info, _masked, _json]
    )

    def render(event: dict[str, Any]) -> str:
        rendered: Any = event
        for processor in last:
            rendered = processor(None, "", rendered)
        return str(rendered)

    outlet = _outlet_of(out)
    outlet.tell = lambda dropped: render(
        {
            "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "level": "warning",
            "event": "log.dropped",
            "logger": "dispatcher.logs",
            "lines": dropped,
        }
    )
    _State.render = render
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last], foreign_pre_chain=first
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("aiohttp.access", "asyncio"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *first, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
