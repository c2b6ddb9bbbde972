"""Geometry of the report's charts: numbers -> places in an SVG view box. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

WIDTH, HEIGHT = 440, 210  # of the view box
LEFT, RIGHT, TOP, BOTTOM = 50, 432, 10, 168  # of the plot in it


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
class Chart:
    title: str
    x_label: str
    y_label: str
    kind: str  # bars or line
    marks: list[Mark]
    x_ticks: list[Tick]
    y_ticks: list[Tick]

    @property
    def points(self) -> str:
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


def line_chart(title: str, values: Sequence[float], *, x_label: str, y_label: str) -> Chart:
    """Values over 1, 2, ...; the vertical axis starts at the tick below the least value."""
    ticks = nice_ticks(min(values), max(values))
    scale = _Scale(ticks[0], ticks[-1], BOTTOM, TOP)
    across = _Scale(1, max(2, len(values)), LEFT + 8, RIGHT - 8)
    marks = [Mark(across(i), scale(v), 0, 0, f"{x_label} {i}: {v:,.6g}") for i, v in enumerate(values, start=1)]
    steps = [t for t in nice_ticks(1, max(2, len(values)), 8) if t == int(t) and 1 <= t <= len(values)]
    x_ticks = [Tick(across(step), f"{step:,.0f}") for step in steps]
    return Chart(title, x_label, y_label, "line", marks, x_ticks, [Tick(scale(t), short(t)) for t in ticks])


def bar_chart(
    title: str, heights: Sequence[float], edges: Sequence[float], *, x_label: str, y_label: str, centred: bool = False
) -> Chart:
    """Bar i spans `edges[i]` to `edges[i + 1]`. `centred` (bars of single integers): ticks stand below the bars."""
    ticks = nice_ticks(0, max([1, *heights]))
    scale, across = _Scale(0, ticks[-1], BOTTOM, TOP), _Scale(edges[0], edges[-1], LEFT, RIGHT)
    marks = []
    for low, high, value in zip(edges[:-1], edges[1:], heights, strict=True):
        span = short(low) if centred else f"{short(low)} to {short(high)}"
        left, right, top = across(low) + 1, across(high) - 1, scale(value)
        marks.append(Mark(left, top, max(right - left, 0.5), BOTTOM - top, f"{span}: {value:,.0f}"))
    shift = 0.5 if centred else 0
    last = edges[-1] - 1 if centred else edges[-1]
    places = [t for t in nice_ticks(edges[0], max(last, 1), 6) if edges[0] <= t <= last and (t == int(t) or last <= 1)]
    x_ticks = [Tick(across(t + shift), short(t)) for t in places]
    return Chart(title, x_label, y_label, "bars", marks, x_ticks, [Tick(scale(t), short(t)) for t in ticks])


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
    span = (high - low) or abs(high) or 1.0
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
