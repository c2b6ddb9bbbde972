"""Panoptic labels beside their truth, one image after the other: what mappings are learnt on and scores are made of.

Either side comes from panoptic parts or from COCO panoptic files. Memory is that of the names, one part of either side
and one pair of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from model.metrics.panoptic import VOID_ID, Overlaps, segment_overlaps
from pipeline.clusters.names import Names
from pipeline.errors import ConfigError
from pipeline.sources.coco import Categories, Category, CocoPanoptic, PanopticImage, check_size
from pipeline.sources.names import ImageNames, comparable, image_stem
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

    def __init__(self, source: LabelSource, like: StuffBySupercategory | None = None) -> None:
        """`like`: labels that decide the groups. Categories of `source` that are none of theirs stay as they are, be it
        that they are groups already."""
        self._source = source
        self.shown = source.shown
        self._group: dict[int, int] = {}
        if like is not None:
            theirs = like._source.categories
            alike = {i for i, c in source.categories.items() if i in theirs and theirs[i].name == c.name}
            self._group = {i: group for i, group in like._group.items() if i in alike}
            self.categories = {self._group.get(i, i): c for i, c in source.categories.items()}
            self.categories |= {group: like.categories[group] for group in self._group.values()}
            return
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


class WithoutCategories:
    """The labels of `source` without the categories `gone`, whose pixels become void."""

    def __init__(self, source: LabelSource, gone: Collection[int]) -> None:
        self._source = source
        self.shown = source.shown
        self.categories = {i: category for i, category in source.categories.items() if i not in gone}

    @property
    def names(self) -> Sequence[str]:
        return self._source.names

    def read(self, name: str) -> PanopticImage:
        image = self._source.read(name)
        kept = tuple(segment for segment in image.segments if segment.category in self.categories)
        ids = np.where(np.isin(image.ids, [segment.id for segment in kept]), image.ids, np.int32(VOID_ID))
        found = image.detections and tuple(one for one in image.detections if one.category in self.categories)
        return replace(image, ids=ids, segments=kept, detections=found)


class ThingsAlone(WithoutCategories):
    """The labels of `source` without their stuff, whose pixels become void."""

    def __init__(self, source: LabelSource) -> None:
        super().__init__(source, {i for i, category in source.categories.items() if not category.is_thing})


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

    Names are matched as `ImageNames` says, whole paths first. Predictions of other images are left out: `unknown` are
    their names. ConfigError: one of the sides has no image, no prediction is of an image of the truth, or two are of
    one; while iterating, a size that differs.
    """

    def __init__(self, truth: LabelSource, predicted: LabelSource) -> None:
        self.truth, self.predicted = truth, predicted
        for source in (truth, predicted):
            if not source.names:
                raise ConfigError(f"{source.shown} holds no labelled image")
        image_of = _matched(truth, predicted)
        if not image_of:
            raise ConfigError(
                f"{predicted.shown}: the image {predicted.names[0]!r} is none of the {len(truth.names)} images of "
                f"{truth.shown}, such as {truth.names[0]!r}, nor is any other; predict images that have a truth"
            )
        self._prediction_of = {image_of[name]: name for name in predicted.names if name in image_of}
        self.missing = [name for name in truth.names if name not in self._prediction_of]
        self.unknown = [name for name in predicted.names if name not in image_of]

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


def _matched(truth: LabelSource, predicted: LabelSource) -> dict[str, str]:
    """The image of the truth of each prediction that has one. An image whose whole path was predicted is not also that
    of a namesake in another folder."""
    known, paths = ImageNames(truth.names, truth.shown), {comparable(name) for name in truth.names}
    exact = [name for name in predicted.names if comparable(name) in paths]
    found = {name: known.claim(name, predicted.shown) for name in exact}
    taken = set(found.values())
    for name in predicted.names:
        if name not in found and known.find(name) not in taken:
            found[name] = known.claim(name, predicted.shown)
    return {name: image for name, image in found.items() if image is not None}


def half_of(name: str) -> int:
    """0 or 1 for an image, the same wherever it is scored."""
    return hashlib.sha256(image_stem(name).encode(errors="surrogateescape")).digest()[0] & 1
