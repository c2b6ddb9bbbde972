"""Instances of every class that show what it is: the most typical, the least typical, and some at random.

Of things an instance is as typical as its embedding is near to the centroid of its cluster. Segments of stuff have no
embedding: theirs are the largest and the smallest. Parts are read coarse to fine until there is plenty of everything;
memory is that of one part and of the few instances that are kept of each class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.clusters.artifact import read_centroids
from pipeline.engine.shards import ahead, read_columns
from pipeline.report import rows
from pipeline.report.rows import Member
from pipeline.stages.base import Run
from workers.kmeans import assign, embedding_rows
from workers.merge import box_order

PLENTY = 200  # instances a class, on average, after which no further part is read
SPECK = 0.01  # of its photo; smaller segments of stuff are shown only of a class that has no larger ones
SPARE = 3  # times as many are kept at random as are shown, for some of them are typical, too
FOUND = np.dtype(
    [(name, np.int64) for name in ("category", "shard", "row", "segment", "area")]
    + [(name, np.float64) for name in ("score", "draw", "share")]
)


@dataclass(frozen=True, slots=True)
class Examples:
    """Of one class, the most and the least typical first; none is in two of the lists."""

    typical: list[Member]
    least: list[Member]
    random: list[Member]

    @property
    def all(self) -> list[Member]:
        return [*self.typical, *self.least, *self.random]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Examples by category; of each category (indexed by it) its photos and its share of the pixels; and of what."""

    examples: dict[int, Examples]
    photos: np.ndarray
    shares: np.ndarray
    images: int
    parts_read: int
    parts: int


def sample_members(run: Run, each: int) -> Sampled:
    """Up to `each` of the three kinds, of every class of a run with panoptic parts and clusters."""
    total = run.config.clusters.k + run.config.num_stuff
    shards = sorted(run.done["panoptic"])
    chosen = [shards[i] for i in rows.coarse_to_fine(rows.spread(len(shards), rows.SAMPLED_PARTS))]
    kept = np.zeros(0, FOUND)
    photos, areas = np.zeros(total + 1, np.int64), np.zeros(total + 1, np.int64)
    images = pixels = read = seen = 0
    for found, size, readable in ahead(lambda shard: _read(run, shard), chosen, depth=rows.READERS):
        read, seen, images, pixels = read + 1, seen + len(found), images + readable, pixels + size
        of_photo = np.unique(np.stack([found["category"], found["row"]]), axis=1)[0]
        photos += np.bincount(of_photo, minlength=total + 1)
        areas += np.bincount(found["category"], weights=found["area"], minlength=total + 1).astype(np.int64)
        kept = _prune(np.concatenate([kept, found]), each)
        if seen >= PLENTY * total:
            break
    examples = {category: pick_examples(of_class, each) for category, of_class in _by_class(kept)}
    return Sampled(examples, photos, areas / max(1, pixels), images, read, len(shards))


def _read(run: Run, shard: int) -> tuple[np.ndarray, int, int]:
    """The visible segments of a part, the pixels of its photos, and how many of these there are."""
    columns = read_columns(run.stages["panoptic"].part(shard), ["height", "width", "segments"])
    segments = columns["segments"].combine_chunks()
    entries = segments.flatten()
    found = np.zeros(len(entries), FOUND)
    found["shard"], found["row"] = shard, pc.list_parent_indices(segments).to_numpy()
    for name, field in (("category", "category"), ("segment", "id"), ("area", "area"), ("score", "area")):
        found[name] = entries.field(field).to_numpy()
    found["draw"] = np.random.default_rng(shard).random(len(found))
    sizes = [pc.fill_null(columns[name], 0).to_numpy().astype(np.int64) for name in ("height", "width")]
    areas = sizes[0] * sizes[1]
    found["share"] = found["area"] / areas[found["row"]]
    things = found["category"] <= run.config.clusters.k
    found["score"][things], found["share"][things] = _typicality(run, shard, found[things]), 1
    return found, int(areas.sum()), int((areas > 0).sum())


def _typicality(run: Run, shard: int, things: np.ndarray) -> np.ndarray:
    """Of each visible thing, less its squared distance to the nearest centroid."""
    table = read_columns(run.things.part(shard), ["bbox", "embedding"])
    centroids = read_centroids(run.stages["clusters"].folder)
    rows_ND = embedding_rows(table["embedding"])
    if not len(things):
        return np.zeros(0)
    _, distances = assign(rows_ND, centroids, spherical=run.config.clusters.spherical, threads=1)
    places = _painted(table["bbox"].to_pylist())
    return -distances[[places[row][segment - 1] for row, segment in zip(things["row"], things["segment"], strict=True)]]


def _painted(boxes_of_rows: list[list[Any]]) -> list[np.ndarray]:
    """Of each photo, where in the part's list of instances its segments 1, 2, ... are: they are painted by size."""
    starts = np.cumsum([0, *(len(boxes) for boxes in boxes_of_rows)])
    return [
        start + box_order(np.array(boxes).reshape(-1, 4))
        for start, boxes in zip(starts[:-1], boxes_of_rows, strict=True)
    ]


def _by_class(found: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Instances of each class, the most typical first."""
    ordered = found[np.lexsort((found["segment"], found["row"], found["shard"], -found["score"], found["category"]))]
    categories, starts = np.unique(ordered["category"], return_index=True)
    yield from zip(categories.tolist(), np.split(ordered, starts[1:]), strict=True)


def _prune(found: np.ndarray, each: int) -> np.ndarray:
    """Those that may be shown: of each class both ends, and some at random."""
    kept = [np.zeros(0, FOUND)]
    for _, of_class in _by_class(found):
        chosen = np.zeros(len(of_class), bool)
        chosen[:each], chosen[max(0, len(of_class) - each) :] = True, True
        chosen[np.argsort(of_class["draw"])[: SPARE * each]] = True
        kept.append(of_class[chosen])
    return np.concatenate(kept)


def pick_examples(of_class: np.ndarray, each: int) -> Examples:
    """Up to `each` of the three kinds among instances (`FOUND`) of one class, the most typical first."""
    large = of_class[of_class["share"] >= SPECK]
    typical, rest = np.split(large if len(large) >= each else of_class, [each])
    split = max(0, len(rest) - each)
    middle, least = rest[:split], rest[split:][::-1]
    return Examples(_members(typical), _members(least), _members(middle[np.argsort(middle["draw"])[:each]]))


def _members(found: np.ndarray) -> list[Member]:
    return [Member(*entry) for entry in found[["shard", "row", "segment"]].tolist()]
