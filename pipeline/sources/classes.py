"""The classes that labels are written with, and which class of the labels becomes which of them.

Every format of `pipeline.export` takes one `Classes` and nothing else about classes: names, colours, merged classes
and noise are decided here. `classes_as_they_are` keeps those of the parts; with names for clusters it is, say,

    Classes({1: Category(1, "dog", True), 2: Category(2, "sky", False)}, {7: 1, 9: 1, 803: 2})

writes the classes 7 and 9 of the labels as dogs and 803 as sky; the pixels of all others become void.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.metrics.instances import Instance
from pipeline.errors import ConfigError
from pipeline.sources.coco import Categories, PanopticImage, PanopticSegment
from workers.overlay import Color, category_color
from workers.renaming import NOISE, new_ids, replace_ids

BLACK = (0, 0, 0)  # void, in pictures of colours


@dataclass(frozen=True)
class Classes:
    """What is written, and from what.

    categories: those that are written by their ids, things 1..K before stuff K+1..K+S.
    written: class of the labels -> one of `categories`. A class that is missing here is noise: its pixels become void.

    Raises:
        ConfigError: `categories` are not numbered like that, or `written` names one that is not among them.
    """

    categories: Categories
    written: Mapping[int, int]

    def __post_init__(self) -> None:
        ordered = sorted(self.categories.values(), key=lambda c: (not c.is_thing, c.id))
        numbers = [category.id for category in ordered]
        if not numbers or numbers != list(range(1, len(numbers) + 1)):
            raise ConfigError(f"an export needs things 1..{self.things} and then stuff, got {numbers[:5]}...")
        if unknown := sorted({*self.written.values()} - self.categories.keys()):
            raise ConfigError(
                f"classes are written as {unknown[:5]}, which are not among the categories 1..{len(numbers)}"
            )

    @property
    def things(self) -> int:
        """K, the number of categories of things."""
        return sum(category.is_thing for category in self.categories.values())

    @property
    def stuff(self) -> int:
        """S, the number of categories of stuff."""
        return len(self.categories) - self.things

    @cached_property
    def names(self) -> dict[int, str]:
        """A name for each category, in their order; one that is taken gets its number, for some formats have no two of
        one name."""
        found: dict[int, str] = {}
        taken: set[str] = set()
        for number, category in sorted(self.categories.items()):
            found[number] = category.name if category.name not in taken else f"{category.name} ({number})"
            taken.add(found[number])
        return found

    @cached_property
    def colors(self) -> dict[int, Color]:
        """An RGB colour for each category, no two the same and none black: some readers tell classes by it."""
        found: dict[int, Color] = {}
        taken = {BLACK}
        for number in sorted(self.categories):
            red, green, blue = category_color(number)
            while (red, green, blue) in taken:
                blue = (blue + 1) % 256
            found[number] = (red, green, blue)
            taken.add(found[number])
        return found

    def apply(self, image: PanopticImage) -> PanopticImage:
        """The label in the categories that are written: noise is void, and stuff of one category one segment.

        Things keep their ids, so that their masks can still be found by them.
        """
        found = [segment.category for segment in image.segments] + [one.category for one in image.detections or ()]
        if all(self.written.get(category) == category for category in found):
            return image
        named = [(segment, self.written.get(segment.category, NOISE)) for segment in image.segments]
        becomes = new_ids(((segment.id, category) for segment, category in named), self.things)
        segments: dict[int, PanopticSegment] = {}
        for segment, category in named:
            if category != NOISE:
                number, score = becomes[segment.id], segment.score if category <= self.things else None
                segments.setdefault(number, PanopticSegment(number, category, segment.is_crowd, score))
        detections = None if image.detections is None else self._detections(image.detections)
        ids = replace_ids(image.ids, becomes)
        return replace(image, ids=ids, segments=tuple(segments.values()), detections=detections)

    def _detections(self, detections: tuple[Instance, ...]) -> tuple[Instance, ...]:
        named = ((one, self.written.get(one.category, NOISE)) for one in detections)
        return tuple(one._replace(category=category) for one, category in named if NOISE < category <= self.things)

    def as_coco(self) -> list[dict[str, Any]]:
        """`categories` of a COCO panoptic JSON. A category without a supercategory is one by itself."""
        return [
            {
                "id": category.id,
                "name": self.names[category.id],
                "supercategory": category.supercategory or self.names[category.id],
                "isthing": int(category.is_thing),
                "color": list(self.colors[category.id]),
            }
            for category in (self.categories[number] for number in sorted(self.categories))
        ]


def classes_as_they_are(categories: Categories) -> Classes:
    """Each category of the labels as itself. ConfigError unless they are things 1..K before stuff."""
    return Classes(categories, {number: number for number in categories})


def look_up(ids_hw: NDArray[np.int32], table: Mapping[int, int]) -> NDArray[np.int64]:
    """(h, w) ids -> (h, w) int64, what `table` has for each; it must have all of them. Ids may be as large as 2**24."""
    keys = np.array(sorted(table))
    values = np.array([table[key] for key in keys.tolist()], np.int64)
    found: NDArray[np.int64] = values[np.searchsorted(keys, ids_hw)]
    return found
