"""`u2label export coco`: panoptic parts as the files that detectron2's loaders, Mask2Former and U2Seg's trainer read.

    panoptic_NAME.json        COCO panoptic: images, annotations with segments_info, categories with isthing and color
    panoptic_NAME/            an RGB PNG an image, id = R + 256 G + 65536 B, 0 = void, ids from 1 in every image
    instances_NAME.json       COCO instances: one annotation a thing, compressed run lengths, categories 1..K
    panoptic_stuff_NAME/      a grey PNG an image: 0 things, 1..S stuff (category K + s), 255 void
    images_NAME/              photos, where they are no files of their own
    register.py               registers all this with detectron2 and Mask2Former, and sets their numbers of classes

The first four are, in this order, the `panoptic_json`, `panoptic_root`, `instances_json` and `sem_seg_root` of
detectron2's `register_coco_panoptic_separated`. `file_name` of an image is its image_id, or the path of its copy; its
PNGs have that path with `.png`, unless two would be one file or lie outside of the folder. Its COCO id is its place in
the list of parts, from 1; a row that could not be read takes a place and is left out. An image also says where its
photo lies (`coco_url`), its image_id where that is not its `file_name`, and `exif_orientation` where the photo is
turned: labels are of the upright photo; the keys of a manifest are fields of it. The annotations of panoptic JSON have
an `id`, and the `category_id` 0, because pycocotools wants both; the classes are in `segments_info`, where a score is
kept, which other readers ignore.

Instances are whole masks where the instances parts are given, as U2Seg trains on them, else what is visible.

Memory is that of one part and the names; the JSONs are put together from temporary files on the local disk. With shards
there are as many JSONs of each kind, `NAME-00000-of-00004`, over the same folders.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.engine.shards import ahead
from pipeline.errors import ConfigError
from pipeline.export.folder import Folder
from pipeline.export.labels import WRITERS, Labelled, Labels, extent
from pipeline.export.photos import Photos, photos_to_write
from pipeline.export.summary import Exported
from pipeline.sources.classes import Classes, look_up
from pipeline.sources.coco import VOID_ID, PanopticImage
from pipeline.stages.parts import Inputs
from pipeline.store import storage
from pipeline.store.json_lists import JsonLists, json_lists
from workers.masks import BoolArray, encode_rle
from workers.merge import VOID_LABEL

THINGS = 0  # in a stuff PNG
REGISTER = Path(__file__).with_name("register.py")


def export_coco(
    parts: Inputs,
    instances_parts: Inputs | None = None,
    *,
    output: str,
    name: str = "train",
    stuff: bool = True,
    classes: Classes | None = None,
    photos: bool | None = None,
    shards: int = 1,
) -> Exported:
    """Write the labels of panoptic parts as COCO files to the folder `output`, local or remote.

    Args:
        parts, instances_parts, classes: as in `Labels`.
        output: folder for the files; an earlier export of this name is replaced, other files are not touched.
        name: of the set, part of the files' names.
        stuff: whether to write the stuff PNGs.
        photos: whether to write copies of the photos; None: where they are no files of their own.
        shards: JSON files of each kind, over consecutive parts; no more than there are parts.

    Raises:
        ConfigError: as of `Labels` and `Folder`, more than 254 classes of stuff for stuff PNGs, or no label at all.
    """
    labels = Labels(parts, instances_parts, classes=classes)
    copies = photos_to_write(labels.run, photos)
    labels.name_files(dots=copies is None)
    if stuff and labels.classes.stuff >= VOID_LABEL:
        raise ConfigError(f"{labels.classes.stuff} classes of stuff; a stuff PNG holds {VOID_LABEL - 1}")
    groups = _groups(name, shards, len(labels.parts))
    writer = _Writer(labels, _folder(output, name, groups, stuff), copies)
    with writer.folder.writing():
        for group, numbers in groups.items():
            with json_lists("images", "panoptic", "instances") as lists:
                for number in numbers:
                    writer.add_part(number, lists)
                writer.write_jsons(group, lists)
        return labels.finish(writer.folder, writer.files(sharded=shards > 1))


def _groups(name: str, shards: int, parts: int) -> dict[str, range]:
    """The parts of each set of JSONs, by its name."""
    if not 1 <= shards <= parts:
        raise ConfigError(f"--shards: {shards} must be from 1 to the number of parts, which is {parts}")
    if shards == 1:
        return {name: range(parts)}
    ends = [parts * i // shards for i in range(shards + 1)]
    return {f"{name}-{i:05d}-of-{shards:05d}": range(ends[i], ends[i + 1]) for i in range(shards)}


def _folder(output: str, name: str, groups: Iterable[str], stuff: bool) -> Folder:
    """The folder with what is written to it, the JSONs last."""
    folders = [f"images_{name}", *([f"panoptic_stuff_{name}"] if stuff else []), f"panoptic_{name}"]
    jsons = [f"{kind}_{group}.json" for kind in ("instances", "panoptic") for group in groups]
    return Folder(output, "coco", name, [*folders, *jsons], {"register.py": REGISTER.read_bytes()})


class _Entries(NamedTuple):
    """What the JSONs say of an image; the annotations of instances have no id yet."""

    label: Labelled
    turned: bool | None  # by EXIF data; None where that could not be seen
    image: dict[str, Any]
    panoptic: dict[str, Any]
    instances: list[dict[str, Any]]


class _Writer:
    """Writes the PNGs of one part after the other, in threads, and gathers the JSONs' entries in their order."""

    def __init__(self, labels: Labels, folder: Folder, copies: Photos | None) -> None:
        self.folder = folder
        self._labels, self._copies, self._exported = labels, copies, labels.exported
        self._photos = None if labels.run is None else Photos(labels.run)
        self._stuff = f"panoptic_stuff_{folder.name}" in folder.entries

    def add_part(self, number: int, lists: JsonLists) -> None:
        for entries in ahead(self._write, self._labels.read(number), depth=WRITERS):
            if entries is None:
                self._exported.lost += 1
                continue
            lists.add("images", entries.image)
            lists.add("panoptic", entries.panoptic)
            for place, annotation in enumerate(entries.instances, self._exported.instances + 1):
                lists.add("instances", {"id": place, **annotation})
            self._count(entries)

    def write_jsons(self, group: str, lists: JsonLists) -> None:
        entries = self._labels.classes.as_coco()
        things = [{key: entry[key] for key in entry if key != "isthing"} for entry in entries if entry["isthing"]]
        root = f"images_{self.folder.name}" if self._copies else self._photos.root if self._photos else ""
        info = {"name": self.folder.name, **self._exported.categories, "image_root": root}
        lists.write(
            self.folder.uri(f"instances_{group}.json"), {"images": "images", "annotations": "instances"}, things, info
        )
        lists.write(
            self.folder.uri(f"panoptic_{group}.json"), {"images": "images", "annotations": "panoptic"}, entries, info
        )

    def files(self, *, sharded: bool) -> dict[str, str]:
        """Where what lies in the end, by what detectron2 calls it."""
        name, some = self.folder.name, "-*" if sharded else ""
        files = {
            "panoptic_json": f"panoptic_{name}{some}.json",
            "panoptic_root": f"panoptic_{name}",
            "instances_json": f"instances_{name}{some}.json",
        }
        files |= {"sem_seg_root": f"panoptic_stuff_{name}"} if self._stuff else {}
        files |= {"image_root": f"images_{name}"} if self._copies else {}
        return files | {"register": "register.py"}

    def _write(self, label: Labelled) -> _Entries | None:
        """None when the photo is to be copied and is not there."""
        if (found := self._image(label)) is None:
            return None
        image, turned = found
        png, name = f"{label.name}.png", self.folder.name
        storage.write_bytes(self.folder.uri(f"panoptic_{name}", png), label.png)
        if self._stuff:
            grey = stuff_png(label.image, self._labels.classes.things)
            storage.write_bytes(self.folder.uri(f"panoptic_stuff_{name}", png), grey)
        numbers = {"id": label.number, "image_id": label.number, "category_id": 0}
        panoptic = numbers | {"file_name": png, "segments_info": label.segments()}
        category = {segment.id: segment.category for segment in label.image.segments}
        instances = [_instance_entry(label.number, category[i], mask) for i, mask in label.masks.items()]
        return _Entries(label, turned, image, panoptic, instances)

    def _image(self, label: Labelled) -> tuple[dict[str, Any], bool | None] | None:
        """The entry of `images`, with the copy of the photo if there is to be one, and whether EXIF data turns it."""
        height, width = label.size
        entry: dict[str, Any] = {"id": label.number, "file_name": _file_name(label), "height": height, "width": width}
        entry |= label.keys
        turned: bool | None = False
        if self._copies:
            photo = self._copies.of(label)
            if photo is None:
                return None
            entry["file_name"] = label.name + photo.ending
            storage.write_bytes(self.folder.uri(f"images_{self.folder.name}", label.name + photo.ending), photo.data)
            turned = photo.turned
        elif self._photos and label.record:
            turn = self._photos.orientation(label.record)
            turned = None if turn is None else turn != 1
            entry |= {"exif_orientation": turn} if turned else {}
        if self._photos and self._photos.are_files and label.record:
            entry["coco_url"] = storage.redact(label.record.uri)
        return (entry if entry["file_name"] == label.image_id else entry | {"image_id": label.image_id}), turned

    def _count(self, entries: _Entries) -> None:
        name = entries.image["file_name"]
        self._labels.count(entries.label, photo=self._copies is not None, turned=entries.turned)
        self._exported.not_jpg += posixpath.splitext(name)[1] != ".jpg"
        self._exported.in_subfolders += "/" in name
        self._exported.dotted += "." in entries.label.name


def _file_name(label: Labelled) -> str:
    """The image_id, unless it leads out of its folder."""
    inside = not label.image_id.startswith("/") and ".." not in label.image_id.split("/")
    return label.image_id if inside else label.name + posixpath.splitext(label.image_id)[1]


def stuff_png(image: PanopticImage, things: int) -> bytes:
    """PNG of (h, w) uint8: 0 where a thing is, s where stuff of category things + s is, 255 where nothing is."""
    values = {VOID_ID: VOID_LABEL} | {s.id: max(THINGS, s.category - things) for s in image.segments}
    stream = io.BytesIO()
    Image.fromarray(look_up(image.ids, values).astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def _instance_entry(image_id: int, category: int, mask: BoolArray) -> dict[str, Any]:
    rle = {"size": list(mask.shape), "counts": encode_rle(mask)}
    return {"image_id": image_id, "category_id": category, "iscrowd": 0, "segmentation": rle, **extent(mask)}
