"""Where ticks, bars and points lie."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    bar_chart,
    integer_bins,
    line_chart,
    lines_chart,
    nice_ticks,
    share_chart,
    short,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 42, [0, 20, 40, 60]),
        (33.7, 48.2, [30, 35, 40, 45, 50]),
        (0, 1, [0, 0.5, 1]),
        (0, 0, [0, 0.5]),
    ],
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == expected


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_ticks_rise_and_are_few(a: float, b: float) -> None:
    ticks = nice_ticks(min(a, b), max(a, b))
    assert all(x < y for x, y in itertools.pairwise(ticks))
    assert 2 <= len(ticks) <= 7


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.2, "0.2"), (1234, "1,234"), (52_000, "52k"), (3_400_000, "3.4M"), (2e9, "2G"), (-40_000, "-40k")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_bars_stand_on_the_axis_and_fill_the_width() -> None:
    chart = bar_chart("t", [0, 2, 4], [0, 1, 2, 3], x_label="x", y_label="y", centred=True)
    assert [mark.height for mark in chart.bars] == [0, (BOTTOM - TOP) / 2, BOTTOM - TOP]
    assert chart.bars[0].x == LEFT + 1
    assert chart.bars[-1].x + chart.bars[-1].width == pytest.approx(RIGHT - 1)
    assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2"]
    assert chart.bars[2].title == "2: 4"


def test_a_line_goes_from_left_to_right_and_larger_is_higher() -> None:
    chart = line_chart("t", [9.0, 5.0, 4.0], x_label="iteration", y_label="y")
    (line,) = chart.lines
    assert [mark.x for mark in line.marks] == sorted(mark.x for mark in line.marks)
    assert [mark.y for mark in line.marks] == sorted(mark.y for mark in line.marks)
    assert [tick.label for tick in chart.x_ticks] == ["1", "2", "3"]
    assert line.points.count(",") == 3


def test_a_line_of_one_value_can_be_drawn() -> None:
    assert len(line_chart("t", [3.0], x_label="x", y_label="y").lines[0].marks) == 1


def test_lines_share_an_axis_and_leave_out_what_is_not_finite() -> None:
    series = {"a": [0.0, 1.0, 2.0], "b": [2.0, math.nan, math.inf]}
    chart = lines_chart("t", [1, 50, 100], series, x_label="step", y_label="loss")
    a, b = chart.lines
    assert [(mark.x, mark.y) for mark in a.marks] == [
        (LEFT + 8, BOTTOM),
        (pytest.approx(LEFT + 8 + 49 / 99 * (RIGHT - LEFT - 16)), (TOP + BOTTOM) / 2),
        (RIGHT - 8, TOP),
    ]
    assert [(mark.x, mark.y, mark.title) for mark in b.marks] == [(LEFT + 8, TOP, "b, step 1: 2")]
    assert [line.name for line in chart.legend] == ["a", "b"] and a.color != b.color
    assert [tick.label for tick in chart.x_ticks] == ["20", "40", "60", "80", "100"]


def test_a_line_needs_a_finite_value() -> None:
    with pytest.raises(ValueError, match="t: no value is finite"):
        lines_chart("t", [1], {"a": [math.nan]}, x_label="x", y_label="y")


def test_a_share_chart_is_in_percent_with_its_rule_and_the_outline_of_before() -> None:
    chart = share_chart(
        "t", [1, 3, 0, 0], [-1, -0.5, 0, 0.5, 1], x_label="x", y_label="y", before=[0, 0, 0, 9], rules={"shift": 0.5}
    )
    high = BOTTOM - TOP
    assert [mark.height for mark in chart.bars] == [high * 0.25, high * 0.75, 0, 0]
    assert [mark.title for mark in chart.bars][:2] == ["-1.00 to -0.50: 25.00 %", "-0.50 to 0.00: 75.00 %"]
    assert [tick.label for tick in chart.y_ticks] == ["0", "50", "100"]
    assert [tick.label for tick in chart.x_ticks] == ["-1", "-0.5", "0", "0.5", "1"]
    (outline,) = chart.lines
    assert outline.faint and outline.marks[-1].y == TOP and len(outline.marks) == 8
    assert [(rule.label, rule.at) for rule in chart.rules] == [("shift", LEFT + 0.75 * (RIGHT - LEFT))]
    assert not chart.legend


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_every_integer_falls_into_one_of_few_bins(values: list[int]) -> None:
    counts, edges = integer_bins(values)
    assert sum(counts) == len(values)
    assert len(edges) == len(counts) + 1 <= 27
    assert len(set(np.diff(edges).tolist())) == 1
