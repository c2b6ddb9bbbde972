"""Classes that got names: several become one, things become stuff, and noise becomes void.

Labels keep the ids of their things, so that the whole masks of instances are still found by them. Of a class of stuff a
photo has one segment: those that become one take the id of the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.masks import decode_panoptic_png, encode_panoptic_png
from workers.merge import VOID_ID, MergedLabels, Segment

NOISE = 0  # in place of a category


@dataclass(frozen=True, slots=True)
class Renaming:
    """`category_of[c]` is the new category of category c, or `NOISE`; `category_of[0]` is 0. New categories are things
    1..num_things and stuff from num_things + 1 to num_things + num_stuff."""

    category_of: tuple[int, ...]
    num_things: int
    num_stuff: int

    def keeps_thing(self, category: int) -> bool:
        """Whether an instance of an old category is one of a new category of things."""
        return NOISE < self.category_of[category] <= self.num_things


def rename_labels(labels: MergedLabels, renaming: Renaming) -> MergedLabels:
    """Labels of old categories -> labels of new ones; what is noise is void.

    IndexError for a category that the renaming does not know.
    """
    named = [(one, renaming.category_of[one.category]) for one in labels.segments]
    becomes = new_ids(((one.id, category) for one, category in named), renaming.num_things)
    groups: dict[int, list[Segment]] = {}
    for one, category in named:
        if category != NOISE:
            groups.setdefault(becomes[one.id], []).append(replace(one, category=category))
    united = [_unite(members, renaming.num_things) for members in groups.values()]
    return MergedLabels(replace_ids(labels.ids, becomes), united, labels.hidden)


def new_ids(segments: Iterable[tuple[int, int]], num_things: int) -> dict[int, int]:
    """(id, new category) of the segments of a photo -> what each id becomes: void where the category is `NOISE`, and
    that of the first of its category where this is stuff."""
    becomes: dict[int, int] = {}
    first: dict[int, int] = {}
    for number, category in segments:
        if category == NOISE:
            becomes[number] = VOID_ID
        else:
            becomes[number] = number if category <= num_things else first.setdefault(category, number)
    return becomes


def replace_ids(ids_hw: NDArray[np.int32], becomes: Mapping[int, int]) -> NDArray[np.int32]:
    """The map with each id as `becomes` has it, those that it lacks as they are; the same array if none changes. Ids
    may be as large as 2**24."""
    if all(number == new for number, new in becomes.items()):
        return ids_hw
    found, places = np.unique(ids_hw, return_inverse=True)
    table = np.array([becomes.get(number, number) for number in found.tolist()], np.int32)
    return table[places].reshape(ids_hw.shape)


def rename_row(row: Mapping[str, Any], renaming: Renaming) -> dict[str, Any]:
    """A row of panoptic labels (`PANOPTIC_SCHEMA`) of old categories -> of new ones.

    Rows without labels stay as they are. Errors as of `rename_labels`, and ValueError for a PNG that is none.
    """
    if row["panoptic"] is None:
        return dict(row)
    segments = [Segment(**segment) for segment in row["segments"]]
    labels = MergedLabels(decode_panoptic_png(row["panoptic"]), segments, 0)
    renamed = rename_labels(labels, renaming)
    same = renamed.ids is labels.ids
    return {
        **row,
        "panoptic": row["panoptic"] if same else encode_panoptic_png(renamed.ids),
        "segments": [asdict(segment) for segment in renamed.segments],
    }


def _unite(members: list[Segment], num_things: int) -> Segment:
    """One segment, with the id of the first, of what several were."""
    first, is_thing = members[0], members[0].category <= num_things
    boxes = np.array([member.bbox for member in members])
    box = (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())
    area = sum(member.area for member in members)
    return replace(first, is_thing=is_thing, area=area, bbox=box, score=first.score if is_thing else None)
