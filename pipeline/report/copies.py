"""Masks that are copies of each other as the report shows them: how many there are, and the largest groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.clusters import copies
from pipeline.engine.stage import spread
from pipeline.errors import ConfigError
from pipeline.report.pictures import Crop, Drawer
from pipeline.report.rows import Member
from pipeline.stages.base import Run
from workers.copies import COPY_COSINE

READ_PARTS = 4000  # parts whose masks are compared; of a larger run so many stand for all
SHOWN, CROPS = 8, 12  # groups, and masks of each


@dataclass(frozen=True, slots=True)
class Group:
    """Masks that are copies, of so many photos; `crops` shows some, spread over them."""

    masks: int
    photos: int
    crops: list[Crop]


@dataclass(frozen=True, slots=True)
class Copies:
    """Of `masks` in `parts_read` of `parts` parts, `copied` have copies in another photo, in `groups` groups with a
    cosine of at least `cosine`; `photos` of `photos_read` hold one of them. `weighed`: the clusters count a group as
    one."""

    cosine: float
    weighed: bool
    masks: int
    copied: int
    groups: int
    photos: int
    photos_read: int
    parts_read: int
    parts: int
    largest: list[Group]


def describe_copies(run: Run) -> Copies | None:
    """None before there are masks. ConfigError: a part that cannot be read, no room for the scratch file."""
    shards = sorted(run.done[run.things.name])
    chosen = [shards[i] for i in spread(len(shards), READ_PARTS)]
    dedup = run.config.clusters.dedup
    cosine = COPY_COSINE[run.things.name == "things"] if dedup == "none" else dedup
    try:
        found = copies.find_copies([run.things.part(shard) for shard in chosen], cosine)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not len(found.groups):
        return None
    groups = found.across_photos()
    copied = np.concatenate([np.zeros(0, np.int64), *groups])
    return Copies(
        cosine=cosine,
        weighed=dedup != "none",
        masks=len(found.groups),
        copied=len(copied),
        groups=len(groups),
        photos=len(np.unique(found.photo_of[copied])),
        photos_read=len(found.photos),
        parts_read=len(chosen),
        parts=len(shards),
        largest=_draw(run, found, groups[:SHOWN], chosen),
    )


def _draw(run: Run, found: copies.Copies, groups: list[np.ndarray], shards: list[int]) -> list[Group]:
    shown = [[_member(found, int(masks[i]), shards) for i in spread(len(masks), CROPS)] for masks in groups]
    drawer = Drawer(run.index, run.things, run.stages["panoptic"], (), run.limits)
    _, crops = drawer.draw([], [member for members in shown for member in members])
    return [
        Group(len(masks), len(np.unique(found.photo_of[masks])), [crops[member] for member in members])
        for masks, members in zip(groups, shown, strict=True)
    ]


def _member(found: copies.Copies, mask: int, shards: list[int]) -> Member:
    place = found.place(mask)
    return Member(shards[place.part], place.row, place.mask + 1)  # as `read_labels` numbers masks
