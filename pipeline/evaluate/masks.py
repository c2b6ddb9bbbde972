"""Masks of a run beside the true objects of the same photos, one photo after the other.

A run's masks are those of its stage `instances`, or the things of a stage of panoptic labels. On either side they may
overlap, or lie in one another. Memory is that of the truth (its JSON), one part and one photo, whatever the run's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from model.metrics.instances import Instance, instance_of
from pipeline.clusters.artifact import read_centroids
from pipeline.clusters.names import Names as ClassNames
from pipeline.engine.shards import ahead
from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.evaluate.instances import found_instances, visible_instances
from pipeline.evaluate.results import Names
from pipeline.sources.coco import CocoInstances, check_size, open_coco
from pipeline.sources.names import ImageNames
from pipeline.stages.base import Run, ShardStage
from pipeline.stages.parts import classes_of_names, common_categories, image_of_row, label_columns, read_part_columns
from pipeline.store import storage
from workers.masks import encode_rle
from workers.panoptic import nearest_categories
from workers.records import READABLE
from workers.renaming import Renaming

READERS = 4  # parts whose names are looked through at a time
NO_CLUSTER = 0  # clusters are 1..K, as the categories of panoptic labels
INSTANCE_COLUMNS = ["image_id", "height", "width", "status", "rle", "score"]


class TruePhoto(NamedTuple):
    """A labelled photo: where it was read from, its (height, width), its objects, crowds among them, and the RLE of all
    its stuff, None where that is not known."""

    origin: str
    size: tuple[int, int]
    objects: list[Instance]
    stuff: Mapping[str, Any] | None


class FoundPhoto(NamedTuple):
    """A row of the run: (height, width), None when the photo could not be read, and the masks, the surest first, each
    with its cluster as `category`."""

    image_id: str
    size: tuple[int, int] | None
    masks: list[Instance]


class TrueMasks:
    """The objects of COCO instances, or the things and the stuff of COCO panoptic labels, as the JSON may be.

    ConfigError as `open_coco`, and for panoptic labels that do not say which categories are things.
    """

    def __init__(self, uri: str, pngs: str | None = None) -> None:
        self._labels = open_coco(uri, pngs)
        self.shown = self._labels.shown
        self.names = self._labels.names
        self._things = set[int]()
        if not isinstance(self._labels, CocoInstances):
            if not self._labels.categories:
                raise ConfigError(f"{self.shown} lists no categories, so that nothing says which are things; add them")
            self._things = {category.id for category in self._labels.categories.values() if category.is_thing}

    @property
    def has_stuff(self) -> bool:
        return not isinstance(self._labels, CocoInstances)

    def read(self, name: str) -> TruePhoto:
        """The labels of one of `names`. ConfigError as `CocoInstances.read` and `CocoPanoptic.read`."""
        if isinstance(self._labels, CocoInstances):
            return TruePhoto(f"{self.shown}, {name!r}", self._labels.size(name), self._labels.read(name), None)
        image = self._labels.read(name)
        height, width = image.ids.shape
        stuff_ids = [segment.id for segment in image.segments if segment.category not in self._things]
        stuff = {"size": [height, width], "counts": encode_rle(np.isin(image.ids, stuff_ids))}
        return TruePhoto(image.origin, (height, width), visible_instances(image, self._things), stuff)


class MaskSource(Protocol):
    """Masks of a stage of a run; `clusters` is how many there are, None while they are not fitted."""

    @property
    def clusters(self) -> int | None: ...

    def read(self, shard: int, rows: Sequence[int]) -> Iterator[FoundPhoto]: ...


class InstanceMasks:
    """The masks of a stage of instances, each in the cluster of its nearest centroid, as the panoptic stage has it, if
    the clusters are of the masks of this stage. With a renaming, masks are in the class that their cluster has, and
    those without one, or of stuff, are left out."""

    def __init__(self, run: Run, stage: str, renaming: Renaming | None = None) -> None:
        self._stage = run.stages[stage]
        clustered = run.fitted and stage == run.things.name
        self._centroids_KD = read_centroids(run.stages["clusters"].folder) if clustered else None
        self._spherical = run.config.clusters.spherical
        self._threads = max(1, int(run.config.workers.cpus))
        self.clusters = None if self._centroids_KD is None else len(self._centroids_KD)
        self._renaming = None if self._centroids_KD is None else renaming
        if self._renaming is not None:
            self.clusters = self._renaming.num_things

    def read(self, shard: int, rows: Sequence[int]) -> Iterator[FoundPhoto]:
        """Some rows of a part, in their order. ConfigError when it cannot be read."""
        columns = INSTANCE_COLUMNS + ([] if self._centroids_KD is None else ["embedding"])
        table = read_part_columns(self._stage.part(shard), columns)
        ends = np.cumsum([len(masks) for masks in table["rle"]])
        clusters = np.split(self._clusters(table, int(ends[-1])), ends[:-1])
        for row in rows:
            entry = table.select(INSTANCE_COLUMNS).slice(row, 1).to_pylist()[0]
            yield _found_photo(entry, clusters[row].tolist(), self._renaming)

    def _clusters(self, table: pa.Table, masks: int) -> np.ndarray:
        """(N,) int64 of all masks of a part, `NO_CLUSTER` while there are none."""
        if self._centroids_KD is None:
            return np.full(masks, NO_CLUSTER, np.int64)
        return nearest_categories(
            table["embedding"], self._centroids_KD, spherical=self._spherical, threads=self._threads
        )


class LabelMasks:
    """The things of panoptic labels, each in the cluster that is its category; of a model's predictions, which list
    it, all that was detected."""

    def __init__(self, stage: Stage, shards: Sequence[int], names: ClassNames | None = None) -> None:
        self._stage = stage
        parts = [stage.part(shard) for shard in shards]
        self._categories = common_categories(parts)
        self._classes = classes_of_names(parts, self._categories, names)
        self._columns = label_columns(parts[0])
        seen = self._categories if self._classes is None else self._classes.categories
        self._things = {category.id for category in seen.values() if category.is_thing}
        self.clusters = len(self._things)

    def read(self, shard: int, rows: Sequence[int]) -> Iterator[FoundPhoto]:
        """Some rows of a part, in their order. ConfigError when it cannot be read, or as `image_of_row`."""
        part = self._stage.part(shard)
        table = read_part_columns(part, self._columns)
        for row in rows:
            entry = table.slice(row, 1).to_pylist()[0]
            if entry["status"] not in READABLE:
                yield FoundPhoto(entry["image_id"], None, [])
                continue
            image = image_of_row(entry, storage.redact(part), self._categories)
            image = image if self._classes is None else self._classes.apply(image)
            height, width = image.ids.shape
            yield FoundPhoto(image.name, (height, width), _surest_first(found_instances(image, self._things)))


def open_masks(run: Run, stage: str, names: ClassNames | None = None) -> MaskSource:
    """The masks of a stage with a finished part, in the classes of `names` if there are any. ConfigError for a stage
    without masks, or as `LabelMasks`."""
    if stage in {"instances", run.things.name}:
        return InstanceMasks(run, stage, None if names is None else names.renaming)
    with_labels = [name for name, one in run.definitions.items() if isinstance(one, ShardStage) and one.holds_labels]
    if stage in with_labels:
        return LabelMasks(run.stages[stage], sorted(run.done[stage]), names)
    raise ConfigError(f"--stage: {stage} has no masks; give one of instances, {', '.join(with_labels)}")


class MaskPairs:
    """The photos of the truth that have a row in the run, in the run's order, with what was found in them.

    Names are matched as `ImageNames` says. `without_truth` are the run's photos that were passed over so far. While
    iterating, ConfigError: an ambiguous name, a photo of another size than its labels, or as the two sides' `read`.
    """

    def __init__(self, truth: TrueMasks, found: MaskSource, stage: Stage, shards: Sequence[int]) -> None:
        self._truth, self._found, self._stage, self._shards = truth, found, stage, shards
        self._known = ImageNames(truth.names, truth.shown)
        self.without_truth = Names()

    def __iter__(self) -> Iterator[tuple[TruePhoto, FoundPhoto]]:
        for shard, image_ids in zip(self._shards, ahead(self._image_ids, self._shards, depth=READERS), strict=True):
            name_of = self._claim(image_ids)
            if name_of:
                for name, found in zip(name_of.values(), self._found.read(shard, list(name_of)), strict=True):
                    true = self._truth.read(name)
                    if found.size is not None:
                        check_size(true.origin, true.size, f"the run's {found.image_id!r}", found.size)
                    yield true, found

    def without_row(self) -> list[str]:
        """The photos of the truth that are not in the run; after the iteration."""
        return [name for name in self._truth.names if name not in self._known.claimed]

    def _image_ids(self, shard: int) -> list[str]:
        ids: list[str] = read_part_columns(self._stage.part(shard), ["image_id"])["image_id"].to_pylist()
        return ids

    def _claim(self, image_ids: Iterable[str]) -> dict[int, str]:
        """Rows with their photos of the truth."""
        name_of: dict[int, str] = {}
        for row, image_id in enumerate(image_ids):
            name = self._known.claim(image_id, storage.redact(self._stage.folder))
            if name is None:
                self.without_truth.add(image_id)
            else:
                name_of[row] = name
        return name_of


def _found_photo(entry: Mapping[str, Any], clusters: Sequence[int], renaming: Renaming | None) -> FoundPhoto:
    """A row of an instances part with the cluster of each mask, or its class."""
    if entry["status"] not in READABLE:
        return FoundPhoto(entry["image_id"], None, [])
    size = (entry["height"], entry["width"])
    masks = [
        instance_of(
            cluster if renaming is None else renaming.category_of[cluster],
            {"size": list(size), "counts": rle},
            score=score,
        )
        for cluster, rle, score in zip(clusters, entry["rle"], entry["score"], strict=True)
        if renaming is None or renaming.keeps_thing(cluster)
    ]
    return FoundPhoto(entry["image_id"], size, _surest_first(masks))


def _surest_first(masks: Iterable[Instance]) -> list[Instance]:
    return sorted(masks, key=lambda mask: -mask.score)
