"""Plots as SVG, written by hand: latencies by quantile, columns, lines over time. Readable on light and dark
grounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Final

from bench.histogram import Histogram

WIDTH: Final = 860
HEIGHT: Final = 420
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 50, 60
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
    drawn = [
        (label, [(x / span, (math.log10(y) - low) / (high - low)) for x, y in points])
        for label, points in curves.items()
    ]
    return _frame(title, marks, rows, unit="ms", body=_polylines(drawn), legend=[label for label, _ in drawn])


def _curve(histogram: Histogram) -> list[Point]:
    """(stretched quantile, ms), as far as there are enough events to tell."""
    told = [q for q in QUANTILES if q <= 1 - 1 / (len(histogram) + 1)]
    return [(_stretched(q), max(histogram.ms(q or 1e-9), 1e-3)) for q in told]


def _stretched(share: float) -> float:
    return -math.log10(1 - share)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def columns(title: str, values: Mapping[str, float], unit: str) -> str:
    """One column each."""
    rows, top = _linear(list(values.values()))
    width = 1 / len(values)
    marks = [((n + 0.5) * width, label) for n, label in enumerate(values)]
    body = [
        f'<rect x="{_x((n + 0.2) * width):.1f}" y="{_y(value / top):.1f}" width="{_x(width * 0.6) - LEFT:.1f}" '
        f'height="{max(0.0, _y(0) - _y(value / top)):.1f}" fill="{COLOURS[0]}"/>'
        for n, value in enumerate(values.values())
    ]
    return _frame(title, marks, rows, unit=unit, body=body)


def lines(title: str, series: Mapping[str, Sequence[Point]], *, x: str, y: str) -> str:
    """Values over time."""
    points = [point for each in series.values() for point in each]
    if not points:
        return ""
    rows, top = _linear([value for _, value in points])
    last = max(at for at, _ in points) or 1.0
    marks = [(n / 5, f"{last * n / 5:.3g} {x}") for n in range(6)]
    drawn = [(label, [(at / last, value / top) for at, value in each]) for label, each in series.items()]
    return _frame(title, marks, rows, unit=y, body=_polylines(drawn), legend=[label for label, _ in drawn])


def _linear(values: Sequence[float]) -> tuple[list[tuple[float, str]], float]:
    """Grid rows and the value at the top."""
    highest = max([*values, 1e-9])
    step = 10.0 ** math.floor(math.log10(highest))
    step = next(s for s in (step / 5, step / 2, step, step * 2) if highest / s <= 8)
    top = math.ceil(highest / step) * step
    return [(n * step / top, f"{n * step:,.6g}") for n in range(round(top / step) + 1)], top


def _polylines(curves: Iterable[tuple[str, list[Point]]]) -> list[str]:
    return [
        f'<polyline fill="none" stroke="{COLOURS[n % len(COLOURS)]}" stroke-width="2" points="'
        + " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in points)
        + '"/>'
        for n, (_, points) in enumerate(curves)
    ]


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _frame(
    title: str,
    marks: Sequence[tuple[float, str]],
    rows: Sequence[tuple[float, str]],
    *,
    unit: str,
    body: Sequence[str],
    legend: Sequence[str] = (),
) -> str:
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 18 * ((len(legend) + 1) // 2)}" '
            f'font-family="system-ui, sans-serif" font-size="12" role="img">'
        ),
        f"<title>{escape(title)}</title>",
        _text(LEFT, 24, title, size=14),
        _text(LEFT - 8, TOP - 12, unit, anchor="end"),
    ]
    for at, label in rows:
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(at):.1f}" y2="{_y(at):.1f}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 8, _y(at) + 4, label, anchor="end"))
    for at, label in marks:
        parts.append(_text(_x(at), HEIGHT - BOTTOM + 20, label, anchor="middle"))
    parts += body
    for n, label in enumerate(legend):
        x, y = LEFT + 380 * (n % 2), HEIGHT - 16 + 18 * (n // 2)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLOURS[n % len(COLOURS)]}"/>')
        parts.append(_text(x + 16, y, label))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{TEXT}">{escape(text)}</text>'
    )
