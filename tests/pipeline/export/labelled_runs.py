"""Runs whose photos and labels are made up, without a stage at work: what exports read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.engine.stage import index_folder
from pipeline.evaluate.panoptic import LabelSource
from pipeline.evaluate.score import score_labels
from pipeline.sources.index import open_index
from pipeline.stages.parts import PanopticParts, find_parts
from pipeline.store import storage
from tests.pipeline.label_files import categories, random_rows, write_instances, write_part
from tests.pipeline.report.tiny_runs import config_of, plan_run

NAMES = ("a.jpg", "b.png", "below/c.jpg", "d.v2.jpg")
SIDEWAYS = 6  # EXIF: the top of the photo is on the right of what is stored


def photo_bytes(height: int, width: int, seed: int, *, turned: bool = False, format: str = "JPEG") -> bytes:
    """A photo of (height, width) upright; a turned one is stored lying down, and its EXIF data says so."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    picture = Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)[:height, :width])
    exif = Image.Exif()
    if turned:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = SIDEWAYS
    stream = io.BytesIO()
    picture.save(stream, format, exif=exif)
    return stream.getvalue()


def labelled_run(
    folder: Path,
    names: Sequence[str] = NAMES,
    *,
    kind: str = "folder",
    things: int = 4,
    stuff: int = 3,
    turned: Collection[str] = (),
    bucket: str | None = None,
) -> str:
    """The folder of a run of photos of these names (in a tar: of its members; in Parquet: a row each), which lie in
    `photos`, or in a bucket."""
    rng = np.random.default_rng(0)
    rows = [random_rows(rng, name, things, stuff) for name in names]
    photos = [
        photo_bytes(row["height"], row["width"], i, turned=name in turned, format="PNG" if ".png" in name else "JPEG")
        for i, (name, (row, _)) in enumerate(zip(names, rows, strict=True))
    ]
    SOURCES[kind](folder / "photos", dict(zip(names, photos, strict=True)))
    for file in storage.walk(str(folder / "photos")) if bucket else ():
        storage.write_bytes(f"{bucket}/photos/{file.path}", (folder / "photos" / file.path).read_bytes())
    source: Any = f"{bucket}/photos" if bucket else folder / "photos"
    table = plan_run(config := config_of(source, folder / "run"))
    index = open_index(index_folder(config))
    remaining = iter(sorted(rows, key=lambda pair: pair[0]["image_id"].encode()) if kind == "folder" else rows)
    for shard in range(index.shards):
        part = [(record.image_id, next(remaining)) for record in index.records(shard)]
        panoptic = [labels | {"image_id": name} for name, (labels, _) in part]
        write_part(Path(table["panoptic"].part(shard)), panoptic, categories(things, stuff))
        masks = [found | {"image_id": name} for name, (_, found) in part]
        write_instances(Path(table["instances"].part(shard)), masks)
    return str(folder / "run")


def scores(predicted: LabelSource, truth: LabelSource) -> dict[str, Any]:
    """The scores of labels whose classes are the truth's."""
    found: dict[str, Any] = score_labels(predicted, truth, mode="identity")
    return found["all_images"]


def labels_of(run: str) -> PanopticParts:
    return PanopticParts(find_parts(run))


def _folder(where: Path, photos: dict[str, bytes]) -> None:
    for name, data in photos.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(data)


def _tar(where: Path, photos: dict[str, bytes]) -> None:
    where.mkdir(parents=True)
    with tarfile.open(where / "shard.tar", "w") as tar:
        for name, data in photos.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _parquet(where: Path, photos: dict[str, bytes]) -> None:
    where.mkdir(parents=True)
    pq.write_table(pa.table({"image": pa.array(photos.values(), pa.binary())}), where / "two.parquet")


SOURCES = {"folder": _folder, "tar": _tar, "parquet": _parquet}
