"""`u2label export labelstudio`: tasks with the labels as predictions, for people to correct.

    NAME.xml                     the labelling interface: a brush for things, one for stuff
    NAME_tasks/part-00000.json   a file of tasks a part, to import or to sync from a bucket
    NAME_images/                 photos, where they are no files of their own

A photo is named by the URI in the bucket and is not copied: connect the bucket as source storage of the project. One on
a local disk goes by `/data/local-files/?d=PATH`, for which Label Studio is started with
LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=/. Masks are Label Studio's own
run lengths, as its SDK makes them, of the upright photo as browsers show it.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterable
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from pipeline.errors import ConfigError
from pipeline.export.extras import load_extra
from pipeline.export.folder import Folder
from pipeline.export.labels import Labelled, Labels
from pipeline.export.photos import Photo, each, photos_to_write
from pipeline.export.summary import Exported
from pipeline.sources.classes import Classes
from pipeline.stages.parts import Inputs
from pipeline.store import storage
from workers.overlay import css

LOCAL = "/data/local-files/?d="
THINGS, STUFF, PHOTO = "things", "stuff", "image"  # names of the interface's tags
ON = 255  # of a mask of Label Studio


def export_labelstudio(
    parts: Inputs,
    instances_parts: Inputs | None = None,
    *,
    output: str,
    name: str = "train",
    classes: Classes | None = None,
    photos: bool | None = None,
) -> Exported:
    """Write the labels of a run as tasks of Label Studio to the folder `output`.

    `photos`: whether to write copies; None: where the photos are no files of their own. ConfigError: as of `Labels` and
    `Folder`, parts without a run, or Label Studio's SDK is not installed.
    """
    brush = load_extra("label_studio_sdk.converter.brush", package="label-studio-sdk", format="labelstudio")
    labels = Labels(parts, instances_parts, classes=classes)
    if labels.run is None:
        raise ConfigError("export labelstudio: parts alone do not say where their photos lie; give the run")
    copies = photos_to_write(labels.run, photos)
    labels.name_files(dots=copies is None)
    folder = Folder(output, "labelstudio", name, [f"{name}_images", f"{name}_tasks", f"{name}.xml"])
    model = "u2label " + labels.run.stages["panoptic"].fingerprint

    def write(label: Labelled, photo: Photo | None) -> dict[str, Any]:
        where = _place(label) if photo is None else _copy(folder, label, photo)
        result = [_region(label, segment, labels.classes, brush) for segment in label.segments()]
        predictions = [{"model_version": model, "result": result}]
        return {"data": {**label.keys, PHOTO: where, "image_id": label.image_id}, "predictions": predictions}

    with folder.writing():
        for number in range(len(labels.parts)):
            uri = folder.uri(f"{name}_tasks", f"part-{number:05d}.json")
            _write_list(uri, each(labels, number, copies, write))
        storage.write_bytes(folder.uri(f"{name}.xml"), interface(labels.classes).encode())
        files = {"tasks": f"{name}_tasks", "interface": f"{name}.xml"}
        return labels.finish(folder, files | ({"images": f"{name}_images"} if copies else {}))


def interface(classes: Classes) -> str:
    """The labelling interface in Label Studio's XML: the classes by their names and colours."""
    names, colors = classes.names, classes.colors
    lines = ["<View>", f'  <Image name="{PHOTO}" value="${PHOTO}" zoom="true"/>']
    for tag in (THINGS, STUFF):
        lines.append(f'  <BrushLabels name="{tag}" toName="{PHOTO}">')
        for number, category in sorted(classes.categories.items()):
            if category.is_thing == (tag == THINGS):
                lines.append(f'    <Label value={quoteattr(names[number])} background="{css(colors[number])}"/>')
        lines.append("  </BrushLabels>")
    return "\n".join([*lines, "</View>", ""])


def _region(label: Labelled, segment: dict[str, Any], classes: Classes, brush: Any) -> dict[str, Any]:
    """A segment as a stroke of the brush: a thing whole where that is known, and stuff as far as it is visible."""
    mask = label.masks.get(segment["id"], label.image.ids == segment["id"])
    height, width = label.size
    region = {
        "id": f"segment-{segment['id']}",
        "type": "brushlabels",
        "from_name": THINGS if segment["id"] in label.masks else STUFF,
        "to_name": PHOTO,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {
            "format": "rle",
            "rle": brush.mask2rle(np.where(mask, ON, 0).astype(np.uint8)),
            "brushlabels": [classes.names[segment["category_id"]]],
        },
    }
    return region | ({"score": round(segment["score"], 4)} if "score" in segment else {})


def _place(label: Labelled) -> str:
    """Where Label Studio finds the photo."""
    assert label.record is not None
    return _served(label.record.uri)


def _copy(folder: Folder, label: Labelled, photo: Photo) -> str:
    file = label.name + photo.ending
    storage.write_bytes(folder.uri(f"{folder.name}_images", file), photo.data)
    return _served(storage.join(folder.output, f"{folder.name}_images", file))


def _served(uri: str) -> str:
    if storage.is_remote(uri):
        return storage.redact(uri)
    return LOCAL + urllib.parse.quote(storage.local_uri(storage.filesystem(uri)[1]).removeprefix("/"))


def _write_list(uri: str, tasks: Iterable[dict[str, Any]]) -> None:
    """A JSON list, without holding it."""
    with storage.open_output(uri) as stream:
        stream.write(b"[")
        for number, task in enumerate(tasks):
            stream.write((b",\n" if number else b"\n") + json.dumps(task).encode())
        stream.write(b"\n]\n")
