"""`u2label evaluate masks`: how good the masks of a run are against human ones, and how pure their clusters.

Masks are scored with the classes ignored, by the surest 100 of a photo, as COCO does. A photo that could not be read,
or has no mask, is one where nothing was found; one that only the run or only the truth has is left out.

Clusters are scored on the masks that match a true object (IoU of at least 0.5, one to one): whether masks of a cluster
are of one class, beside what clusters of the same sizes have by chance. Where the truth knows stuff, masks that are
mostly stuff are counted: what human labels call background and the run takes for an object.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from model.metrics.clusters import cluster_quality
from model.metrics.instances import AREAS, MAX_DETECTIONS, InstanceAP, Size, covered_shares, match_masks
from pipeline.engine.log import stdout_console
from pipeline.errors import ConfigError
from pipeline.evaluate.instances import numbers_of
from pipeline.evaluate.masks import FoundPhoto, MaskPairs, TrueMasks, TruePhoto, open_masks
from pipeline.evaluate.results import Names, number, percent, plain, write_json
from pipeline.stages.named import names_of
from pipeline.stages.run import open_run
from pipeline.store import storage

RESULT = "masks.json"
MOSTLY = 0.8  # of a mask's pixels
SUREST = 10  # masks of a photo


def evaluate_masks(
    run_or_config: str,
    truth: str,
    *,
    stage: str = "instances",
    truth_pngs: str | None = None,
    output: str | None = None,
    named: bool = False,
) -> dict[str, Any]:
    """Score the masks of a run and write the result to `output`/masks.json; returns what it holds, with `files`.

    Args:
        run_or_config: a run folder or its config file.
        truth: a COCO instances JSON, or a COCO panoptic JSON with its PNGs.
        stage: `instances`, or a stage of panoptic labels, such as panoptic or predictions.
        truth_pngs: the folder of the PNGs of a panoptic truth; by default its path without `.json`.
        output: folder for the result, local or remote; by default `evaluation` in the run folder.
        named: the classes as the run's names have them: merged ones are one, and masks of noise and stuff are left out.

    Raises:
        ConfigError: no such run, no names where they are asked for, a stage without masks, a truth that cannot be read,
            no photo that both have, or as `MaskPairs`.
    """
    run = open_run(run_or_config, need=stage)
    names = names_of(run) if named else None
    true, found = TrueMasks(truth, truth_pngs), open_masks(run, stage, names)
    done = sorted(run.done[stage])
    pairs = MaskPairs(true, found, run.stages[stage], done)
    tally = MaskTally(clusters=found.clusters, has_stuff=true.has_stuff)
    for pair in pairs:
        tally.add(*pair)
    if not tally.photos:
        raise ConfigError(
            f"none of the {len(true.names)} photos of {true.shown} is in the stage {stage} of "
            f"{storage.redact(run.uri)}: the first of the truth is {true.names[0]!r}, the first of the run "
            f"{next(iter(pairs.without_truth.first), 'none')!r}; give the labels of the run's photos, by their names"
        )
    result = {
        "run": storage.redact(run.uri),
        "truth": true.shown,
        "stage": stage,
        "parts": run.stages[stage].shards,
        "parts_done": len(done),
        "images_without_truth": asdict(pairs.without_truth),
        "truth_without_image": asdict(Names.of(pairs.without_row())),
        **tally.result(),
    }
    return result | {"files": [write_json(output or storage.join(run.uri, "evaluation"), RESULT, result)]}


class MaskTally:
    """Scores over a stream of photos. Memory: a few bytes a mask that counts, none of the masks.

    Args:
        clusters: how many there are; None where they are not known, and not scored.
        has_stuff: whether the truth knows its stuff.
    """

    def __init__(self, *, clusters: int | None, has_stuff: bool) -> None:
        self._clusters, self._has_stuff = clusters, has_stuff
        self._precision = InstanceAP("segm", class_agnostic=True, sizes=tuple(AREAS))
        self._matches: list[tuple[int, int]] = []  # cluster and class
        self._masks, self._objects = list[int](), list[int]()  # of each photo that could be read
        self._on_stuff = {"all": (0, 0), "surest": (0, 0)}  # masks, and those mostly on stuff
        self._unreadable, self._without_mask = Names(), Names()
        self._crowds = 0

    @property
    def photos(self) -> int:
        return len(self._masks) + self._unreadable.count

    def add(self, true: TruePhoto, found: FoundPhoto) -> None:
        """Count a photo of the truth and its row of the run."""
        self._precision.update(true.objects, found.masks)
        crowds = sum(one.crowd for one in true.objects)
        self._crowds += crowds
        if found.size is None:
            self._unreadable.add(found.image_id)
            return
        self._masks.append(len(found.masks))
        self._objects.append(len(true.objects) - crowds)
        if not found.masks:
            self._without_mask.add(found.image_id)
        pairs = match_masks(found.masks, true.objects)
        self._matches += [(found.masks[mask].category, true.objects[one].category) for mask, one in pairs]
        if true.stuff is not None:
            mostly = covered_shares(found.masks, true.stuff) >= MOSTLY
            for key, some in (("all", mostly), ("surest", mostly[:SUREST])):
                masks, on_stuff = self._on_stuff[key]
                self._on_stuff[key] = (masks + len(some), on_stuff + int(some.sum()))

    def result(self) -> dict[str, Any]:
        """Ready for JSON: numbers in [0, 1], None where there is nothing to average or it is not known."""
        readable = len(self._masks)
        return {
            "images": self.photos,
            "images_unreadable": asdict(self._unreadable),
            "images_without_mask": asdict(self._without_mask),
            "share_without_mask": self._without_mask.count / readable if readable else None,
            "images_with_more_than_100_masks": sum(masks > MAX_DETECTIONS[-1] for masks in self._masks),
            "masks": sum(self._masks),
            "crowds": self._crowds,
            "masks_per_image": _spread(self._masks),
            "objects_per_image": _spread(self._objects),
            "scores": {size: self._scores(size) for size in AREAS},
            "clusters": None if self._clusters is None else self._cluster_scores(self._clusters),
            "mostly_stuff": self._stuff_scores() if self._has_stuff else None,
        }

    def _scores(self, size: Size) -> dict[str, Any]:
        """AP and AR of the objects of a size, and their number."""
        result = self._precision.result(size)
        return {"objects": sum(one.n for one in result.per_class.values()), **plain(numbers_of(result.all))}

    def _cluster_scores(self, clusters: int) -> dict[str, Any]:
        quality = asdict(cluster_quality([k for k, _ in self._matches], [c for _, c in self._matches]))
        counts = {"of": clusters, "matched": quality.pop("items"), "seen": quality.pop("clusters")}
        return counts | {"classes": quality.pop("classes"), **plain(quality)}

    def _stuff_scores(self) -> dict[str, Any]:
        return {
            key: {"masks": masks, "share": number(on_stuff / masks) if masks else None}
            for key, (masks, on_stuff) in self._on_stuff.items()
        }


def _spread(counts: Sequence[int]) -> dict[str, float | None]:
    if not counts:
        return {"mean": None, "median": None, "max": None}
    return {"mean": statistics.fmean(counts), "median": float(statistics.median(counts)), "max": max(counts)}


def print_scores(result: Mapping[str, Any]) -> None:
    """The scores as tables, and whatever was left out."""
    console = stdout_console()
    for line in _remarks(result):
        console.print(line, markup=False)
    for table in (_score_table(result), _count_table(result), _cluster_table(result), _stuff_table(result)):
        if table is not None:
            console.print(table)


def _score_table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    keys = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")
    table = Table("objects", "how many", *keys, title="masks, classes ignored")
    for size, title in _SIZES.items():
        scores = result["scores"][size]
        table.add_row(title, str(scores["objects"]), *(percent(scores[key]) for key in keys))
    return table


_SIZES = {"all": "all", "small": "small, up to 32²", "medium": "medium, up to 96²", "large": "large"}


def _count_table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table("a photo", "mean", "median", "most", title="masks and true objects")
    for key, title in {"masks_per_image": "masks", "objects_per_image": "true objects"}.items():
        table.add_row(title, *("–" if value is None else f"{value:.4g}" for value in result[key].values()))
    return table


def _cluster_table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    found = result["clusters"]
    if found is None:
        return None
    table = Table("", "clusters", "by chance", title="clusters against classes")
    for key, title in {"purity": "purity", "nmi": "NMI"}.items():
        table.add_row(title, percent(found[key]), percent(found[f"{key}_by_chance"]))
    table.caption = (
        f"{found['matched']} masks that match an object, in {found['seen']} of {found['of']} clusters, "
        f"of {found['classes']} classes"
    )
    return table


def _stuff_table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    found = result["mostly_stuff"]
    if found is None:
        return None
    table = Table("masks", "how many", "mostly stuff", title=f"masks with {MOSTLY:.0%} or more on human stuff")
    for key, title in {"all": "all", "surest": f"the {SUREST} surest of a photo"}.items():
        table.add_row(title, str(found[key]["masks"]), percent(found[key]["share"]))
    return table


def _remarks(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{result['images']} photos, {result['masks']} masks of the stage {result['stage']}, "
        f"{result['scores']['all']['objects']} true objects and {result['crowds']} crowds; "
        f"{percent(result['share_without_mask'])} of the readable photos have no mask"
    )
    what = {
        "images_without_truth": "photos of the run without truth, left out",
        "truth_without_image": "photos of the truth that are not in the run, left out",
        "images_unreadable": "photos that could not be read, counted as nothing found",
    }
    for key, text in what.items():
        if result[key]["count"]:
            yield f"{text}: {result[key]['count']}, such as {result[key]['first'][0]}"
    if many := result["images_with_more_than_100_masks"]:
        yield f"{many} photos have more than 100 masks: AP and AR are of the 100 surest"
    if result["parts_done"] < result["parts"]:
        yield f"only {result['parts_done']} of {result['parts']} parts are done; the rest was left out"
    if result["clusters"] is None:
        yield "the clusters are not fitted yet, and not scored; go on with u2label run"
