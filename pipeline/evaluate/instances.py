"""AP and AR of an evaluation's instances: the true objects, the predicted ones, boxes and masks side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model.metrics.instances import Average, Instance, InstanceAP, instance_of
from pipeline.errors import ConfigError
from pipeline.evaluate.panoptic import LabelSource
from pipeline.sources.coco import CocoInstances, PanopticImage, check_size
from pipeline.sources.names import ImageNames
from workers.masks import encode_rle

NUMBERS = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "AR1": "ar1", "AR10": "ar10", "AR100": "ar100"}


class TrueInstances:
    """The true objects of an image: of COCO instances when given (whole masks), else the visible things of the truth.

    ConfigError when the instances have categories that are no things of the truth, or lack an image of it.
    """

    def __init__(self, truth: LabelSource, instances: CocoInstances | None) -> None:
        self._things = {category.id for category in truth.categories.values() if category.is_thing}
        self._instances = instances
        if instances is None:
            return
        foreign = sorted(instances.categories.keys() - self._things)
        if foreign:
            raise ConfigError(
                f"{instances.shown}: the categories {foreign[:5]} are no things of {truth.shown}; the instances and "
                "the panoptic truth must have the same category ids"
            )
        self._names = ImageNames(instances.names, instances.shown)

    def of(self, truth: PanopticImage) -> list[Instance]:
        """The objects of an image of the truth. ConfigError when the instances lack it or are of another size."""
        if self._instances is None:
            return visible_instances(truth, self._things)
        name = self._names.find(truth.name)
        if name is None:
            raise ConfigError(f"{self._instances.shown} does not list the image {truth.name!r} of the truth")
        check_size(truth.origin, truth.ids.shape, self._instances.shown, self._instances.size(name))
        return self._instances.read(name)


def visible_instances(image: PanopticImage, things: set[int]) -> list[Instance]:
    """The visible masks of an image's things and their boxes; a score that is not given is 1."""
    size = list(image.ids.shape)
    return [
        instance_of(
            segment.category,
            {"size": size, "counts": encode_rle(image.ids == segment.id)},
            crowd=segment.is_crowd,
            score=1.0 if segment.score is None else segment.score,
        )
        for segment in image.segments
        if segment.category in things
    ]


def found_instances(image: PanopticImage, things: set[int]) -> list[Instance]:
    """All that was detected in an image, sure or not, as AP takes it; the visible things where only they are known."""
    return visible_instances(image, things) if image.detections is None else list(image.detections)


class InstanceScores:
    """AP and AR of boxes and of masks. `class_agnostic` takes all things for one class and needs no mapping."""

    def __init__(self, *, class_agnostic: bool = False) -> None:
        self.class_agnostic = class_agnostic
        self._regions = {
            "box": InstanceAP("bbox", class_agnostic=class_agnostic),
            "mask": InstanceAP("segm", class_agnostic=class_agnostic),
        }

    def add(self, truth: Sequence[Instance], found: Sequence[Instance], class_of: Mapping[int, int]) -> None:
        """Add an image. Detections of clusters that `class_of` lacks are left out, unless classes do not matter."""
        if not self.class_agnostic:
            found = [one._replace(category=class_of[one.category]) for one in found if one.category in class_of]
        for region in self._regions.values():
            region.update(truth, found)

    def numbers(self) -> dict[str, float]:
        """`box_AP`, ... `mask_AR100`, NaN without a true object."""
        return {
            f"{name}_{key}": value
            for name, region in self._regions.items()
            for key, value in numbers_of(region.result().all).items()
        }

    def per_class(self) -> dict[int, dict[str, float]]:
        """The same of each category of the truth or the detections."""
        found: dict[int, dict[str, float]] = {}
        for name, region in self._regions.items():
            for category, average in region.result().per_class.items():
                numbers = {f"{name}_{key}": value for key, value in numbers_of(average).items()}
                found[category] = found.get(category, {}) | numbers
        return found


def numbers_of(average: Average) -> dict[str, float]:
    """AP, ... AR100 by the names of the field."""
    return {key: getattr(average, field) for key, field in NUMBERS.items()}
