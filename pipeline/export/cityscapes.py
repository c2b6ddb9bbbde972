"""`u2label export cityscapes`: the folders that tools for Cityscapes look for.

    gtFine/NAME/photos/photos_000001_000000_gtFine_labelIds.png        8 bits: the class, 0 where there is none
    gtFine/NAME/photos/photos_000001_000000_gtFine_instanceIds.png     16 bits: the class, of things x 1000 + a number
    gtFine/NAME/photos/photos_000001_000000_gtFine_labelTrainIds.png   8 bits: the class from 0, 255 where there is none
    gtFine/NAME/photos/photos_000001_000000_gtFine_color.png           the classes' colours
    leftImg8bit/NAME/photos/photos_000001_000000_leftImg8bit.png       the photo, upright
    labels_NAME.py                                                     the classes, for cityscapesScripts
    photos_NAME.csv                                                    which photo is which

The number is the image's place in the list of parts. The scripts of Cityscapes know its own classes alone:
`labels_NAME.install()` puts these in their place. Sixteen bits hold 64 classes of things with a thousand things each in
a photo, and eight bits 254 classes; for more, merge classes. Masks are what is visible.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.export.folder import Folder
from pipeline.export.labels import Labelled, Labels
from pipeline.export.photos import Photo, each, photos_to_write
from pipeline.export.summary import Exported
from pipeline.sources.classes import Classes, look_up
from pipeline.sources.coco import VOID_ID, PanopticImage
from pipeline.stages.parts import Inputs
from pipeline.store import storage
from workers.decode import DecodeLimits, decode_image

PER_CLASS = 1000  # instance ids of one class
MOST_THINGS, MOST_CLASSES = 64, 254
NO_TRAIN_ID = 255
CITY = "photos"


def export_cityscapes(
    parts: Inputs,
    *,
    output: str,
    name: str = "train",
    classes: Classes | None = None,
    photos: bool | None = None,
) -> Exported:
    """Write the labels of panoptic parts, and the photos unless `photos` is False, to the local folder `output`.

    ConfigError: as of `Labels` and `Folder`, more classes than the format holds, a thousand things of one class in a
    photo, or an `output` that is not on a local disk, as the format's readers want it.
    """
    if storage.is_remote(output):
        raise ConfigError(f"--output: {storage.redact(output)!r}: tools for Cityscapes read local folders; give one")
    labels = Labels(parts, classes=classes)
    _check_classes(labels.classes)
    copies = photos_to_write(labels.run, photos, usual=True)
    entries = [f"leftImg8bit/{name}", f"labels_{name}.py", f"photos_{name}.csv", f"gtFine/{name}"]
    if "-" in name:
        raise ConfigError(f"--name: {name!r} has a -, and labels_{name}.py could not be imported; use _")
    folder = Folder(output, "cityscapes", name, entries)
    table = io.StringIO()

    def write(label: Labelled, photo: Photo | None) -> tuple[str, str]:
        key = f"{CITY}_{label.number:06d}_000000"
        for kind, picture in pictures(label.image, labels.classes).items():
            _save(folder.uri("gtFine", name, CITY, f"{key}_gtFine_{kind}.png"), picture)
        if photo is not None:
            pixels = decode_image(photo.data, DecodeLimits(min_side=1, max_pixels=label.size[0] * label.size[1]))
            _save(folder.uri("leftImg8bit", name, CITY, f"{key}_leftImg8bit.png"), pixels)
        return key, label.image_id

    with folder.writing():
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(("key", "image_id"))
        for number in range(len(labels.parts)):
            rows.writerows(each(labels, number, copies, write))
        storage.write_bytes(folder.uri(f"photos_{name}.csv"), table.getvalue().encode(errors="surrogateescape"))
        storage.write_bytes(folder.uri(f"labels_{name}.py"), _labels_module(labels.classes).encode())
        files = {"gtFine": f"gtFine/{name}", "labels": f"labels_{name}.py", "photos": f"photos_{name}.csv"}
        return labels.finish(folder, files | ({"leftImg8bit": f"leftImg8bit/{name}"} if copies else {}))


def pictures(image: PanopticImage, classes: Classes) -> dict[str, NDArray[Any]]:
    """The maps (h, w) of a label by their kind: uint8 labelIds and labelTrainIds, uint16 instanceIds, RGB uint8 color.

    ConfigError for a thousand things of one class.
    """
    seen: Counter[int] = Counter()
    instance: dict[int, int] = {VOID_ID: 0}
    for segment in image.segments:
        instance[segment.id] = segment.category
        if classes.categories[segment.category].is_thing:
            instance[segment.id] = segment.category * PER_CLASS + seen[segment.category]
            seen[segment.category] += 1
    if max(seen.values(), default=0) > PER_CLASS:
        raise ConfigError(
            f"{image.origin}: more than {PER_CLASS} things of one class; Cityscapes has no numbers for them"
        )
    label = look_up(image.ids, {VOID_ID: 0} | {s.id: s.category for s in image.segments})
    palette = np.array([(0, 0, 0), *(classes.colors[number] for number in sorted(classes.categories))], np.uint8)
    return {
        "labelIds": label.astype(np.uint8),
        "labelTrainIds": np.where(label == 0, NO_TRAIN_ID, label - 1).astype(np.uint8),
        "instanceIds": look_up(image.ids, instance).astype(np.uint16),
        "color": palette[label],
    }


def _check_classes(classes: Classes) -> None:
    if classes.things > MOST_THINGS or len(classes.categories) > MOST_CLASSES:
        raise ConfigError(
            f"export cityscapes: {classes.things} classes of things and {classes.stuff} of stuff; the format holds "
            f"{MOST_THINGS} of things and {MOST_CLASSES} in all: merge some, or use another format"
        )


def _save(uri: str, picture: NDArray[Any]) -> None:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    storage.write_bytes(uri, stream.getvalue())


def _labels_module(classes: Classes) -> str:
    """A Python file with the classes as cityscapesScripts' own are written."""
    rows = ["    ('unlabeled', 0, 255, 'void', 0, False, True, (0, 0, 0)),"]
    for entry in classes.as_coco():
        number, thing = entry["id"], bool(entry["isthing"])
        group = 1 if thing else 2
        values = (entry["name"], number, number - 1, entry["supercategory"], group, thing, False, tuple(entry["color"]))
        rows.append(f"    {values!r},")
    return MODULE.format(rows="\n".join(rows))


MODULE = '''"""The classes of these labels for cityscapesScripts: `install()` puts them in place of Cityscapes' own."""

from cityscapesscripts.helpers import labels as cityscapes

ROWS = [  # name, id, trainId, category, categoryId, hasInstances, ignoreInEval, color
{rows}
]


def install():
    """In place, so that modules see them that were imported before."""
    labels = [cityscapes.Label(*row) for row in ROWS]
    cityscapes.labels[:] = labels
    tables = {{"name": cityscapes.name2label, "id": cityscapes.id2label, "trainId": cityscapes.trainId2label}}
    for key, table in tables.items():
        table.clear()
        table.update({{getattr(label, key): label for label in reversed(labels)}})
    cityscapes.category2labels.clear()
    for label in labels:
        cityscapes.category2labels.setdefault(label.category, []).append(label)
'''
