"""What a prediction leaves in its folder.

    overlays/NAME.jpg   the photo with its labels drawn on it
    panoptic/NAME.png   RGB, id = R + 256 G + 65536 B, 0 = void
    panoptic.json       COCO panoptic, written last: images, annotations with segments_info (and scores), categories
    predict.json        what made them; written first, so that another prediction does not mix its files with these

NAME is the photo's image_id without its ending; where two photos would share it, the later one keeps its ending, and a
number if need be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.predict.draw import draw_labels
from pipeline.sources.classes import classes_as_they_are
from pipeline.sources.coco import Category
from pipeline.store import storage
from pipeline.store.json_lists import JsonLists
from workers.images import LoadedImage
from workers.masks import encode_panoptic_png
from workers.merge import MergedLabels, Segment

ABOUT = "predict.json"
PANOPTIC_JSON, PANOPTIC, OVERLAYS = "panoptic.json", "panoptic", "overlays"


@dataclass(frozen=True, slots=True)
class Labelled:
    """A photo and its labels: `number` is its place among all, from 1, and `name` that of its files."""

    number: int
    name: str
    image: LoadedImage
    labels: MergedLabels
    seconds: float


@dataclass(frozen=True, slots=True)
class Output:
    """The folder of a prediction, local or remote. `names` of the categories are drawn in place of their numbers."""

    uri: str
    num_things: int
    num_stuff: int
    names: Mapping[int, str]

    def begin(self, about: Mapping[str, Any]) -> None:
        """Take the folder. ConfigError when it holds anything but the files of the same prediction."""
        content = json.dumps(about, indent=1, sort_keys=True).encode()
        place, shown = storage.join(self.uri, ABOUT), storage.redact(self.uri)
        try:
            if storage.file_size(self.uri) is not None:
                raise ConfigError(f"--output: {shown!r} is a file; give a folder")
            if storage.exists(place):
                if storage.read_bytes(place) == content:
                    return
                raise ConfigError(
                    f"--output: {shown!r} holds predictions of other weights, photos or settings (see {ABOUT} there); "
                    "give another folder, or delete that one"
                )
            if _holds_files(self.uri):
                raise ConfigError(f"--output: {shown!r} holds other files; give a new or an empty folder")
            storage.write_bytes(place, content)
        except storage.store_errors(self.uri) as error:
            raise self._unwritable(error) from error

    def write(self, photo: Labelled) -> None:
        """The overlay and the PNG of a photo; safe in threads. ConfigError when the folder cannot be written."""
        assert photo.image.pixels is not None
        overlay = draw_labels(photo.image.pixels, photo.labels, self.names)
        try:
            storage.write_bytes(storage.join(self.uri, OVERLAYS, f"{photo.name}.jpg"), overlay)
            storage.write_bytes(
                storage.join(self.uri, PANOPTIC, f"{photo.name}.png"), encode_panoptic_png(photo.labels.ids)
            )
        except storage.store_errors(self.uri) as error:
            raise self._unwritable(error) from error

    def add(self, photo: Labelled, lists: JsonLists) -> None:
        """Add a photo to the lists `images` and `annotations`."""
        height, width = photo.labels.ids.shape
        image = {"id": photo.number, "file_name": photo.image.image_id, "height": height, "width": width}
        segments = [_segment_entry(segment) for segment in photo.labels.segments]
        lists.add("images", image)
        numbers = {"id": photo.number, "image_id": photo.number, "category_id": 0}  # an image has many categories
        lists.add("annotations", numbers | {"file_name": f"{photo.name}.png", "segments_info": segments})

    def finish(self, lists: JsonLists) -> None:
        """Write panoptic.json. ConfigError when it cannot be written."""
        uri = storage.join(self.uri, PANOPTIC_JSON)
        try:
            lists.write(uri, {"images": "images", "annotations": "annotations"}, self._categories())
        except storage.store_errors(self.uri) as error:
            raise self._unwritable(error) from error

    def files(self) -> dict[str, str]:
        """What is in the folder, by kind."""
        return {name: storage.redact(storage.join(self.uri, name)) for name in (OVERLAYS, PANOPTIC, PANOPTIC_JSON)}

    def _categories(self) -> list[dict[str, Any]]:
        """Things 1..K, stuff K+1..K+S."""
        things, last = self.num_things, self.num_things + self.num_stuff
        usual = {i: f"thing {i}" if i <= things else f"stuff {i - things}" for i in range(1, last + 1)}
        listed = {i: Category(i, self.names.get(i, name), i <= things) for i, name in usual.items()}
        return classes_as_they_are(listed).as_coco()

    def _unwritable(self, error: Exception) -> ConfigError:
        reason = storage.redact(str(error)) or type(error).__name__
        return ConfigError(
            f"--output: cannot write to {storage.redact(self.uri)!r}: {reason}; give a folder that can be written"
        )


def _holds_files(uri: str) -> bool:
    try:
        return next(iter(storage.walk(uri)), None) is not None
    except FileNotFoundError:
        return False


def _segment_entry(segment: Segment) -> dict[str, Any]:
    x0, y0, x1, y1 = map(int, segment.bbox)
    entry = {
        "id": segment.id,
        "category_id": segment.category,
        "iscrowd": 0,
        "area": segment.area,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
    }
    return entry if segment.score is None else entry | {"score": round(segment.score, 4)}
