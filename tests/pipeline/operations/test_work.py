"""A share of a stage in a process of its own, without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from pipeline.config import Config, load_config
from pipeline.engine.lease import run_lease
from pipeline.engine.receipts import read_receipts
from pipeline.errors import ConfigError, StageFailed
from pipeline.operations import work as work_module
from pipeline.operations.run import run
from pipeline.operations.status import run_status
from pipeline.operations.work import Slice, work
from pipeline.stages.run import find_run, open_run
from tests.pipeline.report.tiny_runs import scene

SECTIONS: dict[str, Any] = {
    "backbone": {"name": "patch-dct", "weights": "random:0"},
    "maskcut": {"image_size": 64, "tau": 0.3},
    "crf": {"min_iou": 0},
    "embedding": {"crop_size": 32},
    "clusters": {"k": 2},
    "semantics": {"method": "kmeans", "classes": 2, "image_size": 64},
    "workers": {"size": 1, "cpus": 1, "memory_gb": 0.6},
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("no cluster is needed"))
    (tmp_path / "photos").mkdir()
    for number in range(7):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(scene(number))
    source = {"uri": str(tmp_path / "photos"), "shard_size": 2}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"source": source, "run": {"uri": str(tmp_path / "run")}, **SECTIONS}))
    return load_config(str(path), ())


def rows(config: Config, stage: str) -> list[dict[str, Any]]:
    found = find_run(config)
    assert found is not None
    return [row for part in found.stages[stage].parts() for row in pq.read_table(part).to_pylist()]


def test_shares_are_every_shard_once_and_run_finds_them_done(config: Config) -> None:
    shares = [work(config, "instances", Slice(number, 3)) for number in (1, 2, 3)]
    assert [share.computed for share in shares] == [2, 1, 1] and {share.shards for share in shares} == {4}
    assert work(config, "instances", Slice(1, 3)).computed == 0
    assert [row["image_id"] for row in rows(config, "instances")] == [f"{number}.jpg" for number in range(7)]
    receipts = read_receipts(config.run.uri, "instances", shares[0].fingerprint)
    assert [receipt.shard for receipt in receipts] == [0, 1, 2, 3]
    assert run(config, stages=["instances"]).computed == {"instances": 0}
    status = run_status(config).stages[0]
    assert (status.done, status.rows["ok"] + status.rows.get("no_masks", 0)) == (4, 7)
    assert open_run(config.run.uri).done["instances"] == {0, 1, 2, 3}


def test_a_stage_that_reads_none_can_be_shared_before_the_others(config: Config) -> None:
    assert [work(config, "patches", Slice(number, 2)).computed for number in (1, 2)] == [2, 2]
    with pytest.raises(
        StageFailed, match=r"semantics needs the stage \w+, which is not fitted; do it first: u2label run"
    ):
        work(config, "semantics")


def test_a_share_goes_on_where_it_was_and_does_what_was_lost(config: Config) -> None:
    work(config, "instances", Slice(1, 2))
    before = rows_of_part(config, 2)
    found = find_run(config)
    assert found is not None
    Path(found.stages["instances"].part(2)).unlink()
    assert work(config, "instances", Slice(1, 2)).computed == 1
    assert rows_of_part(config, 2) == before


def rows_of_part(config: Config, shard: int) -> list[dict[str, Any]]:
    found = find_run(config)
    assert found is not None
    rows: list[dict[str, Any]] = pq.read_table(found.stages["instances"].part(shard)).to_pylist()
    return rows


def test_a_shard_that_fails_is_told_and_the_others_are_done(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.stages.instances import InstanceShards

    whole = InstanceShards.process

    def process(self: InstanceShards, shard: int, phases: Any) -> Any:
        if shard == 1:
            raise RuntimeError("planted")
        return whole(self, shard, phases)

    monkeypatch.setattr(InstanceShards, "process", process)
    with pytest.raises(StageFailed, match="instances: 1 of 4 shards of share 1/1 failed") as failed:
        work(config, "instances")
    assert [failure.shard for failure in failed.value.failures] == [1]
    assert "planted" in (failed.value.failures[0].error or "")
    monkeypatch.undo()
    assert work(config, "instances").computed == 1


def test_what_cannot_be_shared_is_refused(config: Config) -> None:
    with pytest.raises(
        ConfigError, match=r"clusters is fitted to all parts at once: u2label run does it, with --stage"
    ):
        work(config, "clusters")
    with pytest.raises(ConfigError, match="--stage: masks is unknown; the stages with shards are instances, "):
        work(config, "masks")
    with pytest.raises(StageFailed, match="panoptic needs the stage instances, 4 shards of which are missing"):
        work(config, "panoptic")


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/4", "1/4/2", ""])
def test_a_slice_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="give the number of a share and how many there are"):
        Slice.parse(text)


def test_slices_are_disjoint_and_whole() -> None:
    shares = [[shard for shard in range(50) if shard in Slice(number, 7)] for number in range(1, 8)]
    assert sorted(shard for share in shares for shard in share) == list(range(50))
    assert Slice.parse("3/16") == Slice(3, 16) and str(Slice(3, 16)) == "3/16"


def test_whoever_comes_second_waits_for_the_index(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    with run_lease(config.run.uri):

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(work_module, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            work(config, "instances")
    assert len(waited) == 2
    assert work(config, "instances").computed == 4


@pytest.mark.slow
def test_the_job_array_as_sixteen_processes_at_once(config: Config, tmp_path: Path) -> None:
    for number in range(7, 34):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(scene(number))
    script = Path(__file__).resolve().parents[3] / "docs" / "slurm.sbatch"
    array = {"SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_CPUS_PER_TASK": "1"}
    environment = os.environ | array | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = [
        subprocess.Popen(
            ["bash", str(script), str(tmp_path / "config.yaml"), "instances"],
            env=environment | {"SLURM_ARRAY_TASK_ID": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(5, 21)
    ]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * 16, said
    assert sum("index: listing" in text for text in said) == 1
    status = run_status(config).stages[0]
    assert (status.done, status.shards) == (17, 17)
    found = find_run(config)
    assert found is not None
    lines = [
        json.loads(line)["shard"]
        for path in (Path(config.run.uri) / "receipts").glob("instances-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert Counter(lines) == dict.fromkeys(range(17), 1)
    assert Counter(row["image_id"] for row in rows(config, "instances")) == {f"{n}.jpg": 1 for n in range(34)}
