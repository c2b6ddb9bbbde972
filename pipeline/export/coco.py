"""`u2label export coco`: panoptic parts as the files that detectron2's loaders, and so U2Seg's trainer, read.

    panoptic_NAME.json        COCO panoptic: images, annotations with segments_info, categories with isthing
    panoptic_NAME/            an RGB PNG an image, id = R + 256 G + 65536 B, 0 = void, ids from 1 in every image
    instances_NAME.json       COCO instances: one annotation a thing, compressed run lengths, categories 1..K
    panoptic_stuff_NAME/      a grey PNG an image: 0 things, 1..S stuff (category K + s), 255 void

These are, in this order, the `panoptic_json`, `panoptic_root`, `instances_json` and `sem_seg_root` of detectron2's
`register_coco_panoptic_separated`. `file_name` of an image is its image_id; its PNGs have that path with `.png`. An
image's COCO id is its place in the list of parts, from 1; a row that could not be read takes a place and is left out.

detectron2 takes it that photos end in `.jpg`, and looks for the stuff PNGs and photos in one folder without subfolders:
the result counts the images for which that is not so. In `segments_info` a score is kept, which other readers ignore.

Instances are whole masks where the instances parts are given, as U2Seg trains on them, else what is visible.

Memory is that of one part and the names; the JSONs are put together from temporary files on the local disk, and written
last, so that an export that has them is whole.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.clusters.names import Names
from pipeline.engine.log import stdout_console
from pipeline.engine.shards import ahead
from pipeline.errors import ConfigError
from pipeline.sources.coco import VOID_ID, Categories, PanopticImage, check_size
from pipeline.sources.names import image_stem, require_inside
from pipeline.stages.parts import (
    LABEL_COLUMNS,
    Inputs,
    find_parts,
    image_of_row,
    named_categories,
    read_part_columns,
    renamed,
)
from pipeline.store import storage
from pipeline.store.json_lists import JsonLists, json_lists
from workers.masks import BoolArray, decode_rle, encode_rle, mask_box
from workers.merge import VOID_LABEL, whole_masks
from workers.records import READABLE
from workers.renaming import Renaming

THINGS = 0  # in a stuff PNG
WRITERS = 8  # images under way at a time
INSTANCE_COLUMNS = ["image_id", "height", "width", "rle"]


@dataclass(slots=True)
class Exported:
    """What was written; `hidden` are instances without a visible pixel, which have no category and are left out."""

    files: dict[str, str]
    images: int = 0
    unreadable: int = 0
    segments: int = 0
    instances: int = 0
    hidden: int = 0
    whole_masks: bool = False
    not_jpg: int = 0
    in_subfolders: int = 0
    categories: dict[str, int] = field(default_factory=dict)


def export_coco(
    parts: Inputs,
    instances_parts: Inputs | None = None,
    *,
    output: str,
    name: str = "train",
    stuff: bool = True,
    names: Names | None = None,
) -> Exported:
    """Write the labels of panoptic parts as COCO files to the folder `output`, local or remote.

    Args:
        parts: a run (folder or config file), a folder of panoptic parts, or the parts.
        instances_parts: the same of the stage instances from which they were merged (parts of one name belong
            together): instances are then whole masks.
        output: folder for the files; what is there under their names is replaced.
        name: of the set, part of the files' names.
        stuff: whether to write the stuff PNGs.
        names: of the classes, which are then those that came of them: merged, and without noise.

    Raises:
        ConfigError: parts that cannot be read or do not belong together, categories that are not things 1..K before
            stuff K+1..K+S (S at most 254), or two images whose PNGs would be one file.
    """
    panoptic = find_parts(parts)
    whole = None if instances_parts is None else _beside(panoptic, find_parts(instances_parts, "things"))
    categories, renaming = named_categories(panoptic, names)
    things = _count_things(categories, storage.redact(panoptic[0]))
    writer = _Writer(output, name, categories, things, stuff, renaming)
    writer.exported.whole_masks = whole is not None
    try:
        with json_lists("images", "panoptic", "instances") as lists:
            for number, part in enumerate(panoptic):
                writer.add_part(part, None if whole is None else whole[number], lists)
            writer.finish(lists)
    except storage.store_errors(output) as error:
        raise ConfigError(f"--output: cannot write to {storage.redact(output)!r}: {error}") from error
    return writer.exported


def _beside(panoptic: Sequence[str], instances: Sequence[str]) -> list[str]:
    """The instances part of each panoptic part, by the names of the parts."""
    named = {posixpath.basename(part): part for part in instances}
    missing = [part for part in panoptic if posixpath.basename(part) not in named]
    if missing:
        raise ConfigError(
            f"{storage.redact(missing[0])} has no instances part of its name beside {storage.redact(instances[0])}; "
            "give the instances of the same run"
        )
    return [named[posixpath.basename(part)] for part in panoptic]


class _Row(NamedTuple):
    """A readable row with its place in the data set and the row of its instances, if there is one."""

    image_id: int
    where: str
    row: Mapping[str, Any]
    instances: Mapping[str, Any] | None


class _Entries(NamedTuple):
    """What the JSONs say of an image; the annotations have no id yet."""

    image: dict[str, Any]
    panoptic: dict[str, Any]
    instances: list[dict[str, Any]]
    hidden: int


class _Writer:
    """Writes the PNGs of one part after the other, in threads, and gathers the JSONs' entries in their order."""

    def __init__(
        self,
        output: str,
        name: str,
        categories: Categories,
        things: int,
        stuff: bool,
        renaming: Renaming | None,
    ) -> None:
        names = {
            "panoptic_json": f"panoptic_{name}.json",
            "panoptic_root": f"panoptic_{name}",
            "instances_json": f"instances_{name}.json",
        }
        names |= {"sem_seg_root": f"panoptic_stuff_{name}"} if stuff else {}
        self._uris = {role: storage.join(output, file) for role, file in names.items()}
        self.exported = Exported({role: storage.redact(uri) for role, uri in self._uris.items()})
        self.exported.categories = {"things": things, "stuff": len(categories) - things}
        self._categories = categories
        self._things = things
        self._renaming = renaming
        self._stems: dict[str, str] = {}
        self._place = 0

    def add_part(self, part: str, instances: str | None, lists: JsonLists) -> None:
        for entries in ahead(self._write, self._rows(part, instances), depth=WRITERS):
            lists.add("images", entries.image)
            lists.add("panoptic", entries.panoptic)
            for annotation in entries.instances:
                self.exported.instances += 1
                lists.add("instances", {"id": self.exported.instances, **annotation})
            self._count(entries)

    def finish(self, lists: JsonLists) -> None:
        if not self.exported.images:
            raise ConfigError("none of the images of the parts has labels; there is nothing to export")
        things, kinds = [], []
        for category in self._categories.values():
            entry = {"id": category.id, "name": category.name}
            if category.supercategory:
                entry["supercategory"] = category.supercategory
            kinds.append(entry | {"isthing": int(category.is_thing)})
            if category.is_thing:
                things.append(entry)
        lists.write(self._uris["instances_json"], {"images": "images", "annotations": "instances"}, things)
        lists.write(self._uris["panoptic_json"], {"images": "images", "annotations": "panoptic"}, kinds)

    def _rows(self, part: str, instances: str | None) -> Iterator[_Row]:
        """The readable rows of a part; all rows take a place."""
        where, table = storage.redact(part), read_part_columns(part, LABEL_COLUMNS)
        masks = None if instances is None else read_part_columns(instances, INSTANCE_COLUMNS)
        if masks is not None and not masks["image_id"].equals(table["image_id"]):
            raise ConfigError(f"{where} and {storage.redact(str(instances))} hold different images")
        for number in range(table.num_rows):
            self._place += 1
            row = table.slice(number, 1).to_pylist()[0]
            if row["status"] in READABLE:
                self._claim(row["image_id"], where)
                whole = None if masks is None else masks.slice(number, 1).to_pylist()[0]
                yield _Row(self._place, where, renamed(row, self._renaming), whole)
            else:
                self.exported.unreadable += 1

    def _claim(self, image_id: str, where: str) -> None:
        stem = image_stem(require_inside(image_id, where))
        if (other := self._stems.setdefault(stem, image_id)) != image_id:
            raise ConfigError(f"{where}: the maps of {other!r} and {image_id!r} would both be {stem}.png; rename one")

    def _write(self, entry: _Row) -> _Entries:
        image = image_of_row(entry.row, entry.where, self._categories)
        check_size(image.origin, image.ids.shape, "its row", (entry.row["height"], entry.row["width"]))
        png = image_stem(image.name) + ".png"
        storage.write_bytes(storage.join(self._uris["panoptic_root"], png), entry.row["panoptic"])
        if "sem_seg_root" in self._uris:
            storage.write_bytes(storage.join(self._uris["sem_seg_root"], png), stuff_png(image, self._things))
        height, width = image.ids.shape
        listed = {"id": entry.image_id, "file_name": image.name, "height": height, "width": width}
        segments = [_segment_entry(image, segment) for segment in entry.row["segments"]]
        annotation = {"image_id": entry.image_id, "file_name": png, "segments_info": segments}
        things = [s.id for s in image.segments if s.category <= self._things]
        masks = (
            {number: image.ids == number for number in things}
            if entry.instances is None
            else _whole_masks(image, things, entry.instances)
        )
        hidden = 0 if entry.instances is None else len(entry.instances["rle"]) - len(masks)
        category = {s.id: s.category for s in image.segments}
        instances = [_instance_entry(entry.image_id, category[number], mask) for number, mask in masks.items()]
        return _Entries(listed, annotation, instances, hidden)

    def _count(self, entries: _Entries) -> None:
        name = entries.image["file_name"]
        self.exported.images += 1
        self.exported.segments += len(entries.panoptic["segments_info"])
        self.exported.hidden += entries.hidden
        self.exported.not_jpg += posixpath.splitext(name)[1] != ".jpg"
        self.exported.in_subfolders += "/" in name


def stuff_png(image: PanopticImage, things: int) -> bytes:
    """PNG of (h, w) uint8: 0 where a thing is, s where stuff of category things + s is, 255 where nothing is."""
    # By a look-up of sorted ids, which may be as large as 2**24.
    ids = np.array([VOID_ID, *(s.id for s in image.segments)])
    values = np.array([VOID_LABEL, *(max(THINGS, s.category - things) for s in image.segments)], np.uint8)
    order = np.argsort(ids)
    stuff: NDArray[np.uint8] = values[order][np.searchsorted(ids, image.ids, sorter=order)]
    stream = io.BytesIO()
    Image.fromarray(stuff).save(stream, format="PNG")
    return stream.getvalue()


def _whole_masks(image: PanopticImage, things: Sequence[int], instances: Mapping[str, Any]) -> dict[int, BoolArray]:
    size = (instances["height"], instances["width"])
    check_size(image.origin, image.ids.shape, "its row of instances", size)
    try:
        return whole_masks(image.ids, things, [decode_rle(counts, *size) for counts in instances["rle"]])
    except ValueError as error:
        raise ConfigError(f"{image.origin}: {error}, or none, and the masks are the visible ones") from error


def _segment_entry(image: PanopticImage, segment: Mapping[str, Any]) -> dict[str, Any]:
    entry = {
        "id": segment["id"],
        "category_id": segment["category"],
        "iscrowd": 0,
        **_extent(image.ids == segment["id"]),
    }
    return entry if segment["score"] is None else entry | {"score": segment["score"]}


def _instance_entry(image_id: int, category: int, mask: BoolArray) -> dict[str, Any]:
    rle = {"size": list(mask.shape), "counts": encode_rle(mask)}
    return {"image_id": image_id, "category_id": category, "iscrowd": 0, "segmentation": rle, **_extent(mask)}


def _extent(mask: BoolArray) -> dict[str, Any]:
    """Area in pixels and box as x, y, width, height."""
    x0, y0, x1, y1 = map(int, mask_box(mask))
    return {"area": int(mask.sum()), "bbox": [x0, y0, x1 - x0, y1 - y0]}


def _count_things(categories: Categories, where: str) -> int:
    """K of categories that are things 1..K and stuff K+1..K+S."""
    things = sum(category.is_thing for category in categories.values())
    numbers = [category.id for category in sorted(categories.values(), key=lambda c: (not c.is_thing, c.id))]
    if numbers != list(range(1, len(categories) + 1)):
        raise ConfigError(f"{where}: an export needs things 1..{things} and then stuff, got {numbers[:5]}...")
    if len(categories) - things >= VOID_LABEL:
        raise ConfigError(f"{where}: {len(categories) - things} classes of stuff; a stuff PNG holds {VOID_LABEL - 1}")
    return things


def print_export(exported: Exported) -> None:
    """What was written, and what other readers will not find."""
    from rich.table import Table

    console = stdout_console()
    table = Table("argument of register_coco_panoptic_separated", "path")
    for role, uri in exported.files.items():
        table.add_row(role, uri)
    console.print(table)
    masks = "whole" if exported.whole_masks else "visible"
    console.print(
        f"{exported.images} images, {exported.segments} segments, {exported.instances} instances as {masks} masks; "
        f"{exported.categories['things']} things, {exported.categories['stuff']} stuff"
    )
    remarks = {
        "images that could not be read, left out": exported.unreadable,
        "hidden instances, left out": exported.hidden,
        "images do not end in .jpg, where detectron2 looks for them": exported.not_jpg,
        "images lie in subfolders, where detectron2's load_sem_seg does not look": exported.in_subfolders,
    }
    for remark, count in remarks.items():
        if count:
            console.print(f"{count} {remark}")
