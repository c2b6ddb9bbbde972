"""`u2label evaluate panoptic`: panoptic labels against a known truth, in every measure of the field.

Clusters have no names, so they are mapped to the classes of the truth first (mapping.py): a first pass over the images
learns the mapping, a second one scores. The mapping sees the images that it is then scored on, as is customary; beside
it stands what a mapping learnt on one half of the images (by a hash of their names) is worth on the other half.

Panoptic quality is given twice: segment by segment as they are, which is what the COCO evaluator and U2Seg compute, and
*merged*, where the stuff of one class is one segment an image, of the prediction and of the truth.
AP and AR are of all that was detected when the parts are a model's predictions, which list it with its scores; of the
visible things otherwise. Semantic scores are of the categories of the id maps, strict and as published
(model/semantic_metrics.py).

U2Seg's vote is taken on the panoptic segments, because they are what a labelling is; its program votes with the
detections and the semantic map from before they are combined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.clusters.names import Names as ClassNames
from pipeline.engine.log import stdout_console
from pipeline.errors import ConfigError
from pipeline.evaluate.instances import TrueInstances, visible_instances
from pipeline.evaluate.mapping import (
    ClassOf,
    Evidence,
    Leftover,
    Mode,
    VoteThresholds,
    by_vote,
    identity,
    one_to_one,
)
from pipeline.evaluate.panoptic import (
    LabelPairs,
    LabelSource,
    StuffBySupercategory,
    WithoutCategories,
    open_labels,
)
from pipeline.evaluate.results import Names, percent, write_json
from pipeline.evaluate.tally import MERGED, Tally
from pipeline.evaluate.void import Void
from pipeline.sources.coco import Categories, CocoInstances, CocoPanoptic
from pipeline.stages.parts import Inputs

RESULT = "panoptic.json"


def evaluate_run(
    predictions: Inputs,
    truth: Inputs,
    *,
    output: str,
    prediction_pngs: str | None = None,
    truth_pngs: str | None = None,
    instances: str | None = None,
    mode: Mode = "hungarian",
    leftover: Leftover = "error",
    thresholds: VoteThresholds | None = None,
    stuff_by_supercategory: bool = False,
    void: Sequence[str] | None = None,
    names: ClassNames | None = None,
) -> dict[str, Any]:
    """Score panoptic labels and write the result to `output`/panoptic.json; returns what it holds, with `files`.

    Args:
        predictions, truth: a COCO panoptic JSON, a run (folder or config file), a folder of panoptic parts, or parts.
        output: folder for the result, local or remote.
        prediction_pngs, truth_pngs: the folder of the PNGs of such a JSON; by default its path without `.json`.
        instances: COCO instances JSON of the truth's images; AP is then of its whole masks, not of the visible ones.
        mode: `hungarian` one to one, `vote` as published by U2Seg, `identity` when the categories are the truth's.
        leftover: of `hungarian`: a cluster without a partner is an `error`, or gets its commonest class (`argmax`).
        thresholds: of `vote`.
        stuff_by_supercategory: score stuff by supercategory, as U2Seg does.
        void: what of the truth is not scored, as `Void` takes it.
        names: of the classes of the predictions, where these are parts: merged classes are one, noise is void.

    Raises:
        ConfigError: inputs that cannot be read or do not fit each other; the message names the file.
    """
    opened = open_labels(truth, truth_pngs)
    unscored = Void(opened, void)
    true: LabelSource = WithoutCategories(opened, unscored.categories)
    groups = StuffBySupercategory(true) if stuff_by_supercategory else None
    true = groups or true
    predicted: LabelSource = open_labels(predictions, prediction_pngs, names)
    if mode == "identity" and predicted.categories:
        predicted = WithoutCategories(predicted, unscored.categories)
        predicted = StuffBySupercategory(predicted, groups) if groups else predicted
    whole = CocoInstances(instances) if instances else None
    found = score_labels(predicted, true, instances=whole, mode=mode, leftover=leftover, thresholds=thresholds)
    found |= {"void": unscored.told()}
    return found | {"files": [write_json(output, RESULT, found)]}


def score_labels(
    predicted: LabelSource,
    truth: LabelSource,
    *,
    instances: CocoInstances | None = None,
    mode: Mode = "hungarian",
    leftover: Leftover = "error",
    thresholds: VoteThresholds | None = None,
) -> dict[str, Any]:
    """The scores ready for JSON: numbers in [0, 1], None where there is nothing to average. See `evaluate_run`.

    Memory: names, one pair of images, and of each detection its score and whether it hit.
    """
    _check_options(mode, leftover, thresholds)
    clusters = _clusters(predicted, truth, mode)
    pairs = LabelPairs(truth, predicted)
    objects = TrueInstances(truth, instances)
    if mode == "identity":
        class_of, by_half = identity(clusters, truth.categories), None
    else:
        class_of, by_half = _learn(pairs, clusters, objects, mode, leftover, thresholds or VoteThresholds())
    tally = Tally(clusters, truth.categories, class_of, by_half)
    for pair in pairs:
        tally.add(pair, objects)
    return {
        "predictions": predicted.shown,
        "truth": truth.shown,
        "instances": instances.shown if instances else None,
        "mode": mode,
        "options": {"leftover": leftover} if mode == "hungarian" else _vote_options(mode, thresholds),
        "images": len(pairs),
        "images_without_prediction": asdict(Names.of(pairs.missing)),
        "predictions_without_truth": asdict(Names.of(pairs.unknown)),
        "classes": [category._asdict() for category in truth.categories.values()],
        "clusters": {kind: sum(c.is_thing is k for c in clusters.values()) for kind, k in _KINDS.items()},
        "mapping": {str(cluster): category for cluster, category in sorted(class_of.items())},
        **tally.result(),
    }


_KINDS = {"things": True, "stuff": False}


def _check_options(mode: Mode, leftover: Leftover, thresholds: VoteThresholds | None) -> None:
    if mode not in ("hungarian", "vote", "identity"):
        raise ConfigError(f"mode: {mode!r} is none of hungarian, vote, identity")
    if leftover not in ("error", "argmax"):
        raise ConfigError(f"leftover: {leftover!r} is none of error, argmax")
    if leftover != "error" and mode != "hungarian":
        raise ConfigError(f"leftover: {leftover!r} belongs to the mapping hungarian, not to {mode}")
    if thresholds is not None and mode != "vote":
        raise ConfigError(f"thresholds belong to the mapping vote, not to {mode}")


def _vote_options(mode: Mode, thresholds: VoteThresholds | None) -> dict[str, Any]:
    return asdict(thresholds or VoteThresholds()) if mode == "vote" else {}


def _clusters(predicted: LabelSource, truth: LabelSource, mode: Mode) -> Categories:
    if not truth.categories:
        raise ConfigError(f"{truth.shown} lists no categories; the truth needs them")
    if predicted.categories:
        return predicted.categories
    if mode != "identity" or not isinstance(predicted, CocoPanoptic):
        raise ConfigError(
            f"{predicted.shown} lists no categories, so that nothing says which are things: add the list, or use the "
            "mapping identity if they are those of the truth"
        )
    predicted.categories = dict(truth.categories)
    return predicted.categories


def _learn(
    pairs: LabelPairs,
    clusters: Categories,
    objects: TrueInstances,
    mode: Mode,
    leftover: Leftover,
    thresholds: VoteThresholds,
) -> tuple[ClassOf, tuple[ClassOf, ClassOf] | None]:
    """The mapping of all images, and for the images of each half that of the other one (None: a half is empty)."""
    halves = (Evidence(clusters, pairs.truth.categories), Evidence(clusters, pairs.truth.categories))
    images = [0, 0]
    things = {category.id for category in clusters.values() if category.is_thing}
    for pair in pairs:
        images[pair.half] += 1
        if mode == "vote":
            found = visible_instances(pair.predicted, things)
            halves[pair.half].add_votes(pair, objects.of(pair.truth), found, thresholds)
        else:
            halves[pair.half].add_pixels(pair)

    def learnt(evidence: Evidence) -> ClassOf:
        return by_vote(evidence) if mode == "vote" else one_to_one(evidence, leftover=leftover)

    return learnt(halves[0] + halves[1]), (learnt(halves[1]), learnt(halves[0])) if all(images) else None


def print_scores(result: Mapping[str, Any]) -> None:
    """The scores as tables, and whatever was left out."""

    console = stdout_console()
    for line in _remarks(result):
        console.print(line, markup=False)
    quality = ("PQ", "SQ", "RQ")
    rows = {label: [key + suffix for key in quality] for label, suffix in _QUALITIES.items()}
    console.print(_table(result, f"panoptic, {_MODES[result['mode']]}", quality, rows))
    average = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")
    rows = {region: [f"{region}_{key}" for key in average] for region in ("box", "mask")}
    console.print(_table(result, "instances", average, rows, agnostic=True))
    rows = {
        label: [f"{key}{suffix}{convention}" for key in ("mIoU", "accuracy") for convention in ("", "_published")]
        for label, suffix in {"all classes": "", "things as one class": "_things_as_one"}.items()
    }
    console.print(_table(result, "semantic", ("mIoU strict", "published", "accuracy strict", "published"), rows))
    console.print(_class_table(result))


_MODES = {
    "hungarian": "clusters to classes one to one",
    "vote": "clusters to classes by U2Seg's vote",
    "identity": "categories as they are",
}
_QUALITIES = {
    "all": "",
    "things": "_things",
    "stuff": "_stuff",
    "all, stuff merged": MERGED,
    "stuff, merged": f"_stuff{MERGED}",
}


def _table(
    result: Mapping[str, Any],
    title: str,
    heads: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    *,
    agnostic: bool = False,
) -> Any:
    """One table of `all_images`; the last column is the first measure under the mapping of the other half."""
    from rich.table import Table

    halves = result["other_half"]
    table = Table("", *heads, *([] if halves is None else [f"{heads[0]} by other half"]), title=title)
    for label, keys in rows.items():
        other = [] if halves is None else [percent(halves[keys[0]])]
        table.add_row(label, *(percent(result["all_images"][key]) for key in keys), *other)
    if agnostic:
        for label, keys in rows.items():
            table.add_row(f"{label}, classes ignored", *(percent(result["class_agnostic"][key]) for key in keys))
    return table


def _class_table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    clusters: dict[int, list[str]] = {}
    for cluster, category in result["mapping"].items():
        clusters.setdefault(category, []).append(cluster)
    table = Table("class", "clusters", "PQ", "SQ", "RQ", "box AP", "mask AP", "IoU", title="by class")
    for category in result["classes"]:
        numbers = result["per_class"][str(category["id"])]
        if numbers["n"] or numbers["IoU"] is not None:
            mapped = clusters.get(category["id"], ["–"])
            shown = ", ".join(mapped[:4]) + (f" and {len(mapped) - 4} more" if len(mapped) > 4 else "")
            keys = ("PQ", "SQ", "RQ", "box_AP", "mask_AP", "IoU")
            table.add_row(category["name"], shown, *(percent(numbers.get(key)) for key in keys))
    return table


def _remarks(result: Mapping[str, Any]) -> Iterator[str]:
    clusters = sum(result["clusters"].values())
    yield (
        f"{result['images']} images; {len(result['mapping'])} of {clusters} clusters have a class; "
        f"{result['segments_without_class']} of {result['segments']} segments have none and count as void"
    )
    if "void" in result:
        yield f"void of the truth, {result['void_share']:.1%} of its pixels, is not scored: {result['void']}"
    if unknown := result["predictions_without_truth"]["count"]:
        first = result["predictions_without_truth"]["first"][0]
        yield f"{unknown} predicted images have no truth, such as {first}: they are left out"
    if missing := result["images_without_prediction"]["count"]:
        first = result["images_without_prediction"]["first"][0]
        yield f"{missing} images have no prediction, such as {first}: all that is in them counts as missed"
    if result["things_without_score"]:
        yield f"{result['things_without_score']} things have no score: AP takes them all for equally sure"
    if result["mode"] != "identity" and result["other_half"] is None:
        yield "all images are in one half, so there is no other half to learn the mapping on"
