"""Charts: what is drawn is what was measured, and everything drawn is also said."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.web.dashboard.charts import (
    DELIVERIES,
    LATENCY,
    Series,
    Slot,
    lines,
    milliseconds,
    sparkline,
    stacked_bars,
)

NOON = datetime(2025, 1, 15, 12, 0, tzinfo=UTC)
HOSTILE = Series('"><script>', '</title><script>alert(1)</script>&"')

values = st.lists(st.tuples(*[st.one_of(st.none(), st.floats(0, 1e9)) for _ in range(3)]), max_size=70)


def slots(*rows: tuple[float | None, ...]) -> list[Slot]:
    return [Slot(NOON + timedelta(minutes=place), row) for place, row in enumerate(rows)]


def tree(markup: str) -> ET.Element:
    return ET.fromstring(f"<page>{markup}</page>")


def rects(page: ET.Element, name: str) -> list[tuple[float, float, float]]:
    """Where the bars of a series stand: x, y, height."""
    return [
        (float(one.attrib["x"]), float(one.attrib["y"]), float(one.attrib["height"]))
        for one in page.iter("rect")
        if one.attrib["class"] == f"series-{name}"
    ]


def test_bars_stand_on_each_other_in_proportion():
    page = tree(stacked_bars("c", "Deliveries", DELIVERIES, slots((6, 2, 2), (5, 0, 0))))
    assert rects(page, "delivered") == [(1, 40, 60), (11, 50, 50)]
    assert rects(page, "retrying") == [(1, 20, 20)]
    assert rects(page, "failed") == [(1, 0, 20)]


def test_one_failure_among_ten_thousand_is_still_seen():
    page = tree(stacked_bars("c", "Deliveries", DELIVERIES, slots((9_999, 0, 1))))
    [(_, y, height)] = rects(page, "failed")
    assert height >= 3 or y == 0


def test_a_line_breaks_where_nothing_was_measured():
    page = tree(lines("c", "Latency", LATENCY, slots((10, 20), (10, 20), (None, None), (10, None))))
    paths = {one.attrib["class"]: one.attrib["d"] for one in page.iter("path") if "line" in one.attrib["class"]}
    assert paths["line series-p50"] == "M5 50L15 50M31.67 50H38.33"
    assert paths["line series-p95"] == "M5 0L15 0"


def test_every_value_is_in_the_table_with_its_time_the_newest_first():
    page = tree(stacked_bars("c", "Deliveries", DELIVERIES, slots((1, 2, 3), (0, 0, 0), (1234, 0, None))))
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]
    assert rows == [
        ["From", "Delivered", "Failed, retried", "Given up"],
        ["2025-01-15 12:02 UTC", "1,234", "0", "–"],
        ["2025-01-15 12:00 UTC", "1", "2", "3"],
    ]
    assert [one.attrib["datetime"] for one in page.iter("time")][-1] == "2025-01-15T12:00:00Z"


def test_a_picture_has_a_name_and_a_description():
    page = tree(stacked_bars("c7", "Deliveries", DELIVERIES, slots((1, 0, 0), (5, 0, 0))))
    [picture] = page.iter("svg")
    assert picture.attrib["role"] == "img"
    named = {one.attrib.get("id"): one.text for one in picture.iter() if "id" in one.attrib}
    assert picture.attrib["aria-labelledby"].split() == list(named) == ["c7-title", "c7-desc"]
    assert named["c7-title"] == "Deliveries"
    assert "Delivered: at most 5, at 2025-01-15 12:01 UTC. Failed, retried: nothing." in named["c7-desc"]


@pytest.mark.parametrize("nothing", [[], slots((0, 0, 0)), slots((None, None, None))])
def test_nothing_is_said_in_words(nothing):
    page = tree(stacked_bars("c", "Deliveries", DELIVERIES, nothing, empty="No deliveries in these 24 hours."))
    assert not list(page.iter("svg"))
    assert "No deliveries in these 24 hours." in "".join(page.itertext())


def test_a_sparkline_says_its_sums():
    page = tree(sparkline("Last 24 hours", DELIVERIES, slots((5, 0, 1), (7, 2, 0))))
    assert page.find("svg/title").text == "Last 24 hours: delivered 12, failed, retried 2, given up 1"
    assert tree(sparkline("Last 24 hours", DELIVERIES, [])).find("svg/title").text == "Last 24 hours: nothing"


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0 ms"), (0.42, "0.4 ms"), (9.96, "10.0 ms"), (85.4, "85 ms"), (1234, "1.23 s"), (30_000, "30 s")],
)
def test_latencies_are_short(ms, text):
    assert milliseconds(ms) == text


@given(values)
def test_whatever_is_measured_stays_inside_the_box(rows):
    for draw in (stacked_bars, lines):
        page = tree(draw("c", "Title", DELIVERIES, slots(*rows)))
        for one in DELIVERIES:
            assert all(y >= 0 and y + height <= 100.011 for _, y, height in rects(page, one.name))
        for path in page.iter("path"):
            ys = [float(y) for y in re.findall(r"[ML]\S+ (-?[\d.]+)", path.attrib["d"])]
            assert all(-0.001 <= y <= 100.001 for y in ys)


@given(values)
def test_nothing_is_styled_inline_and_nothing_gets_out_of_its_text(rows):
    series = [HOSTILE, *DELIVERIES[1:]]
    for markup in (
        stacked_bars("c", "<b>&", series, slots(*rows)),
        lines("c", "<b>&", series, slots(*rows)),
        sparkline("<b>&", series, slots(*rows)),
    ):
        page = tree(markup)
        assert {one.tag for one in page.iter()}.isdisjoint({"script", "b", "style"})
        assert not any(name == "style" or name.startswith("on") for one in page.iter() for name in one.attrib)
