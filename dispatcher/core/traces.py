"""W3C Trace Context: what of a traceparent is passed on, and what not."""

from __future__ import annotations

import re
from typing import Final

# Version 00's four fields. Later versions may only add behind them; the store knows none but these 55 characters.
_is_traceparent: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
).fullmatch


def is_traceparent(text: str) -> bool:
    """Whether this names a trace. What does not is not sent: a subscriber would begin a trace of its own for it."""
    return _is_traceparent(text) is not None


def trace_id(text: str | None) -> str | None:
    """The trace's id, 32 hexadecimal digits; None if the text names no trace."""
    return text[3:35] if text is not None and is_traceparent(text) else None
