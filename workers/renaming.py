"""Classes that got names: several become one, things become stuff, and noise becomes void.

Labels keep the ids of their things, so that the whole masks of instances are still found by them. Of a class of stuff a
photo has one segment: those that become one take the least of their ids.
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
DETECTIONS = ("category", "rle", "bbox", "area", "score")  # parallel lists of a row of a model's predictions


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
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in labels.segments:
        category = renaming.category_of[segment.category]
        if category != NOISE:
            instance = segment.id if category <= renaming.num_things else 0
            groups.setdefault((category, instance), []).append(segment)
    united = [_unite(members, category, renaming) for (category, _), members in groups.items()]
    id_of = {member.id: one.id for one, members in zip(united, groups.values(), strict=True) for member in members}
    ids = _replace_ids(labels.ids, id_of, [segment.id for segment in labels.segments])
    return MergedLabels(ids, sorted(united, key=lambda segment: segment.id), labels.hidden)


def rename_row(row: Mapping[str, Any], renaming: Renaming) -> dict[str, Any]:
    """A row of panoptic labels (`PANOPTIC_SCHEMA`, or of a model's predictions) of old categories -> of new ones.

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
        **(_rename_detections(row, renaming) if "category" in row else {}),
    }


def _unite(members: list[Segment], category: int, renaming: Renaming) -> Segment:
    """One segment of what several were; of one thing alone all but the category stays."""
    first, is_thing = min(members, key=lambda member: member.id), category <= renaming.num_things
    boxes = np.array([member.bbox for member in members])
    box = (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())
    area = sum(member.area for member in members)
    score = first.score if is_thing else None
    return replace(first, category=category, is_thing=is_thing, area=area, bbox=box, score=score)


def _replace_ids(ids_hw: NDArray[np.int32], id_of: Mapping[int, int], old: Iterable[int]) -> NDArray[np.int32]:
    """The map with each of the `old` ids as `id_of` has it, void where it lacks it; the same array if none changes."""
    changed = {number: id_of.get(number, VOID_ID) for number in old if id_of.get(number, VOID_ID) != number}
    if not changed:
        return ids_hw
    found, places = np.unique(ids_hw, return_inverse=True)
    table = np.array([changed.get(number, number) for number in found.tolist()], np.int32)
    return table[places].reshape(ids_hw.shape)


def _rename_detections(row: Mapping[str, Any], renaming: Renaming) -> dict[str, list[Any]]:
    """The parallel lists of a model's detections, which are of things: those of things alone."""
    kept = [number for number, category in enumerate(row["category"]) if renaming.keeps_thing(category)]
    lists = {name: [row[name][number] for number in kept] for name in DETECTIONS}
    return lists | {"category": [renaming.category_of[category] for category in lists["category"]]}
