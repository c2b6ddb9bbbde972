"""What the report reads of a run's parts: counts of rows, a sample of images, members of clusters.

Memory is that of one part at a time. Up to `READ_ALL` parts are all read (a few columns of each); of a larger run the
receipts give the counts and `SAMPLED_PARTS` evenly spaced parts the rest, and `RowCounts` and `Members` say so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.engine.shards import ahead, read_columns
from pipeline.engine.stage import Stage, spread
from pipeline.engine.status import StageStatus
from pipeline.sources.index import Index
from pipeline.store import storage
from workers.records import READABLE

READ_ALL = 2000  # parts whose status columns are all read
SAMPLED_PARTS = 200
SIMILARITY_PARTS = 20  # embeddings are most of a part
PROBLEMS_LISTED = 50
SHARE_BINS = 20  # of the area of an instance as a share of its image
READERS = 4  # threads; each holds a few columns of one part

COUNT_COLUMNS = ["image_id", "height", "width", "status", "error", "area"]
PHOTO_COLUMNS = {
    "instances": ["image_id", "height", "width", "status", "error", "rle"],
    "things": ["image_id", "height", "width", "status", "error", "rle"],
    "panoptic": ["image_id", "height", "width", "status", "error", "panoptic", "segments"],
    "semantics": ["image_id", "status", "error", "labels"],
}  # of a stage; the model's predictions are panoptic labels too


@dataclass(frozen=True, slots=True)
class Problem:
    """An image that could not be labelled."""

    image_id: str
    status: str
    error: str


@dataclass(slots=True)
class RowCounts:
    """Rows by status, most frequent first, and what the parts that were read say of their instances.

    `per_image[n]` is the number of readable images with n instances, `shares` a histogram of instances by their share
    of the image's area in `SHARE_BINS` equal bins of [0, 1].
    """

    parts_read: int
    parts: int
    rows: dict[str, int] = field(default_factory=dict)
    instances: int = 0
    per_image: list[int] = field(default_factory=list)
    shares: list[int] = field(default_factory=lambda: [0] * SHARE_BINS)
    problems: list[Problem] = field(default_factory=list)  # the first PROBLEMS_LISTED

    @property
    def from_receipts(self) -> bool:
        return self.parts_read < self.parts

    @property
    def problem_total(self) -> int:
        return sum(count for status, count in self.rows.items() if status not in READABLE)

    @property
    def readable(self) -> int:
        return sum(count for status, count in self.rows.items() if status in READABLE)


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One segment: row `row` of part `shard`, and its id in that image."""

    shard: int
    row: int
    segment: int


@dataclass(frozen=True, slots=True)
class Members:
    """Members by category, in the order of the data set, and how many of the parts were searched for them."""

    by_category: dict[int, list[Member]]
    parts_read: int
    parts: int


def category_names(panoptic: Stage, shard: int) -> dict[int, str]:
    """The names of the categories, from the metadata of a part; empty when it has none."""
    with storage.open_input(panoptic.part(shard), block_size=0) as stream, pq.ParquetFile(stream) as file:
        entries = (file.metadata.metadata or {}).get(b"u2label.categories", b"[]")
    return {int(entry["id"]): str(entry["name"]) for entry in json.loads(entries)}


def count_rows(instances: Stage, done: Collection[int], status: StageStatus) -> RowCounts:
    """Counts over the finished instances parts; `status` (the receipts) counts for a run of too many parts."""
    shards = sorted(done)
    chosen = shards if len(shards) <= READ_ALL else [shards[i] for i in spread(len(shards), SAMPLED_PARTS)]
    counts = RowCounts(parts_read=len(chosen), parts=len(shards))
    for table in ahead(lambda shard: read_columns(instances.part(shard), COUNT_COLUMNS), chosen, depth=READERS):
        _add_part(counts, table)
    if counts.from_receipts:
        counts.rows, counts.instances = status.rows, status.instances
    counts.rows = dict(sorted(counts.rows.items(), key=lambda item: (-item[1], item[0])))
    return counts


def _add_part(counts: RowCounts, table: pa.Table) -> None:
    statuses = table["status"].to_pylist()
    counts.rows = dict(Counter(counts.rows) + Counter(statuses))
    areas = table["area"].combine_chunks()
    sizes = pc.list_value_length(areas).to_numpy(zero_copy_only=False)
    counts.instances += int(sizes.sum())
    readable = np.array([status in READABLE for status in statuses], bool)
    per_image = np.bincount(sizes[readable], minlength=len(counts.per_image))
    per_image[: len(counts.per_image)] += np.array(counts.per_image, np.int64)
    counts.per_image = per_image.tolist()
    parents = pc.list_parent_indices(areas).to_numpy()
    pixels = [pc.fill_null(table[name], 1).to_numpy().astype(np.float64) for name in ("height", "width")]
    shares = areas.flatten().to_numpy() / (pixels[0] * pixels[1])[parents]
    binned = np.bincount(np.minimum(shares * SHARE_BINS, SHARE_BINS - 1).astype(int), minlength=SHARE_BINS)
    counts.shares = (np.array(counts.shares) + binned).tolist()
    for row in np.flatnonzero(~readable)[: PROBLEMS_LISTED - len(counts.problems)].tolist():
        error = table["error"][row].as_py() or ""
        counts.problems.append(Problem(table["image_id"][row].as_py(), statuses[row], error))


def sample_images(index: Index, done: Collection[int], wanted: int) -> list[tuple[int, int]]:
    """(shard, row) of up to `wanted` images, evenly spaced over the images of the finished shards."""
    shards = np.array(sorted(done), np.int64)
    ends = np.cumsum([index.size(shard) for shard in shards.tolist()])
    positions = spread(int(ends[-1]), wanted)
    places = np.searchsorted(ends, positions, side="right").tolist()
    starts = [0, *ends.tolist()]
    return [(int(shards[place]), at - starts[place]) for at, place in zip(positions, places, strict=True)]


def read_images(stage: Stage, shard: int, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Whole rows of a part, but for what the report does not draw."""
    images: list[dict[str, Any]] = (
        read_columns(stage.part(shard), PHOTO_COLUMNS[stage.name if stage.name in PHOTO_COLUMNS else "panoptic"])
        .take(rows)
        .to_pylist()
    )
    return images


def find_members(panoptic: Stage, done: Collection[int], categories: Sequence[int], each: int) -> Members:
    """Up to `each` members of every category, spread over the parts; the search ends when there are plenty of each.

    Parts are visited coarse to fine, so that an early end still leaves members from all over the data set.
    """
    shards = sorted(done)
    chosen = [shards[i] for i in coarse_to_fine(spread(len(shards), SAMPLED_PARTS))]
    plenty = 4 * each
    a_part = max(4, -(-plenty // max(1, len(chosen))))
    found: dict[int, list[Member]] = {category: [] for category in categories}
    visited = 0
    for shard in chosen:
        if all(len(members) >= plenty for members in found.values()):
            break
        visited += 1
        rows, segments, labels = _segments(panoptic.part(shard))
        for category, members in found.items():
            places = np.flatnonzero(labels == category)
            members += [Member(shard, int(rows[p]), int(segments[p])) for p in places[spread(len(places), a_part)]]
    picked = {category: [sorted(members)[i] for i in spread(len(members), each)] for category, members in found.items()}
    return Members(picked, visited, len(shards))


def _segments(uri: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, id and category of every segment of a part."""
    column = read_columns(uri, ["segments"])["segments"].combine_chunks()
    entries = column.flatten()
    rows = pc.list_parent_indices(column).to_numpy()
    return rows, entries.field("id").to_numpy(), entries.field("category").to_numpy()


def coarse_to_fine(values: Sequence[int]) -> list[int]:
    """In van der Corput's order: any first few are spread over all."""
    bits = max(1, (len(values) - 1).bit_length())
    return [values[i] for i in sorted(range(len(values)), key=lambda i: f"{i:0{bits}b}"[::-1])]


def mean_similarities(instances: Stage, done: Collection[int], centroids_KD: np.ndarray) -> np.ndarray:
    """(K,) mean cosine of the embeddings to their nearest centroid of unit norm, from `SIMILARITY_PARTS` parts.

    NaN for a cluster that has no member in them.
    """
    from workers.kmeans import assign, embedding_rows

    shards = sorted(done)
    sums, counts = np.zeros(len(centroids_KD)), np.zeros(len(centroids_KD))
    for shard in [shards[i] for i in spread(len(shards), SIMILARITY_PARTS)]:
        rows_ND = embedding_rows(read_columns(instances.part(shard), ["embedding"])["embedding"])
        labels, distances = assign(rows_ND, centroids_KD, spherical=True, threads=1)
        counts += np.bincount(labels, minlength=len(counts))
        sums += np.bincount(labels, weights=1 - distances / 2, minlength=len(sums))
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
