from __future__ import annotations

import pytest

from dispatcher.durations import seconds_in


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("0s", 0), ("90s", 90), ("1m", 60), ("1h30m", 5400), ("5d", 432000), ("250ms", 0.25)),
        *(("1.5h", 5400), ("1h0.5m", 3630), ("1d2h3m4s5ms", 93784.005)),
    ],
)
def test_durations_are_numbers_with_units_from_large_to_small(text: str, seconds: float) -> None:
    assert seconds_in(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "5", "m", "1.s", ".5s", "-1s", "1m1h", "1s1s", "1 m", "1M", "1w", "١s", "1m ", "1m\n"]
)
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        seconds_in(text)
