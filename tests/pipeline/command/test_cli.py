"""The command: help, exit codes, errors without tracebacks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.command import cli
from pipeline.command.cli import app
from pipeline.command.cluster import submit
from pipeline.command.common import user_errors
from pipeline.command.run_options import as_arguments, as_seconds
from pipeline.engine.receipts import Receipt
from pipeline.errors import StageFailed
from tests.pipeline.label_files import random_run

RUNNER = CliRunner()


def write(folder: Path, **overrides: str) -> str:
    (folder / "photos").mkdir(exist_ok=True)
    path = folder / "c.yaml"
    path.write_text(
        f"source: {{uri: {folder / 'photos'}}}\nrun: {{uri: {folder / 'run'}}}\n"
        "backbone: {name: patch-dct, weights: 'random:0'}\n"
    )
    return str(path)


@pytest.mark.parametrize("command", ["run", "status", "plan", "report", "demo", "submit", "clean", "weights", "name"])
def test_every_command_has_help(command: str) -> None:
    result = RUNNER.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_config_show_fills_in_defaults(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["config", "show", write(tmp_path), "--set", "maskcut.tau=0.2"])
    assert result.exit_code == 0
    assert "tau: 0.2" in result.output
    assert "k: 300" in result.output


def test_a_typo_ends_with_code_2_and_one_paragraph(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["run", write(tmp_path), "--set", "maskcut.tao=0.2"])
    assert result.exit_code == 2
    assert "maskcut.tao: unknown key; did you mean 'tau'?" in result.output
    assert "Traceback" not in result.output


def test_a_source_without_images_ends_with_code_2(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["run", write(tmp_path)])
    assert result.exit_code == 2
    assert "source.uri" in result.output


def test_status_and_plan_before_anything_was_done(tmp_path: Path) -> None:
    status = RUNNER.invoke(app, ["status", write(tmp_path), "--json"])
    assert status.exit_code == 0
    assert json.loads(status.output)["images"] is None
    assert "nothing done yet" in RUNNER.invoke(app, ["status", write(tmp_path)]).output
    assert "nothing is measured yet" in RUNNER.invoke(app, ["plan", write(tmp_path)]).output
    assert not (tmp_path / "run").exists()


def test_plan_as_json_after_the_index_is_made(tmp_path: Path) -> None:
    from PIL import Image

    from pipeline.config import load_config
    from pipeline.engine.stage import index_folder
    from pipeline.sources.index import build_index

    path = write(tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "a.png")
    config = load_config(path)
    build_index(index_folder(config), config.source.uri, shard_size=config.source.shard_size)
    result = RUNNER.invoke(app, ["plan", path, "--json"])
    assert result.exit_code == 0, result.output
    steps = json.loads(result.output)["steps"]
    assert [(step["stage"], step["pending"]) for step in steps] == [("instances", 1), ("clusters", 1), ("panoptic", 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "run.uri=foo://bucket/x"], "run.uri: cannot write to foo://bucket/x"),
        (["--set", "backbone.name=dino_vits8", "--set", "backbone.weights={weights}"], "is neither a"),
    ],
)
def test_what_cannot_work_is_refused_before_work(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "w.pth").write_bytes(bytes(range(256)) * 2)
    filled = [argument.format(weights=tmp_path / "w.pth") for argument in arguments]
    result = RUNNER.invoke(app, ["run", write(tmp_path), *filled])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_folder_as_config_is_refused(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["status", str(tmp_path)])
    assert result.exit_code == 2
    assert "cannot read the config file" in result.output


def test_parts_outside_a_run_are_scored_into_a_folder_that_is_named(tmp_path: Path) -> None:
    parts, _ = random_run(tmp_path, 4)
    command = ["evaluate", "panoptic", parts, parts, "--mode", "identity"]
    refused = RUNNER.invoke(app, command)
    assert refused.exit_code == 2
    assert "--output: name a folder" in refused.output
    scored = RUNNER.invoke(app, [*command, "--output", str(tmp_path / "out"), "--json"])
    assert scored.exit_code == 0
    assert json.loads(scored.output)["all_images"]["PQ"] == 1.0
    assert (tmp_path / "out" / "panoptic.json").exists()


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_every_command_can_answer_in_json() -> None:
    without = [name for name, command in commands(get_command(app)) if "--json" not in options_of(command)]
    assert without == []


def options_of(command: Any) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts]


def test_an_error_is_one_document_too(tmp_path: Path) -> None:
    config = write(tmp_path)
    for arguments in (["run", config], ["plan", config, "--set", "x"], ["clean", config], ["report", str(tmp_path)]):
        result = RUNNER.invoke(app, [*arguments, "--json"])
        assert result.exit_code == 2
        document = json.loads(result.stdout)
        assert document["exit_code"] == 2
        assert document["error"] in " ".join(result.stderr.split("\n"))
        assert document["failed"] == []


def test_failed_shards_are_told_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    failed = Receipt("instances", "abc", 7, False, 1.0, error="Traceback\nValueError: planted")
    with pytest.raises(SystemExit) as ended, user_errors(as_json=True):
        raise StageFailed("instances: 1 of 8 shards are not done", [failed])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["failed"] == [{"stage": "instances", "shard": 7, "error": "Traceback\nValueError: planted"}]
    assert "ValueError: planted" in printed.err  # in the table for people


def test_a_config_is_shown_as_json(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["config", "show", write(tmp_path), "--json"])
    assert json.loads(result.stdout)["clusters"]["k"] == 300


def test_logs_as_json_lines(tmp_path: Path) -> None:
    for arguments, variables in ((["--log-format", "json"], {}), ([], {"U2LABEL_LOG_FORMAT": "json"})):
        result = RUNNER.invoke(app, [*arguments, "run", write(tmp_path)], env=variables)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert json.loads(line)["level"] == "error"
    result = RUNNER.invoke(app, ["run", write(tmp_path)])
    assert result.stderr.startswith("u2label: source.uri")


def test_weights_are_told_as_json_and_fetched_one_file_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    told = json.loads(RUNNER.invoke(app, ["weights", "dinov2_vits14", "--json"]).stdout)
    assert [(file["weights"], file["present"]) for file in told["files"]] == [("official", False), ("index", False)]
    both = RUNNER.invoke(app, ["weights", "dinov2_vits14", "--download", "--from-index"])
    assert (both.exit_code, "run the command for each" in both.output) == (2, True)
    other = RUNNER.invoke(app, ["weights", "dino_vits8", "--from-index", "--json"])
    assert (other.exit_code, json.loads(other.stdout)["exit_code"]) == (2, 2)
    assert "\n" not in json.loads(other.stdout)["error"]


def test_a_job_takes_the_options_of_a_run() -> None:
    run_only = {"config", "overrides", "address", "as_json"}
    assert inspect.signature(cli.run).parameters.keys() - run_only <= inspect.signature(submit).parameters.keys()
    arguments = as_arguments(stages="a,b", reindex=False, extend=True, retry=None, max_failed_fraction=0.5)
    assert arguments == ["--stages", "a,b", "--extend", "--max-failed-fraction", "0.5"]


def test_durations() -> None:
    assert [as_seconds(text) for text in ("90", "90s", "30m", "1.5h")] == [90, 90, 1800, 5400]
    for text in ("", "h", "3x", "-1", "1h30m"):
        with pytest.raises(typer.BadParameter, match="is no duration"):
            as_seconds(text)
