"""Segments of one image from the features of its patches, without labels (DatUS2, arXiv 2401.12820, section III).

As published, patches are joined where their keys point into the same half space; the Louvain communities of that graph,
cut into pieces that hang together on the patch grid, are the segments. The graph is dense (about half of all pairs), so
it is built as one matrix product and one scan. Louvain holds the interpreter lock: many images run in processes.

Of features for which that graph says nothing (keys with a large common part, where all pairs are joined) the closest
pairs of each image are joined instead. Louvain finds two or three communities in a graph of a third of all pairs,
wherever the threshold lies; at 3 to 5 % it finds as many as there are things to see.

Shapes: N = h * w patches of one image in raster order, D channels, B images.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait

import numpy as np
import scipy.ndimage
import scipy.sparse
from sknetwork.clustering import Louvain

CLOSEST = 0.03  # of an image's pairs
MAX_NOISE = 5  # patches: a segment has more (tau of the paper, the same for patches of 8 and 16 pixels)
NOISE = -1
TOUCHING = np.ones((3, 3), int)  # 8-connectivity
Graph = Callable[[np.ndarray], scipy.sparse.csr_matrix]


def affinity_graph(keys_ND: np.ndarray) -> scipy.sparse.csr_matrix:
    """(N, D) raw keys -> (N, N) bool: a pair is joined when its dot product is above 0, strictly; with self loops.

    Neither norm nor centre of the keys is changed, as published; the norm could not change a sign.
    ValueError for keys that are not finite: no pair of them would compare.
    """
    if not np.isfinite(keys_ND).all():
        raise ValueError("the keys of a patch are not finite; are the backbone's weights whole?")
    return _as_graph(keys_ND @ keys_ND.T > 0)


def closest_graph(rows_ND: np.ndarray) -> scipy.sparse.csr_matrix:
    """(N, D) rows of unit norm or zero -> (N, N) bool: CLOSEST of all pairs are joined, those with the largest cosines,
    if above 0; with self loops. Pairs as close as the last of them are joined too.

    ValueError for rows that are not finite.
    """
    if not np.isfinite(rows_ND).all():
        raise ValueError("the features of a patch are not finite; are the backbone's weights whole?")
    cosines_NN = rows_ND @ rows_ND.T
    pairs = cosines_NN[np.triu_indices(len(rows_ND), 1)]
    count = math.ceil(CLOSEST * len(pairs))
    last = np.partition(pairs, -count)[-count] if count else np.inf
    joined_NN = (cosines_NN >= last) & (cosines_NN > 0)
    np.fill_diagonal(joined_NN, True)
    return _as_graph(joined_NN)


def _as_graph(joined_NN: np.ndarray) -> scipy.sparse.csr_matrix:
    columns = np.nonzero(joined_NN)[1].astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(joined_NN, axis=1))]).astype(np.int32)
    return scipy.sparse.csr_matrix((np.ones(len(columns), bool), columns, starts), shape=joined_NN.shape)


def communities(graph: scipy.sparse.csr_matrix) -> np.ndarray:
    """(N, N) symmetric graph -> (N,) int64 communities by decreasing size: Louvain, resolution 1, no shuffling.

    scikit-network's defaults, which are deterministic, but for two graphs that say nothing about groups. In a complete
    graph every partition has the modularity 0, and rounding would decide (groups of 3 at N = 784): it is one community.
    In a graph without edges, which Louvain refuses, every patch is one.
    """
    patches = graph.shape[0]
    if graph.nnz == patches**2:
        return np.zeros(patches, np.int64)
    if graph.nnz == 0:
        return np.arange(patches)
    found: np.ndarray = Louvain(return_probs=False, return_aggregate=False).fit_predict(graph)
    return found.astype(np.int64)


def connected_segments(communities_hw: np.ndarray) -> np.ndarray:
    """(h, w) communities -> (h, w) int32 segments 0..n-1, -1 for noise: pieces of at most 5 patches.

    A segment is an 8-connected piece of a community. Numbered by community, in it by the first patch in raster order.
    """
    segments_hw = np.full(communities_hw.shape, NOISE, np.int32)
    count = 0
    for community in np.flatnonzero(np.bincount(communities_hw.ravel()) > MAX_NOISE):
        pieces_hw, _ = scipy.ndimage.label(communities_hw == community, TOUCHING)
        sizes = np.bincount(pieces_hw.ravel())
        for piece in np.flatnonzero(sizes[1:] > MAX_NOISE) + 1:
            segments_hw[pieces_hw == piece] = count
            count += 1
    return segments_hw


def discover_segments(rows_ND: np.ndarray, grid: tuple[int, int], graph: Graph = affinity_graph) -> np.ndarray:
    """(N, D) keys, or what `graph` takes, of the (h, w) `grid` -> (h, w) int32 segments 0..n-1, -1 for noise.

    ValueError when the rows are not finite or not of that grid.
    """
    if len(rows_ND) != grid[0] * grid[1]:
        raise ValueError(f"{len(rows_ND)} keys do not fill a grid of {grid[0]} x {grid[1]} patches")
    return connected_segments(communities(graph(rows_ND)).reshape(grid))


class SegmentFinder:
    """`discover_segments` of many images, in `processes` of its own (1: in this one). Results keep the order."""

    def __init__(self, processes: int = 1, graph: Graph = affinity_graph) -> None:
        self._processes = processes
        self._graph = graph
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, rows_BND: Sequence[np.ndarray] | np.ndarray, grid: tuple[int, int]) -> list[np.ndarray]:
        """(B, N, D) keys -> B arrays of `discover_segments`. BrokenProcessPool when a process was killed; the next
        call starts new ones."""
        find = partial(discover_segments, grid=grid, graph=self._graph)
        if self._processes == 1 or len(rows_BND) == 1:
            return [find(rows_ND) for rows_ND in rows_BND]
        if self._pool is None:
            # Not forked: a fork of a process whose threads hold locks (torch, CUDA, Ray) can hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, mp_context=context, initializer=_end_with_parent)
        try:
            return list(self._pool.map(find, rows_BND))
        except BrokenProcessPool:
            self._pool = None
            raise

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _end_with_parent() -> None:
    """A killed actor cannot shut its pool down, and its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
