"""Charts as inline SVG, for people who see them and for people who do not.

A chart is drawn into a box of fixed units that the style sheet stretches to whatever room there is, so all text stands
around the drawing, in HTML. Colours come from the classes `c-KIND` alone: the content security policy allows no inline
style, and the style sheet has one set for light and one for dark. Every value is told three times: drawn, named where
a pointer rests, and in a table that opens below. Without any data the box stays as high, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final, NamedTuple

from markupsafe import Markup

SLOT: Final = 10.0  # width of a slot, of which a bar fills 8
HEIGHT: Final = 100.0
SPARK_HEIGHT: Final = 24.0
VISIBLE: Final = 0.03  # of the height: one failure among a thousand deliveries must not vanish
TICKS_MAX: Final = 5  # times below a chart
_STEPS: Final = (1.0, 2.0, 4.0, 5.0, 10.0)  # tops of a scale whose halves are round, too
_DAY: Final = timedelta(days=1)

Show = Callable[[float], str]
Point = tuple[datetime, *tuple[float | None, ...]]
"""A moment, and a value for each line; None where nothing was measured."""


class Series(NamedTuple):
    """One thing that is counted: what people call it, and its class in the style sheet."""

    name: str
    kind: str


class Bar(NamedTuple):
    """One stretch of time: when it begins, and a count for each series. `is_cut`: there was more."""

    at: datetime
    counts: tuple[int, ...]
    is_cut: bool = False


class _Slot(NamedTuple):
    """A stretch of any chart: what is told about it, and whether there is anything to tell."""

    label: Markup
    told: str
    texts: list[str]
    has_any: bool


def bars(
    bars: Sequence[Bar],
    series: Sequence[Series],
    *,
    title: str,
    length: timedelta,
    zone: tzinfo,
    class_: str = "",
    empty: str = "Nothing in this time",
) -> Markup:
    """A bar for each stretch of `length`, its series on top of each other, the first at the bottom."""
    clock = _Clock(zone, length, len(bars))
    top = _top(max((sum(bar.counts) for bar in bars), default=0))
    slots = [
        _slot(bar.at, series, [f"{count:,}{'+' if bar.is_cut else ''}" for count in bar.counts], any(bar.counts), clock)
        for bar in bars
    ]
    drawn = [_stack(number, bar.counts, series, top, HEIGHT) for number, bar in enumerate(bars)]
    return _figure(title, series, slots, drawn, scale=(f"{top:,.0f}", _half(top)), class_=class_, empty=empty)


def lines(
    points: Sequence[Point],
    names: Sequence[str],
    *,
    title: str,
    unit: str = "ms",
    length: timedelta,
    zone: tzinfo,
    class_: str = "",
    empty: str = "Nothing was measured in this time",
) -> Markup:
    """A line for each name, which is its class as well, interrupted where nothing was measured."""
    show = milliseconds if unit == "ms" else lambda value: f"{value:,.3g} {unit}".rstrip()
    clock = _Clock(zone, length, len(points))
    series = [Series(name, name) for name in names]
    top = _top(max((value for _, *values in points for value in values if value is not None), default=0.0))
    slots = [
        _slot(at, series, ["–" if value is None else show(value) for value in values], any(values), clock)
        for at, *values in points
    ]
    drawn = [
        Markup('<path class="line c-{}" d="{}"/>').format(one.kind, path)
        for place, one in enumerate(series)
        if (path := _path([values[place] for _, *values in points], top))
    ]
    return _figure(title, series, slots, drawn, scale=(show(top), show(top / 2)), class_=class_, empty=empty)


def spark(bars: Sequence[Bar], series: Sequence[Series], *, label: str) -> Markup:
    """Stacked bars the size of a word, with their sums as the text alternative."""
    sums = [sum(bar.counts[place] for bar in bars) for place in range(len(series))]
    more = "+" if any(bar.is_cut for bar in bars) else ""
    told = ", ".join(f"{one.name.lower()} {total:,}{more}" for one, total in zip(series, sums, strict=True))
    top, width = max((sum(bar.counts) for bar in bars), default=0), _n(max(len(bars), 1) * SLOT)
    drawn = Markup("").join(_stack(number, bar.counts, series, top, SPARK_HEIGHT) for number, bar in enumerate(bars))
    return Markup(
        '<svg class="spark" role="img" viewBox="0 0 {0} {1}" preserveAspectRatio="none"><title>{2}</title>'
        '<path class="axis" d="M0 {1}H{0}"/>{3}</svg>'
    ).format(width, _n(SPARK_HEIGHT), f"{label}: {told if any(sums) else 'nothing'}", drawn)


def milliseconds(value: float) -> str:
    """A latency on a scale: `0.4 ms`, `85 ms`, `1.23 s`."""
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.1f} ms" if 0 < value < 10 and value != round(value) else f"{value:.0f} ms"


# -- drawing


def _stack(number: int, counts: Sequence[int], series: Sequence[Series], top: float, height: float) -> Markup:
    """The parts of a bar, from the bottom up."""
    parts, y = [], height
    for one, count in zip(series, counts, strict=True):
        if count:
            tall = min(max(count / top * height, VISIBLE * height), y)
            y -= tall
            box = (one.kind, *map(_n, (number * SLOT + 1, y, SLOT - 2, tall)))
            parts.append(Markup('<rect class="c-{}" x="{}" y="{}" width="{}" height="{}"/>').format(*box))
    return Markup("").join(parts)


def _path(values: Sequence[float | None], top: float) -> str:
    """A line through the middles of the slots; a value without neighbours is a dash, since a point has no length."""
    path, is_drawing = [], False
    for number, value in enumerate(values):
        if value is None:
            is_drawing = False
            continue
        x, y = number * SLOT + SLOT / 2, _n(HEIGHT - value / top * HEIGHT)
        if is_drawing:
            path.append(f"L{_n(x)} {y}")
        elif number + 1 < len(values) and values[number + 1] is not None:
            path.append(f"M{_n(x)} {y}")
        else:
            path.append(f"M{_n(x - SLOT / 3)} {y}H{_n(x + SLOT / 3)}")
        is_drawing = True
    return "".join(path)


def _figure(
    title: str,
    series: Sequence[Series],
    slots: Sequence[_Slot],
    drawn: Sequence[Markup],
    *,
    scale: tuple[str, str],
    class_: str,
    empty: str,
) -> Markup:
    """The drawing with everything around it."""
    has_any = any(slot.has_any for slot in slots)
    width = _n(max(len(slots), 1) * SLOT)
    grid = [Markup('<path class="grid" d="M0 {0}H{1}"/>').format(_n(y), width) for y in (0.0, HEIGHT / 2, HEIGHT)]
    hits = [
        Markup('<rect class="hit" x="{}" y="0" width="{}" height="{}"><title>{}</title></rect>').format(
            _n(number * SLOT), _n(SLOT), _n(HEIGHT), slot.told
        )
        for number, slot in enumerate(slots)
    ]
    return Markup(
        '<figure class="chart {class_}"><figcaption>{title}{legend}</figcaption><div class="chart-frame">'
        '<div class="chart-scale" aria-hidden="true">{scale}</div>'
        '<svg role="img" viewBox="0 0 {width} {height}" preserveAspectRatio="none"><title>{title}</title>'
        "<desc>{desc}</desc>{drawing}</svg>{nothing}</div>"
        '<div class="chart-times" aria-hidden="true">{times}</div>{table}</figure>'
    ).format(
        class_=class_,
        title=title,
        legend=_legend(series),
        scale=Markup("").join(Markup("<span>{}</span>").format(text) for text in ((*scale, "0") if has_any else ())),
        width=width,
        height=_n(HEIGHT),
        desc="The table below has every value." if has_any else f"{empty}.",
        drawing=Markup("").join([*grid, *drawn, *hits] if has_any else grid[-1:]),
        nothing="" if has_any else Markup('<p class="chart-nothing">{}</p>').format(empty),
        times=Markup("").join(_ticks([slot.label for slot in slots])),
        table=_table(title, series, slots) if has_any else "",
    )


def _legend(series: Sequence[Series]) -> Markup:
    entry = Markup(
        '<li><svg class="swatch" viewBox="0 0 10 10" aria-hidden="true">'
        '<rect class="c-{}" width="10" height="10"/></svg>{}</li>'
    )
    return Markup('<ul class="chart-legend">{}</ul>').format(
        Markup("").join(entry.format(one.kind, one.name) for one in series)
    )


def _ticks(labels: Sequence[Markup]) -> Iterator[Markup]:
    """Some of the times, evenly apart, the first and the last among them."""
    count = min(TICKS_MAX, len(labels))
    yield from (labels[round(place * (len(labels) - 1) / max(count - 1, 1))] for place in range(count))


def _table(title: str, series: Sequence[Series], slots: Sequence[_Slot]) -> Markup:
    """The stretches that have anything in them, the latest first."""
    head = Markup("").join(Markup('<th scope="col" class="num">{}</th>').format(one.name) for one in series)
    rows = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            slot.label, Markup("").join(Markup('<td class="num">{}</td>').format(text) for text in slot.texts)
        )
        for slot in reversed(slots)
        if slot.has_any
    )
    return Markup(
        '<details class="chart-table"><summary>Values<span class="unseen"> of {0}</span></summary>'
        '<div class="table" tabindex="0" role="group" aria-label="{0}: values"><table><thead><tr>'
        '<th scope="col">From</th>{1}</tr></thead><tbody>{2}</tbody></table></div></details>'
    ).format(title, head, rows)


# -- words and numbers


class _Clock:
    """Times below a chart: of the day if it spans few of them, else dates."""

    def __init__(self, zone: tzinfo, length: timedelta, count: int) -> None:
        self._zone = zone
        if length >= _DAY:
            self._style = "%-d %b"
        elif length * count > 2 * _DAY:
            self._style = "%-d %b, %H:%M"
        else:
            self._style = "%H:%M:%S" if length < timedelta(minutes=1) else "%H:%M"

    def text(self, at: datetime) -> str:
        return at.astimezone(self._zone).strftime(self._style)

    def label(self, at: datetime) -> Markup:
        utc = at.astimezone(UTC)
        return Markup('<time datetime="{}Z" title="{} UTC">{}</time>').format(
            utc.replace(tzinfo=None).isoformat(timespec="seconds"), f"{utc:%a, %-d %b %Y, %H:%M:%S}", self.text(at)
        )


def _slot(at: datetime, series: Sequence[Series], texts: list[str], has_any: bool, clock: _Clock) -> _Slot:
    told = "\n".join([clock.text(at), *(f"{one.name}: {text}" for one, text in zip(series, texts, strict=True))])
    return _Slot(clock.label(at), told, texts, has_any)


def _top(most: float) -> float:
    """The least round number that nothing exceeds: the top of the scale."""
    if most <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(most))
    return next(step * unit for step in _STEPS if step * unit >= most * (1 - 1e-9))


def _half(top: float) -> str:
    """Half of a count; nothing where counts have no half."""
    return f"{top / 2:,.0f}" if top % 2 == 0 else ""


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
