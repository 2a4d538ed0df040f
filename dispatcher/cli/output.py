"""What both command lines show, and how they end.

Results go to standard output: tables for people, JSON for programs, which is also what a pipe gets. Everything else
(mistakes, warnings, hints) goes to standard error, in a few lines and never as a traceback.

    0    done
    1    failed
    2    the command line or the configuration is wrong
    3    the server or the database cannot be reached
    4    not authorised
    130  interrupted

Imports stay late: `--help` is instant because nothing is loaded for it but click.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn

import click

if TYPE_CHECKING:
    from rich.console import Console

FAILED: Final = 1
MISUSED: Final = 2
UNREACHABLE: Final = 3
UNAUTHORISED: Final = 4
INTERRUPTED: Final = 130

_LOST_STATEMENTS: Final = {"42P05", "26000"}  # what we prepared is another session's, or is not there any more

ARGUMENT_BYTES_MAX: Final = 16 << 20  # a file named on the command line; far more than any event may hold

LINE_BREAK: Final = "\n"
HELP: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Failure(click.ClickException):
    """Ends a command: a message for people and an exit code for programs."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click means it to be set either way


class Program(click.Group):
    """A command line whose every end is an orderly one."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and leave the process with the exit code."""
        run: Callable[[], Any] = functools.partial(
            super().main, args, prog_name, complete_var, standalone_mode=False, **extra
        )
        if not standalone_mode:
            return run()
        try:
            outcome = run()
            sys.stdout.flush()
        except Exception as error:  # noqa: BLE001  the outermost place: what is unknown is told as a fault of ours
            sys.exit(_report(error))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        sys.exit(outcome if isinstance(outcome, int) else 0)


def _report(error: Exception) -> int:
    """Say what went wrong; return the exit code it stands for."""
    from dispatcher.errors import (
        ConfigurationError,
        DatabaseUnreachable,
        DispatcherError,
        EmbeddedError,
        SchemaMismatch,
    )

    match error:
        case ExceptionGroup():
            return _report(error.exceptions[0])
        case click.Abort():
            return INTERRUPTED
        case Failure():
            complain(error.message)
            return error.exit_code
        case click.ClickException():
            error.show()
            return error.exit_code
        case BrokenPipeError():
            # Whoever read us has seen enough. Python would complain about the rest of the buffer at exit.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        case ConfigurationError():
            complain(*error.problems)
            return MISUSED
        case SchemaMismatch():
            complain(str(error))
            return MISUSED
        case DatabaseUnreachable() | EmbeddedError():
            complain(str(error))
            return UNREACHABLE
        case DispatcherError() | OSError():
            complain(str(error))
            return FAILED
    if getattr(error, "sqlstate", None) in _LOST_STATEMENTS:
        complain(
            "what a session prepared in PostgreSQL belongs to another one: a pooler in transaction mode is in between; "
            "`dispatcher doctor` says more"
        )
        return MISUSED
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exception(error)
    complain(
        f"this is a fault of the program: {type(error).__name__}: {error} (--debug before the command shows where)"
    )
    return FAILED


# ── for people, on standard error ──────────────────────────────────────────────────────────────────────────────────


def complain(*problems: str) -> None:
    """Say what is wrong, a line each."""
    for problem in problems:
        click.echo(f"{_coloured('Error:', 'red')} {printable(problem, keep=LINE_BREAK)}", err=True)


def warn(message: str) -> None:
    """Say what should be thought over, to people only."""
    if sys.stderr.isatty():
        click.echo(f"{_coloured('Warning:', 'yellow')} {printable(message)}", err=True)


def hint(message: str) -> None:
    """Say what else is worth knowing, to people only: programs read standard output."""
    if sys.stderr.isatty():
        click.echo(_coloured(printable(message), "bright_black"), err=True)


def _coloured(text: str, colour: str) -> str:
    return text if is_plain() else click.style(text, fg=colour)


def is_plain() -> bool:
    """Whether colours are unwanted whatever the terminal can do (no-color.org)."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def printable(text: str, keep: str = "") -> str:
    """The text with what could steer a terminal made visible: it may come from anybody."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


# ── results, on standard output ────────────────────────────────────────────────────────────────────────────────────


def for_programs(as_json: bool) -> bool:
    """Whether to print JSON: asked for, or nobody is looking."""
    return as_json or not sys.stdout.isatty()


def print_json(document: Any, *, on_one_line: bool | None = None) -> None:
    """Print a document: laid out on a terminal, on one line elsewhere."""
    compact = not sys.stdout.isatty() if on_one_line is None else on_one_line
    layout: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 2}
    text = json.dumps(document, ensure_ascii=False, default=_plain, **layout)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # lone surrogates, or a terminal of another century
        text = json.dumps(document, default=_plain, **layout)
    click.echo(text)


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return timestamp(value)
    return str(value)


def timestamp(at: datetime) -> str:
    """A time in UTC and whole seconds, as the API spells it."""
    return f"{at.astimezone(UTC).replace(tzinfo=None, microsecond=0).isoformat()}Z"


def console() -> Console:
    """Where tables go."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, no_color=is_plain() or None)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    empty: str = "nothing here",
    folding: Container[str] = (),
) -> None:
    """Print rows under small headings, or as blocks where the terminal is narrow; `empty` in place of no rows at all.

    Columns of `folding` may break their cells over lines.
    """
    from dispatcher.cli.tables import lay_out

    listed = [[cell(value) for value in row] for row in rows]
    if not listed:
        click.echo(empty)
        return
    to = console()
    for part in lay_out(columns, listed, to.width, folding):
        to.print(part)


def print_record(record: Mapping[str, object]) -> None:
    """Print one thing, a line for each of its fields."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in record.items():
        table.add_row(name, cell(value))
    console().print(table)


def cell(value: object) -> str:
    """A value as a person reads it."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case datetime():
            return timestamp(value)
        case list() | tuple():
            return ", ".join(cell(entry) for entry in value) or "–"
        case dict():
            return ", ".join(f"{printable(str(k))}: {cell(v)}" for k, v in value.items()) or "–"
        case float():
            return f"{value:g}"
    return printable(str(value))


def since(at: datetime | str | None, now: datetime | None = None) -> str | None:
    """How long ago a moment was, or how far ahead it is, as people say it; exact times are for `--json` and `get`."""
    if at is None:
        return None
    moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    passed_s = ((now or datetime.now(UTC)) - moment).total_seconds()
    for unit, length_s, end_s in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800), ("d", 86_400, 8_640_000)):
        if abs(passed_s) < end_s:
            span = f"{abs(passed_s) // length_s:.0f} {unit}"
            return f"{span} ago" if passed_s >= 0 else f"in {span}"
    return f"{moment:%Y-%m-%d}"


# ── options and arguments both command lines have ──────────────────────────────────────────────────────────────────


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON. Also what standard output gets when it is not a terminal."
)

debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show a traceback for faults of this program."
)


def text_argument(value: str, param_hint: str) -> str:
    """What an option says itself, `@FILE` holds, or `-` reads from standard input."""
    if value != "-" and not value.startswith("@"):
        return decoded(os.fsencode(value), param_hint)
    return decoded(file_argument(value.removeprefix("@"), param_hint), param_hint)


def decoded(raw: bytes, param_hint: str) -> str:
    """The text that these bytes are in UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise click.BadParameter("expected text in UTF-8", param_hint=param_hint) from None


def file_argument(name: str, param_hint: str) -> bytes:
    """The bytes of a file, or of standard input if it is called `-`."""
    try:
        if name == "-":
            return _bounded(sys.stdin.buffer, "standard input", param_hint)
        with Path(name).expanduser().open("rb") as file:
            return _bounded(file, name, param_hint)
    except OSError as error:
        raise click.BadParameter(f"{name}: {error.strerror or error}", param_hint=param_hint) from None


def _bounded(file: IO[bytes], name: str, param_hint: str) -> bytes:
    raw = file.read(ARGUMENT_BYTES_MAX + 1)
    if len(raw) > ARGUMENT_BYTES_MAX:
        raise click.BadParameter(f"{name}: more than {ARGUMENT_BYTES_MAX >> 20} MiB", param_hint=param_hint)
    return raw


def refuse(message: str, param_hint: str) -> NoReturn:
    """End with exit code 2 because of what an option or argument says."""
    raise click.BadParameter(message, param_hint=param_hint)


def examples(*lines: str) -> str:
    """The epilog of a command's help: command lines, printed as they stand."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
