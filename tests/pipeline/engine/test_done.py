"""What counts as done: parts that are there, whole, and made of their inputs as they are now."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config
from pipeline.engine import done
from pipeline.engine.done import FitChanges, Look, begin_fit
from pipeline.engine.stage import Stage, index_folder
from pipeline.errors import ConfigError
from pipeline.operations.retry import remove_parts
from pipeline.operations.run import _fit
from pipeline.operations.source import open_source
from pipeline.sources.index import open_index
from pipeline.sources.index_files import write_manifest
from pipeline.stages.base import Run
from pipeline.stages.clusters import Clusters
from pipeline.stages.run import open_run, resolve_run
from tests.pipeline.report.tiny_runs import config_of, make_run, run_stage, scene


@pytest.fixture
def config(tmp_path: Path) -> Config:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.jpg").write_bytes(scene(number))
    config = config_of(source, tmp_path / "run")
    return config.model_copy(update={"source": config.source.model_copy(update={"shard_size": 2})})


@pytest.fixture
def table(config: Config) -> dict[str, Stage]:
    """A finished run of three shards."""
    stages = make_run(config, ("instances", "clusters"))
    run_stage(stages["panoptic"], config, stages)
    return stages


def pending(table: dict[str, Stage]) -> dict[str, list[int]]:
    look = Look(table.values())
    return {name: look.pending(stage) for name, stage in table.items()}


def redo(stage: Stage, config: Config, table: dict[str, Stage], shard: int) -> None:
    Path(stage.part(shard)).unlink(missing_ok=True)
    others = {other: Path(stage.part(other)).read_bytes() for other in range(3) if Path(stage.part(other)).exists()}
    run_stage(stage, config, table)
    for other, data in others.items():
        Path(stage.part(other)).write_bytes(data)


NOTHING = {"instances": [], "clusters": [], "panoptic": []}


def test_a_part_without_its_input_is_not_done_and_can_be_read(table: dict[str, Stage], config: Config) -> None:
    assert pending(table) == NOTHING
    Path(table["instances"].part(1)).unlink()
    assert pending(table) == {"instances": [1], "clusters": [], "panoptic": [1]}
    assert Look(table.values()).usable(table["panoptic"]) == {0, 1, 2}
    redo(table["instances"], config, table, 1)
    assert pending(table) == NOTHING  # the same rows came out


def test_other_rows_of_an_input_make_what_was_made_of_them_old(table: dict[str, Stage], config: Config) -> None:
    Path(config.source.uri, "2.jpg").write_bytes(scene(40))  # under the same name, and the index does not know
    redo(table["instances"], config, table, 1)
    assert pending(table) == {"instances": [], "clusters": [], "panoptic": [1]}
    assert Look(table.values()).usable(table["panoptic"]) == {0, 2}
    assert Look(table.values()).changes(table["clusters"]) == FitChanges(known=3, changed=1)
    redo(table["panoptic"], config, table, 1)
    assert pending(table) == NOTHING


def test_a_part_that_somebody_replaced_is_seen_though_it_claims_the_checksum(table: dict[str, Stage]) -> None:
    part = Path(table["instances"].part(2))
    rows = pq.read_table(part)
    place = rows.schema.get_field_index("score")
    scores = pa.array([[0.5] * len(row) for row in rows["score"].to_pylist()], rows.schema.field(place).type)
    pq.write_table(rows.set_column(place, rows.schema.field(place), scores), part)
    assert pending(table) == {"instances": [], "clusters": [], "panoptic": [2]}


def test_a_fit_whose_parts_are_mostly_others_is_to_be_made_again(table: dict[str, Stage], config: Config) -> None:
    for shard in (0, 1):
        Path(config.source.uri, f"{2 * shard}.jpg").write_bytes(scene(50 + shard))
        redo(table["instances"], config, table, shard)
    assert pending(table) == {"instances": [], "clusters": [0], "panoptic": [0, 1, 2]}


def test_a_fit_goes_on_from_a_checkpoint_of_the_same_inputs_alone(table: dict[str, Stage], config: Config) -> None:
    clusters = table["clusters"]
    checkpoint = Path(clusters.folder, "checkpoint.pt")
    Path(clusters.folder, "artifact.json").unlink()
    checkpoint.write_bytes(b"half way")
    assert not begin_fit(clusters) and checkpoint.exists()
    Path(config.source.uri, "0.jpg").write_bytes(scene(50))
    redo(table["instances"], config, table, 0)
    assert begin_fit(clusters) and not checkpoint.exists()
    assert not begin_fit(clusters)


def test_a_fit_that_was_killed_as_it_cleared_the_last_one_is_to_be_made(
    table: dict[str, Stage], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: str) -> None:
        Path(folder, "inputs.json").unlink()
        raise KeyboardInterrupt

    Path(config.source.uri, "0.jpg").write_bytes(scene(50))
    redo(table["instances"], config, table, 0)
    monkeypatch.setattr(done.storage, "remove_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        begin_fit(table["clusters"])
    assert pending(table)["clusters"] == [0]


def test_a_run_begins_a_fit_of_other_inputs_anew_and_says_so(
    table: dict[str, Stage], config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    clusters, seen = table["clusters"], list[bool]()
    checkpoint = Path(clusters.folder, "checkpoint.pt")

    class Fit(Clusters):
        def fit(self, run: Run, stage: Stage) -> str:
            seen.append(checkpoint.exists())
            return "fitted"

    Path(clusters.folder, "artifact.json").unlink()
    for name, said in (("6.jpg", False), ("0.jpg", True)):  # one is not in the run
        checkpoint.write_bytes(b"half way")
        Path(config.source.uri, name).write_bytes(scene(50))
        redo(table["instances"], config, table, 0)
        _fit(Fit(), clusters, open_run(config.run.uri))
        assert ("from the start, as what was there is of other inputs" in capsys.readouterr().err) == said
    assert seen == [True, False]


def test_another_artifact_makes_all_parts_old(table: dict[str, Stage]) -> None:
    artifact = Path(table["clusters"].folder, "artifact.json")
    artifact.write_text(artifact.read_text().replace("9.0", "8.0"))
    assert pending(table) == {"instances": [], "clusters": [], "panoptic": [0, 1, 2]}


def test_a_source_that_grew_and_changed_leaves_its_other_shards_done(table: dict[str, Stage], config: Config) -> None:
    Path(config.source.uri, "7.jpg").write_bytes(scene(7))
    photo = Path(config.source.uri, "5.jpg")
    photo.write_bytes(photo.read_bytes())
    os.utime(photo, ns=(0, photo.stat().st_mtime_ns + 10**9))
    extended = resolve_run(config, open_source(config, extend=True)[0])
    assert {name: stage.fingerprint for name, stage in extended.stages.items()} == {
        name: stage.fingerprint for name, stage in table.items()
    }
    assert pending(extended.stages) == {"instances": [2, 3], "clusters": [], "panoptic": [2, 3]}
    for name in ("instances", "panoptic"):
        run_stage(extended.stages[name], config, extended.stages)
    assert pending(extended.stages) == NOTHING
    assert Look(extended.stages.values()).changes(extended.stages["clusters"]).added == 1


def test_parts_that_are_younger_than_their_inputs_are_not_asked(
    table: dict[str, Stage], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = open_index(index_folder(config)).made
    for age, stage in enumerate(table.values(), start=1):
        for path in Path(stage.folder).iterdir():
            os.utime(path, (made + 10 * age, made + 10 * age))

    def asked(part: str) -> None:
        raise AssertionError(f"{part} was read")

    monkeypatch.setattr(done, "_footer", asked)
    assert pending(table) == NOTHING


def test_a_copy_of_a_run_without_its_times_is_done(table: dict[str, Stage], config: Config) -> None:
    for age, path in enumerate(sorted(Path(config.run.uri).rglob("*"), reverse=True)):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert pending(table) == NOTHING


def test_parts_of_a_time_when_they_did_not_say_are_done(table: dict[str, Stage], config: Config) -> None:
    for stage in table.values():
        for shard in range(3) if stage.kind == "shard" else ():
            rows = pq.read_table(stage.part(shard))
            pq.write_table(rows.replace_schema_metadata({}), stage.part(shard))
    Path(table["clusters"].folder, "inputs.json").unlink()
    assert pending(table) == NOTHING
    redo(table["instances"], config, table, 0)  # and says now
    assert pending(table) == {"instances": [], "clusters": [], "panoptic": [0]}


def test_a_photo_that_was_replaced_under_an_index_of_before_has_its_shard_done_again(
    table: dict[str, Stage], config: Config
) -> None:
    index = open_index(index_folder(config))
    write_manifest(replace(index, versions="", made=0.0))
    for stage in table.values():
        for shard in range(3) if stage.kind == "shard" else ():
            rows = pq.read_table(stage.part(shard))
            pq.write_table(rows.replace_schema_metadata({}), stage.part(shard))
    Path(table["clusters"].folder, "inputs.json").unlink()
    Path(config.source.uri, "2.jpg").write_bytes(scene(40) + b" ")
    extended = resolve_run(config, open_source(config, extend=True)[0])
    assert pending(extended.stages) == {"instances": [1], "clusters": [], "panoptic": [1]}


def test_retry_removes_the_parts_with_such_rows(table: dict[str, Stage], config: Config) -> None:
    (whole := Path(config.source.uri, "3.jpg")).write_bytes(b"")
    redo(table["instances"], config, table, 1)
    redo(table["panoptic"], config, table, 1)
    whole.write_bytes(scene(3))
    run = resolve_run(config, open_source(config)[0])
    with pytest.raises(ConfigError, match="--retry: broken is unknown; the statuses are missing, empty, undecodable"):
        remove_parts(run, ["broken"])
    remove_parts(run, ["missing", "crashed"])
    assert pending(table) == NOTHING
    again = resolve_run(config, open_source(config)[0])
    remove_parts(again, ["empty"])
    assert pending(table) == {"instances": [1], "clusters": [], "panoptic": [1]}
    redo(table["instances"], config, table, 1)
    assert again.look.done(table["instances"]) == {0, 1, 2}  # what `u2label run` says at its end
    assert index_folder(config) == run.index.folder
