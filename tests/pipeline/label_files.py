"""Parts and COCO files of hand-written and of random labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workers.masks import encode_panoptic_png, encode_rle, mask_box
from workers.merge import merge_panoptic
from workers.records import PANOPTIC_SCHEMA, Status, instances_schema, with_metadata

Segments = Sequence[Mapping[str, Any]]
Labels = Mapping[str, tuple[Any, Segments]]  # name: (ids, segments as COCO has them)


def categories(things: int, stuff: int) -> list[dict[str, Any]]:
    """Things 1..K, stuff K+1..K+S, named as a run names them."""
    listed = [{"id": i, "name": f"thing {i}", "isthing": 1} for i in range(1, things + 1)]
    return listed + [{"id": things + i, "name": f"stuff {i}", "isthing": 0} for i in range(1, stuff + 1)]


def write_coco(folder: Path, labels: Labels, listed: Sequence[Mapping[str, Any]], name: str = "truth") -> str:
    """COCO panoptic files of `labels`; returns the JSON's path."""
    images, annotations = [], []
    (folder / name).mkdir(parents=True)
    for number, (image, (ids, segments)) in enumerate(labels.items(), start=1):
        ids = np.atleast_2d(np.array(ids))
        png = Path(image).with_suffix(".png").name
        (folder / name / png).write_bytes(encode_panoptic_png(ids))
        images.append({"id": number, "file_name": image, "height": ids.shape[0], "width": ids.shape[1]})
        annotations.append({"image_id": number, "file_name": png, "segments_info": list(segments)})
    document = {"images": images, "annotations": annotations, "categories": list(listed)}
    (folder / f"{name}.json").write_text(json.dumps(document))
    return str(folder / f"{name}.json")


def segment(number: int, category: int, **further: Any) -> dict[str, Any]:
    return {"id": number, "category_id": category, **further}


def write_part(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    listed: Sequence[Mapping[str, Any]] | None,
    schema: pa.Schema = PANOPTIC_SCHEMA,
) -> str:
    """A panoptic part with `listed` as the categories of its metadata."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if listed is None else with_metadata(table, {"categories": json.dumps(listed)}), path)
    return str(path)


def unreadable_row(image_id: str) -> dict[str, Any]:
    base = {"image_id": image_id, "uri": "", "height": None, "width": None, "panoptic": None, "segments": []}
    return base | {"status": Status.UNDECODABLE, "error": "cut short", "hidden_instances": 0}


def random_rows(rng: np.random.Generator, image_id: str, things: int, stuff: int) -> tuple[dict, dict]:
    """A panoptic row and the row of the instances that it was merged from; masks overlap, some are hidden."""
    height, width = (int(side) for side in rng.integers(20, 40, 2))
    masks = np.zeros((int(rng.integers(0, 6)), height, width), bool)
    for mask in masks:
        y, x = rng.integers(0, 15, 2)
        mask[y : y + rng.integers(3, 20), x : x + rng.integers(3, 20)] = True
    if len(masks) > 3:
        masks[-1] = masks[0]  # the later one hides the earlier
    semantic = np.kron(rng.integers(0, stuff, (2, 2)), np.ones((20, 20), int))[:height, :width].astype(np.uint8)
    semantic[rng.random(semantic.shape) < 0.05] = 255
    classes, scores = rng.integers(1, things + 1, len(masks)), rng.random(len(masks)).astype(np.float32)
    merged = merge_panoptic(masks, classes, semantic, num_things=things, num_stuff=stuff, scores_n=scores)
    common = {"image_id": image_id, "height": height, "width": width, "status": Status.OK, "error": None}
    panoptic = common | {
        "uri": "",
        "panoptic": encode_panoptic_png(merged.ids),
        "segments": [asdict(s) for s in merged.segments],
        "hidden_instances": merged.hidden,
    }
    instances = common | {
        "rle": [encode_rle(mask) for mask in masks],
        "bbox": [mask_box(mask) for mask in masks],
        "area": [int(mask.sum()) for mask in masks],
        "score": scores.tolist(),
        "embedding": [[0.0, 1.0]] * len(masks),
    }
    return panoptic, instances


def write_instances(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=instances_schema(2)), path)
    return str(path)


def random_run(folder: Path, images: int, *, things: int = 4, stuff: int = 3, seed: int = 0) -> tuple[str, str]:
    """Folders of panoptic and of instances parts of `images` random images, three a part; the second is unreadable."""
    rng = np.random.default_rng(seed)
    rows = [random_rows(rng, f"photo-{i:03d}.jpg", things, stuff) for i in range(images)]
    bad = {"rle": [], "bbox": [], "area": [], "score": [], "embedding": []} | unreadable_row("photo-bad.jpg")
    rows.insert(1, (unreadable_row("photo-bad.jpg"), {k: bad[k] for k in instances_schema(2).names}))
    for number in range(0, len(rows), 3):
        panoptic, instances = zip(*rows[number : number + 3], strict=True)
        name = f"part-{number // 3:05d}.parquet"
        write_part(folder / "panoptic" / name, panoptic, categories(things, stuff))
        write_instances(folder / "instances" / name, instances)
    return str(folder / "panoptic"), str(folder / "instances")
