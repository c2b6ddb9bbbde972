"""`u2label demo`: scenes with known truth go through the whole pipeline, which never sees the truth, and are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pipeline.config import Config, load_config
from pipeline.engine.log import stdout_console
from pipeline.errors import ConfigError
from pipeline.evaluate.panoptic import ThingsAlone
from pipeline.evaluate.score import score_labels
from pipeline.operations.demo.photos import label, prepare
from pipeline.operations.demo.scenes import write_scenes
from pipeline.operations.run import run
from pipeline.report.write import write_report
from pipeline.sources.coco import CocoPanoptic
from pipeline.stages.parts import PanopticParts

SCENES = 200
SIZE = (320, 320)
PHOTOS_CONFIG = Path("configs/photos.yaml")
MEASURES = {
    "AP50": "AP50: class-agnostic mask AP at IoU 0.5",
    "AP": "AP: class-agnostic mask AP, IoU 0.5 to 0.95",
    "AR100": "AR100: class-agnostic mask AR, 100 detections",
    "PQ_things": "PQ: panoptic quality of things",
    "SQ_things": "SQ: segmentation quality of things",
    "RQ_things": "RQ: recognition quality of things",
    "PQ_stuff": "PQ of stuff",
    "PQ": "PQ of things and stuff",
    "PQ_without_stuff": "PQ of the same without its stuff",
}


Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class Demo:
    """What a demo made: the scores of the scenes' `labels` and of the `model`'s predictions, the reports by what they
    are of, and what the features are called that own photos were labelled with."""

    scores: dict[str, Scores]
    reports: dict[str, str]
    features: str | None = None


def run_demo(
    output: Path,
    config_path: Path,
    photos: Path | None = None,
    *,
    photos_config: Path = PHOTOS_CONFIG,
    weights: str | None = None,
    scenes: int = SCENES,
) -> Demo:
    """Write scenes below `output`, label them, train a model on the labels if the config says so, score both and write
    the report; then label `photos`, if given, with `weights`. ConfigError before all that, as of `prepare`."""
    own = None
    if photos is not None:
        photos = photos.expanduser()
        own = prepare(photos, output / "photos", config=photos_config, fallback=config_path, weights=weights)
    elif weights is not None:
        raise ConfigError(f"--weights: {weights} is for your own photos, and there are none; give --photos, too")
    folder = output / "scenes"
    write_scenes(str(folder), scenes, seed=0, size=SIZE)
    config = _config(config_path, folder / "images", output / "run")
    stages = run(config).stages
    names = {"labels": "panoptic", "model": "predictions"}
    scores = {what: score_scenes(str(folder), stages[name].parts()) for what, name in names.items() if name in stages}
    reports = {"the scenes": write_report(config.run.uri, None)}
    if own is None:
        return Demo(scores, reports)
    return Demo(scores, reports | {str(photos): label(own)}, own.features)


def print_demo(demo: Demo) -> None:
    print_scores(**demo.scores)
    for what, report in demo.reports.items():
        print(f"report of {what}: {report}")
    if demo.features is not None:
        print(f"features of the photos: {demo.features}")


def score_scenes(folder: str, parts: Sequence[str]) -> Scores:
    """Scores of panoptic parts against the truth that `write_scenes` wrote below `folder`.

    Returns:
        `AP50`, `AP`, `AR100` of the visible masks of things, classes ignored; `PQ_things`, `SQ_things`, `RQ_things`,
        `PQ_stuff`, `PQ`, segment by segment, and `PQ_without_stuff`, that of the same labels with void in place of
        stuff, all in [0, 1], `images`, `segments`, and `unmapped_segments`, those of classes
        that have no partner among the true ones.
    """
    truth, labels = CocoPanoptic(f"{folder}/truth.json"), PanopticParts(parts)
    found = score_labels(labels, truth)
    things_alone = score_labels(ThingsAlone(labels), truth)
    scores = {key: found["class_agnostic"][f"mask_{key}"] for key in ("AP50", "AP", "AR100")}
    quality = ("PQ_things", "SQ_things", "RQ_things", "PQ_stuff", "PQ")
    scores |= {key: found["all_images"][key] for key in quality}
    scores["PQ_without_stuff"] = things_alone["all_images"]["PQ"]
    scores |= {"images": found["images"], "segments": found["segments"]}
    return scores | {"unmapped_segments": found["segments_without_class"]}


def _config(path: Path, source: Path, run_folder: Path) -> Config:
    return load_config(str(path), [f"source.uri={source.absolute()}", f"run.uri={run_folder.absolute()}"])


def print_scores(labels: Scores, model: Scores | None = None) -> None:
    """What `score_scenes` found of the labels, and of the model that was trained on them, as a table."""
    title = f"{labels['images']:.0f} scenes against their truth, which neither labels nor model have seen"
    columns = {"pseudo-labels": labels} | ({"model trained on them": model} if model else {})
    table = Table("measure", *columns, title=title)
    for name, meaning in MEASURES.items():
        table.add_row(meaning, *(f"{100 * scores[name]:.1f} %" for scores in columns.values()))
    console = stdout_console()
    console.print(table)
    for what, scores in columns.items():
        console.print(
            f"{what}: {scores['unmapped_segments']:.0f} of {scores['segments']:.0f} segments are of classes that match "
            "no true category one to one; panoptic quality counts them as void"
        )
