"""Plots as SVG, written by hand: latencies by quantile, columns in groups, lines over time. Readable on light and dark
grounds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Final

from bench.histogram import Histogram

WIDTH: Final = 860
PANEL: Final = 310  # height of one; several are below each other
LEFT, RIGHT, TOP, BETWEEN = 70, 40, 62, 62
CHARACTER: Final = 6.2  # width of one, about
COLOURS: Final = ("#2f6fde", "#d9480f", "#2b8a3e", "#9c36b5", "#e8a100", "#0b7285", "#c2255c", "#868e96")
QUANTILES: Final = (0.0, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999)
TEXT: Final = "#666"
GRID: Final = "#9996"

Point = tuple[float, float]


def quantiles(title: str, histograms: Mapping[str, Histogram]) -> str:
    """Latency (ms, logarithmic) over the share of events that were faster, stretched towards the slowest."""
    known = {label: histogram for label, histogram in histograms.items() if len(histogram)}
    curves = {label: _curve(histogram) for label, histogram in known.items()}
    if not curves:
        return ""
    low, high = _decades([y for points in curves.values() for _, y in points])
    span = _stretched(QUANTILES[-1])
    marks = [(_stretched(q) / span, f"{q * 100:g} %") for q in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999)]
    rows = [((e - low) / (high - low), f"{10.0**e:g}") for e in range(low, high + 1)]
    drawn = [[(x / span, (math.log10(y) - low) / (high - low)) for x, y in points] for points in curves.values()]
    return _page(title, [[*_axes(0, "ms", rows, marks), *_polylines(0, drawn)]], list(curves))


def _curve(histogram: Histogram) -> list[Point]:
    """(stretched quantile, ms), as far as there are enough events to tell."""
    told = [q for q in QUANTILES if q <= 1 - 1 / (len(histogram) + 1)]
    return [(_stretched(q), max(histogram.ms(q or 1e-9), 1e-3)) for q in told]


def _stretched(share: float) -> float:
    return -math.log10(1 - share)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def columns(title: str, groups: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Columns in groups; those of one series have one colour."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    rows, top = _linear([value for group in groups.values() for value in group.values()])
    width = 1 / len(groups)
    marks = [((n + 0.5) * width, label) for n, label in enumerate(groups)]
    thick = width * 0.8 / len(series)
    body = []
    for n, group in enumerate(groups.values()):
        for name, value in group.items():
            place = series.index(name)
            left, high = _x((n + 0.1) * width + place * thick), _y(0, value / top)
            body.append(
                f'<rect x="{left:.1f}" y="{high:.1f}" width="{max(1.0, _x(thick) - LEFT - 2):.1f}" '
                f'height="{max(0.0, _y(0, 0) - high):.1f}" fill="{COLOURS[place % len(COLOURS)]}"/>'
            )
            middle = left + (_x(thick) - LEFT) / 2
            body.append(
                _text(middle, high - 4, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", "middle", size=10)
            )
    legend = series if series != [""] else []
    return _page(title, [[*_axes(0, unit, rows, marks), *body]], legend)


def lines(title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Values over time, in seconds; those of one unit, which stands behind the comma, in one panel."""
    units: dict[str, list[str]] = {}
    for label, points in series.items():
        if points:
            units.setdefault(label.rpartition(", ")[2], []).append(label)
    if not units:
        return ""
    last = max(at for points in series.values() for at, _ in points) or 1.0
    marks = [(n / 5, f"{last * n / 5:.3g} s") for n in range(6)]
    panels: list[list[str]] = []
    legend: list[str] = []
    for number, (unit, labels) in enumerate(units.items()):
        rows, top = _linear([value for label in labels for _, value in series[label]])
        drawn = [[(at / last, value / top) for at, value in series[label]] for label in labels]
        panels.append([*_axes(number, unit, rows, marks), *_polylines(number, drawn, first=len(legend))])
        legend += labels
    return _page(title, panels, legend)


def _linear(values: Sequence[float]) -> tuple[list[tuple[float, str]], float]:
    """Grid rows and the value at the top."""
    highest = max([*values, 1e-9])
    step = 10.0 ** math.floor(math.log10(highest))
    step = next(s for s in (step / 5, step / 2, step, step * 2) if highest / s <= 8)
    top = math.ceil(highest / step) * step
    return [(n * step / top, f"{n * step:,.6g}") for n in range(round(top / step) + 1)], top


def _polylines(panel: int, curves: Iterable[list[Point]], *, first: int = 0) -> list[str]:
    return [
        f'<polyline fill="none" stroke="{COLOURS[n % len(COLOURS)]}" stroke-width="2" points="'
        + " ".join(f"{_x(x):.1f},{_y(panel, y):.1f}" for x, y in points)
        + '"/>'
        for n, points in enumerate(curves, first)
    ]


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(panel: int, share: float) -> float:
    return TOP + panel * (PANEL + BETWEEN) + (1 - share) * PANEL


def _axes(
    panel: int, unit: str, rows: Sequence[tuple[float, str]], marks: Sequence[tuple[float, str]]
) -> Iterator[str]:
    """The grid, what its rows mean, and the marks below it, each in as many lines as it needs."""
    yield _text(8, _y(panel, 1) - 12, unit)
    for at, label in rows:
        y = _y(panel, at)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
        yield _text(LEFT - 8, y + 4, label, "end")
    room = int((WIDTH - LEFT - RIGHT) / max(1, len(marks)) / CHARACTER)
    for at, label in marks:
        for n, line in enumerate(textwrap.wrap(label, max(8, room))[:3]):
            yield _text(_x(at), _y(panel, 0) + 18 + 13 * n, line, "middle", size=11)


def _page(title: str, panels: Sequence[Sequence[str]], legend: Sequence[str]) -> str:
    bottom = _y(len(panels) - 1, 0) + BETWEEN
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {WIDTH} {bottom + 18 * ((len(legend) + 1) // 2):.0f}" '
            f'font-family="system-ui, sans-serif" font-size="12" role="img">'
        ),
        f"<title>{escape(title)}</title>",
        _text(8, 24, title, size=14),
    ]
    for panel in panels:
        parts += panel
    for n, label in enumerate(legend):
        x, y = LEFT + 380 * (n % 2), bottom + 18 * (n // 2)
        parts.append(f'<rect x="{x}" y="{y - 9:.0f}" width="10" height="10" fill="{COLOURS[n % len(COLOURS)]}"/>')
        parts.append(_text(x + 16, y, label))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start", *, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{TEXT}">{escape(text)}</text>'
    )
