"""The labels of panoptic parts, one image after the other, as every format takes them: in the classes that are written,
under a name that no other image has, with masks of the things, and with where the photo lies."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.engine.shards import ahead
from pipeline.errors import ConfigError
from pipeline.export.folder import Folder
from pipeline.export.summary import Exported
from pipeline.sources.classes import Classes, classes_as_they_are
from pipeline.sources.coco import PanopticImage, check_size
from pipeline.sources.names import OutputNames, image_stem, without_dots
from pipeline.stages.base import Run
from pipeline.stages.parts import (
    LABEL_COLUMNS,
    Inputs,
    common_categories,
    find_parts,
    find_run_and_parts,
    image_of_row,
    key_columns,
    keys_of_row,
    parts_of_run,
    read_part_columns,
    shard_of,
)
from pipeline.store import storage
from workers.masks import BoolArray, decode_rle, encode_panoptic_png, mask_box
from workers.merge import whole_masks
from workers.records import READABLE, ImageRecord

WRITERS = 8  # images under way at a time
INSTANCE_COLUMNS = ["image_id", "height", "width", "rle"]
EXAMPLES = 3


class Row(NamedTuple):
    """A readable row: its place in the data set, the name of its files, the row of its masks, and its photo."""

    number: int
    name: str
    where: str
    row: Mapping[str, Any]
    instances: Mapping[str, Any] | None
    record: ImageRecord | None


@dataclass(frozen=True, slots=True)
class Labelled:
    """One labelled image.

    number: its place in the list of parts, from 1; a row that could not be read takes a place, too.
    name: a relative path without an ending that no other image has.
    image: id map and segments in the classes that are written; png: the id map encoded.
    masks: id of each thing -> (h, w) bool, whole or what is visible. hidden: instances without a visible pixel.
    record: where the photo lies, where that is known. keys: of a manifest, as JSON can hold them.
    """

    number: int
    name: str
    image: PanopticImage
    png: bytes
    masks: Mapping[int, BoolArray]
    hidden: int
    record: ImageRecord | None
    keys: Mapping[str, Any]

    @property
    def image_id(self) -> str:
        return self.image.name

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.image.ids.shape
        return height, width

    def segments(self) -> list[dict[str, Any]]:
        """`segments_info` of COCO panoptic; a score is kept, which other readers ignore."""
        return [
            {"id": s.id, "category_id": s.category, "iscrowd": 0, **extent(self.image.ids == s.id)}
            | ({} if s.score is None else {"score": s.score})
            for s in self.image.segments
        ]


class Labels:
    """The labels of parts.

    Args:
        inputs: a run (folder or config file), a folder of panoptic parts, or the parts.
        instances: the same of the stage `things` from which they were merged (parts of one name belong together):
            masks are then whole, and else what is visible.
        classes: with which they are written; None: with those of the parts.

    Raises:
        ConfigError: parts that cannot be read or do not belong together, or classes that are not things 1..K before
            stuff; while reading, a row that does not fit.
    """

    def __init__(self, inputs: Inputs, instances: Inputs | None = None, *, classes: Classes | None = None) -> None:
        self.run, self.parts = find_run_and_parts(inputs)
        self._whole = None if instances is None else _beside(self.parts, self._find_things(inputs, instances))
        self._categories = common_categories(self.parts)
        if classes is None:
            try:
                classes = classes_as_they_are(self._categories)
            except ConfigError as error:
                raise ConfigError(f"{storage.redact(self.parts[0])}: {error}") from error
        self.classes = classes
        self.exported = Exported(whole_masks=instances is not None)
        self.exported.categories = {"things": classes.things, "stuff": classes.stuff}
        self.name_files(dots=True)
        self._place = 0

    def name_files(self, *, dots: bool, folder: str | None = None) -> None:
        """Begin names anew, with or without dots in them, and no `folder` of that name; see `OutputNames`."""
        self._names = OutputNames(dots=dots, folder=folder)

    def read(self, number: int) -> Iterator[Labelled]:
        """The labels of a part, in order; the parts must be read in theirs. Memory: a part, and the names."""
        return ahead(self._label, self._rows(number), depth=WRITERS)

    def count(self, label: Labelled, *, photo: bool = False, turned: bool | None = False) -> None:
        """Count an image that was written: whether a copy of its photo was, and whether EXIF data turns it; None where
        that could not be seen."""
        found = self.exported
        found.images += 1
        found.segments += len(label.image.segments)
        found.instances += len(label.masks)
        found.hidden += label.hidden
        found.photos += photo
        found.turned += turned is True
        found.unchecked += turned is None
        if label.name not in _usual_names(label.image_id):
            found.renamed += 1
            if len(found.examples) < EXAMPLES:
                found.examples[label.image_id] = label.name

    def finish(self, folder: Folder, files: Mapping[str, str]) -> Exported:
        """Put what was written in its place and tell of it; `files` by what they are for, as paths below the folder.
        ConfigError when no image was."""
        if not self.exported.images:
            lost = f", and {self.exported.lost} photos are gone" if self.exported.lost else ""
            raise ConfigError(f"none of the images of the parts has labels{lost}; there is nothing to export")
        self.exported.files = dict(files)
        folder.finish(asdict(self.exported) | {"labels": "/".join(self.parts[0].split("/")[-3:-1])})
        self.exported.files = {role: folder.final(path) for role, path in files.items()}
        return self.exported

    def _find_things(self, inputs: Inputs, instances: Inputs) -> list[str]:
        return parts_of_run(self.run, "things") if self.run and instances == inputs else find_parts(instances, "things")

    def _rows(self, number: int) -> Iterator[Row]:
        part = self.parts[number]
        where, table = storage.redact(part), read_part_columns(part, LABEL_COLUMNS + key_columns(part))
        masks = None if self._whole is None else _same_images(self._whole[number], table["image_id"], where)
        records = None if self.run is None else _records(self.run, part, table["image_id"].to_pylist())
        for i in range(table.num_rows):
            self._place += 1
            row = table.slice(i, 1).to_pylist()[0]
            if row["status"] not in READABLE:
                self.exported.unreadable += 1
                continue
            name = self._names.claim(row["image_id"])
            whole = None if masks is None else masks.slice(i, 1).to_pylist()[0]
            yield Row(self._place, name, where, row, whole, None if records is None else records[i])

    def _label(self, entry: Row) -> Labelled:
        image = image_of_row(entry.row, entry.where, self._categories)
        check_size(image.origin, image.ids.shape, "its row", (entry.row["height"], entry.row["width"]))
        written = self.classes.apply(image)
        png = entry.row["panoptic"] if written is image else encode_panoptic_png(written.ids)
        things = [s.id for s in written.segments if self.classes.categories[s.category].is_thing]
        if entry.instances is None:
            masks, hidden = {number: image.ids == number for number in things}, 0
        else:
            masks, hidden = _whole_masks(image, things, entry.instances)
        return Labelled(entry.number, entry.name, written, png, masks, hidden, entry.record, keys_of_row(entry.row))


def _usual_names(image_id: str) -> set[str]:
    """What the files of an image are called when nothing stands against it."""
    stem = image_stem(image_id)
    return {stem, without_dots(stem)}


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


def _same_images(part: str, image_ids: Any, where: str) -> Any:
    """The rows of masks of an instances part."""
    masks = read_part_columns(part, INSTANCE_COLUMNS)
    if not masks["image_id"].equals(image_ids):
        raise ConfigError(f"{where} and {storage.redact(part)} hold different images")
    return masks


def _records(run: Run, part: str, image_ids: Sequence[str]) -> list[ImageRecord]:
    """Where the photos of a part of a run lie, by its index."""
    records = run.index.records(shard_of(part))
    if [record.image_id for record in records] != list(image_ids):
        raise ConfigError(f"{storage.redact(part)} holds other images than the index of the run; run u2label run again")
    return records


def _whole_masks(
    image: PanopticImage, things: Sequence[int], instances: Mapping[str, Any]
) -> tuple[dict[int, BoolArray], int]:
    """The whole masks of `things`, and how many instances have no visible pixel."""
    size = (instances["height"], instances["width"])
    check_size(image.origin, image.ids.shape, "its row of instances", size)
    masks = [decode_rle(counts, *size) for counts in instances["rle"]]
    visible = np.unique(image.ids)
    hidden = sum(number not in visible for number in range(1, len(masks) + 1))
    try:
        return whole_masks(image.ids, things, masks), hidden
    except ValueError as error:
        raise ConfigError(f"{image.origin}: {error}, or none, and the masks are the visible ones") from error


def extent(mask: BoolArray) -> dict[str, Any]:
    """Area in pixels and box as x, y, width, height."""
    x0, y0, x1, y1 = map(int, mask_box(mask))
    return {"area": int(mask.sum()), "bbox": [x0, y0, x1 - x0, y1 - y0]}
