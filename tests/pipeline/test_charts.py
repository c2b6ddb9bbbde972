"""Where ticks, bars and points lie."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.charts import BOTTOM, LEFT, RIGHT, TOP, bar_chart, integer_bins, line_chart, nice_ticks, short


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
    assert [mark.height for mark in chart.marks] == [0, (BOTTOM - TOP) / 2, BOTTOM - TOP]
    assert chart.marks[0].x == LEFT + 1
    assert chart.marks[-1].x + chart.marks[-1].width == pytest.approx(RIGHT - 1)
    assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2"]
    assert chart.marks[2].title == "2: 4"


def test_a_line_goes_from_left_to_right_and_larger_is_higher() -> None:
    chart = line_chart("t", [9.0, 5.0, 4.0], x_label="iteration", y_label="y")
    assert [mark.x for mark in chart.marks] == sorted(mark.x for mark in chart.marks)
    assert [mark.y for mark in chart.marks] == sorted(mark.y for mark in chart.marks)
    assert [tick.label for tick in chart.x_ticks] == ["1", "2", "3"]
    assert chart.points.count(",") == 3


def test_a_line_of_one_value_can_be_drawn() -> None:
    assert len(line_chart("t", [3.0], x_label="x", y_label="y").marks) == 1


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_every_integer_falls_into_one_of_few_bins(values: list[int]) -> None:
    counts, edges = integer_bins(values)
    assert sum(counts) == len(values)
    assert len(edges) == len(counts) + 1 <= 27
    assert len(set(np.diff(edges).tolist())) == 1
