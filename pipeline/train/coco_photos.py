"""Photos with human labels to train on: a COCO panoptic JSON, its PNGs and a folder of images."""

from __future__ import annotations

import hashlib

import numpy as np

from pipeline.errors import ConfigError
from pipeline.sources.coco import CocoPanoptic
from pipeline.store import storage
from pipeline.train.photos import chosen_fraction
from workers.decode import DecodeError, DecodeLimits, decode_image
from workers.training.samples import Sample, coco_categories, from_coco

PART = 64  # images that are shuffled as one part


class CocoPhotos:
    """The photos of a COCO panoptic data set as `pipeline.train.photos.TrainingPhotos`.

    Categories become things 1..K and stuff K+1..K+S, each in the order of COCO's ids. The JSON is held in memory.
    """

    def __init__(
        self, labels: str, images: str, *, pngs: str | None = None, limits: DecodeLimits, fraction: float = 1
    ) -> None:
        """`labels`: the JSON, `images`: the folder of its images (URIs), `pngs`: by default beside the JSON. `fraction`
        of the photos, at least one, chosen at random but always the same. ConfigError: labels that do not fit."""
        self._labels = CocoPanoptic(labels, pngs)
        self._folder, self._limits = images, limits
        entries = [{"id": category.id, "isthing": category.is_thing} for category in self._labels.categories.values()]
        self._ids, self.num_things, self.num_stuff = coco_categories(entries)
        named = self._labels.categories
        self.categories = [
            {"id": number, "name": named[coco_id].name, "isthing": int(named[coco_id].is_thing)}
            for coco_id, number in self._ids.items()
        ]
        names = sorted(self._labels.names)
        if not names:
            raise ConfigError(f"{storage.redact(labels)} has no annotation to train on")
        if not any(self._labels.annotation(name)["segments_info"] for name in names):
            raise ConfigError(f"{storage.redact(labels)} has {len(names)} photos without a segment: nothing to learn")
        self._names = [names[index] for index in chosen_fraction(len(names), fraction)]
        self.parts = np.arange(len(self._names)) // PART
        sizes = np.array([self._labels.size(name) for name in self._names])
        self.wide = sizes[:, 1] > sizes[:, 0]
        self.identity = f"coco {hashlib.sha256(storage.read_bytes(labels)).hexdigest()[:12]} {fraction:g}"

    def __len__(self) -> int:
        return len(self._names)

    def sample(self, index: int) -> Sample:
        """Image and labels. ConfigError when a file cannot be read; ValueError for labels that do not fit."""
        name = self._names[index]
        uri = storage.join(self._folder, name)
        errors: tuple[type[Exception], ...] = (*storage.store_errors(uri), DecodeError)
        try:
            image = decode_image(storage.read_bytes(uri), self._limits)
        except errors as error:
            raise ConfigError(
                f"cannot read the image {storage.redact(uri)!r}, which has labels: {storage.redact(str(error))}; "
                "give the folder of images that belongs to the labels"
            ) from error
        return from_coco(
            self._labels.annotation(name),
            self._labels.png(name),
            image,
            self._ids,
            num_things=self.num_things,
            num_stuff=self.num_stuff,
        )
