"""The pictures of a report: photos fetched again from their source, with labels of the parts drawn on them.

A photo is fetched and decoded once, whatever is drawn of it, and is gone when its thumbnails are made. What cannot be
drawn becomes a picture with an error text: sources change after a run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.engine.shards import ahead
from pipeline.engine.stage import Stage
from pipeline.report.rows import Member, read_images
from pipeline.sources.fetch import Fetcher
from pipeline.sources.index import Index
from pipeline.store import storage
from workers import overlay
from workers.decode import DecodeLimits, decode_image
from workers.masks import decode_panoptic_png, decode_rle
from workers.records import READABLE, ImageRecord

PHOTO_HEIGHT, PHOTO_WIDTH = 240, 480  # pixels a thumbnail has at most
CROP_SIDE = 144
DRAWERS = 4  # threads, each with one whole photo in memory


@dataclass(frozen=True, slots=True)
class Label:
    """One visible segment as the legend of its photo names it; `category` is None before the panoptic stage."""

    segment: int
    category: int | None
    color: overlay.Color


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of the page of photos. `photo` and `overlay` are data URIs, None when `error` says why not."""

    image_id: str
    labels: list[Label] = field(default_factory=list)
    photo: str | None = None
    overlay: str | None = None
    aspect: float = 4 / 3  # width over height
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Crop:
    """One instance cut out of its photo."""

    image_id: str
    picture: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    record: ImageRecord
    row: dict[str, Any]
    place: tuple[int, int]  # shard, row
    as_photo: bool
    members: list[Member]


@dataclass(frozen=True, slots=True)
class _Drawn:
    place: tuple[int, int]
    picture: Picture | None
    crops: dict[Member, Crop]


@dataclass(frozen=True, slots=True)
class Drawer:
    """Where labels and photos come from. Shards in `panoptic_done` are drawn from the panoptic parts.

    The longer side of a cut-out is `crop_side` pixels; given `crop_bytes`, it is a WebP of about so many at most.
    """

    index: Index
    instances: Stage
    panoptic: Stage
    panoptic_done: Collection[int]
    limits: DecodeLimits
    crop_side: int = CROP_SIDE
    crop_bytes: int | None = None

    def draw(
        self, places: Collection[tuple[int, int]], members: Iterable[Member]
    ) -> tuple[list[Picture], dict[Member, Crop]]:
        """The photos at (shard, row) of `places`, in their order, and the cut-outs of `members`."""
        fetcher = self.index.fetcher()
        pictures: dict[tuple[int, int], Picture] = {}
        crops: dict[Member, Crop] = {}
        for drawn in ahead(lambda job: self._draw_job(fetcher, job), self._jobs(places, members), depth=DRAWERS):
            crops.update(drawn.crops)
            if drawn.picture is not None:
                pictures[drawn.place] = drawn.picture
        return [pictures[place] for place in places], crops

    def _jobs(self, places: Collection[tuple[int, int]], members: Iterable[Member]) -> Iterator[_Job]:
        """By shard, so that each part is read once."""
        wanted: dict[tuple[int, int], list[Member]] = {place: [] for place in places}
        for member in members:
            wanted.setdefault((member.shard, member.row), []).append(member)
        rows_of = defaultdict(list)
        for shard, row in sorted(wanted):
            rows_of[shard].append(row)
        photos = set(places)
        for shard, rows in rows_of.items():
            stage = self.panoptic if shard in self.panoptic_done else self.instances
            records = self.index.records(shard)
            for row, labels in zip(rows, read_images(stage, shard, rows), strict=True):
                place = (shard, row)
                yield _Job(records[row], labels, place, place in photos, wanted[place])

    def _draw_job(self, fetcher: Fetcher, job: _Job) -> _Drawn:
        row = job.row
        name = row["image_id"]
        if row["status"] not in READABLE:
            error = f"{row['status']}: {row['error'] or 'no reason was given'}"
            return _Drawn(job.place, Picture(name, error=error), {})
        lost: tuple[type[Exception], ...] = (*storage.store_errors(job.record.uri), ValueError)
        try:
            photo = decode_image(fetcher.fetch(job.record), self.limits)
            ids, labels = read_labels(row)
            colors = {label.segment: label.color for label in labels}
            picture = _picture(name, photo, ids, labels, colors) if job.as_photo else None
            crops = {m: Crop(name, self._crop(photo, ids == m.segment, colors[m.segment])) for m in job.members}
        except lost as error:
            reason = storage.redact(f"{type(error).__name__}: {error}")
            return _Drawn(job.place, Picture(name, error=reason), {m: Crop(name, error=reason) for m in job.members})
        return _Drawn(job.place, picture, crops)

    def _crop(self, photo: overlay.Pixels, mask: np.ndarray, color: overlay.Color) -> str:
        """As a data URI."""
        pixels = overlay.cut_out(photo, mask, color, self.crop_side)
        if self.crop_bytes is None:
            return overlay.jpeg_data_uri(pixels)
        return overlay.webp_data_uri(pixels, self.crop_bytes)


def read_labels(row: dict[str, Any]) -> tuple[overlay.Ids, list[Label]]:
    """The id map of an image and its segments: what is visible, by category, once the panoptic part is there."""
    if "panoptic" in row:
        labels = [Label(s["id"], s["category"], overlay.category_color(s["category"])) for s in row["segments"]]
        return decode_panoptic_png(row["panoptic"]), labels
    height, width = row["height"], row["width"]
    masks = [decode_rle(counts, height, width) for counts in row["rle"]]
    labels = [Label(i, None, overlay.category_color(i)) for i in range(1, len(masks) + 1)]
    return overlay.paint_masks(masks, height, width), labels


def _picture(
    name: str, photo: overlay.Pixels, ids: overlay.Ids, labels: list[Label], colors: dict[int, overlay.Color]
) -> Picture:
    height, width = overlay.size_within(photo.shape[0], photo.shape[1], PHOTO_HEIGHT, PHOTO_WIDTH)
    drawn = overlay.draw_overlay(photo, ids, colors, height, width)
    thumbnail = overlay.shrink(photo, height, width)
    return Picture(name, labels, overlay.jpeg_data_uri(thumbnail), overlay.jpeg_data_uri(drawn), width / height)
