"""COCO panoptic JSON with its folder of PNGs, and COCO instances JSON: human labels, or what the export wrote.

An image goes by its name, `images[].file_name`; where the JSON lists no images, by the name of its PNG. The JSON is
held in memory, as every reader of the format does; PNGs and masks are decoded one image at a time.

Everything that does not fit is a ConfigError that names the file: a missing PNG, an id in a PNG that `segments_info`
does not list or the reverse, a category that is not in `categories`, an unknown image, a size that differs.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.metrics.instances import Instance
from pipeline.errors import ConfigError
from pipeline.sources.names import require_inside
from pipeline.store import storage
from workers.decode import BAD_DATA
from workers.masks import decode_panoptic_png

VOID_ID = 0
SHOWN = 5  # ids in an error


class Category(NamedTuple):
    """A category of things or stuff; `supercategory` is "" where none is given."""

    id: int
    name: str
    is_thing: bool
    supercategory: str = ""


Categories = dict[int, Category]


class PanopticSegment(NamedTuple):
    """A segment of an id map. `score` is None where none is given."""

    id: int
    category: int
    is_crowd: bool = False
    score: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PanopticImage:
    """One labelled image: `ids` (h, w) int32 with 0 = void, and a segment for each of its other ids.

    `origin` is where it was read from, for messages. `detections` is all that a model detected, with boxes and scores,
    before it was combined to `segments`; None where only those are known.
    """

    name: str
    origin: str
    ids: NDArray[np.int32]
    segments: tuple[PanopticSegment, ...]
    detections: tuple[Instance, ...] | None = None


class CocoPanoptic:
    """COCO panoptic labels; `names` are those of the labelled images in the order of the file.

    Args:
        uri: the JSON file.
        pngs: the folder of its PNGs; by default the JSON's path without `.json`, as COCO names them.
        document: what the JSON holds, where it was read already.

    Raises:
        ConfigError: the JSON cannot be read or is none of COCO panoptic, or an image comes twice.
    """

    def __init__(self, uri: str, pngs: str | None = None, *, document: Any = None) -> None:
        self.uri = uri
        self.shown = storage.redact(uri)
        self.pngs = pngs or uri.removesuffix(".json")
        self.void: frozenset[int] = frozenset()  # ids in PNGs that are void too, where no segment has them
        self.void_found: set[int] = set()  # those of them that were there
        document = read_document(uri, "COCO panoptic", "annotations", document=document)
        self.categories = read_categories(document.get("categories", ()), self.shown)
        self._images = {image["id"]: image for image in _images(document, self.shown, "id", "file_name")}
        self._annotations: dict[str, dict[str, Any]] = {}
        for annotation in document["annotations"]:
            name = self._name(annotation)
            if name in self._annotations:
                raise ConfigError(f"{self.shown}: the image {name!r} has two annotations; keep one of them")
            self._annotations[name] = annotation

    @property
    def names(self) -> Sequence[str]:
        return list(self._annotations)

    def annotation(self, name: str) -> Mapping[str, Any]:
        """The entry of `annotations` of an image, as the file has it."""
        return self._annotations[name]

    def size(self, name: str) -> tuple[int, int]:
        """(height, width) of an image as `images` lists it. ConfigError when it does not."""
        image = self._images.get(self._annotations[name]["image_id"], {})
        if not image.get("height") or not image.get("width"):
            raise ConfigError(f"{self.shown}: `images` has no height and width for {name!r}; add them")
        return int(image["height"]), int(image["width"])

    def png(self, name: str) -> bytes:
        """The encoded id map of an image. ConfigError when it cannot be read."""
        where = storage.join(self.pngs, self._annotations[name]["file_name"])
        try:
            return storage.read_bytes(where)
        except storage.store_errors(where) as error:
            raise ConfigError(
                f"cannot read {storage.redact(where)!r}, which {self.shown} names: {storage.redact(str(error))}; give "
                "the folder of the PNGs that belongs to this JSON"
            ) from error

    def read(self, name: str) -> PanopticImage:
        """The label of an image. ConfigError when PNG, annotation and categories do not fit."""
        annotation = self._annotations[name]
        where = storage.redact(storage.join(self.pngs, annotation["file_name"]))
        segments = tuple(_segment(entry, where) for entry in annotation["segments_info"])
        ids = self._without_void(decode_ids(self.png(name), where), segments)
        image = PanopticImage(name, where, ids, segments)
        check_image(image, self.categories)
        listed = self._images.get(annotation["image_id"], {})
        check_size(where, image.ids.shape, self.shown, (listed.get("height"), listed.get("width")))
        return image

    def _without_void(self, ids: NDArray[np.int32], segments: Sequence[PanopticSegment]) -> NDArray[np.int32]:
        for number in self.void - {segment.id for segment in segments}:
            there = ids == number
            if there.any():
                self.void_found.add(number)
                ids[there] = VOID_ID
        return ids

    def _name(self, annotation: Mapping[str, Any]) -> str:
        try:
            image_id, name, _ = annotation["image_id"], annotation["file_name"], annotation["segments_info"]
            listed = str(self._images[image_id]["file_name"] if self._images else name)
        except KeyError as error:
            raise ConfigError(
                f"{self.shown}: the annotation of the image {annotation.get('image_id')!r} lacks {error}, or `images` "
                "does not list it; COCO panoptic needs image_id, file_name and segments_info"
            ) from error
        require_inside(str(name), self.shown)
        return require_inside(listed, self.shown)


class CocoInstances:
    """COCO instance annotations; `names` are those of all its images, in the order of the file.

    `document` is what the JSON holds, where it was read already. ConfigError when the JSON cannot be read or is none of
    COCO instances, two images have one name, or an annotation is of an unknown image or category.
    """

    def __init__(self, uri: str, *, document: Any = None) -> None:
        self.uri = uri
        self.shown = storage.redact(uri)
        document = read_document(uri, "COCO instances", "images", "annotations", "categories", document=document)
        self.categories = {int(entry["id"]): str(entry["name"]) for entry in document["categories"]}
        images = _images(document, self.shown, "id", "file_name", "height", "width")
        self._images = {str(image["file_name"]): image for image in images}
        if len(self._images) < len(images):
            name, count = Counter(str(image["file_name"]) for image in images).most_common(1)[0]
            raise ConfigError(f"{self.shown}: {count} of the images are called {name!r}; give each a name of its own")
        self._annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        known = {image["id"] for image in images}
        for annotation in document["annotations"]:
            image_id, category = annotation.get("image_id"), annotation.get("category_id")
            if image_id not in known or category not in self.categories:
                raise ConfigError(
                    f"{self.shown}: the annotation {annotation.get('id')!r} is of the image {image_id!r} and the "
                    f"category {category!r}, and the file does not list both"
                )
            self._annotations[image_id].append(annotation)

    @property
    def names(self) -> Sequence[str]:
        return list(self._images)

    def read(self, name: str) -> list[Instance]:
        """The objects of an image, whole masks that may overlap. ConfigError for a segmentation that is none."""
        image = self._images[name]
        return [self._instance(entry, image["height"], image["width"]) for entry in self._annotations[image["id"]]]

    def size(self, name: str) -> tuple[int, int]:
        """(height, width) of an image, as the file says."""
        return self._images[name]["height"], self._images[name]["width"]

    def _instance(self, entry: Mapping[str, Any], height: int, width: int) -> Instance:
        from pycocotools import mask as codec

        rle = self._rle(entry, height, width)
        box = entry["bbox"] if "bbox" in entry else codec.toBbox(rle)
        x, y, w, h = (float(value) for value in box)
        area = float(entry.get("area", codec.area(rle)))
        return Instance(int(entry["category_id"]), rle, (x, y, w, h), area, bool(entry.get("iscrowd", 0)))

    def _rle(self, entry: Mapping[str, Any], height: int, width: int) -> Mapping[str, Any]:
        """Polygons, uncompressed and compressed run lengths, all as compressed ones."""
        from pycocotools import mask as codec

        shape = entry.get("segmentation")
        where = f"{self.shown}: the annotation {entry.get('id')!r}"
        if isinstance(shape, list) and shape and all(len(polygon) >= 6 for polygon in shape):
            merged: Mapping[str, Any] = codec.merge(codec.frPyObjects(shape, height, width))
            return merged
        if not isinstance(shape, Mapping) or "counts" not in shape:
            raise ConfigError(
                f"{where} has no mask: its segmentation is {shape!r:.60}, neither polygons nor run lengths"
            )
        if list(shape["size"]) != [height, width]:
            raise ConfigError(f"{where} has a mask of {shape['size']}, its image is {[height, width]} (height, width)")
        if isinstance(shape["counts"], list):
            packed: Mapping[str, Any] = codec.frPyObjects(dict(shape), height, width)
            return packed
        return shape


def open_coco(uri: str, pngs: str | None = None) -> CocoPanoptic | CocoInstances:
    """COCO labels of the kind that the JSON holds: panoptic annotations list their segments.

    ConfigError as of the two, and for `pngs` (the folder of the PNGs of panoptic labels) beside instances.
    """
    document = read_json(uri)
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, list):
        raise ConfigError(f"{storage.redact(uri)} is neither COCO panoptic nor instances JSON: it has no annotations")
    if any(isinstance(one, Mapping) and "segments_info" in one for one in annotations[:1]):
        return CocoPanoptic(uri, pngs, document=document)
    if pngs is not None:
        raise ConfigError(f"a folder of PNGs ({pngs!r}) belongs to COCO panoptic JSON, not to instances as in {uri!r}")
    return CocoInstances(uri, document=document)


def read_json(uri: str) -> Any:
    """What a JSON file holds. ConfigError when it cannot be read."""
    shown = storage.redact(uri)
    try:
        return json.loads(storage.read_bytes(uri))
    except storage.store_errors(uri) as error:
        raise ConfigError(f"cannot read {shown!r}: {storage.redact(str(error))}") from error
    except ValueError as error:
        raise ConfigError(f"{shown} is not JSON: {error}") from error


def read_document(uri: str, kind: str, *needed: str, document: Any = None) -> dict[str, Any]:
    """A JSON object with the lists `needed`, the first not empty. ConfigError names the file and what is wrong."""
    shown = storage.redact(uri)
    if document is None:
        document = read_json(uri)
    lacking = [key for key in needed if not isinstance(document, dict) or not isinstance(document.get(key), list)]
    if lacking:
        raise ConfigError(f"{shown} is not {kind} JSON: it lacks the lists {', '.join(lacking)}")
    if not document[needed[0]]:
        raise ConfigError(f"{shown} has no {needed[0]}; give the labels of at least one image")
    return dict(document)


def _images(document: Mapping[str, Any], where: str, *needed: str) -> list[dict[str, Any]]:
    images = list(document.get("images", ()))
    for image in images:
        if lacking := [key for key in needed if key not in image]:
            raise ConfigError(f"{where}: the image {image!r:.80} lacks {', '.join(lacking)}")
    return images


def read_categories(entries: Iterable[Mapping[str, Any]], where: str) -> Categories:
    """`categories` of a panoptic JSON by their ids, ascending. ConfigError for an entry without id or isthing."""
    found: Categories = {}
    for entry in entries:
        try:
            number, is_thing = int(entry["id"]), bool(entry["isthing"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: the category {dict(entry)!r:.80} needs an integer id and isthing (instances JSON has no "
                "isthing: give the panoptic one)"
            ) from error
        category = Category(number, str(entry.get("name", number)), is_thing, str(entry.get("supercategory", "")))
        if found.setdefault(number, category).is_thing != is_thing:
            raise ConfigError(f"{where}: the category {number} is listed both as thing and as stuff")
    return dict(sorted(found.items()))


def decode_ids(png: bytes, where: str) -> NDArray[np.int32]:
    """(h, w) int32 ids of a panoptic PNG. ConfigError names the file when it is none."""
    try:
        return decode_panoptic_png(png)
    except (*BAD_DATA, Image.DecompressionBombError) as error:
        raise ConfigError(f"{where}: not a panoptic PNG (id = R + 256 G + 65536 B): {error}") from error


def check_image(image: PanopticImage, categories: Mapping[int, Category]) -> None:
    """ConfigError unless each id of the map but void is that of one segment, and the categories are known.

    Without `categories` any will do (a file of results need not list them).
    """
    listed = [segment.id for segment in image.segments]
    drawn = set(np.unique(image.ids).tolist()) - {VOID_ID}
    problems = {
        "listed twice in segments_info": {number for number, count in Counter(listed).items() if count > 1},
        "in segments_info but without a pixel": set(listed) - drawn,
        "in the picture but not in segments_info": drawn - set(listed),
    }
    if any(problems.values()):
        words = "; ".join(f"{sorted(ids)[:SHOWN]} {what}" for what, ids in problems.items() if ids)
        words += " (an evaluation is told by --void which ids are void)" if drawn - set(listed) else ""
        raise ConfigError(f"{image.origin}: segment ids of the image {image.name!r}: {words}")
    unknown = sorted({segment.category for segment in image.segments} - categories.keys())
    if categories and unknown:
        raise ConfigError(
            f"{image.origin}: the image {image.name!r} has segments of the categories {unknown[:SHOWN]}, which are not "
            f"among the {len(categories)} listed ones ({min(categories)}..{max(categories)})"
        )


def check_size(origin: str, size: Sequence[int], other: str, other_size: Sequence[int | None]) -> None:
    """ConfigError when two (height, width) of one image differ; None in the second is not compared."""
    if any(theirs is not None and mine != theirs for mine, theirs in zip(size, other_size, strict=True)):
        turned = " (one of them may have ignored a rotation in the photo's EXIF data)"
        raise ConfigError(
            f"{origin} is {size[1]}x{size[0]} pixels, but {other_size[1]}x{other_size[0]} by {other}"
            f"{turned if tuple(size) == tuple(other_size)[::-1] else ''}: labels must have the size of the photo"
        )


def _segment(entry: Mapping[str, Any], where: str) -> PanopticSegment:
    try:
        number, category, score = int(entry["id"]), int(entry["category_id"]), entry.get("score")
    except KeyError as error:
        raise ConfigError(f"{where}: a segment {dict(entry)!r:.80} lacks {error}") from error
    crowd = bool(entry.get("iscrowd", 0))
    return PanopticSegment(number, category, crowd, None if score is None else float(score))
