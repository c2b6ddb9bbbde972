"""In which order a training sees its images: a function of seed and step alone, so that resuming needs no state.

An epoch visits the parts in random order, and mixes the rows of a few parts at a time, so that a process holds only
these few. Wide and tall images go to different batches, as a batch is padded to its largest (detectron2's grouping by
aspect ratio), and what is left over of both makes the last batches. Every image is seen once an epoch; the very last
batch is filled up with images of the same epoch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIXED_PARTS = 8  # parts whose rows are shuffled together


@dataclass(frozen=True, slots=True, eq=False)
class TrainingOrder:
    """The images of each step. Holds a few bytes an image, and in `batch` the order of two epochs.

    parts: (N,) the part that each image lies in, ascending. wide: (N,) bool, whether it is wider than it is high.
    batch_size: images a step. ValueError: there is no image.
    """

    parts: NDArray[np.int64]
    wide: NDArray[np.bool_]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.parts) == 0:
            raise ValueError("there is no image to train on")
        if len(self.parts) != len(self.wide):
            raise ValueError(f"{len(self.parts)} parts of images, but {len(self.wide)} aspects")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.parts) // self.batch_size)

    def batch(self, step: int) -> NDArray[np.int64]:
        """(batch_size,) indices of the images of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows: NDArray[np.int64] = _epoch(self, epoch)[place]
        return rows


@functools.lru_cache(maxsize=2)  # a batch is read while the one before it, maybe of the last epoch, is computed
def _epoch(order: TrainingOrder, epoch: int) -> NDArray[np.int64]:
    """(steps, batch_size) all images in batches."""
    rng = np.random.default_rng([order.seed, epoch])
    shuffled = _shuffled(order.parts, rng)
    wide = order.wide[shuffled]
    size = order.batch_size
    places = np.arange(len(shuffled))
    groups = [places[wide], places[~wide]]
    whole = [group[: len(group) // size * size] for group in groups]
    left = np.sort(np.concatenate([group[len(kept) :] for group, kept in zip(groups, whole, strict=True)]))
    missing = -len(left) % size
    filled = np.concatenate([left, np.resize(places, missing)])
    batches = np.concatenate([part.reshape(-1, size) for part in (*whole, filled)])
    alike = len(batches) - len(filled) // size
    by_last = np.argsort(batches[:alike].max(1, initial=0), kind="stable")  # so that part is read after part
    return shuffled[np.concatenate([batches[by_last], batches[alike:]])]


def _shuffled(parts: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """All images: parts in random order, the rows of every few neighbours in it shuffled together."""
    starts = np.flatnonzero(np.r_[True, parts[1:] != parts[:-1]])
    ends = np.r_[starts[1:], len(parts)]
    visited = rng.permutation(len(starts))
    chunks = []
    for first in range(0, len(visited), MIXED_PARTS):
        mixed = [np.arange(starts[part], ends[part]) for part in visited[first : first + MIXED_PARTS]]
        chunks.append(rng.permutation(np.concatenate(mixed)))
    return np.concatenate(chunks)
