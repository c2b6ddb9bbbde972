"""Tiny runs made in this process, without Ray, and their reports as a browser reads them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import Config, parse_config
from pipeline.engine.done import begin_fit
from pipeline.engine.receipts import ReceiptLog
from pipeline.engine.shards import StageJob
from pipeline.engine.stage import Stage, index_folder
from pipeline.report.write import write_report
from pipeline.sources.index import build_index
from pipeline.stages.run import open_run
from pipeline.stages.table import define_stages, resolve_stages

NAMES = {1: "thing one & only"}
VOID = {"meta", "img", "wbr", "input", "line", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """A page as a browser reads it: elements, attributes and text; `wbr` does not cut a word."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += "" if tag == "wbr" else " "
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style"} & set(self.open):
            self.text += data

    def values(self, tag: str, attribute: str) -> list[str]:
        return [value for t, name, value in self.attributes if (t, name) == (tag, attribute)]


def scene(seed: int) -> bytes:
    """A JPEG of a bright disc on a dark ground."""
    rows, columns = np.mgrid[:72, :96]
    rng = np.random.default_rng(seed)
    disc = (rows - rng.integers(25, 45)) ** 2 + (columns - rng.integers(30, 65)) ** 2 < 18**2
    pixels = np.where(disc[..., None], rng.integers(150, 255, 3), rng.integers(0, 70, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG")
    return stream.getvalue()


def config_of(source: Path, run: Path, **sections: Any) -> Config:
    data = {
        "source": {"uri": str(source), "shard_size": 3},
        "run": {"uri": str(run)},
        "backbone": {"name": "patch-dct", "weights": "random:0"},
        "maskcut": {"image_size": 96},
        "crf": {"min_iou": 0.0, "iterations": 2},
        "clusters": {"k": 3},
        **sections,
    }
    return parse_config(data, origin="test")


def plan_run(config: Config) -> dict[str, Stage]:
    """The stage table of a run of which only the index and its record are there."""
    source = config.source
    index = build_index(index_folder(config), source.uri, source.format, shard_size=source.shard_size)
    table = resolve_stages(config, index)
    latest = {"config": config.model_dump(), "fingerprints": {name: stage.fingerprint for name, stage in table.items()}}
    (Path(config.run.uri) / "latest.json").write_text(json.dumps(latest))
    return table


def make_run(config: Config, stages: tuple[str, ...] = ("instances", "clusters", "panoptic")) -> dict[str, Stage]:
    """What `u2label run` leaves behind, with centroids at the first axes."""
    table = plan_run(config)
    for name in stages:
        if name == "clusters":
            begin_fit(table[name])
            write_clusters(Path(table[name].folder), config.clusters.k)
        else:
            run_stage(table[name], config, table)
    return table


def run_stage(stage: Stage, config: Config, table: dict[str, Stage], names: Mapping[int, str] = NAMES) -> None:
    categories = json.dumps([{"id": category, "name": name, "isthing": 1} for category, name in names.items()])
    actor = define_stages(config)[stage.name].actor()(
        StageJob(stage, config, index_folder(config), table, {"categories": categories})
    )
    log = ReceiptLog(config.run.uri, stage.name, stage.fingerprint)
    for shard in range(stage.shards):
        receipt = actor.run(shard)
        assert receipt.ok, receipt.error
        log.append(receipt)
    log.flush()


def write_clusters(folder: Path, k: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    centroids = np.zeros((k, 384), np.float32)
    centroids[np.arange(k), np.arange(k)] = 1
    np.save(folder / "centroids.npy", centroids)
    record = {"k": k, "sizes": [5, 0, 2], "inertia": [9.0, 4.5, 4.0], "iterations": 2, "spherical": True}
    (folder / "artifact.json").write_text(json.dumps(record))


def report_of(run: Path, **options: int) -> Page:
    where = write_report(str(run), None, **({"max_photos": 48, "max_clusters": 8} | options))
    assert where == f"{run}/report.html"
    return Page(Path(where).read_text(encoding="utf-8"))


def squeezed(text: str) -> str:
    return " ".join(text.split())


def table_of(run: Path) -> dict[str, Stage]:
    return open_run(str(run)).stages
