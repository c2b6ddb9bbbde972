"""`u2label export hf`: a data set of Hugging Face `datasets`, in Parquet with the photos in it.

    NAME/part-00000.parquet    a file a part: image, panoptic (a PNG of ids, R + 256 G + 65536 B, 0 = void), segments
    README.md                  the card, from which `load_dataset` learns the split

`load_dataset(FOLDER)`, or the same from the Hub after an upload as it is, has the features of the columns: pictures
decode by themselves, and `category` is a `ClassLabel` whose 0 is void, 1..K things and K+1..K+S stuff.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.errors import ConfigError
from pipeline.export.extras import load_extra
from pipeline.export.folder import Folder
from pipeline.export.labels import Labelled, Labels
from pipeline.export.photos import Photo, Photos, each, photos_to_write
from pipeline.export.summary import Exported
from pipeline.sources.classes import Classes
from pipeline.stages.parts import Inputs
from pipeline.store import storage
from workers.masks import encode_rle

ROWS = 32  # of a row group, held at a time
VOID = "void"


def export_hf(
    parts: Inputs,
    instances_parts: Inputs | None = None,
    *,
    output: str,
    name: str = "train",
    classes: Classes | None = None,
    photos: bool | None = None,
) -> Exported:
    """Write the labels of panoptic parts, with the photos unless `photos` is False, to the folder `output`.

    ConfigError: as of `Labels` and `Folder`, or `datasets` is not installed.
    """
    datasets = load_extra("datasets", package="datasets", format="hf")
    labels = Labels(parts, instances_parts, classes=classes)
    copies = photos_to_write(labels.run, photos, usual=True)
    if "-" in name:
        raise ConfigError(
            f"--name: {name!r} has a -, which names of splits in Hugging Face datasets may not have; use _"
        )
    folder = Folder(output, "hf", name, [name, "README.md"])
    features = _features(datasets, labels.classes, image=copies is not None)
    with folder.writing():
        for number in range(len(labels.parts)):
            _write_part(folder.uri(name, f"part-{number:05d}.parquet"), features.arrow_schema, labels, number, copies)
        storage.write_bytes(folder.uri("README.md"), _card(folder.sets, labels))
        return labels.finish(folder, {"data": name, "card": "README.md"})


def _write_part(uri: str, schema: pa.Schema, labels: Labels, number: int, copies: Photos | None) -> None:
    rows: list[dict[str, Any]] = []
    with storage.open_output(uri) as stream, pq.ParquetWriter(stream, schema) as writer:
        for row in each(labels, number, copies, _row):
            rows.append(row)
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _features(datasets: Any, classes: Classes, *, image: bool) -> Any:
    segment = {
        "id": datasets.Value("int32"),
        "category": datasets.ClassLabel(names=[VOID, *_names_beside_void(classes)]),
        "is_thing": datasets.Value("bool"),
        "area": datasets.Value("int64"),
        "bbox": datasets.List(datasets.Value("int32"), length=4),  # x, y, width, height
        "score": datasets.Value("float32"),
        "rle": datasets.Value("string"),  # of things: COCO's counts of the mask, whole or visible
    }
    columns = {"image_id": datasets.Value("string"), "image": datasets.Image(), "panoptic": datasets.Image()}
    columns |= {"keys": datasets.Value("string")}  # of a manifest, as JSON
    columns |= {"height": datasets.Value("int32"), "width": datasets.Value("int32")}
    if not image:
        del columns["image"]
    return datasets.Features(columns | {"segments": datasets.List(segment)})


def _names_beside_void(classes: Classes) -> list[str]:
    return [name if name != VOID else f"{name} ({number})" for number, name in classes.names.items()]


def _row(label: Labelled, photo: Photo | None) -> dict[str, Any]:
    height, width = label.size
    row: dict[str, Any] = {"image_id": label.image_id, "height": height, "width": width}
    row |= {"keys": json.dumps(dict(label.keys)) if label.keys else None}
    row |= {"panoptic": {"bytes": label.png, "path": f"{label.name}.png"}}
    row |= {"segments": [_segment(label, info) for info in label.segments()]}
    return row | ({} if photo is None else {"image": {"bytes": photo.data, "path": label.name + photo.ending}})


def _segment(label: Labelled, info: dict[str, Any]) -> dict[str, Any]:
    mask = label.masks.get(info["id"])
    return {
        "id": info["id"],
        "category": info["category_id"],
        "is_thing": mask is not None,
        "area": info["area"],
        "bbox": info["bbox"],
        "score": info.get("score"),
        "rle": None if mask is None else encode_rle(mask),
    }


def _card(names: Sequence[str], labels: Labels) -> bytes:
    """What the Hub and `load_dataset` read of the folder: the sets that it has now."""
    files = [{"split": name, "path": f"{name}/*.parquet"} for name in names]
    head = {"configs": [{"config_name": "default", "data_files": files}]}
    things, stuff = labels.classes.things, labels.classes.stuff
    text = (
        f"# Panoptic pseudo-labels\n\nWritten by u2label, the last set of {labels.exported.images} photos: "
        f"{things} classes of things, {stuff} of stuff; nobody has looked at the labels.\n"
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{text}".encode()
