"""Durations as people write them, in the configuration and in the API alike: "90s", "10m", "1h30m", "1.5h", "30d"."""

from __future__ import annotations

import re
from typing import Final

UNITS_S: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
"""Seconds in each unit, the longest first."""

_NUMBER: Final = r"[0-9]{1,15}(?:\.[0-9]{1,6})?"
_DURATION: Final = re.compile("".join(rf"(?:({_NUMBER}){unit})?" for unit in ("d", "h", "m(?!s)", "s", "ms")), re.ASCII)


def seconds_in(text: str) -> float:
    """Seconds in a duration: numbers, each with a unit, from the largest unit to the smallest.

    Raises ValueError on anything else.
    """
    found = _DURATION.fullmatch(text)
    if not text or found is None:
        raise ValueError(f"{text!r:.80} is no duration: expected something like 90s, 10m, 1h30m or 30d")
    return sum(float(number or 0) * unit_s for number, unit_s in zip(found.groups(), UNITS_S.values(), strict=True))
