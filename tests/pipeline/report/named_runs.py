"""Finished runs of hundreds of classes, written by hand: what the page of clusters and the names are tested on."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from pipeline.clusters.names import FORMAT
from pipeline.config import Config
from pipeline.engine.shards import StageJob
from pipeline.engine.stage import Stage, index_folder
from pipeline.stages.base import categories
from pipeline.stages.table import define_stages
from tests.pipeline.report.tiny_runs import config_of, plan_run
from workers.masks import encode_rle, mask_box
from workers.records import SEMANTICS_SCHEMA, Status, instances_schema

CELL, COLUMNS, ROWS = 24, 4, 3  # pixels, and cells of a photo; each cell is an instance
HEIGHT, WIDTH = CELL * ROWS, CELL * COLUMNS + CELL  # the last column is stuff alone
DIM = 16


def make_named_run(folder: Path, *, k: int, stuff: int = 2, photos: int = 12, shard_size: int = 25) -> dict[str, Stage]:
    """A run with all stages up to panoptic in `folder`/run, of k classes of things and, if there is any, stuff.

    Instance n of the run is of cluster n % k; its similarity to the centroid falls with n.
    """
    config = run_config(folder, k=k, stuff=stuff, shard_size=shard_size)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for number in range(photos):
        (folder / "photos" / f"{number:04d}.jpg").write_bytes(_photo(rng))
    table = plan_run(config)
    centroids = rng.normal(size=(k, DIM))
    centroids = (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).astype(np.float32)
    _write_fits(table, centroids, photos * COLUMNS * ROWS, stuff)
    for shard in range(table["instances"].shards):
        numbers = range(shard * shard_size, min(photos, (shard + 1) * shard_size))
        _write(table["instances"], shard, [_instances(n, centroids) for n in numbers], instances_schema(DIM))
        if stuff:
            _write(table["semantics"], shard, [_map(n, stuff) for n in numbers], SEMANTICS_SCHEMA)
    _merge(config, table)
    return table


def run_config(folder: Path, *, k: int, stuff: int = 2, shard_size: int = 25, **sections: Any) -> Config:
    semantics = {"method": "kmeans", "classes": stuff} if stuff else {"method": "none"}
    given = {"clusters": {"k": k}, "semantics": semantics, **sections}
    config = config_of(folder / "photos", folder / "run", **given)
    return config.model_copy(update={"source": config.source.model_copy(update={"shard_size": shard_size})})


def fit_name(fit: Stage) -> str:
    """As a file of names tells a fit."""
    digest = hashlib.sha256(Path(fit.folder, "artifact.json").read_bytes()).hexdigest()
    return f"{fit.fingerprint}-{digest[:16]}"


def write_names(file: Path, table: dict[str, Stage], k: int, stuff: int, names: dict[int, dict[str, Any]]) -> str:
    """A file of names for such a run; returns its path."""
    fits = {"things": fit_name(table["clusters"]), "stuff": fit_name(table["semantics_fit"]) if stuff else None}
    document = {"format": FORMAT, "fits": fits, "classes": {"things": k, "stuff": stuff}, "names": names}
    file.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return str(file)


def _photo(rng: np.random.Generator) -> bytes:
    """A colour in each cell."""
    cells = rng.integers(0, 256, (ROWS, COLUMNS + 1, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.kron(cells, np.ones((CELL, CELL, 1), np.uint8))).save(stream, format="JPEG")
    return stream.getvalue()


def _write_fits(table: dict[str, Stage], centroids: np.ndarray, instances: int, stuff: int) -> None:
    k = len(centroids)
    sizes = np.bincount(np.arange(instances) % k, minlength=k).tolist()
    folder = Path(table["clusters"].folder)
    folder.mkdir(parents=True)
    np.save(folder / "centroids.npy", centroids)
    record = {"k": k, "sizes": sizes, "inertia": [9.0, 4.5], "iterations": 1, "spherical": True}
    (folder / "artifact.json").write_text(json.dumps(record))
    if stuff:
        folder = Path(table["semantics_fit"].folder)
        folder.mkdir(parents=True)
        book = {"centroids": np.eye(stuff, DIM, dtype=np.float32), "classes": np.arange(stuff)}
        np.savez(folder / "codebook.npz", mean=np.zeros(DIM), directions=np.eye(DIM), **book)
        fit = {"sizes": [1] * stuff, "iterations": 1, "clusters": stuff, "components": DIM, "inertia": [1.0]}
        (folder / "artifact.json").write_text(json.dumps(fit))


def _instances(photo: int, centroids: np.ndarray) -> dict[str, Any]:
    """A row of an instances part: a rectangle in each cell, in their order."""
    masks, embeddings = [], []
    for cell in range(COLUMNS * ROWS):
        row, column = divmod(cell, COLUMNS)
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[row * CELL : (row + 1) * CELL - 2, column * CELL : (column + 1) * CELL - 2 - cell % 3] = True
        number = photo * COLUMNS * ROWS + cell
        centroid = centroids[number % len(centroids)]
        away = np.roll(centroid, 1) * 0.3 * (number // len(centroids)) / 10
        masks.append(mask)
        embeddings.append((centroid + away).astype(np.float16))
    return {
        "image_id": f"{photo:04d}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "status": Status.OK,
        "rle": [encode_rle(mask) for mask in masks],
        "bbox": [mask_box(mask) for mask in masks],
        "area": [int(mask.sum()) for mask in masks],
        "score": [1.0] * len(masks),
        "embedding": embeddings,
    }


def _map(photo: int, stuff: int) -> dict[str, Any]:
    """A row of a semantics part: one class on the left and in the gaps, the next one in the last column."""
    classes = np.full((HEIGHT, WIDTH), photo % stuff, np.uint8)
    classes[:, -CELL:] = (photo + 1) % stuff
    stream = io.BytesIO()
    Image.fromarray(classes).save(stream, format="PNG")
    return {"image_id": f"{photo:04d}.jpg", "status": Status.OK, "labels": stream.getvalue()}


def _write(stage: Stage, shard: int, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    Path(stage.folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), stage.part(shard))


def _merge(config: Config, table: dict[str, Stage]) -> None:
    """The panoptic parts, by the stage itself."""
    listed = {"categories": json.dumps(categories(config))}
    job = StageJob(table["panoptic"], config, index_folder(config), table, listed)
    actor = define_stages(config)["panoptic"].actor()(job)
    for shard in range(table["panoptic"].shards):
        receipt = actor.run(shard)
        assert receipt.ok, receipt.error
