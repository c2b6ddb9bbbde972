"""`u2label demo`: scenes with known truth go through the whole pipeline, which never sees the truth, and are scored."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipeline import storage
from pipeline.config import Config, load_config
from pipeline.demo.scenes import write_scenes
from pipeline.demo.scores import PanopticRow, score_labels
from pipeline.errors import ConfigError
from pipeline.report.write import write_report
from pipeline.runner import run
from pipeline.stages import Stage
from workers.masks import decode_panoptic_png

SCENES = 200
SIZE = (320, 320)


def run_demo(output: Path, config_path: Path, photos: Path | None, *, scenes: int = SCENES) -> dict[str, float]:
    """Write scenes below `output`, label them, print their scores and the report's path; then `photos`, if given."""
    photos = photos and photos.expanduser()
    if photos is not None and not photos.is_dir():
        raise ConfigError(f"--photos: no folder {str(photos)!r}; give a folder of images")
    folder = output / "scenes"
    write_scenes(str(folder), scenes, seed=0, size=SIZE)
    config = _config(config_path, folder / "images", output / "run")
    summary = run(config)
    stage = summary.stages["panoptic"]
    scores = score_labels(str(folder), panoptic_rows(stage))
    things_alone = score_labels(str(folder), panoptic_rows(stage, stuff=False))
    report = write_report(config.run.uri, None)
    _print_scores(scores, things_alone)
    print(f"report of the scenes: {report}")
    if photos is not None:
        own = _config(config_path, photos, output / "photos", "source.format=auto", "maskcut.image_size=480")
        run(own)
        print(f"report of {photos}: {write_report(own.run.uri, None)}")
    return scores


def panoptic_rows(stage: Stage, *, stuff: bool = True) -> Iterator[PanopticRow]:
    """(image_id, ids, segments, scores) of every labelled image of a panoptic stage, with or without its stuff."""
    for part in stage.parts():
        table: pa.Table = pq.read_table(io.BytesIO(storage.read_bytes(part)))
        for row in table.to_pylist():
            if row["panoptic"] is not None:
                segments = [segment for segment in row["segments"] if stuff or segment["is_thing"]]
                ids = decode_panoptic_png(row["panoptic"])
                ids = np.where(np.isin(ids, [segment["id"] for segment in segments]), ids, 0)
                yield row["image_id"], ids, segments, [segment["score"] for segment in segments]


def _config(path: Path, source: Path, run_folder: Path, *overrides: str) -> Config:
    return load_config(str(path), [f"source.uri={source.absolute()}", f"run.uri={run_folder.absolute()}", *overrides])


def _print_scores(scores: dict[str, float], things_alone: dict[str, float]) -> None:
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
    table.add_row("PQ of the same labels without their stuff", f"{100 * things_alone['PQ']:.1f} %")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{scores['unmapped_segments']:.0f} of {scores['segments']:.0f} segments are of classes that match no true "
        "category one to one; panoptic quality counts them as void"
    )
