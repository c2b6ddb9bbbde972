"""What the report reads of class maps and of DatUS2's segments, and the maps it shows beside their photos.

A large run is sampled: up to `SAMPLED_IMAGES` images, evenly spaced over up to `SAMPLED_PARTS` evenly spaced parts.
Memory is that of the PNGs of `READERS` parts and as many decoded maps, whatever the size of the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.engine.shards import ahead, read_columns
from pipeline.engine.stage import Stage, spread
from pipeline.report import rows
from pipeline.report.pictures import DRAWERS, PHOTO_HEIGHT, PHOTO_WIDTH, read_labels
from pipeline.sources.fetch import Fetcher
from pipeline.sources.index import Index
from pipeline.stages.base import Run
from pipeline.store import storage
from workers import overlay
from workers.decode import decode_image
from workers.masks import open_png
from workers.records import ImageRecord

SAMPLED_PARTS = 20  # class maps are large beside the other columns that a report reads
SAMPLED_IMAGES = 1000
READERS = 4  # threads, each with the maps of one part
VALUES = 256  # of a map; those from the number of classes on are void

Place = tuple[int, int]  # shard, row


@dataclass(frozen=True, slots=True)
class MapCounts:
    """Pixels of each value, (256,) int64, over the maps of `images` images in `parts_read` of `parts` parts."""

    pixels: np.ndarray
    images: int
    parts_read: int
    parts: int


@dataclass(frozen=True, slots=True)
class SegmentCounts:
    """Segments and patches of noise in the photos of a sample of segments parts."""

    images: int
    segments: int
    noise: int
    patches: int


@dataclass(frozen=True, slots=True)
class MapPicture:
    """One image beside its class map. The three pictures are data URIs; `overlay` is None before the panoptic stage.

    `shares` are the classes of the image and their share of its pixels, the largest first, without void.
    """

    image_id: str
    photo: str | None = None
    classes: str | None = None
    overlay: str | None = None
    aspect: float = 4 / 3  # width over height
    shares: list[tuple[int, float]] = field(default_factory=list)
    void: float = 0.0
    error: str | None = None


def sample_places(index: Index, done: Collection[int]) -> dict[int, list[int]]:
    """The rows of each shard that stand for all finished ones."""
    shards = sorted(done)
    chosen = {shards[i] for i in spread(len(shards), SAMPLED_PARTS)}
    return _by_shard(rows.sample_images(index, chosen, SAMPLED_IMAGES))


def count_classes(stage: Stage, index: Index, done: Collection[int]) -> MapCounts:
    """The pixels of each value in a sample of the class maps of a semantics stage."""
    places = sample_places(index, done)

    def count(shard: int) -> tuple[np.ndarray, int]:
        maps = [png for png in _column(stage, shard, "labels", places[shard]) if png is not None]
        return sum((_histogram(png) for png in maps), np.zeros(VALUES, np.int64)), len(maps)

    counted = list(ahead(count, places, depth=READERS))
    pixels = np.sum([histogram for histogram, _ in counted], axis=0)
    return MapCounts(pixels, sum(images for _, images in counted), len(places), len(done))


def count_segments(stage: Stage, index: Index, done: Collection[int]) -> SegmentCounts:
    """Segments and noise in a sample of the photos of a segments stage; embeddings are not read."""
    from workers.semantics.datus import NOISE, decode_segments  # loads torch, which other runs can do without

    places = sample_places(index, done)

    def count(shard: int) -> list[np.ndarray]:
        return [decode_segments(png) for png in _column(stage, shard, "segments", places[shard]) if png is not None]

    images = segments = noise = patches = 0
    for maps in ahead(count, places, depth=READERS):
        images += len(maps)
        segments += sum(int(found.max()) + 1 for found in maps)  # noise is -1
        noise += sum(int((found == NOISE).sum()) for found in maps)
        patches += sum(found.size for found in maps)
    return SegmentCounts(images, segments, noise, patches)


def draw_maps(run: Run, colors: Sequence[overlay.Color], wanted: int) -> list[MapPicture]:
    """Up to `wanted` images, evenly spaced over the finished class maps, each beside its map in `colors`."""
    places = rows.sample_images(run.index, run.done["semantics"], wanted) if wanted else []
    fetcher = run.index.fetcher()
    return list(ahead(lambda job: _draw(fetcher, run, job, colors), _jobs(run, places), depth=DRAWERS))


@dataclass(frozen=True, slots=True)
class _Job:
    record: ImageRecord
    row: dict[str, Any]
    panoptic: dict[str, Any] | None


def _jobs(run: Run, places: Sequence[Place]) -> Iterator[_Job]:
    """By shard, so that each part is read once."""
    semantics, panoptic = run.stages["semantics"], run.stages["panoptic"]
    for shard, chosen in _by_shard(places).items():
        records = run.index.records(shard)
        maps = read_columns(semantics.part(shard), rows.PHOTO_COLUMNS["semantics"]).take(chosen).to_pylist()
        merged: Sequence[dict[str, Any] | None] = [None] * len(chosen)
        if shard in run.done["panoptic"]:
            merged = rows.read_images(panoptic, shard, chosen)
        for row, labels, beside in zip(chosen, maps, merged, strict=True):
            yield _Job(records[row], labels, beside)


def _draw(fetcher: Fetcher, run: Run, job: _Job, colors: Sequence[overlay.Color]) -> MapPicture:
    name = job.row["image_id"]
    if job.row["labels"] is None:
        return MapPicture(name, error=f"{job.row['status']}: {job.row['error'] or 'no reason was given'}")
    lost: tuple[type[Exception], ...] = (*storage.store_errors(job.record.uri), ValueError)
    try:
        photo = decode_image(fetcher.fetch(job.record), run.limits)
        return _picture(name, photo, job, colors)
    except lost as error:
        return MapPicture(name, error=storage.redact(f"{type(error).__name__}: {error}"))


def _picture(name: str, photo: overlay.Pixels, job: _Job, colors: Sequence[overlay.Color]) -> MapPicture:
    classes_hw = _decode(job.row["labels"])
    overlay.check_sizes(photo, classes_hw)
    height, width = overlay.size_within(photo.shape[0], photo.shape[1], PHOTO_HEIGHT, PHOTO_WIDTH)
    drawn = None
    if job.panoptic is not None and job.panoptic["panoptic"] is not None:
        ids, labels = read_labels(job.panoptic)
        drawn = overlay.draw_overlay(photo, ids, {label.segment: label.color for label in labels}, height, width)
    counts = np.bincount(classes_hw.ravel(), minlength=VALUES)
    order = np.argsort(-counts[: len(colors)], kind="stable").tolist()
    return MapPicture(
        name,
        photo=overlay.jpeg_data_uri(overlay.shrink(photo, height, width)),
        classes=overlay.png_data_uri(overlay.draw_classes(classes_hw, colors, height, width)),
        overlay=None if drawn is None else overlay.jpeg_data_uri(drawn),
        aspect=width / height,
        shares=[(c, float(counts[c] / classes_hw.size)) for c in order if counts[c]],
        void=float(counts[len(colors) :].sum() / classes_hw.size),
    )


def _by_shard(places: Sequence[Place]) -> dict[int, list[int]]:
    found = defaultdict(list)
    for shard, row in places:
        found[shard].append(row)
    return dict(found)


def _column(stage: Stage, shard: int, name: str, chosen: list[int]) -> list[bytes | None]:
    values: list[bytes | None] = read_columns(stage.part(shard), [name])[name].take(chosen).to_pylist()
    return values


def _histogram(png: bytes) -> np.ndarray:
    """(256,) pixels of each value, counted without a copy of the map."""
    with open_png(png) as image:
        return np.array(image.histogram(), np.int64)


def _decode(png: bytes) -> overlay.Pixels:
    with open_png(png) as image:
        return np.asarray(image, np.uint8)
