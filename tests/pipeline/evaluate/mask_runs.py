"""Tiny runs of hand-written masks and COCO truths of hand-written objects, all of them rectangles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.stage import Stage
from tests.pipeline.report.tiny_runs import config_of, plan_run
from workers.masks import encode_rle, mask_box
from workers.records import Status, instances_schema

SIZE = (120, 130)


class Mask(NamedTuple):
    """Left, top, width and height in pixels. A found one has a score and an embedding, a true one a class."""

    x: int
    y: int
    width: int
    height: int
    score: float = 0.5
    embedding: tuple[float, float] = (1.0, 0.0)
    category: int = 1
    crowd: bool = False

    def pixels(self) -> np.ndarray:
        mask = np.zeros(SIZE, bool)
        mask[self.y : self.y + self.height, self.x : self.x + self.width] = True
        return mask


Found = Mapping[str, Sequence[Mask] | None]  # of each photo; None: it could not be read


def make_run(folder: Path, found: Found, *, fitted: bool = True, **sections: Any) -> dict[str, Stage]:
    """A run with the stages instances, three photos a part in the order of their names, and, if `fitted`, clusters: two
    of them, at the axes of two dimensions."""
    for name in found:
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(b"photo")
    table = plan_run(config_of(folder / "photos", folder / "run", **{"clusters": {"k": 2}, **sections}))
    names = sorted(found)
    for shard in range(table["instances"].shards):
        rows = [row_of(name, found[name]) for name in names[3 * shard : 3 * shard + 3]]
        write_rows(table["instances"], shard, rows, instances_schema(2))
    if fitted:
        write_centroids(table["clusters"], np.eye(2, dtype=np.float32))
    return table


def row_of(name: str, masks: Sequence[Mask] | None) -> dict[str, Any]:
    """A row of an instances part."""
    readable = {"height": SIZE[0], "width": SIZE[1], "status": Status.OK if masks else Status.NO_MASKS}
    pixels = [mask.pixels() for mask in masks or ()]
    return {
        "image_id": name,
        **(readable if masks is not None else {"status": Status.UNDECODABLE, "error": "cut short"}),
        "rle": [encode_rle(mask) for mask in pixels],
        "bbox": [mask_box(mask) for mask in pixels],
        "area": [int(mask.sum()) for mask in pixels],
        "score": [mask.score for mask in masks or ()],
        "embedding": [np.float16(mask.embedding) for mask in masks or ()],
    }


def write_rows(stage: Stage, shard: int, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    Path(stage.folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), stage.part(shard))


def write_centroids(stage: Stage, centroids_KD: np.ndarray) -> None:
    Path(stage.folder).mkdir(parents=True)
    np.save(Path(stage.folder) / "centroids.npy", centroids_KD)
    (Path(stage.folder) / "artifact.json").write_text("{}")


def write_truth(folder: Path, objects: Mapping[str, Sequence[Mask]]) -> str:
    """A COCO instances JSON; objects are polygons, crowds run lengths, as COCO has them. Its path."""
    images = [
        {"id": k, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for k, name in enumerate(objects, start=1)
    ]
    annotations = [
        {
            "image_id": image["id"],
            "category_id": mask.category,
            "segmentation": run_lengths(mask.pixels()) if mask.crowd else polygon(mask),
            "area": mask.width * mask.height,
            "bbox": mask[:4],
            "iscrowd": int(mask.crowd),
        }
        for image in images
        for mask in objects[image["file_name"]]
    ]
    document = {
        "images": images,
        "annotations": [{"id": k, **annotation} for k, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in (1, 2, 3)],
    }
    (folder / "truth.json").write_text(json.dumps(document))
    return str(folder / "truth.json")


def polygon(mask: Mask) -> list[list[int]]:
    right, below = mask.x + mask.width, mask.y + mask.height
    return [[mask.x, mask.y, right, mask.y, right, below, mask.x, below]]


def run_lengths(mask_hw: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, the first of zeros."""
    edges = np.flatnonzero(np.diff(mask_hw.ravel(order="F"), prepend=False))
    return {"size": list(mask_hw.shape), "counts": np.diff([0, *edges, mask_hw.size]).tolist()}
