"""Logging: one line per thing that happened, text for people and JSON for machines, secrets for nobody.

Structlog renders; records of other libraries pass through the same door. Request bodies and secrets are never handed to
a logger in the first place; what looks like a credential in a DSN is masked here as a second line.

What others wrote (a path, a host name, what a peer sent) stands in a line and cannot end it: whatever is not printable
is escaped, so that nobody forges a line of ours or speaks to the terminal it is read on.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import Any, TextIO

import structlog

from dispatcher.config import Log, mask


def _masked(_: Any, __: str, event: Any) -> Any:
    for key, value in event.items():
        if isinstance(value, str) and "://" in value:
            event[key] = mask(value)
    return event


def _escaped(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _printable(_: Any, __: str, event: Any) -> Any:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _escaped(value)
    return event


def _traceback(out: TextIO, failure: Any) -> None:
    """Indented, so that no message of an exception looks like a line of its own, and without local variables."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, failure)
    out.writelines(f"\n    {_escaped(line)}" for line in text.getvalue().strip("\n").split("\n"))


def _in_order(_: Any, __: str, event: Any) -> Any:
    """What every line has comes first, so that columns of raw logs align."""
    return {key: event.pop(key) for key in ("timestamp", "level", "event", "logger") if key in event} | event


def start_logging(settings: Log, stream: TextIO | None = None) -> None:
    """Log to `stream` (standard error) from now on. Calling it again applies changed settings."""
    out = stream or sys.stderr
    level = getattr(logging, settings.level.upper())
    as_text = settings.format == "text" or (settings.format == "auto" and out.isatty())
    first: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _masked,
    ]
    last: list[Any] = (
        # The default formatter prints local variables with a traceback: secrets, keys, payloads.
        [_printable, structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=_traceback)]
        if as_text
        else [structlog.processors.format_exc_info, _in_order, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(out)
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
