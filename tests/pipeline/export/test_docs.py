"""The lines of docs/use-the-labels.md and of step 7 of docs/operations.md do what they say."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest

from pipeline.export.cityscapes import export_cityscapes
from pipeline.export.coco import export_coco
from pipeline.export.hf import export_hf
from pipeline.export.webdataset import export_webdataset
from tests.pipeline.export.labelled_runs import labelled_run, labels_of
from tests.pipeline.export.test_register import Catalog, catalog

__all__ = ["catalog"]
DOCS = Path(__file__).resolve().parents[3] / "docs"


def block_of(file: str, heading: str) -> str:
    """The first Python block behind a heading or another text."""
    behind = (DOCS / file).read_text().partition(heading)[2]
    found = re.search(r"( *)```python\n(.*?)\n *```", behind, re.DOTALL)
    assert found
    return "\n".join(line.removeprefix(found[1]) for line in found[2].splitlines())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run where the page has it."""
    labelled_run(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.move(tmp_path / "run", tmp_path / "runs" / "pictures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for module in ("register", "labels_train"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def run_block(heading: str, **variables: Any) -> None:
    exec(compile(block_of("use-the-labels.md", heading), heading, "exec"), variables)


@pytest.mark.parametrize("program", ["detectron2", "Mask2Former"])
def test_detectron2_and_mask2former(here: Path, catalog: Catalog, program: str) -> None:
    export_coco("runs/pictures", "runs/pictures", output="labels/coco")
    parts = {name: SimpleNamespace() for name in ("INPUT", "DATASETS")}
    cfg = SimpleNamespace(MODEL=SimpleNamespace(ROI_HEADS=SimpleNamespace(), SEM_SEG_HEAD=SimpleNamespace()), **parts)
    run_block(f"## {program}\n", cfg=cfg)
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    assert len(catalog.loaders[cfg.DATASETS.TRAIN[0]]()) == 4


def test_hugging_face(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_hf("runs/pictures", output="labels/hf")
    run_block("## Hugging Face datasets")
    assert "thing" in capsys.readouterr().out


def test_webdataset(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_webdataset("runs/pictures", output="labels/webdataset")
    run_block("## webdataset")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a", "b", "below/c", "d_v2"]


def test_cityscapes(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cityscapesscripts.helpers import labels as own

    kept = list(own.labels)
    tables = (own.name2label, own.id2label, own.trainId2label, own.category2labels)
    before = [dict(table) for table in tables]
    export_cityscapes("runs/pictures", output="labels/cityscapes")
    try:
        run_block("## Cityscapes' tools")
    finally:
        own.labels[:] = kept
        for table, was in zip(tables, before, strict=True):
            table.clear()
            table.update(was)
    found = json.loads((here / "labels/cityscapes/gtFine/cityscapes_panoptic_train.json").read_text())
    assert len(found["annotations"]) == 4


def test_duckdb_counts_the_last_settings_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs/pictures/panoptic")
    (current,) = folder.iterdir()
    shutil.copytree(current, folder / "0123456789ab")  # of other settings
    run_block("## DuckDB")
    segments = sum(len(labels_of("runs/pictures").read(name).segments) for name in labels_of("runs/pictures").names)
    numbers = [int(n) for n in re.findall(r"│ +\d+ │ +(\d+) │", capsys.readouterr().out)]
    assert sum(numbers) == segments


def test_step_7_of_operations_reads_each_photo_once(
    here: Path, s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.store import storage

    for file in storage.walk("runs/pictures"):
        storage.write_bytes(f"{s3_bucket}/u2label/{file.path}", Path("runs/pictures", file.path).read_bytes())
        if file.path.startswith("panoptic/"):
            again = re.sub("panoptic/[0-9a-f]+", "panoptic/0123456789ab", file.path)
            storage.write_bytes(f"{s3_bucket}/u2label/{again}", Path("runs/pictures", file.path).read_bytes())
    found: list[Any] = []
    own = duckdb.connect()  # the module's own connection keeps the filesystems of other tests
    monkeypatch.setattr(duckdb, "register_filesystem", own.register_filesystem)
    monkeypatch.setattr(duckdb, "sql", lambda query: found.append(own.sql(query).fetchall()))
    code = block_of("operations.md", "7. **Read** the parts").replace("s3://bucket/u2label", f"{s3_bucket}/u2label")
    exec(compile(code, "operations.md", "exec"), {})
    assert sorted(name for name, _ in found[0]) == ["a.jpg", "b.png", "below/c.jpg", "d.v2.jpg"]
