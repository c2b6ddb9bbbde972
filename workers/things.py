"""Nested masks -> the flat choice of them that becomes the things of a panoptic label.

The best masks first, each as long as it overlaps none chosen before by more than a share of the smaller one: of an
object and its parts the better one stands for both. Rows keep their order, and photos without masks stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pycocotools import mask as coco

from workers.kmeans import embedding_rows
from workers.records import READABLE, TARGETS_SCHEMA, instances_schema

THINGS_A_PHOTO = 2  # on average, where nobody has measured which score is worth a thing
COLUMNS = ("rle", "bbox", "area", "score")


@dataclass(frozen=True, slots=True)
class ThingParams:
    """`min_score`: of a mask; `max_overlap`: share of the smaller of two up to which both may stay; `most`: a photo."""

    min_score: float
    max_overlap: float
    most: int


def choose_things(instances: pa.Table, params: ThingParams) -> pa.Table:
    """An instances part, nested or not -> the same photos with the chosen masks alone, best first: a table of
    `instances_schema` that is not nested."""
    rows, taken = [], list[int]()  # embeddings are most of a part, and as Python's numbers twenty times as large
    vectors = instances["embedding"].combine_chunks()
    starts = vectors.offsets.to_pylist() if len(vectors) else []
    for row, start in zip(instances.drop_columns("embedding").to_pylist(), starts, strict=False):
        size = (row["height"], row["width"])
        kept = _choose(row["rle"], row["area"], row["score"], size, params) if row["rle"] else []
        common = {name: row[name] for name in ("image_id", "height", "width", "status", "error")}
        rows.append(common | {name: [row[name][i] for i in kept] for name in COLUMNS})
        taken += [start + i for i in kept]
    schema = instances_schema(instances.schema.field("embedding").type.value_type.list_size)
    position = schema.get_field_index("embedding")
    chosen = pa.Table.from_pylist(rows, schema=schema.remove(position))
    offsets = pa.array(np.cumsum([0, *(len(row["rle"]) for row in rows)]), pa.int32())
    column = pa.ListArray.from_arrays(offsets, vectors.values.take(pa.array(taken, pa.int64())))
    return chosen.add_column(position, schema.field(position), column.cast(schema.field(position).type)).cast(schema)


def scores_of(things: pa.Table) -> NDArray[np.float32]:
    """(N,) of all masks of a part, in order."""
    scores = things["score"].combine_chunks().flatten()
    return np.asarray(scores.to_numpy(zero_copy_only=False), np.float32)


def score_of_two(parts: Sequence[pa.Table]) -> float:
    """The score that leaves a photo with two masks on average; 0 where there are fewer."""
    readable = sum(status in READABLE for part in parts for status in part["status"].to_pylist())
    scores = np.sort(np.concatenate([scores_of(part) for part in parts]))[::-1]
    wanted = THINGS_A_PHOTO * readable
    return float(scores[wanted - 1]) if 0 < wanted <= len(scores) else 0.0


def embeddings_of(things: pa.Table) -> NDArray[np.float32]:
    """(N, D) of all masks of a part, in order."""
    return embedding_rows(things["embedding"])


def with_embeddings(things: pa.Table, rows_Nd: NDArray[np.float32]) -> pa.Table:
    """The part with other embeddings of its masks, one row each in the order of `embeddings_of`."""
    counts = [len(areas) for areas in things["area"].to_pylist()]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    schema = instances_schema(rows_Nd.shape[1])
    values = pa.array(rows_Nd.astype(np.float16).reshape(-1), pa.float16())
    vectors = pa.FixedSizeListArray.from_arrays(values, rows_Nd.shape[1])
    column = pa.ListArray.from_arrays(offsets, vectors)
    position = things.schema.get_field_index("embedding")
    return things.set_column(position, schema.field("embedding"), column.cast(schema.field("embedding").type))


def with_categories(things: pa.Table, categories_N: NDArray[np.int64]) -> pa.Table:
    """The part with the category of each mask, in the order of `embeddings_of`, in place of embeddings: a table of
    TARGETS_SCHEMA."""
    counts = [len(areas) for areas in things["area"].to_pylist()]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    column = pa.ListArray.from_arrays(offsets, pa.array(categories_N, pa.int32()))
    return things.drop_columns("embedding").append_column(TARGETS_SCHEMA.field("category"), column).cast(TARGETS_SCHEMA)


def _choose(
    rles: Sequence[str], areas: Sequence[int], scores: Sequence[float], size: tuple[int, int], params: ThingParams
) -> list[int]:
    """Numbers of the chosen masks, best first; of equal scores the earlier."""
    order = sorted(range(len(rles)), key=lambda mask: (-scores[mask], mask))
    overlap = _overlaps(rles, areas, size)
    chosen: list[int] = []
    for mask in order:
        if scores[mask] < params.min_score or len(chosen) == params.most:
            break
        if not (overlap[mask, chosen] > params.max_overlap).any():
            chosen.append(mask)
    return chosen


def _overlaps(rles: Sequence[str], areas: Sequence[int], size: tuple[int, int]) -> NDArray[np.float64]:
    """(M, M) pixels that two masks share, as a share of the smaller one."""
    coded = [{"size": list(size), "counts": rle.encode("ascii")} for rle in rles]
    of_the_first = np.asarray(coco.iou(coded, coded, [1] * len(coded)))  # in a crowd: the share of the first in it
    area = np.asarray(areas, np.float64)
    shares = of_the_first * area[:, None] / np.minimum(area[:, None], area[None])
    return np.minimum(shares, 1)  # a product that is rounded may be above
