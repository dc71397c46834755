"""Small pictures of numbers as inline SVG; colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 26
STROKES = ("most_frequent", "chance")
MOST_POINTS = 600
"""Beyond this many a line is thinned: a screen has no more columns."""


@dataclass(frozen=True)
class Mark:
    """A value with its 95 % interval, if it has one; `kind` is a class of the style sheet."""

    kind: str
    value: float
    low: float | None = None
    high: float | None = None


def number(value: float) -> str:
    """At most three significant digits, and no exponent where one can read without."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    while (high - low) / step > count + 1:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first = math.ceil(low / step - 1e-9)
    return [round(step * place, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(points: Points, weight: float = 0.8) -> list[tuple[float, float]]:
    """Running mean with an exponential window, free of bias towards the start."""
    total = mass = 0.0
    result = []
    for place, value in points:
        total, mass = weight * total + value, weight * mass + 1.0
        result.append((place, total / mass))
    return result


def line_chart(label: str, lines: Sequence[tuple[str, Points]], limit: float | None = None) -> str:
    """Lines over steps.

    Args:
        label: what the chart shows, for who cannot see it.
        lines: (class of the style sheet, points) of each; values that are not finite are left out.
        limit: a value marked by a dashed line.
    """
    finite = [(kind, [point for point in points if math.isfinite(point[1])]) for kind, points in lines]
    places = [place for _, points in finite for place, _ in points]
    values = [value for _, points in finite for _, value in points] + ([limit] if limit is not None else [])
    if not places:
        return ""
    left, right = min(places), max(max(places), min(places) + 1)
    low, high = _range(values)

    def x(place: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (place - left) / (right - left)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(left, right):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_short(tick)}</text>')
    if limit is not None:
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>')
    for kind, points in finite:
        thinned = points[:: math.ceil(len(points) / MOST_POINTS) or 1]
        if len(thinned) == 1:
            parts.append(f'<circle class="{kind}" cx="{x(thinned[0][0]):.1f}" cy="{y(thinned[0][1]):.1f}" r="3"/>')
        elif thinned:
            path = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in thinned)
            parts.append(f'<polyline class="{kind}" points="{path}"/>')
    return "".join([*parts, "</svg>"])


def interval_plot(label: str, marks: Sequence[Mark], high: float, unit: float = 1.0) -> str:
    """Values on one line from 0 to `high`, each with its interval; as wide as there is room.

    Args:
        label: what the plot shows, for who cannot see it.
        marks: from the hindmost to the foremost; "most_frequent" and "chance" are strokes, others dots.
        high: the right end.
        unit: what the numbers below the line are multiplied by (100 for percentages).
    """

    def x(value: float) -> str:
        return f"{3 + 94 * min(max(value / high, 0.0), 1.0):.2f}%"

    parts = [f'<svg class="plot" width="100%" height="42" role="img" aria-label="{escape(label)}">']
    for tick in ticks(0, high):
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="1" y2="27"/>')
        parts.append(f'<text x="{x(tick)}" y="40" text-anchor="middle">{number(unit * tick)}</text>')
    for mark in marks:
        if mark.low is not None and mark.high is not None:
            ends = f'x1="{x(mark.low)}" x2="{x(mark.high)}" y1="14" y2="14"'
            parts.append(f'<line class="span {mark.kind}" {ends}/>')
    for mark in marks:
        if mark.kind in STROKES:
            parts.append(f'<line class="{mark.kind}" x1="{x(mark.value)}" x2="{x(mark.value)}" y1="5" y2="23"/>')
        else:
            parts.append(f'<circle class="{mark.kind}" cx="{x(mark.value)}" cy="14" r="5"/>')
    return "".join([*parts, "</svg>"])


def share_bars(label: str, shares: Sequence[tuple[str, float]], high: float) -> str:
    """One thin bar below the other, each a share of `high`."""
    parts = [f'<svg class="plot" width="100%" height="{8 * len(shares) + 4}" role="img" aria-label="{escape(label)}">']
    for row, (kind, share) in enumerate(shares):
        parts.append(
            f'<rect class="{kind}" x="0" y="{8 * row + 2}" height="6" rx="2" width="{100 * share / high:.2f}%"/>'
        )
    return "".join([*parts, "</svg>"])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' own range with a little air, never empty; from 0 where they come near it."""
    low, high = min(values), max(values)
    if 0 <= low < 0.4 * high:
        low = 0.0
    if low == high:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    air = 0.05 * (high - low)
    return low if low == 0 else low - air, high + air


def _short(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"
