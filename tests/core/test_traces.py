"""What counts as a traceparent."""

from __future__ import annotations

import pytest

from dispatcher.core.traces import is_traceparent, trace_id

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("text", [GOOD, GOOD[:-2] + "00", "01" + GOOD[2:], "fe" + GOOD[2:]])
def test_traceparent_of_any_known_or_later_version_names_its_trace(text: str) -> None:
    assert is_traceparent(text)
    assert trace_id(text) == "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    "text",
    [
        "", "00", GOOD[:-1], GOOD + "-", GOOD.upper(), "ff" + GOOD[2:], GOOD.replace("-", "_"), f" {GOOD[1:]}",
        f"{GOOD[:-2]}\r\n",
        GOOD.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), GOOD.replace("b7ad6b7169203331", "0" * 16),
        "٠٠" + GOOD[2:], f"{GOOD}\n", f"{GOOD}\r\nX-Forged: 1",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_names_none(text: str) -> None:
    assert not is_traceparent(text)
    assert trace_id(text) is None


def test_no_traceparent_names_none() -> None:
    assert trace_id(None) is None
