"""`u2label evaluate semantic`: the class maps of a run against human labels.

The labels are looked at for nothing but this score. Clusters have no names, so they are mapped to classes on the pixels
they share, one to one. The mapping sees the labels that it is then scored on, as is customary; beside it stands what a
mapping learnt on every other image is worth on the rest (in a video those are much alike). Every score is given twice,
strict and as published (model/semantic_metrics.py).

`count_pixels` streams maps (class_maps.py) and labels (label_sources.py) into counts, `summarise` scores the counts.
Neither knows of runs, so that other class maps can be scored by the same code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.metrics.semantic import ClassScores, ConfusionCounts, SemanticScores, many_to_one, one_to_one, score
from pipeline.engine.log import stdout_console
from pipeline.errors import ConfigError
from pipeline.evaluate.class_maps import Prediction, predictions
from pipeline.evaluate.confusion import arrange, confusion_png
from pipeline.evaluate.labels import IGNORED, LabelFolder, open_labels
from pipeline.evaluate.results import Names, mean_of_known, number, percent, write_file, write_json
from pipeline.evaluate.same_features import SameFeatures, same_features
from pipeline.store import storage


@dataclass(slots=True)
class Tally:
    """Counts over the images of even and of odd place among those with a label, and what could not be counted."""

    halves: tuple[ConfusionCounts, ConfusionCounts]
    images: int = 0
    without_label: Names = field(default_factory=Names)
    without_prediction: Names = field(default_factory=Names)

    @property
    def total(self) -> ConfusionCounts:
        return self.halves[0] + self.halves[1]


def evaluate_semantic(
    run_or_config: str,
    labels: str,
    *,
    ignore: Collection[int] = (255,),
    names: Sequence[str] | Mapping[int, str] | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Score a run (folder or config file) against a folder of PNG labels; returns what `semantic.json` holds.

    The maps are those of the semantics stage, or without one the categories of the panoptic parts, things and stuff
    alike. `names` and `ignore` as `evaluate.labels.class_table`. Writes `semantic.json` and `semantic.png` (the
    confusion matrix) to the folder `output`, by default `evaluation` in the run folder. ConfigError when the run has
    no maps, or labels do not fit: see `LabelFolder` and `count_pixels`.
    """
    from pipeline.stages.run import open_run

    run = open_run(run_or_config, need=None)
    found = predictions(run)
    source = open_labels(labels, names=names, ignore=ignore)
    beside = same_features(run, found, len(source.table.names)) if found.stage == "semantics" else None
    tally = count_pixels(found.maps, source, found.clusters, void=found.void, beside=beside)
    clusters = [str(found.first + k) for k in range(found.clusters)]
    result = {
        "run": storage.redact(run.uri),
        "labels": storage.redact(labels),
        "stage": found.stage,
        "parts": found.parts,
        "parts_done": found.parts_done,
        **summarise(tally, source, clusters),
        "same_features": None if beside is None else beside.summary(),
    }
    return result | {"files": _write(result, output or storage.join(run.uri, "evaluation"))}


def count_pixels(
    maps: Iterable[Prediction], source: LabelFolder, clusters: int, *, void: int, beside: SameFeatures | None = None
) -> Tally:
    """Stream maps and their labels into counts, also into those `beside`. An image without a prediction counts as all
    void.

    ConfigError when no image has a label, a label is of another size than its map, none of its pixels is scored, or as
    `LabelFolder`; ValueError when a map holds a cluster that is not in 0..clusters-1.
    """
    classes = len(source.table.names)
    even, odd = (ConfusionCounts(clusters, classes, void=void, ignore=(IGNORED,)) for _ in range(2))
    tally = Tally((even, odd))
    for image_id, predicted in maps:
        path = source.claim(image_id)
        if path is None:
            tally.without_label.add(image_id)
            continue
        truth = source.read(path)
        if predicted is None:
            tally.without_prediction.add(image_id)
            predicted = np.full(truth.shape, void, np.int32)
        _check_sizes(image_id, predicted.shape, path, truth.shape)
        tally.halves[tally.images % 2].add(predicted, truth)
        if beside is not None:
            beside.add(image_id, tally.images % 2, predicted, truth)
        tally.images += 1
    _check_counted(tally, source)
    return tally


def _check_sizes(image_id: str, predicted: tuple[int, ...], path: str, truth: tuple[int, ...]) -> None:
    if predicted == truth:
        return
    turned = " (the photo may carry a rotation in its EXIF data that the label does not)"
    raise ConfigError(
        f"label {path!r} is {truth[1]}x{truth[0]} pixels, the image {image_id!r} is {predicted[1]}x{predicted[0]}"
        f"{turned if predicted == truth[::-1] else ''}: labels must have the size of the images; resize them with the "
        "nearest neighbour, never blending ids"
    )


def _check_counted(tally: Tally, source: LabelFolder) -> None:
    where = storage.redact(source.uri)
    if not tally.images:
        image, label = next(iter(tally.without_label.first), "none"), next(iter(source.unclaimed()), "none")
        raise ConfigError(
            f"none of the {len(source)} labels in {where} has the name of one of the {tally.without_label.count} "
            f"images: the first image is {image!r}, the first label {label!r}; name labels as their images, but .png"
        )
    if not any(half.matrix.any() for half in tally.halves):
        raise ConfigError(f"the labels in {where} hold nothing but ignored values {list(source.table.ignore)}")


def summarise(tally: Tally, source: LabelFolder, clusters: Sequence[str]) -> dict[str, Any]:
    """The scores of counts, ready for JSON: numbers in [0, 1], None where there is nothing to average.

    `one_to_one` is the headline; `other_half` the mean of both halves scored with the mapping learnt on the other;
    `many_to_one` gives every cluster its commonest class. `counts` is (clusters + 1, classes), void last.
    """
    total = tally.total
    # Classes nobody named are the values that occur.
    shown = np.flatnonzero(total.matrix.any(axis=0) | source.table.named)
    classes = [source.table.names[c] for c in shown]
    best = score(total, one_to_one(total))
    return {
        "images": tally.images,
        "images_without_label": asdict(tally.without_label),
        "labels_without_image": asdict(Names.of(source.unclaimed())),
        "images_without_prediction": asdict(tally.without_prediction),
        "ignored_values": list(source.table.ignore),
        "classes": classes,
        "clusters": len(clusters),
        "clusters_seen": int(total.matrix[:-1].any(axis=1).sum()),
        "void_share": float(total.matrix[-1].sum() / total.matrix.sum()),
        "one_to_one": _both(best, shown, classes)
        | {"mapping": {clusters[k]: source.table.names[c] for k, c in enumerate(best.mapping.tolist()) if c >= 0}},
        "other_half": _other_half(tally),
        "many_to_one": _both(score(total, many_to_one(total)), shown, classes),
        "truth_share": dict(zip(classes, _shares(total.matrix[:, shown]), strict=True)),
        "cluster_names": list(clusters),
        "counts": total.matrix[:, shown].tolist(),
    }


def _shares(counts: NDArray[np.int64]) -> list[float]:
    shares: list[float] = (counts.sum(axis=0) / max(1, int(counts.sum()))).tolist()
    return shares


def _both(scores: SemanticScores, shown: NDArray[np.int64], classes: list[str]) -> dict[str, Any]:
    def plain(one: ClassScores) -> dict[str, Any]:
        ious = {name: number(one.iou[c]) for name, c in zip(classes, shown, strict=True)}
        return {**_headline(one), "classes": one.classes, "pixels": one.pixels, "iou": ious}

    return {"strict": plain(scores.strict), "published": plain(scores.published)}


def _headline(one: ClassScores) -> dict[str, float | None]:
    return {"accuracy": number(one.accuracy), "miou": number(one.miou)}


def _other_half(tally: Tally) -> dict[str, Any] | None:
    """The mean of two scores, and both: images of odd place by the mapping of the even ones, and the reverse."""
    even, odd = tally.halves
    if not (even.matrix.any() and odd.matrix.any()):
        return None
    folds = [score(odd, one_to_one(even)), score(even, one_to_one(odd))]
    found: dict[str, Any] = {}
    for convention in ("strict", "published"):
        each = [_headline(getattr(fold, convention)) for fold in folds]
        means = {key: mean_of_known(one[key] for one in each) for key in ("accuracy", "miou")}
        found[convention] = means | {"folds": each}
    return found


def _write(result: Mapping[str, Any], folder: str) -> list[str]:
    counts = np.array(result["counts"], np.int64)
    column = {name: c for c, name in enumerate(result["classes"])}
    mapped = result["one_to_one"]["mapping"]
    mapping = np.array([column.get(mapped.get(name), -1) for name in result["cluster_names"]], np.int64)
    rows = arrange(counts[:-1], counts[-1], mapping, [f"cluster {name}" for name in result["cluster_names"]])
    strict = result["one_to_one"]["strict"]
    title = f"mIoU {strict['miou']:.1%}, pixel accuracy {strict['accuracy']:.1%} (strict); % of each true class"
    picture = confusion_png(rows, result["classes"], title)
    return [write_json(folder, "semantic.json", result), write_file(folder, "semantic.png", picture)]


def print_scores(result: Mapping[str, Any]) -> None:
    """The scores as tables, and whatever was not scored."""
    from rich.table import Table

    console = stdout_console()
    for line in _remarks(result):
        console.print(line)
    table = Table("mapping", "mIoU strict", "published", "accuracy strict", "published")
    titles = {
        "one_to_one": "one to one",
        "other_half": "one to one, learnt on other half",
        "many_to_one": "many to one",
    }
    for key, title in titles.items():
        found = result[key]
        if found is not None:
            numbers = [found[convention][k] for k in ("miou", "accuracy") for convention in ("strict", "published")]
            table.add_row(title, *map(percent, numbers))
    console.print(table)
    if result.get("same_features") is not None:
        console.print(_gain_table(result["same_features"]))
    console.print(_class_table(result))


def _gain_table(found: Mapping[str, Any]) -> Any:
    from rich.table import Table

    title = f"against k-means of the same features, at {found['places']:,} places (strict)"
    table = Table("mapping", "measure", "this run", "k-means", "gain", title=title)
    for key, mapping in (("one_to_one", "one to one"), ("other_half", "one to one, learnt on other half")):
        for name, measure in (("miou", "mIoU"), ("accuracy", "accuracy")):
            gain = found["gain"][key][name]
            shown = "–" if gain is None else f"{100 * gain:+.1f}"
            table.add_row(
                mapping, measure, percent(found["run"][key][name]), percent(found["kmeans"][key][name]), shown
            )
    return table


def _class_table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    best = result["one_to_one"]
    cluster_of = {name: cluster for cluster, name in best["mapping"].items()}
    table = Table("class", "share of pixels", "cluster", "IoU strict", "published", title="one to one")
    for name in result["classes"]:
        ious = [best[convention]["iou"][name] for convention in ("strict", "published")]
        table.add_row(name, percent(result["truth_share"][name]), cluster_of.get(name, "–"), *map(percent, ious))
    return table


def _remarks(result: Mapping[str, Any]) -> Iterator[str]:
    left = result["clusters_seen"] - len(result["one_to_one"]["mapping"])
    yield (
        f"{result['images']} images, {result['clusters_seen']} of {result['clusters']} clusters occur, "
        f"{left} without a class, {result['void_share']:.1%} of the labelled pixels void; ignored label values "
        f"{result['ignored_values']}"
    )
    what = {
        "images_without_label": "images without a label, left out",
        "labels_without_image": "labels without an image, left out",
        "images_without_prediction": "labelled images that could not be read, counted as void",
    }
    for key, text in what.items():
        if result[key]["count"]:
            yield f"{text}: {result[key]['count']}, such as {result[key]['first'][0]}"
    if result.get("parts_done", 0) < result.get("parts", 0):
        yield f"only {result['parts_done']} of {result['parts']} parts are done; the rest was left out"
    if result["other_half"] is None:
        yield "one labelled image alone: no half to learn the mapping on"
