"""Rows that are copies of each other: groups of embeddings joined by pairs with a cosine of at least a threshold.

Comparing all pairs is out of reach, so they are proposed by sign codes (Charikar 2002): a bit says on which side of a
random plane a row lies, and rows that are alike share most bits. In each of several tables of 64 bits the rows are
sorted by their codes, and each is compared with the 64 to 127 behind it, so that the work is the same whatever the
rows. Of n rows, two that share the first log2(n / 64) bits of a table are compared: of a million, a pair with a cosine
of 0.95 with a probability of 98 %, one of 0.98 with 99.97 %.

Nothing depends on the order of the arithmetic: rows lie on a grid of 24 bits, planes are of small integers, and float64
holds every sum of their products exactly. Shapes: N rows, D dimensions, W = 64 rows of a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from workers.conditioning import unit_rows
from workers.kmeans import SPHERICAL_STEP, on_grid

# Of copies, where nothing else is asked for, of embeddings as they are and of conditioned ones (docs/operations.md).
COPY_COSINE = {False: 0.97, True: 0.95}
TABLES, BITS = 16, 64
WINDOW = 64
UNIT_BITS = 12
UNIT = 2**UNIT_BITS  # what the rows of a group weigh together
_TILE = 64 * WINDOW  # rows that are turned to float64 at once
_PLANE_SCALE = 16  # of the integers that stand for a normal distribution

Rows = Callable[[NDArray[np.int64]], NDArray[np.floating]]  # numbers of rows -> (n, D), in that order


@dataclass(frozen=True, slots=True)
class Weights:
    """What each row counts, so that a group counts as one: `units` (N,) int32, of each group UNIT together, as equal as
    whole numbers are; `first` (N,) bool: the first row of its group."""

    units: NDArray[np.int32]
    first: NDArray[np.bool_]

    @property
    def groups(self) -> int:
        return int(self.first.sum())

    @property
    def digest(self) -> str:
        """That tells these weights from others."""
        return hashlib.sha256(self.units.tobytes() + self.first.tobytes()).hexdigest()[:16]

    def of(self, start: int, end: int) -> Weights:
        return Weights(self.units[start:end], self.first[start:end])


def find_groups(rows: Rows, count: int, dim: int, threshold: float, *, seed: int = 0) -> NDArray[np.int64]:
    """(N,) int64: for each of `count` rows of `dim` values the number of the first row of its group, itself where there
    is no copy of it before. Rows need not be of unit norm; a row of zeros is no copy of anything.

    Memory: 40 bytes a row, and tiles. The same for the same rows in the same order, on any machine.
    """
    found = _Groups(count)
    rng = np.random.default_rng(seed)
    for _ in range(TABLES):
        planes_BD = np.rint(rng.standard_normal((BITS, dim)) * _PLANE_SCALE)
        order = np.argsort(_codes(rows, count, planes_BD), kind="stable")
        for start in range(0, count, _TILE):
            numbers = order[start : start + _TILE + WINDOW]
            first, second = _near_pairs(_exact(rows(numbers)), threshold)
            found.join(numbers[first], numbers[second])
    return found.roots(np.arange(count))


def weigh(groups_N: NDArray[np.int64]) -> Weights:
    """The groups of `find_groups` -> what each row counts. Of a group of more than UNIT rows the later ones count
    nothing."""
    sizes = np.bincount(groups_N, minlength=len(groups_N))[groups_N]
    order = np.argsort(groups_N, kind="stable")
    grouped = groups_N[order]
    place = np.empty(len(groups_N), np.int64)  # of a row in its group
    place[order] = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    units = UNIT // sizes + (place < UNIT % sizes)
    return Weights(units.astype(np.int32), groups_N == np.arange(len(groups_N)))


def _exact(rows_ND: NDArray[np.floating]) -> NDArray[np.float64]:
    return on_grid(unit_rows(rows_ND), SPHERICAL_STEP).astype(np.float64)


def _codes(rows: Rows, count: int, planes_BD: NDArray[np.float64]) -> NDArray[np.uint64]:
    codes = np.empty(count, ">u8")
    for start in range(0, count, _TILE):
        numbers = np.arange(start, min(start + _TILE, count))
        sides = _exact(rows(numbers)) @ planes_BD.T > 0
        codes[numbers] = np.packbits(sides, axis=1).view(">u8")[:, 0]
    return codes.astype(np.uint64)


def _near_pairs(x_nD: NDArray[np.float64], threshold: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows in the order of their codes, up to a tile and a window -> the pairs of them, each row of the tile with those
    behind it in its window and all of the next, whose cosine is at least the threshold."""
    windows = -(-min(len(x_nD), _TILE) // WINDOW)
    padded = np.zeros((windows + 1, WINDOW, x_nD.shape[1]))
    padded.reshape(-1, x_nD.shape[1])[: len(x_nD)] = x_nD[: padded.shape[0] * WINDOW]
    pairs = np.concatenate([padded[:-1], padded[1:]], axis=1)
    near = padded[:-1] @ pairs.transpose(0, 2, 1) >= threshold
    near &= np.arange(2 * WINDOW) > np.arange(WINDOW)[:, None]
    window, first, second = np.nonzero(near)
    return window * WINDOW + first, window * WINDOW + second


class _Groups:
    """Union-find over numbers, of which the least of a group stands for it."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count)

    def roots(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        found = self._parents[numbers]
        while (found != (above := self._parents[found])).any():
            found = above
        self._parents[numbers] = found
        return found

    def join(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
        first, second = self.roots(first), self.roots(second)
        apart = first != second
        nodes, places = np.unique(np.stack([first[apart], second[apart]]), return_inverse=True)
        places = places.reshape(2, -1)
        edges = scipy.sparse.coo_matrix((np.ones(places.shape[1]), places), shape=(len(nodes), len(nodes)))
        _, group = connected_components(edges, directed=False)
        least = np.unique(group, return_index=True)[1]  # nodes are in order, so that the first of a group is the least
        self._parents[nodes] = nodes[least[group]]
