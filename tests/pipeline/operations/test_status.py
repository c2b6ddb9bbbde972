"""`status` and `plan` from listings and receipts, and from the parts where these are missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.backbone.names import OFFICIAL_URLS
from pipeline.config import Config
from pipeline.engine.done import Look
from pipeline.engine.fit_progress import write_progress
from pipeline.engine.receipts import Receipt, ReceiptLog
from pipeline.engine.stage import index_folder
from pipeline.engine.status import StageStatus
from pipeline.errors import ConfigError, StageFailed
from pipeline.operations import preflight
from pipeline.operations import run as runner
from pipeline.operations.run import _log_fit
from pipeline.operations.stage_jobs import note_latest
from pipeline.operations.status import _step, plan_of, planned, print_plan, print_status, run_status
from pipeline.sources.choice import Choice
from pipeline.sources.index import build_index, open_index
from pipeline.stages.run import resolve_run
from pipeline.stages.table import resolve_stages

ANOTHER = "0123456789ab"  # fingerprint


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


def test_what_others_leave_among_the_receipts_is_said_and_left_out(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = resolve_run(config, open_index(index_folder(config))).stages["instances"]
    add_receipts(config, stage.fingerprint, 1)
    receipts = Path(config.run.uri) / "receipts"
    (receipts / "instances-notes.jsonl").write_text("mine")
    later = json.loads(Receipt("instances", stage.fingerprint, 4, False, 1.0).to_json()) | {"of_a_later_version": 1}
    wrong_type = json.dumps(json.loads(Receipt("instances", stage.fingerprint, 3, True, 1.0).to_json()) | {"rows": 3})
    lines = [json.dumps(later), '{"bad": 1}', "[]", "half a li", wrong_type[:80]]
    (receipts / f"instances-{stage.fingerprint}-{10**19}.jsonl").write_text("\n".join(lines))
    assert run_status(config).stages[0].failed == [1, 4]
    said = [line.rsplit("no receipt: ")[-1] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"{line!r}; left out" for line in lines[1:]]


def test_weights_that_are_only_on_the_cluster_are_those_of_the_last_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    official = config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"name": "dino_vits8", "weights": "official"})}
    )
    with pytest.raises(ConfigError, match=r"backbone\.weights: 'official' is not on this machine, and no run with it"):
        run_status(official)
    checkpoint = tmp_path / "empty/hub/checkpoints" / OFFICIAL_URLS["dino_vits8"].rsplit("/", 1)[1]
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    found = resolve_run(official, open_index(index_folder(official)))
    note_latest(found)
    table = found.stages
    checkpoint.unlink()
    assert [stage.fingerprint for stage in run_status(official).stages] == [s.fingerprint for s in table.values()]
    another = official.model_copy(update={"backbone": official.backbone.model_copy(update={"name": "dino_vitb8"})})
    with pytest.raises(ConfigError, match="no run with it"):
        run_status(another)


def test_a_store_that_fails_under_way_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> set[int]:
        raise ConnectionResetError("the line is cut")

    monkeypatch.setattr(Look, "sizes", away)
    with pytest.raises(ConfigError, match="run: ConnectionResetError: the line is cut; give access"):
        run_status(config)
    monkeypatch.setattr(Look, "pending", away)
    monkeypatch.setattr(runner, "check_all", lambda config: None)
    with pytest.raises(StageFailed, match="run: ConnectionResetError: the line is cut; when it answers, run the same"):
        runner.run(config)


def test_counts_rates_and_failures(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_what_was_left_out_of_the_source_is_said(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    photos = Path(config.source.uri)
    (photos / "notes.txt").write_text("")
    (photos / "raw.dng").write_text("")
    build_index(index_folder(config), config.source.uri, shard_size=2, choice=Choice(exclude=("3.jpg",)))
    status = run_status(config)
    left_out = {
        ".dng (photos ending in .dng are not read; convert them)": 1,
        ".txt": 1,
        "not chosen by source.include and source.exclude": 1,
    }
    assert (status.images, status.left_out, plan_of(status)["left_out"]) == (9, left_out, left_out)
    for show in (print_status, print_plan):
        show(status)
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")] == [
            f"left out: {count} {reason}" for reason, count in left_out.items()
        ]


def stego(config: Config, max_images: int | None) -> Config:
    semantics = {"method": "stego", "max_images": max_images, "batch_size": 2, "neighbours": 1}
    return Config.model_validate(config.model_dump() | {"semantics": semantics})


def test_features_are_planned_for_the_sample_alone(config: Config) -> None:
    status = run_status(stego(config, 4))
    features = next(stage for stage in status.stages if stage.stage == "features")
    assert (features.images, features.shards) == (5, 5)
    log = ReceiptLog(config.run.uri, "features", ANOTHER)
    for shard in range(5):
        log.append(Receipt("features", ANOTHER, shard, True, 2.0, {"ok": 1, "not_sampled": 1}, bytes=1000))
    log.flush()
    status = run_status(stego(config, 4))
    features = next(stage for stage in status.stages if stage.stage == "features")
    step = _step(features, status)
    assert (features.images_per_worker_second, features.bytes_per_image) == (0.5, 1000.0)
    assert (step.images, step.seconds, step.bytes) == (5, 5.0, 5000.0)  # two workers


def test_a_fit_is_told_by_its_step_then_by_its_time(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # of the terminal
    config = stego(config, None)

    def fit() -> StageStatus:
        status = run_status(config)
        print_status(status)
        print_plan(status)
        return next(stage for stage in status.stages if stage.stage == "semantics_fit")

    stage = resolve_stages(config, open_index(index_folder(config)))["semantics_fit"]
    assert (fit().fit_seconds, fit().progress) == (None, None)
    assert "to fit" in capsys.readouterr().out
    write_progress(stage.folder, 5000, {"step": 300, "correspondence": 0.5})
    assert fit().progress == {"step": 300, "correspondence": 0.5, "steps": 5000}
    assert "step 300 of 5000" in capsys.readouterr().out
    _log_fit(stage, config.run.uri, 3.0, "too few images")
    assert fit().failed == [0]
    assert "the fit" in capsys.readouterr().out
    _log_fit(stage, config.run.uri, 42.0, None)
    Path(stage.folder, "artifact.json").write_text("{}")
    done = fit()
    assert (done.fit_seconds, done.seconds, done.failed, done.progress) == (42.0, {"fit": 42.0}, [], None)
    assert capsys.readouterr().out.count("fitted in 42 s") == 2
    other = run_status(Config.model_validate(config.model_dump() | {"seed": 1}))
    waiting = next(stage for stage in other.stages if stage.stage == "semantics_fit")
    assert (waiting.done, _step(waiting, other).seconds) == (0, 42.0)  # as long as the last time


def test_a_plan_for_other_settings_uses_the_rates_of_the_last_run(config: Config) -> None:
    add_receipts(config, ANOTHER, 5)
    instances = run_status(config).stages[0]
    assert (instances.done, instances.rows) == (0, {})
    assert instances.images_per_worker_second == pytest.approx(0.5)


def test_a_plan_says_what_is_bound_to_fail(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    many = Config.model_validate(config.model_dump() | {"clusters": {"k": 31}})
    (fault,) = plan_of(run_status(many))["faults"]
    assert fault.startswith("clusters.k 31 is above the 30 masks that 10 photos can have with maskcut.max_masks 3")
    print_plan(run_status(many))
    assert f"bound to fail: {fault}" in capsys.readouterr().out
    assert plan_of(run_status(Config.model_validate(config.model_dump() | {"clusters": {"k": 30}})))["faults"] == []


def faults_before(config: Config, folder: Path, **sections: object) -> list[str]:
    """Of a plan of a run that has not begun, in a folder of its own, which it leaves as it was."""
    fresh = Config.model_validate(
        config.model_dump() | {"run": {"uri": str(folder / "fresh")}, "clusters": {"k": 3}} | sections
    )
    found: list[str] = plan_of(planned(fresh))["faults"]
    assert not (folder / "fresh").exists()
    return found


def test_a_plan_before_the_index_looks_at_the_source(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (fault,) = faults_before(config, tmp_path, clusters={"k": 31})
    assert fault.startswith("clusters.k 31 is above the 30 masks that 10 photos can have")
    assert faults_before(config, tmp_path, clusters={"k": 30}) == []
    print_plan(planned(Config.model_validate(config.model_dump() | {"clusters": {"k": 31}, "source": {"uri": "/no"}})))
    assert "bound to fail: source.uri: there is no /no" in capsys.readouterr().out
    few = {"method": "stego", "neighbours": 10, "batch_size": 11}
    assert [fault.partition(" photos or")[0] for fault in faults_before(config, tmp_path, semantics=few)] == [
        "semantics.neighbours 10 needs 11"
    ]
    assert faults_before(config, tmp_path, semantics=few | {"crops": "five"}) == []
    listed = []

    def endless(*_: object, **__: object) -> Iterator[int]:
        while True:
            listed.append(1)
            yield 1

    monkeypatch.setattr(preflight, "scan", endless)
    assert faults_before(config, tmp_path, clusters={"k": 100}) == []
    assert len(listed) == 64  # of which 34 would be enough


def test_a_plan_says_which_files_of_the_config_are_not_there(config: Config, tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_text("{}")
    train = {"steps": 1, "labels": str(tmp_path / "truth.json"), "label_images": "/no/images", "init": "/no/model"}
    said = "\n".join(faults_before(config, tmp_path, train=train))
    assert [fault.partition("; ")[0] for fault in said.split("\n")] == [
        "train.label_images: there is no '/no/images'",
        f"train.label_pngs: there is no '{tmp_path / 'truth'}'",  # beside the JSON
        "train.init: there is no '/no/model'",
    ]
    (tmp_path / "model.pth").write_bytes(b"<html>403 Forbidden</html>")
    (fault,) = faults_before(config, tmp_path, train={"steps": 1, "backbone": str(tmp_path / "model.pth")})
    assert fault.startswith(
        f"train.backbone: {tmp_path / 'model.pth'} is a web page and not the weights (26 bytes, the "
    )
    backbone = {"name": "dino_vits8", "weights": "/no/weights.pth"}
    (fault,) = faults_before(config, tmp_path, backbone=backbone)
    assert fault.startswith("backbone.weights: no file '/no/weights.pth'")
    assert faults_before(config, tmp_path, backbone=backbone | {"weights": "official"}) == []  # a run fetches it
