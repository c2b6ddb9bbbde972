"""The fingerprints of version 0.1: a run folder of that time must be found done by all later versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.sources.index import Ignored, Index
from pipeline.stages.table import resolve_stages

PINNED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("fingerprints.json").read_text())
FILES = {"labels.json": b"labels", "init.pth": b"init", "backbone.pth": b"backbone", "refine.pth": b"refine"}
INDEX = Index("/run/index/x", 3, 1000, 400, "folder", "image", "d" * 64, "/photos", Ignored())


def test_keys_of_rounds_count_where_they_are_not_what_was_before() -> None:
    def round_of(**keys: Any) -> str:
        changes = {"self_training": {"rounds": 1, **keys}, "train": {"steps": 3}}
        base = {"source": {"uri": "/photos"}, "run": {"uri": "/run"}, "backbone": {"name": "patch-dct"}}
        return resolve_stages(Config.model_validate(base | changes), INDEX)["train_1"].fingerprint

    found = [round_of(), round_of(soft=False, mixing=1.0), round_of(mixing=0.5), round_of(soft=True)]
    assert found[0] == found[1] and len(set(found)) == 3


def test_the_rate_of_probes_counts_where_there_are_any() -> None:
    def training(rate: float, **network: Any) -> str:
        changes = {"train": {"steps": 3, "probe_rate": rate, "network": network}}
        base = {"source": {"uri": "/photos"}, "run": {"uri": "/run"}, "backbone": {"name": "patch-dct"}}
        return resolve_stages(Config.model_validate(base | changes), INDEX)["train"].fingerprint

    probed = {"backbone": "vit", "linear_probes": True}
    assert training(10.0) == training(3.0)
    assert training(10.0, **probed) != training(3.0, **probed)


def test_a_teacher_counts_in_a_training_and_its_rounds() -> None:
    def trainings(**train: Any) -> list[str]:
        base = {"source": {"uri": "/photos"}, "run": {"uri": "/run"}, "backbone": {"name": "patch-dct"}}
        changes = {"train": {"steps": 3, "ema": 0.9, **train}, "self_training": {"rounds": 1}}
        table = resolve_stages(Config.model_validate(base | changes), INDEX)
        return [table[name].fingerprint for name in ("train", "train_1")]

    none, said, given, other = (
        trainings(**keys) for keys in ({}, {"teacher": None}, {"teacher": {}}, {"teacher": {"threshold": 0.6}})
    )
    assert none == said
    assert all(len({*fingerprints}) == 3 for fingerprints in zip(none, given, other, strict=True))


@pytest.mark.parametrize("case", PINNED)
def test_stages_keep_their_order_inputs_and_fingerprints(case: str, tmp_path: Path) -> None:
    pinned = PINNED[case]
    for name, content in {**FILES, "vit.pth": b"vit"}.items():
        (tmp_path / name).write_bytes(content)
    changes = json.loads(json.dumps(pinned["config"]).replace("FILES", str(tmp_path)))
    base = {
        "source": {"uri": "/photos"},
        "run": {"uri": "/run"},
        "backbone": {"name": "patch-dct", "weights": "random:0"},
    }
    table = resolve_stages(Config.model_validate(base | changes), INDEX)
    assert {name: stage.fingerprint for name, stage in table.items()} == pinned["stages"]
    assert list(table) == list(pinned["stages"])
    assert {name: list(stage.inputs) for name, stage in table.items() if stage.inputs} == pinned["inputs"]
    assert [name for name, stage in table.items() if stage.kind == "fit"] == pinned["fits"]
    few = {name: stage.images for name, stage in table.items() if stage.images not in (None, INDEX.images)}
    assert few == pinned["images"]
