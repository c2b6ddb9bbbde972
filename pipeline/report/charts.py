"""Geometry of the report's charts: numbers -> places in an SVG view box. The template draws them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

WIDTH, HEIGHT = 440, 210  # of the view box
LEAST_SPAN = 1e-300  # of an axis; below it powers of ten run out
LEFT, RIGHT, TOP, BOTTOM = 50, 432, 10, 168  # of the plot in it
LINE_COLORS = ("#1f6f8b", "#d9480f", "#7a4fb5", "#2f9e6e")
FAINT_COLOR = "#1b2430"


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A bar or a point of a line, with the text that a pointer shows."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line through `marks`. `faint` is one to compare with: dashed, without points to touch."""

    name: str
    color: str
    marks: list[Mark]
    faint: bool = False

    @property
    def points(self) -> str:
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Chart:
    """`rules` are upright lines at a value of the horizontal axis, each with its label."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bars: list[Mark] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    rules: list[Tick] = field(default_factory=list)

    @property
    def legend(self) -> list[Line]:
        """The lines that need telling apart."""
        return [line for line in self.lines if line.name]


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of a stacked bar: `share` in [0, 1] of the whole, `color` whatever CSS takes for a background."""

    name: str
    value: float
    share: float
    color: str


def line_chart(title: str, values: Sequence[float], *, x_label: str, y_label: str) -> Chart:
    """Values over 1, 2, ...; the vertical axis starts at the tick below the least value."""
    return lines_chart(title, range(1, len(values) + 1), {"": values}, x_label=x_label, y_label=y_label)


def lines_chart(
    title: str, steps: Sequence[int], series: Mapping[str, Sequence[float]], *, x_label: str, y_label: str
) -> Chart:
    """A line for each name over the same rising `steps`. Values that are not finite are left out.

    ValueError when no value is finite.
    """
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    if not finite:
        raise ValueError(f"{title}: no value is finite")
    first, last = steps[0], max(steps[0] + 1, steps[-1])
    ticks = nice_ticks(min(finite), max(finite))
    scale, across = _Scale(ticks[0], ticks[-1], BOTTOM, TOP), _Scale(first, last, LEFT + 8, RIGHT - 8)
    lines = [
        Line(
            name,
            color,
            [
                Mark(across(step), scale(value), 0, 0, f"{name or y_label}, {x_label} {step:,}: {value:,.6g}")
                for step, value in zip(steps, values, strict=True)
                if math.isfinite(value)
            ],
        )
        for (name, values), color in zip(series.items(), itertools.cycle(LINE_COLORS), strict=False)
    ]
    places = [t for t in nice_ticks(first, last, 8) if t == int(t) and first <= t <= steps[-1]] or [first]
    x_ticks = [Tick(across(place), f"{place:,.0f}") for place in places]
    return Chart(title, x_label, y_label, x_ticks, [Tick(scale(t), short(t)) for t in ticks], lines=lines)


def bar_chart(
    title: str, heights: Sequence[float], edges: Sequence[float], *, x_label: str, y_label: str, centred: bool = False
) -> Chart:
    """Bar i spans `edges[i]` to `edges[i + 1]`. `centred` (bars of single integers): ticks stand below the bars."""
    ticks = nice_ticks(0, max([1, *heights]))
    scale, across = _Scale(0, ticks[-1], BOTTOM, TOP), _Scale(edges[0], edges[-1], LEFT, RIGHT)
    spans = [short(low) if centred else f"{short(low)} to {short(high)}" for low, high in itertools.pairwise(edges)]
    titles = [f"{span}: {value:,.0f}" for span, value in zip(spans, heights, strict=True)]
    shift = 0.5 if centred else 0
    last = edges[-1] - 1 if centred else edges[-1]
    places = [t for t in nice_ticks(edges[0], max(last, 1), 6) if edges[0] <= t <= last and (t == int(t) or last <= 1)]
    x_ticks = [Tick(across(t + shift), short(t)) for t in places]
    y_ticks = [Tick(scale(t), short(t)) for t in ticks]
    return Chart(title, x_label, y_label, x_ticks, y_ticks, bars=_bars(heights, edges, titles, scale, across))


def share_chart(
    title: str,
    counts: Sequence[int],
    edges: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    before: Sequence[int] = (),
    rules: Mapping[str, float] | None = None,
) -> Chart:
    """A histogram in percent of all `counts`. `before`: other counts in the same bins, whose outline lies on it."""
    heights, outline = _percent(counts), _percent(before)
    ticks = nice_ticks(0, max([1, *heights, *outline]))
    scale, across = _Scale(0, ticks[-1], BOTTOM, TOP), _Scale(edges[0], edges[-1], LEFT, RIGHT)
    spans = [f"{low:.2f} to {high:.2f}" for low, high in itertools.pairwise(edges)]
    titles = [f"{span}: {height:.2f} %" for span, height in zip(spans, heights, strict=True)]
    corners = [
        Mark(across(edge), scale(height), 0, 0, "")
        for (low, high), height in zip(itertools.pairwise(edges), outline, strict=False)
        for edge in (low, high)
    ]
    return Chart(
        title,
        x_label,
        y_label,
        [Tick(across(t), short(t)) for t in nice_ticks(edges[0], edges[-1]) if edges[0] <= t <= edges[-1]],
        [Tick(scale(t), short(t)) for t in ticks],
        bars=_bars(heights, edges, titles, scale, across),
        lines=[Line("", FAINT_COLOR, corners, faint=True)] if corners else [],
        rules=[Tick(across(value), label) for label, value in (rules or {}).items()],
    )


def _percent(counts: Sequence[int]) -> list[float]:
    return [100 * count / max(1, sum(counts)) for count in counts]


def _bars(
    heights: Sequence[float], edges: Sequence[float], titles: Sequence[str], scale: _Scale, across: _Scale
) -> list[Mark]:
    """A bar between each two edges, with a gap of up to two units of the view box."""
    bars = []
    for (low, high), height, title in zip(itertools.pairwise(edges), heights, titles, strict=True):
        left, right, top = across(low), across(high), scale(height)
        gap = min(1.0, (right - left) / 8)
        bars.append(Mark(left + gap, top, max(right - left - 2 * gap, 0.5), BOTTOM - top, title))
    return bars


def integer_bins(values: ArrayLike, limit: int = 24) -> tuple[list[int], list[int]]:
    """Histogram of integers >= 0 in at most about `limit` bins of one whole width -> (counts, edges)."""
    numbers = np.asarray(values)
    low, high = int(numbers.min()), int(numbers.max()) + 1
    width = max(1, math.ceil((high - low) / limit))
    edges = np.arange(low // width * width, high + width, width)
    counts, _ = np.histogram(numbers, edges)
    keep = len(counts) - int(np.argmax(counts[::-1] > 0))  # no empty bins after the greatest value
    return counts[:keep].tolist(), edges[: keep + 1].tolist()


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` steps of 1, 2 or 5 times a power of ten that cover [low, high]; at least two ticks."""
    span = next(s for s in (high - low, abs(high), 1.0) if s > LEAST_SPAN)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """1234 -> 1,234; 52000 -> 52k; 3400000 -> 3.4M; small numbers as they are."""
    for least, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:,.6g}"


@dataclass(frozen=True, slots=True)
class _Scale:
    """A linear map of [low, high] onto [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)
