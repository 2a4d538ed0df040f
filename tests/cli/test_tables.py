"""Lists on terminals of any width: nothing is cut, and ids and times stay whole."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from dispatcher.cli.output import since
from dispatcher.cli.tables import lay_out

COLUMNS = ("id", "status", "url", "changed")
ID = "wh_01a207d041777aecb260458741a6e624"
ROWS = [[ID, "active", f"https://yourapp.example/{'x' * 60}", "3 min ago"], [ID, "disabled", "–", ""]]


def printed(width: int) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    for part in lay_out(COLUMNS, ROWS, width, folding=("url",)):
        console.print(part)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_ids_states_and_times_stay_whole(width: int) -> None:
    lines = printed(width)
    assert all(len(line) <= width for line in lines)
    for whole in (ID, "active", "disabled", "3 min ago"):
        assert any(whole in line for line in lines), whole
    assert "".join("".join(lines).split()).count("x") >= 60


def test_a_narrow_terminal_gets_a_block_for_each_row() -> None:
    lines = printed(60)
    assert lines[0] == ID
    assert lines[1].startswith("  status active")
    assert lines[-1] == "  status disabled"  # what is not there is not told


def test_a_wide_one_gets_a_table() -> None:
    heading, _, first, *_ = printed(200)
    assert heading.split() == list(COLUMNS)
    assert first.split()[:2] == [ID, "active"]


@pytest.mark.parametrize(
    ("ahead_s", "said"),
    [
        (-3.5, "3 s ago"),
        (57, "in 57 s"),
        (-181, "3 min ago"),
        (18_009, "in 5 h"),
        (-260_000, "3 d ago"),
        (0, "0 s ago"),
    ],
)
def test_a_moment_is_told_as_people_say_it(ahead_s: float, said: str) -> None:
    now = datetime(2025, 1, 15, 10, 30, tzinfo=UTC)
    assert since((now + timedelta(seconds=ahead_s)).isoformat(), now) == said


def test_a_moment_long_ago_is_a_date_and_none_is_none() -> None:
    assert since("2020-01-15T10:30:00Z") == "2020-01-15"
    assert since(None) is None
