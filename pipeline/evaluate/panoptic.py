"""Panoptic labels beside their truth, one image after the other: what mappings are learnt on and scores are made of.

Either side comes from panoptic parts or from COCO panoptic files. Memory is that of the names, one part of either side
and one pair of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from model.metrics.panoptic import VOID_ID, Overlaps, segment_overlaps
from pipeline.clusters.names import Names
from pipeline.errors import ConfigError
from pipeline.sources.coco import Categories, Category, CocoPanoptic, PanopticImage, check_size
from pipeline.sources.names import ImageNames, image_stem
from pipeline.stages.parts import Inputs, PanopticParts, find_parts

NO_IMAGE = "no prediction"


class LabelSource(Protocol):
    """Panoptic labels of a set of images. `shown` names them in messages; `categories` is empty when unknown."""

    @property
    def shown(self) -> str: ...

    @property
    def categories(self) -> Categories: ...

    @property
    def names(self) -> Sequence[str]: ...

    def read(self, name: str) -> PanopticImage: ...


def open_labels(inputs: Inputs, pngs: str | None = None, names: Names | None = None) -> PanopticParts | CocoPanoptic:
    """Labels of a COCO panoptic JSON (`.json`; `pngs` is the folder of its PNGs), of a run, or of panoptic parts, these
    with the classes of `names`.

    ConfigError as `CocoPanoptic`, `find_parts` and `PanopticParts`, and for `pngs` beside anything but a JSON, or
    `names` beside one.
    """
    if isinstance(inputs, str) and inputs.lower().endswith(".json"):
        if names is not None:
            raise ConfigError(f"--names: {inputs!r} is no run; give the run, or write the JSON with names")
        return CocoPanoptic(inputs, pngs)
    if pngs is not None:
        raise ConfigError(f"a folder of PNGs ({pngs!r}) belongs to a COCO panoptic JSON, not to {inputs!r:.60}")
    return PanopticParts(find_parts(inputs), names)


class StuffBySupercategory:
    """The labels of `source` with every stuff category replaced by its supercategory (U2Seg scores 15 of COCO's 53).

    A supercategory has the lowest id of its categories; segments stay as they are. ConfigError when a stuff category
    has none.
    """

    def __init__(self, source: LabelSource) -> None:
        self._source = source
        self.shown = source.shown
        self._group: dict[int, int] = {}
        first: dict[str, Category] = {}
        for category in source.categories.values():
            if not category.is_thing:
                if not category.supercategory:
                    raise ConfigError(f"{self.shown}: the stuff {category.id} ({category.name}) has no supercategory")
                group = first.setdefault(category.supercategory, category._replace(name=category.supercategory))
                self._group[category.id] = group.id
        groups = {group.id: group for group in first.values()}
        self.categories = {i: groups.get(i, c) for i, c in source.categories.items() if self._group.get(i, i) == i}

    @property
    def names(self) -> Sequence[str]:
        return self._source.names

    def read(self, name: str) -> PanopticImage:
        image = self._source.read(name)
        segments = [s._replace(category=self._group.get(s.category, s.category)) for s in image.segments]
        return replace(image, segments=tuple(segments))


class ThingsAlone:
    """The labels of `source` without their stuff, whose pixels become void."""

    def __init__(self, source: LabelSource) -> None:
        self._source = source
        self.shown = source.shown
        self.categories = {i: category for i, category in source.categories.items() if category.is_thing}

    @property
    def names(self) -> Sequence[str]:
        return self._source.names

    def read(self, name: str) -> PanopticImage:
        image = self._source.read(name)
        things = tuple(segment for segment in image.segments if segment.category in self.categories)
        ids = np.where(np.isin(image.ids, [thing.id for thing in things]), image.ids, np.int32(VOID_ID))
        return replace(image, ids=ids, segments=things)


@dataclass(frozen=True, slots=True, eq=False)
class LabelPair:
    """The truth of an image, what was predicted of it (all void when nothing was), and the pixels that they share.

    `half` is 0 or 1 by a hash of the image's name.
    """

    truth: PanopticImage
    predicted: PanopticImage
    overlaps: Overlaps
    half: int


class LabelPairs:
    """Every image of the truth with its prediction, in the order of the predictions, then those without one.

    Names are matched as `ImageNames` says. ConfigError: one of the sides has no image, a prediction is of no image of
    the truth, or two are of one image; while iterating, a size that differs.
    """

    def __init__(self, truth: LabelSource, predicted: LabelSource) -> None:
        self.truth, self.predicted = truth, predicted
        for source in (truth, predicted):
            if not source.names:
                raise ConfigError(f"{source.shown} holds no labelled image")
        known = ImageNames(truth.names, truth.shown)
        for name in predicted.names:
            if known.claim(name, predicted.shown) is None:
                raise ConfigError(
                    f"{predicted.shown}: the image {name!r} is none of the {len(truth.names)} images of {truth.shown}, "
                    f"such as {truth.names[0]!r}; predict those images, and no others"
                )
        self._prediction_of = known.claimed
        self.missing = [name for name in truth.names if name not in self._prediction_of]

    def __len__(self) -> int:
        return len(self._prediction_of) + len(self.missing)

    def __iter__(self) -> Iterator[LabelPair]:
        for name, prediction in self._prediction_of.items():
            yield self._pair(self.truth.read(name), self.predicted.read(prediction))
        for name in self.missing:
            truth = self.truth.read(name)
            yield self._pair(truth, PanopticImage(name, NO_IMAGE, np.zeros_like(truth.ids), ()))

    def _pair(self, truth: PanopticImage, predicted: PanopticImage) -> LabelPair:
        check_size(predicted.origin, predicted.ids.shape, truth.origin, truth.ids.shape)
        return LabelPair(truth, predicted, segment_overlaps(truth.ids, predicted.ids), half_of(truth.name))


def half_of(name: str) -> int:
    """0 or 1 for an image, the same wherever it is scored."""
    return hashlib.sha256(image_stem(name).encode(errors="surrogateescape")).digest()[0] & 1
