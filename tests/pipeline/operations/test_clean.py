"""What a config no longer names is listed and removed, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.engine.lease import run_lease
from pipeline.engine.receipts import Receipt, ReceiptLog
from pipeline.engine.stage import index_folder
from pipeline.errors import ConfigError, LeaseHeld
from pipeline.operations.clean import clean, print_cleaned
from pipeline.sources.index import build_index, open_index
from pipeline.stages.latest import LATEST
from pipeline.stages.table import resolve_stages
from pipeline.store import storage

OLD = "0123456789ab"


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"{request.getfixturevalue('s3_bucket')}/run"


@pytest.fixture
def config(run: str, tmp_path: Path) -> Config:
    """An indexed source, and one part, artifact and receipt of each stage."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"photo")
    config = Config.model_validate(
        {
            "source": {"uri": str(tmp_path / "photos")},
            "run": {"uri": run},
            "backbone": {"name": "patch-dct", "weights": "random:0"},
        }
    )
    build_index(index_folder(config), config.source.uri)
    write_stages(config)
    return config


def write_stages(config: Config) -> None:
    for stage in resolve_stages(config, open_index(index_folder(config))).values():
        storage.write_bytes(stage.part(0), b"PAR1....PAR1")
        storage.write_bytes(f"{stage.folder}/artifact.json", b"{}")
        log = ReceiptLog(config.run.uri, stage.name, stage.fingerprint)
        log.append(Receipt(stage.name, stage.fingerprint, 0, True, 1.0))
        log.flush()


def files(run: str) -> set[str]:
    return {info.path for info in storage.walk(run)}


def changed(config: Config, **sections: object) -> Config:
    return Config.model_validate(config.model_dump() | sections)


def test_a_run_of_one_config_has_nothing_to_clean(config: Config, run: str) -> None:
    before = files(run)
    assert clean(config, remove=True).stale == []
    assert files(run) == before


def test_other_settings_go_and_what_nobody_knows_stays(config: Config, run: str) -> None:
    before = files(run)
    other = changed(config, clusters={"k": 7})  # other clusters and panoptic parts, the same instances
    write_stages(other)
    build_index(f"{run}/index/{OLD}", config.source.uri)
    storage.write_bytes(f"{run}/train_2/{OLD}/checkpoint.pt", b"1234")  # of a round that the config has no more
    both = {name for name in files(run) if name.startswith("receipts/instances-")}
    before, old = before | both, files(run) - before - both
    unknown = {
        f"instances/{OLD}.bak/part-00000.parquet",
        "instances/notes.txt",
        f"photos/{OLD}/a.jpg",
        f"receipts/elsewhere-{OLD}-1.jsonl",
        "report.html",
        f"evaluation/{OLD}/scores.json",
    }
    for name in unknown:
        storage.write_bytes(f"{run}/{name}", b"mine")
    fingerprints = {"clusters": resolve_stages(other, open_index(index_folder(other)))["clusters"].fingerprint}
    storage.write_bytes(f"{run}/{LATEST}", json.dumps({"fingerprints": fingerprints}).encode())

    dry = clean(config)
    assert not dry.removed
    assert files(run) == before | old | unknown | {LATEST}
    gone = clean(config, remove=True)
    assert (gone.removed, gone.stale, gone.bytes) == (True, dry.stale, dry.bytes)
    assert files(run) == before | unknown | {LATEST}
    kinds = [entry.kind for entry in gone.stale]
    assert (kinds.count("stage"), kinds.count("index"), kinds.count("receipts")) == (3, 1, 2)
    marked = [entry.path.split("/")[0] for entry in gone.stale if entry.last_run]
    assert sorted(marked) == ["clusters", "receipts"]
    train = next(entry for entry in gone.stale if entry.path.startswith("train_2"))
    assert (train.files, train.bytes) == (1, 4)


def test_a_config_that_is_kept_keeps_its_folders(config: Config, run: str) -> None:
    other = changed(config, clusters={"k": 7})
    write_stages(other)
    before = files(run)
    assert clean(config, [other], remove=True).stale == []
    assert files(run) == before
    with pytest.raises(ConfigError, match="--keep: a config of"):
        clean(config, [changed(config, run={"uri": f"{run}-2"})])


def test_a_run_at_work_is_left_alone(config: Config, run: str) -> None:
    write_stages(changed(config, clusters={"k": 7}))
    before = files(run)
    with run_lease(run):
        with pytest.raises(LeaseHeld):
            clean(config, remove=True)
        assert before < files(run)
        assert clean(config).stale  # looking is allowed
    assert files(run) == before


def test_a_config_that_never_ran_names_nothing_and_removes_nothing(config: Config, run: str) -> None:
    never = changed(config, source={**config.source.model_dump(), "shard_size": 7})
    with pytest.raises(ConfigError, match="has no index of"):
        clean(never, remove=True)


def test_links_are_not_followed(config: Config, run: str, tmp_path: Path) -> None:
    if storage.is_remote(run):
        pytest.skip("buckets have no links")
    elsewhere = tmp_path / "elsewhere" / OLD
    elsewhere.mkdir(parents=True)
    (elsewhere / "part-00000.parquet").write_bytes(b"precious")
    Path(run, "instances", OLD).symlink_to(elsewhere)
    Path(run, "features").symlink_to(elsewhere.parent)
    assert clean(config, remove=True).stale == []
    assert (elsewhere / "part-00000.parquet").exists()


def test_the_table(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    print_cleaned(clean(config))
    assert "nothing that the config does not name" in " ".join(capsys.readouterr().out.split())
    write_stages(changed(config, clusters={"k": 7}))
    print_cleaned(clean(config))
    assert "2 folders and 2 files of receipts, 0.0 MiB; with --yes they are removed" in capsys.readouterr().out
    print_cleaned(clean(config, remove=True))
    assert "removed 2 folders and 2 files of receipts" in capsys.readouterr().out
