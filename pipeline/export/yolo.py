"""`u2label export yolo`: things as Ultralytics reads them to train segmentation (or detection, from the same files).

    NAME.yaml               what `yolo segment train data=` takes: folders, and class -> name, classes from 0
    images/NAME/            the photos, upright
    labels/NAME/            a text file a photo, a line a thing: class, then x and y of a polygon as shares of the sides

The format has one polygon a thing and no holes: where a mask has pieces or holes, the polygon runs to and fro between
them along the shortest lines between corners, as Ultralytics' own converter does, and these lines are a pixel wide in
what is read back. Stuff has no place in the format. A corner is a quarter into its pixel, so that readers who round and
readers who cut off find the same pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.export.extras import load_extra
from pipeline.export.folder import Folder
from pipeline.export.labels import Labelled, Labels
from pipeline.export.photos import Photo, each, photos_to_write
from pipeline.export.summary import Exported
from pipeline.sources.classes import Classes
from pipeline.stages.parts import Inputs
from pipeline.store import storage
from workers.masks import BoolArray

Polygon = NDArray[np.int32]
INTO_PIXEL = 0.25
LEAST_CORNERS = 3


def export_yolo(
    parts: Inputs,
    instances_parts: Inputs | None = None,
    *,
    output: str,
    name: str = "train",
    classes: Classes | None = None,
    photos: bool | None = None,
) -> Exported:
    """Write the things of panoptic parts, and the photos unless `photos` is False, to the folder `output`.

    ConfigError: as of `Labels` and `Folder`, no class of things, or OpenCV is not installed.
    """
    cv2 = load_extra("cv2", package="opencv-python-headless", format="yolo")
    labels = Labels(parts, instances_parts, classes=classes)
    if not labels.classes.things:
        raise ConfigError("export yolo: the labels have no class of things, and the format has no place for stuff")
    copies = photos_to_write(labels.run, photos, usual=True)
    # Readers take the last `images` of a path for the place of photos; those that are not copied keep their names.
    labels.name_files(dots=copies is None, folder=None if copies is None else "images")
    folder = Folder(output, "yolo", name, [f"images/{name}", f"labels/{name}", f"{name}.yaml"])

    def write(label: Labelled, photo: Photo | None) -> None:
        if photo is not None:
            storage.write_bytes(folder.uri("images", name, label.name + photo.ending), photo.data)
        storage.write_bytes(folder.uri("labels", name, f"{label.name}.txt"), _lines(label, cv2).encode())

    with folder.writing():
        for number in range(len(labels.parts)):
            for _ in each(labels, number, copies, write):
                pass
        labels.exported.stuff_left_out = labels.exported.segments - labels.exported.instances
        storage.write_bytes(folder.uri(f"{name}.yaml"), _data(labels.classes, name))
        files = {"data": f"{name}.yaml", "labels": f"labels/{name}"}
        return labels.finish(folder, files | ({"images": f"images/{name}"} if copies else {}))


def _data(classes: Classes, name: str) -> bytes:
    things = {number - 1: classes.names[number] for number in range(1, classes.things + 1)}
    document = {"train": f"images/{name}", "val": f"images/{name}", "names": things}
    about = "# Written by u2label. `val` is the training set: give one of your own, with labels that people made.\n"
    return (about + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)).encode()


def _lines(label: Labelled, cv2: Any) -> str:
    height, width = label.size
    category = {segment.id: segment.category for segment in label.image.segments}
    lines = []
    for number, mask in label.masks.items():
        shares = (outline(mask, cv2) + INTO_PIXEL) / (width, height)
        lines.append(f"{category[number] - 1} " + " ".join(f"{share:.7f}" for share in shares.ravel().tolist()))
    return "".join(line + "\n" for line in lines)


def outline(mask_hw: BoolArray, cv2: Any) -> Polygon:
    """(h, w) bool, not empty -> (n, 2) int32 x and y of pixels: one closed polygon around all pieces and holes, which
    `cv2.fillPoly` fills to the mask, but for the lines between them."""
    found, _ = cv2.findContours(mask_hw.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    remaining = sorted((one.reshape(-1, 2) for one in found), key=len, reverse=True)
    polygon = remaining.pop(0)
    for piece in remaining:
        polygon = _joined(polygon, piece)
    repeats = max(0, LEAST_CORNERS - len(polygon))
    return np.concatenate([polygon, np.repeat(polygon[-1:], repeats, axis=0)]).astype(np.int32)


def _joined(polygon: Polygon, piece: Polygon) -> Polygon:
    """The polygon with a way from its corner nearest to the piece, around the piece and back."""
    squared = ((polygon[:, None].astype(np.int64) - piece[None]) ** 2).sum(axis=2)
    here, there = np.unravel_index(int(squared.argmin()), squared.shape)
    around = np.concatenate([piece[there:], piece[: there + 1]])
    return np.concatenate([polygon[: here + 1], around, polygon[here:]])
