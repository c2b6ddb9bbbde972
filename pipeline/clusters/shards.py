"""The Ray actors of the distributed k-means: each holds the rows of some parts and answers for them.

What an actor knows follows from (parts, grid step, version, centroids), where `version` counts the updates of the
centroids. So one that is lost is replaced by a new one that is asked the same, and nothing else is computed again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from pipeline.clusters.embeddings import read_embeddings
from pipeline.store import storage
from workers import kmeans as kernel
from workers.copies import Weights

log = logging.getLogger(__name__)

MAX_DEATHS = 5  # of one actor in a row, without an answer in between
_READ_THREADS = 8  # parts that an actor reads at the same time
_LOST = (RayActorError, ObjectLostError, OutOfMemoryError)


class FarRow(NamedTuple):
    """A row for an empty cluster: squared distance to its centroid, row number, label, and its (D,) values."""

    distance: float
    number: int
    label: int
    values: np.ndarray

    def rank(self) -> tuple[float, int]:
        """Farthest first, ties by the lower row number."""
        return -self.distance, self.number


class KMeansShard:
    """The rows of some parts, and the answers that the driver asks of them. Runs as a Ray actor, or as it is."""

    def __init__(
        self,
        parts: Sequence[str],
        weights: Weights | None = None,
        *,
        spherical: bool,
        device: str,
        threads: int,
        step: float | None,
    ) -> None:
        self._parts, self._spherical, self._step = parts, spherical, step
        self._weights = weights  # of all rows of the parts; None: each counts once
        self._device, self._threads = device, threads
        self._rows: list[np.ndarray] | None = None
        self._search: kernel.Search | None = None
        self._version, self._labels = -1, list[np.ndarray]()

    @property
    def _blocks(self) -> list[np.ndarray]:
        if self._rows is None:  # not in __init__, so that a bad part is an error with a message and not a dead actor
            with ThreadPoolExecutor(_READ_THREADS) as threads:
                self._rows = list(threads.map(self._block, self._parts))
        return self._rows

    def _block(self, uri: str) -> np.ndarray:
        rows = read_embeddings(uri)
        rows = kernel.unit_rows(rows) if self._spherical else rows
        return rows if self._step is None else kernel.on_grid(rows, self._step)

    def survey(self) -> list[tuple[int, int, float]]:
        """Rows, dimension and largest magnitude of each part. RuntimeError when faiss cannot use the device."""
        self._ready_search()
        return [(*x.shape, float(np.abs(x).max(initial=0))) for x in self._blocks]

    def settle(self, step: float, weights: Weights | None = None) -> list[float]:
        """Round the rows to the grid; the sum of the squared norms of each part, each as often as its row counts."""
        self._step, self._weights = step, weights
        for i, block in enumerate(self._blocks):
            self._blocks[i] = kernel.on_grid(block, step)
        return [_squared_norm(x, units) for x, units in zip(self._blocks, self._units, strict=True)]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) the given rows, numbered from the first of this shard, ascending."""
        ends = np.cumsum([len(x) for x in self._blocks])
        cuts = np.searchsorted(rows, ends)
        picked = np.split(rows, cuts[:-1])
        return np.concatenate([x[p - (end - len(x))] for x, p, end in zip(self._blocks, picked, ends, strict=True)])

    def assign(
        self, version: int, centroids: np.ndarray, previous: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Label the rows by `version` of the centroids: sums, counts, and how many labels are not those that
        the `previous` centroids give (all, when there are none)."""
        before = None if previous is None else self._labels_of(version - 1, previous)
        after = self._labels_of(version, centroids)
        sums, counts = np.zeros(centroids.shape, np.int64), np.zeros(len(centroids), np.int64)
        for block, labels, units in zip(self._blocks, after, self._units, strict=True):
            block_sums, block_counts = kernel.cluster_sums(block, labels, len(centroids), self._grid_step(), units)
            sums += block_sums
            counts += block_counts
        if before is None:
            return sums, counts, sum(len(labels) for labels in after)
        return sums, counts, sum(int(np.count_nonzero(a != b)) for a, b in zip(before, after, strict=True))

    def sizes(self, version: int, centroids: np.ndarray) -> np.ndarray:
        """(K,) int64 rows of each cluster of `version`, copies and all."""
        labels = [np.zeros(0, np.int32), *self._labels_of(version, centroids)]
        return np.bincount(np.concatenate(labels), minlength=len(centroids)).astype(np.int64)

    def farthest(self, version: int, centroids: np.ndarray, n: int) -> list[FarRow]:
        """The `n` rows farthest from their centroid of `version`, farthest first; of a group of copies the first."""
        floor = kernel.distance_floor(centroids.shape[1], self._grid_step())
        found, first = list[FarRow](), 0
        for block, labels in zip(self._blocks, self._labels_of(version, centroids), strict=True):
            distances = kernel.squared_distances(block, centroids, labels)
            if self._weights is not None:
                distances[~self._weights.first[first : first + len(block)]] = 0
            far = kernel.farthest(distances, n, floor)
            found += [FarRow(float(distances[i]), first + int(i), int(labels[i]), block[i]) for i in far]
            found = sorted(found, key=FarRow.rank)[:n]
            first += len(block)
        return found

    @property
    def _units(self) -> list[np.ndarray | None]:
        """How often the rows of each part count; None: once."""
        if self._weights is None:
            return [None] * len(self._blocks)
        return list(np.split(self._weights.units, np.cumsum([len(x) for x in self._blocks])[:-1]))

    def _labels_of(self, version: int, centroids: np.ndarray) -> list[np.ndarray]:
        if self._version != version:
            nearest = kernel.NearestCentroid(centroids, self._ready_search())
            self._labels = [nearest(x) for x in self._blocks]
            self._version = version
        return self._labels

    def _ready_search(self) -> kernel.Search:
        self._search = self._search or kernel.faiss_search(self._device, self._threads)
        return self._search

    def _grid_step(self) -> float:
        assert self._step is not None
        return self._step


def _squared_norm(x_ND: np.ndarray, units_N: np.ndarray | None) -> float:
    if units_N is None:
        return float(np.einsum("nd,nd->", x_ND, x_ND, dtype=np.float64))
    return float(np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64) @ units_N)


class ShardPool:
    """The actors, one for each contiguous range of parts. A lost actor is replaced and its call made again."""

    def __init__(
        self, parts: Sequence[str], num_actors: int, *, spherical: bool, device: str, cpus: float, gpus: float
    ) -> None:
        count = min(num_actors, len(parts))
        bounds = [i * len(parts) // max(count, 1) for i in range(count + 1)]
        self._ranges = [list(parts[a:b]) for a, b in itertools.pairwise(bounds)]
        self._resources = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        self._arguments = {"spherical": spherical, "device": device, "threads": max(1, int(cpus))}
        self.step: float | None = None  # given to the actors that replace lost ones
        self.weights: list[Weights | None] = [None] * count  # likewise, of the rows of each
        self._actors = [self._started(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self._actors)

    def _started(self, index: int) -> Any:
        actor = ray.remote(KMeansShard).options(**self._resources)
        return actor.remote(self._ranges[index], self.weights[index], **self._arguments, step=self.step)

    def call(self, method: str, *arguments: Any) -> Iterator[tuple[int, Any]]:
        """Call a method of every actor; (actor, answer) as they come."""
        return self.call_each(method, [arguments] * len(self))

    def call_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """As `call`, with the arguments of each actor."""

        def submit(index: int) -> ray.ObjectRef:
            return getattr(self._actors[index], method).remote(*arguments[index])

        deaths = [0] * len(self)
        pending = {submit(i): i for i in range(len(self))}
        while pending:
            ready = ray.wait(list(pending), num_returns=1)[0][0]
            index = pending.pop(ready)
            try:
                answer = ray.get(ready)
            except RayTaskError as error:
                raise error.cause from error
            except _LOST as error:
                deaths[index] += 1
                self._replace(index, deaths[index], error)
                pending[submit(index)] = index
            else:
                yield index, answer

    def _replace(self, index: int, deaths: int, error: Exception) -> None:
        first, last = (storage.redact(self._ranges[index][i]) for i in (0, -1))
        if deaths >= MAX_DEATHS:
            raise RuntimeError(
                f"the k-means actor for the parts {first} to {last} died {deaths} times in a row ({error}); if it ran "
                "out of memory, raise workers.size so that each actor holds fewer rows, then run the same command again"
            ) from error
        log.warning("k-means actor for the parts %s to %s is lost, starting it again: %s", first, last, error)
        ray.kill(self._actors[index])
        self._actors[index] = self._started(index)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
