"""What the fits of the stuff classes left behind, as the report shows it: charts and a few numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.engine.done import is_fitted
from pipeline.engine.stage import ARTIFACT, Stage
from pipeline.errors import ConfigError
from pipeline.report import charts
from pipeline.store import storage

LOSSES = {
    "intra": "intra: same photo",
    "inter": "inter: neighbour",
    "negative": "negative: another photo",
    "correspondence": "all three, weighted",
}
PAIRS = {
    "intra": "Intra: pairs within a photo",
    "inter": "Inter: a photo and its neighbour",
    "negative": "Negative: a photo and another",
}
MEND = "delete its folder and run again"


@dataclass(frozen=True, slots=True)
class StegoFit:
    """`histograms` are of the last step that has any, over an outline of `first_step` when that is another one.

    `shifted`: the shifts are marked. `diverged` is the first logged step with a loss that is not finite.
    """

    steps: int
    images: int
    histograms: list[charts.Chart]
    first_step: int | None
    last_step: int | None
    shifted: bool
    history: list[charts.Chart]
    diverged: int | None


@dataclass(frozen=True, slots=True)
class PatchFit:
    """Classes of patches: how many patches, in so many conditioned components and clusters before the merge."""

    patches: int
    clusters: int
    components: int
    iterations: int
    charts: list[charts.Chart]


@dataclass(frozen=True, slots=True)
class DatusFit:
    """The k-means of DatUS2's segments: how many there were, iterations, and classes without a segment."""

    segments: int
    iterations: int
    empty: int
    charts: list[charts.Chart]


@dataclass(frozen=True, slots=True)
class RefineFit:
    """The network that smooths the maps: the mean loss of the steps up to each checkpoint."""

    steps: int
    photos: int
    charts: list[charts.Chart]


def read_stego(stage: Stage) -> StegoFit | None:
    """A fit of STEGO; None when it is not complete. An artifact without a history or histograms gives no charts."""
    record = read_record(stage, "steps", "images")
    if record is None:
        return None
    history = record.get("history") or []
    histograms = sorted(record.get("histograms") or [], key=lambda counts: counts["step"])
    terms = record.get("settings", {}).get("terms", {})
    first, last = (histograms[0]["step"], histograms[-1]["step"]) if histograms else (None, None)
    return StegoFit(
        steps=int(record["steps"]),
        images=int(record["images"]),
        histograms=[_histogram(kind, histograms, terms) for kind in PAIRS] if histograms else [],
        first_step=None if first == last else first,
        last_step=last,
        shifted=bool(terms),
        history=_history(history),
        diverged=next((entry["step"] for entry in history if not _is_finite(entry)), None),
    )


def read_datus(stage: Stage) -> DatusFit | None:
    """A fit of DatUS2; None when it is not complete."""
    record = read_record(stage, "sizes", "iterations")
    if record is None:
        return None
    sizes = [int(size) for size in record["sizes"]]
    return DatusFit(sum(sizes), int(record["iterations"]), sizes.count(0), _kmeans(record, sizes, "segments"))


def read_patches(stage: Stage) -> PatchFit | None:
    """A fit of classes to patches; None when it is not complete."""
    record = read_record(stage, "sizes", "iterations", "clusters", "components", "inertia")
    if record is None:
        return None
    sizes = [int(size) for size in record["sizes"]]
    clusters, components, iterations = (int(record[key]) for key in ("clusters", "components", "iterations"))
    return PatchFit(sum(sizes), clusters, components, iterations, _kmeans(record, sizes, "patches"))


def _kmeans(record: dict[str, Any], sizes: list[int], rows: str) -> list[charts.Chart]:
    """Inertia of the iterations, and how many of the `rows` each class has."""
    inertia = record.get("inertia") or []
    return [
        *lines("Inertia of k-means", range(1, len(inertia) + 1), {"": inertia}, "iteration", "inertia"),
        charts.bar_chart(
            f"{rows.capitalize()} of each class",
            sizes,
            list(range(1, len(sizes) + 2)),
            x_label="stuff class",
            y_label=rows,
            centred=True,
        ),
    ]


def read_refine(stage: Stage) -> RefineFit | None:
    """A fit of the refining network; None when it is not complete."""
    record = read_record(stage, "settings", "photos", "loss")
    if record is None:
        return None
    drawn = lines("Loss of DeepLabV3", range(1, len(record["loss"]) + 1), {"": record["loss"]}, "checkpoint", "loss")
    return RefineFit(int(record["settings"]["steps"]), int(record["photos"]), drawn)


def read_record(stage: Stage, *needed: str) -> dict[str, Any] | None:
    """The record of a complete fit with the keys `needed`; None when the fit is not complete."""
    if not is_fitted(stage):
        return None
    where = storage.join(stage.folder, ARTIFACT)
    try:
        record = dict(json.loads(storage.read_bytes(where)))
        missing = [key for key in needed if key not in record]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{storage.redact(where)} is not what u2label run writes ({error}); {MEND}") from error
    if missing:
        raise ConfigError(f"{storage.redact(where)} has no {', '.join(missing)}; {MEND}")
    return record


def _histogram(kind: str, histograms: list[dict[str, Any]], terms: dict[str, float]) -> charts.Chart:
    first, last = histograms[0], histograms[-1]
    shift = terms.get(f"{kind}_shift")
    return charts.share_chart(
        PAIRS[kind],
        last[kind],
        np.linspace(-1, 1, len(last[kind]) + 1).tolist(),
        x_label="cosine of the codes",
        y_label="% of the pairs",
        before=() if first is last else first[kind],
        rules={} if shift is None else {f"shift {shift:.2f}": shift},
    )


def _history(history: list[dict[str, float]]) -> list[charts.Chart]:
    steps = [int(entry["step"]) for entry in history]

    def values(*names: str) -> dict[str, list[float]]:
        return {LOSSES.get(name, ""): [entry[name] for entry in history] for name in names}

    return [
        *lines("Correspondence loss", steps, values(*LOSSES), "step", "loss"),
        *lines("Loss of the cluster probe", steps, values("cluster"), "step", "loss"),
        *lines("Classes that a batch uses", steps, values("classes_used"), "step", "classes"),
    ]


def lines(title: str, steps: Any, series: dict[str, list[float]], x_label: str, y_label: str) -> list[charts.Chart]:
    """No chart when there is nothing finite to draw."""
    if not any(math.isfinite(value) for values in series.values() for value in values):
        return []
    return [charts.lines_chart(title, steps, series, x_label=x_label, y_label=y_label)]


def _is_finite(entry: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in entry.values())
