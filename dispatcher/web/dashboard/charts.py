"""Charts as inline SVG, for people who see them and for people who do not.

A chart is drawn into a box of fixed units that CSS stretches to whatever room there is, so all text stands around the
drawing, in HTML. Colours come from the classes `series-NAME` alone: the content security policy allows no inline style,
and the style sheet has one set for light and one for dark. Every value is told three times: drawn, named when a pointer
rests on its slot, and in a table that opens below. A chart without data says so in words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from markupsafe import Markup

SLOT: Final = 10.0  # width of a slot, of which a bar fills 8
HEIGHT: Final = 100.0
SPARK_HEIGHT: Final = 24.0
VISIBLE: Final = 0.03  # of the height: one failure among a thousand deliveries must not vanish
_STEPS: Final = (1.0, 2.0, 4.0, 5.0, 10.0)  # tops of a scale whose halves are round, too

Show = Callable[[float], str]


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """One thing that is measured. `name` is its class in the style sheet, `label` its name for people."""

    name: str
    label: str


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One stretch of time: when it began, and a value for each series; None where nothing was measured."""

    at: datetime
    values: tuple[float | None, ...]


DELIVERIES: Final = (
    Series("delivered", "Delivered"),
    Series("retrying", "Failed, retried"),
    Series("failed", "Given up"),
)
LATENCY: Final = (Series("p50", "p50"), Series("p95", "p95"))


def whole(value: float) -> str:
    """A count: `12,345`."""
    return f"{value:,.0f}"


def milliseconds(value: float) -> str:
    """A latency: `0.4 ms`, `85 ms`, `1.2 s`, `30 s`."""
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.1f} ms" if 0 < value < 10 else f"{value:.0f} ms"


def stacked_bars(
    key: str, title: str, series: Sequence[Series], slots: Sequence[Slot], *, show: Show = whole, empty: str = ""
) -> Markup:
    """A bar per slot, its series on top of each other, the first at the bottom. `key` makes ids unique in a page."""
    top = _top(max((_sum(slot) for slot in slots), default=0.0))
    drawing = Markup("").join(
        _slot(number, slot, series, show, _bar(number, slot, series, top, HEIGHT)) for number, slot in enumerate(slots)
    )
    return _figure(
        key,
        title,
        series=series,
        slots=slots,
        top=top,
        drawing=drawing,
        show=show,
        empty=empty or "Nothing in this time.",
    )


def lines(
    key: str, title: str, series: Sequence[Series], slots: Sequence[Slot], *, show: Show = milliseconds, empty: str = ""
) -> Markup:
    """A line per series, interrupted where nothing was measured."""
    top = _top(max((value for slot in slots for value in slot.values if value is not None), default=0.0))
    drawn = Markup("").join(
        Markup('<path class="line series-{}" d="{}"/>').format(one.name, path)
        for place, one in enumerate(series)
        if (path := _path([slot.values[place] for slot in slots], top))
    )
    named = Markup("").join(_slot(number, slot, series, show, Markup("")) for number, slot in enumerate(slots))
    return _figure(
        key,
        title,
        series=series,
        slots=slots,
        top=top,
        drawing=drawn + named,
        show=show,
        empty=empty or "Nothing was measured in this time.",
    )


def sparkline(label: str, series: Sequence[Series], slots: Sequence[Slot], *, show: Show = whole) -> Markup:
    """Stacked bars the size of a word, with their sums as the text alternative."""
    sums = ", ".join(
        f"{one.label.lower()} {show(sum(slot.values[place] or 0.0 for slot in slots))}"
        for place, one in enumerate(series)
    )
    top = max((_sum(slot) for slot in slots), default=0.0)
    bars = Markup("").join(_bar(number, slot, series, top, SPARK_HEIGHT) for number, slot in enumerate(slots))
    return Markup(
        '<svg class="sparkline" role="img" viewBox="0 0 {} {}" preserveAspectRatio="none">'
        '<title>{}</title><path class="axis" d="M0 {}H{}"/>{}</svg>'
    ).format(
        _n(max(len(slots), 1) * SLOT),
        _n(SPARK_HEIGHT),
        f"{label}: {sums if top else 'nothing'}",
        _n(SPARK_HEIGHT),
        _n(max(len(slots), 1) * SLOT),
        bars,
    )


# -- drawing


def _bar(number: int, slot: Slot, series: Sequence[Series], top: float, height: float) -> Markup:
    """The parts of a slot's bar, from the bottom up."""
    parts, y = [], height
    for one, value in zip(series, slot.values, strict=True):
        if not value or top <= 0:
            continue
        tall = min(max(value / top * height, VISIBLE * height), y)
        y -= tall
        parts.append(
            Markup('<rect class="series-{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                one.name, _n(number * SLOT + 1), _n(y), _n(SLOT - 2), _n(tall)
            )
        )
    return Markup("").join(parts)


def _slot(number: int, slot: Slot, series: Sequence[Series], show: Show, inside: Markup) -> Markup:
    """A slot that tells its values to a pointer resting anywhere on it."""
    told = "\n".join([_utc(slot.at), *(f"{one.label}: {text}" for one, text in _texts(slot, series, show))])
    return Markup(
        '<g class="slot"><title>{}</title>{}<rect class="hit" x="{}" y="0" width="{}" height="{}"/></g>'
    ).format(told, inside, _n(number * SLOT), _n(SLOT), _n(HEIGHT))


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
    key: str,
    title: str,
    *,
    series: Sequence[Series],
    slots: Sequence[Slot],
    top: float,
    drawing: Markup,
    show: Show,
    empty: str,
) -> Markup:
    caption = Markup('<figcaption class="chart-title">{}{}</figcaption>').format(title, _legend(series))
    if not any(value for slot in slots for value in slot.values):
        return Markup('<figure class="chart chart-empty">{}<p class="chart-nothing">{}</p></figure>').format(
            caption, empty
        )
    width = len(slots) * SLOT
    grid = Markup("").join(
        Markup('<path class="grid" d="M0 {0}H{1}"/>').format(_n(y), _n(width)) for y in (0.0, HEIGHT / 2, HEIGHT)
    )
    return Markup(
        '<figure class="chart">{caption}<div class="chart-frame">'
        '<div class="chart-scale" aria-hidden="true"><span>{top}</span><span>{half}</span><span>0</span></div>'
        '<svg role="img" aria-labelledby="{key}-title {key}-desc" viewBox="0 0 {width} {height}"'
        ' preserveAspectRatio="none"><title id="{key}-title">{title}</title><desc id="{key}-desc">{desc}</desc>'
        '{grid}{drawing}</svg></div><div class="chart-span" aria-hidden="true">{first}{last}</div>{table}</figure>'
    ).format(
        caption=caption,
        top=show(top),
        half=show(top / 2),
        key=key,
        width=_n(width),
        height=_n(HEIGHT),
        title=title,
        desc=_described(slots, series, show),
        grid=grid,
        drawing=drawing,
        first=_time(slots[0].at),
        last=_time(slots[-1].at),
        table=_table(title, series, slots, show),
    )


def _legend(series: Sequence[Series]) -> Markup:
    entries = (
        Markup('<li><span class="swatch series-{}"></span>{}</li>').format(one.name, one.label) for one in series
    )
    return Markup('<ul class="chart-legend">{}</ul>').format(Markup("").join(entries))


# -- words


def _described(slots: Sequence[Slot], series: Sequence[Series], show: Show) -> str:
    """What somebody would say who looked at it."""
    peaks = []
    for place, one in enumerate(series):
        measured = [(value, slot.at) for slot in slots if (value := slot.values[place])]
        if measured:
            most, at = max(measured)
            peaks.append(f"{one.label}: at most {show(most)}, at {_utc(at)}.")
        else:
            peaks.append(f"{one.label}: nothing.")
    return f"From {_utc(slots[0].at)} to {_utc(slots[-1].at)}. {' '.join(peaks)} The table below has every value."


def _table(title: str, series: Sequence[Series], slots: Sequence[Slot], show: Show) -> Markup:
    """The slots that have any value, the newest first."""
    head = Markup("").join(Markup('<th scope="col" class="number">{}</th>').format(one.label) for one in series)
    rows = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            _time(slot.at),
            Markup("").join(
                Markup('<td class="number">{}</td>').format(text) for _, text in _texts(slot, series, show)
            ),
        )
        for slot in reversed(slots)
        if any(slot.values)
    )
    return Markup(
        '<details class="chart-values"><summary>Values<span class="visually-hidden"> of {0}</span></summary>'
        '<div class="scroll" tabindex="0" role="region" aria-label="{0}"><table><thead><tr><th scope="col">From</th>{1}'
        "</tr></thead><tbody>{2}</tbody></table></div></details>"
    ).format(title, head, rows)


def _texts(slot: Slot, series: Iterable[Series], show: Show) -> Iterator[tuple[Series, str]]:
    for one, value in zip(series, slot.values, strict=True):
        yield one, "–" if value is None else show(value)


def _time(at: datetime) -> Markup:
    """The page's script puts it into the reader's zone."""
    return Markup('<time datetime="{}">{}</time>').format(
        at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z", _utc(at)
    )


def _utc(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


# -- numbers


def _sum(slot: Slot) -> float:
    return sum(value or 0.0 for value in slot.values)


def _top(most: float) -> float:
    """The least round number that nothing exceeds: the top of the scale."""
    if most <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(most))
    return next(step * unit for step in _STEPS if step * unit >= most * (1 - 1e-9))


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
