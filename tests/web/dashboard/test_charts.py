"""Charts: what is drawn is what was measured, and everything drawn is also said."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.web.dashboard.charts import Bar, Series, bars, lines, milliseconds, spark

NOON = datetime(2025, 1, 15, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SERIES = [Series("Delivered", "delivered"), Series("Retried", "retrying"), Series("Failed", "failed")]
HOSTILE = Series("</title><script>alert(1)</script>&\"'", '"><script>')

counts = st.lists(st.tuples(*[st.integers(0, 10**9)] * 3), max_size=70)
values = st.lists(st.tuples(*[st.one_of(st.none(), st.floats(0, 1e9))] * 3), max_size=70)


def of(*rows: tuple[int, ...]) -> list[Bar]:
    return [Bar(NOON + place * MINUTE, row) for place, row in enumerate(rows)]


def at(*rows: tuple[float | None, ...]) -> list[tuple[datetime, *tuple[float | None, ...]]]:
    return [(NOON + place * MINUTE, *row) for place, row in enumerate(rows)]


def drawn(rows: list[Bar], series: list[Series] = SERIES, **rest) -> ET.Element:
    return tree(bars(rows, series, **({"title": "Deliveries", "length": MINUTE, "zone": UTC} | rest)))


def tree(markup: str) -> ET.Element:
    return ET.fromstring(f"<page>{markup}</page>")


def words(element: ET.Element) -> str:
    return "".join(element.itertext())


def rects(page: ET.Element, kind: str) -> list[tuple[float, float, float]]:
    """Where the parts of bars stand: x, y, height."""
    return [
        (float(one.attrib["x"]), float(one.attrib["y"]), float(one.attrib["height"]))
        for one in page.iter("rect")
        if one.attrib["class"] == f"c-{kind}" and "x" in one.attrib
    ]


def test_bars_stand_on_each_other_in_proportion():
    page = drawn(of((6, 2, 2), (5, 0, 0)))
    assert rects(page, "delivered") == [(1, 40, 60), (11, 50, 50)]
    assert rects(page, "retrying") == [(1, 20, 20)]
    assert rects(page, "failed") == [(1, 0, 20)]


def test_one_failure_among_ten_thousand_is_still_seen():
    [(_, y, height)] = rects(drawn(of((15_000, 0, 1))), "failed")
    assert (y, height) == (22, 3)


def test_a_line_breaks_where_nothing_was_measured():
    points = at((10, 20), (10, 20), (None, None), (10, None))
    page = tree(lines(points, ["p50", "p95"], title="Latency", length=MINUTE, zone=UTC))
    paths = {one.attrib["class"]: one.attrib["d"] for one in page.iter("path") if "line" in one.attrib["class"]}
    assert paths["line c-p50"] == "M5 50L15 50M31.67 50H38.33"
    assert paths["line c-p95"] == "M5 0L15 0"


def test_every_value_is_in_the_table_with_its_time_the_latest_first():
    page = drawn([*of((1, 2, 3), (0, 0, 0)), Bar(NOON + 2 * MINUTE, (1234, 0, 0), is_cut=True)])
    assert [[words(cell) for cell in row] for row in page.iter("tr")] == [
        ["From", "Delivered", "Retried", "Failed"],
        ["12:02", "1,234+", "0+", "0+"],
        ["12:00", "1", "2", "3"],
    ]


def test_times_are_the_readers_and_say_utc_on_hover():
    page = drawn(of(*[(1, 0, 0)] * 60), zone=ZoneInfo("Asia/Kolkata"))
    ticks = page.findall("figure/div[@class='chart-times']/time")
    assert [words(one) for one in ticks] == ["17:30", "17:45", "18:00", "18:14", "18:29"]
    assert ticks[0].attrib == {"datetime": "2025-01-15T12:00:00Z", "title": "Wed, 15 Jan 2025, 12:00:00 UTC"}


@pytest.mark.parametrize(
    ("length", "label"),
    [(timedelta(seconds=5), "12:00:00"), (timedelta(hours=1), "12:00"), (timedelta(hours=12), "15 Jan, 12:00")],
)
def test_times_are_as_long_as_they_must_be(length, label):
    assert words(next(drawn(of(*[(1, 0, 0)] * 40), length=length).iter("time"))) == label


def test_a_picture_has_a_name_and_a_description():
    [picture] = [one for one in drawn(of((1, 0, 0))).iter("svg") if one.attrib.get("role") == "img"]
    assert picture.find("title").text == "Deliveries"
    assert picture.find("desc").text == "The table below has every value."


@pytest.mark.parametrize("nothing", [[], of((0, 0, 0))])
def test_nothing_is_said_in_words_and_takes_the_same_room(nothing):
    page = drawn(nothing, empty="No deliveries yet")
    assert page.find("figure/div/svg/desc").text == page.find("figure/div/p").text + "." == "No deliveries yet."
    assert page.find("figure/details") is None


def test_a_spark_says_its_sums():
    page = tree(spark(of((5, 0, 1), (7, 2, 0)), SERIES, label="Last 24 hours"))
    assert page.find("svg/title").text == "Last 24 hours: delivered 12, retried 2, failed 1"
    assert tree(spark([], SERIES, label="Last 24 hours")).find("svg/title").text == "Last 24 hours: nothing"


@pytest.mark.parametrize(
    ("ms", "text"), [(0, "0 ms"), (0.42, "0.4 ms"), (5, "5 ms"), (85.4, "85 ms"), (1234, "1.23 s"), (30_000, "30 s")]
)
def test_latencies_are_short(ms, text):
    assert milliseconds(ms) == text


@given(counts, values)
def test_whatever_is_measured_stays_inside_the_box(some, measured):
    page = drawn(of(*some))
    for one in SERIES:
        assert all(y >= 0 and y + height <= 100.011 for _, y, height in rects(page, one.kind))
    page = tree(lines(at(*measured), ["a", "b", "c"], title="Latency", length=MINUTE, zone=UTC))
    for path in page.iter("path"):
        assert all(-0.001 <= float(y) <= 100.001 for y in re.findall(r"[ML]\S+ (-?[\d.]+)", path.attrib["d"]))


@given(counts)
def test_nothing_is_styled_inline_and_nothing_gets_out_of_its_text(some):
    series = [HOSTILE, *SERIES[1:]]
    for page in (
        drawn(of(*some), series, title="<b>&", empty="<b>&"),
        tree(lines(at(*some), [one.name for one in series], title="<b>&", length=MINUTE, zone=UTC)),
        tree(spark(of(*some), series, label="<b>&")),
    ):
        assert {one.tag for one in page.iter()}.isdisjoint({"script", "b", "style"})
        assert not any(name == "style" or name.startswith("on") for one in page.iter() for name in one.attrib)
