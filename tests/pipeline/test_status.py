"""`status` and `plan` from listings and receipts, without any part's content."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.receipts import Receipt, ReceiptLog
from pipeline.sources import build_index
from pipeline.stages import index_folder, resolve_stages
from pipeline.status import _step, print_plan, print_status, run_status


@pytest.fixture
def config(tmp_path: Path) -> Config:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(10):
        (photos / f"{i}.jpg").write_bytes(b"photo")
    config = Config.model_validate(
        {
            "source": {"uri": str(photos), "shard_size": 2},
            "run": {"uri": str(tmp_path / "run")},
            "backbone": {"name": "patch-dct", "weights": "random:0"},
            "workers": {"size": 2},
        }
    )
    build_index(index_folder(config), config.source.uri, shard_size=2)
    return config


def add_receipts(config: Config, fingerprint: str, done: int) -> None:
    log = ReceiptLog(config.run.uri, "instances", fingerprint)
    for shard in range(done):
        log.append(Receipt("instances", fingerprint, shard, True, 4.0, {"ok": 2}, {"crf": 1.0}, 3, 1000))
    log.append(Receipt("instances", fingerprint, done, False, 1.0, error="Traceback\nValueError: planted"))
    log.flush()


def test_counts_rates_and_failures(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.sources import open_index

    stage = resolve_stages(config, open_index(index_folder(config)))["instances"]
    Path(stage.folder).mkdir(parents=True)
    for shard in range(3):
        Path(stage.part(shard)).write_bytes(b"PAR1....PAR1")
    add_receipts(config, stage.fingerprint, 3)
    status = run_status(config)
    instances = status.stages[0]
    assert (status.images, status.shards, instances.done, instances.shards) == (10, 5, 3, 5)
    assert (instances.rows, instances.instances, instances.failed) == ({"ok": 6}, 9, [3])
    assert instances.images_per_worker_second == pytest.approx(0.5)
    assert instances.seconds == {"crf": 3.0}
    step = _step(instances, status)
    assert (step.pending, step.images, step.seconds, step.bytes) == (2, 4, 4.0, 2000.0)  # two workers at 0.5 images/s
    print_status(status)
    print_plan(status)
    printed = capsys.readouterr().out
    assert "3/5" in printed
    assert "2 of 5" in printed


def test_a_plan_for_other_settings_uses_the_rates_of_the_last_run(config: Config) -> None:
    add_receipts(config, "another", 5)
    instances = run_status(config).stages[0]
    assert (instances.done, instances.rows) == (0, {})
    assert instances.images_per_worker_second == pytest.approx(0.5)
