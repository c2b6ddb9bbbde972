"""The stuff of a run as the report shows it: class maps beside their photos, shares of the classes, the fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.engine.status import StageStatus
from pipeline.errors import ConfigError
from pipeline.report.charts import Slice
from pipeline.report.fits import (
    DatusFit,
    PatchFit,
    RefineFit,
    StegoFit,
    read_datus,
    read_patches,
    read_refine,
    read_stego,
)
from pipeline.report.maps import MapCounts, MapPicture, SegmentCounts, count_classes, count_segments, draw_maps
from pipeline.stages.base import Run
from pipeline.store import storage
from workers import overlay
from workers.merge import VOID_LABEL

MAPS_SHOWN = 12
KIND_COLORS = {"thing": "#d9480f", "stuff": "#1f6f8b", "void": overlay.HATCHED}


@dataclass(frozen=True, slots=True)
class StuffClass:
    """A class 0..S-1 of the maps, with the name and the colour of its category in the panoptic labels."""

    name: str
    color: str
    share: float  # of the pixels of the sample


@dataclass(frozen=True, slots=True)
class Stuff:
    """What the section of a run with stuff says. `counts` is None, and there are no pictures, before class maps."""

    method: str
    refined: bool
    classes: list[StuffClass]
    counts: MapCounts | None
    shares: list[Slice]  # of the classes that occur, the largest first, then of void
    pixels: list[Slice]  # of things, stuff and void in the panoptic labels, by the receipts
    pictures: list[MapPicture]
    segments: SegmentCounts | None
    stego: StegoFit | None
    datus: DatusFit | None
    patches: PatchFit | None
    refine: RefineFit | None

    @property
    def void(self) -> float:
        return self.shares[-1].share if self.shares else 0.0

    @property
    def absent(self) -> list[str]:
        """The classes without a pixel in the sample."""
        return [each.name for each in self.classes if each.share == 0] if self.shares else []


def describe_stuff(
    run: Run, statuses: Sequence[StageStatus], names: Mapping[int, str], max_photos: int
) -> Stuff | None:
    """The section of a run that labels stuff; None for one that does not. `names` are those of the categories.

    ConfigError when an artifact or a class map is not what `u2label run` writes.
    """
    if "semantics" not in run.stages:
        return None
    semantics, things = run.config.semantics, run.config.clusters.k
    colors = [overlay.category_color(things + 1 + c) for c in range(semantics.classes)]
    done, fit = run.done["semantics"], run.stages["semantics_fit"]
    counts = count_classes(run.stages["semantics"], run.index, done) if done else None
    shares = _class_shares(run, counts)
    classes = [
        StuffClass(names.get(things + 1 + c, f"stuff {c + 1}"), overlay.css(color), share)
        for c, (color, share) in enumerate(zip(colors, shares, strict=True))
    ]
    refined = "refine_fit" in run.stages
    return Stuff(
        method=semantics.method,
        refined=refined,
        classes=classes,
        counts=counts,
        shares=_slices(classes, counts),
        pixels=_pixels(next(status for status in statuses if status.stage == "panoptic")),
        pictures=draw_maps(run, colors, min(MAPS_SHOWN, max_photos)) if done else [],
        segments=_segments(run),
        stego=read_stego(fit) if semantics.method == "stego" else None,
        datus=read_datus(fit) if semantics.method == "datus" else None,
        patches=read_patches(fit) if semantics.method == "kmeans" else None,
        refine=read_refine(run.stages["refine_fit"]) if refined else None,
    )


def _class_shares(run: Run, counts: MapCounts | None) -> list[float]:
    classes = run.config.semantics.classes
    if counts is None:
        return [0.0] * classes
    strange = counts.pixels[classes:VOID_LABEL].nonzero()[0]
    if len(strange):
        raise ConfigError(
            f"{storage.redact(run.stages['semantics'].folder)}: a map has class {classes + int(strange[0])}, but "
            f"semantics.classes is {classes}; delete the folder and run again"
        )
    return (counts.pixels[:classes] / max(1, counts.pixels.sum())).tolist()


def _slices(classes: Sequence[StuffClass], counts: MapCounts | None) -> list[Slice]:
    if counts is None or not counts.images:
        return []
    total = counts.pixels.sum()
    found = [
        Slice(each.name, int(pixels), each.share, each.color)
        for each, pixels in zip(classes, counts.pixels[: len(classes)], strict=True)
        if pixels
    ]
    void = int(counts.pixels[VOID_LABEL])
    found.sort(key=lambda piece: -piece.share)
    return [*found, Slice("void", void, float(void / total), overlay.HATCHED)]


def _pixels(panoptic: StageStatus) -> list[Slice]:
    total = sum(panoptic.pixels.values())
    return [
        Slice(kind, panoptic.pixels.get(kind, 0), panoptic.pixels.get(kind, 0) / total, color)
        for kind, color in KIND_COLORS.items()
        if total
    ]


def _segments(run: Run) -> SegmentCounts | None:
    done = run.done.get("segments")
    return count_segments(run.stages["segments"], run.index, done) if done else None
