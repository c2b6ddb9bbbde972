"""`u2label demo`: scenes with known truth go through the whole pipeline, which never sees the truth, and are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.coco.parts import PanopticParts
from pipeline.coco.reader import CocoPanoptic
from pipeline.config import Config, load_config
from pipeline.demo.scenes import write_scenes
from pipeline.errors import ConfigError
from pipeline.evaluate.panoptic import ThingsAlone
from pipeline.evaluate.score import score_labels
from pipeline.report.write import write_report
from pipeline.runner import run

SCENES = 200
SIZE = (320, 320)


@dataclass(frozen=True, slots=True)
class Demo:
    """What a demo made: the scores of the scenes' labels, and the reports by what they are of."""

    scores: dict[str, float]
    reports: dict[str, str]


def run_demo(output: Path, config_path: Path, photos: Path | None, *, scenes: int = SCENES) -> Demo:
    """Write scenes below `output`, label them, score them and write their report; then label `photos`, if given."""
    photos = photos and photos.expanduser()
    if photos is not None and not photos.is_dir():
        raise ConfigError(f"--photos: no folder {str(photos)!r}; give a folder of images")
    folder = output / "scenes"
    write_scenes(str(folder), scenes, seed=0, size=SIZE)
    config = _config(config_path, folder / "images", output / "run")
    parts = run(config).stages["panoptic"].parts()
    scores = score_scenes(str(folder), parts)
    reports = {"the scenes": write_report(config.run.uri, None)}
    if photos is not None:
        own = _config(config_path, photos, output / "photos", "source.format=auto", "maskcut.image_size=480")
        run(own)
        reports[str(photos)] = write_report(own.run.uri, None)
    return Demo(scores, reports)


def print_demo(demo: Demo) -> None:
    print_scores(demo.scores)
    for what, report in demo.reports.items():
        print(f"report of {what}: {report}")


def score_scenes(folder: str, parts: Sequence[str]) -> dict[str, float]:
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
    scores |= {key: found["all_images"][f"{key}_unmerged"] for key in quality}
    scores["PQ_without_stuff"] = things_alone["all_images"]["PQ_unmerged"]
    scores |= {"images": found["images"], "segments": found["segments"]}
    return scores | {"unmapped_segments": found["segments_without_class"]}


def _config(path: Path, source: Path, run_folder: Path, *overrides: str) -> Config:
    return load_config(str(path), [f"source.uri={source.absolute()}", f"run.uri={run_folder.absolute()}", *overrides])


def print_scores(scores: Mapping[str, float]) -> None:
    """What `score_scenes` found, as a table."""
    table = Table("measure", "value", title=f"pseudo-labels of {scores['images']:.0f} scenes against their truth")
    for name, meaning in (
        ("AP50", "class-agnostic mask AP at IoU 0.5"),
        ("AP", "class-agnostic mask AP, IoU 0.5 to 0.95"),
        ("AR100", "class-agnostic mask AR, 100 detections"),
        ("PQ_things", "panoptic quality of things"),
        ("SQ_things", "segmentation quality of things"),
        ("RQ_things", "recognition quality of things"),
        ("PQ_stuff", "panoptic quality of stuff"),
        ("PQ", "panoptic quality of things and stuff"),
    ):
        table.add_row(f"{name}: {meaning}", f"{100 * scores[name]:.1f} %")
    table.add_row("PQ of the same labels without their stuff", f"{100 * scores['PQ_without_stuff']:.1f} %")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{scores['unmapped_segments']:.0f} of {scores['segments']:.0f} segments are of classes that match no true "
        "category one to one; panoptic quality counts them as void"
    )
