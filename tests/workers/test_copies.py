"""Groups of rows that are copies of each other, and what a row of a group counts."""

from __future__ import annotations

import numpy as np
import pytest

from workers import copies
from workers.copies import UNIT, find_groups, weigh

DIM = 48


def groups_of(x_ND: np.ndarray, threshold: float = 0.95) -> list[int]:
    return find_groups(lambda numbers: x_ND[numbers], len(x_ND), x_ND.shape[1], threshold).tolist()


def rows(count: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, DIM))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def copies_of(x_ND: np.ndarray, cosine: float, seed: int = 1) -> np.ndarray:
    """Rows with this cosine to the given ones."""
    x = x_ND.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    other = np.random.default_rng(seed).standard_normal(x.shape)
    other -= (other * x).sum(1, keepdims=True) * x
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return (cosine * x + np.sqrt(1 - cosine**2) * other).astype(np.float32)


def brute_force(x_ND: np.ndarray, threshold: float) -> list[int]:
    x = x_ND.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    near = x @ x.T >= threshold
    for _ in range(7):  # 2^7 steps from row to row
        near = (near.astype(np.float64) @ near) > 0
    return near.argmax(axis=1).tolist()


def test_copies_are_found_and_others_are_not() -> None:
    x = rows(3000)
    found = groups_of(np.concatenate([x, copies_of(x[:100], 0.96), copies_of(x[100:200], 0.94), x[200:300]]))
    assert found[:3000] == list(range(3000))
    assert found[3000:3100] == list(range(100))
    assert found[3100:3200] == list(range(3100, 3200))
    assert found[3200:] == list(range(200, 300))


def test_a_group_is_all_that_hangs_together() -> None:
    angles = np.radians([0, 90, 20, 10, 30, 180])  # neighbours have a cosine of 0.985, the ends of 0.87
    chain = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    assert groups_of(chain, 0.98) == [0, 1, 0, 0, 0, 5]
    assert groups_of(chain * [[3], [1], [0.1], [7], [1], [1]], 0.98) == [0, 1, 0, 0, 0, 5]  # norms do not matter


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rows(60, seed)[rng.integers(0, 60, 90)].astype(np.float32) + 0.03 * rng.standard_normal((90, DIM))
    assert groups_of(x) == brute_force(x, 0.95)


def test_more_equal_rows_than_a_window_are_one_group() -> None:
    x = rows(400)
    x[50:350] = x[7]
    found = groups_of(x)
    assert found[50:350] == [7] * 300
    assert len(set(found)) == 100


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.concatenate([rows(700), copies_of(rows(700), 0.955)])
    whole = groups_of(x)
    assert whole[700:] == list(range(700))
    monkeypatch.setattr(copies, "_TILE", copies.WINDOW)
    assert groups_of(x) == whole


def test_rows_of_zeros_are_no_copies_and_nothing_is_no_group() -> None:
    assert groups_of(np.zeros((3, DIM), np.float16)) == [0, 1, 2]
    assert groups_of(np.zeros((0, DIM), np.float16)) == []


def test_a_group_counts_as_one_and_its_rows_alike() -> None:
    weights = weigh(np.array([0, 1, 0, 3, 0]))
    assert weights.units.tolist() == [1366, UNIT, 1365, UNIT, 1365]
    assert weights.first.tolist() == [True, True, False, True, False]
    assert weights.groups == 3
    large = weigh(np.zeros(UNIT + 5, np.int64))
    assert large.units.tolist() == [1] * UNIT + [0] * 5
    assert weigh(np.zeros(0, np.int64)).groups == 0
    assert weights.digest != weigh(np.array([0, 1, 0, 3, 1])).digest
