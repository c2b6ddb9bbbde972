"""The command: help, exit codes, errors without tracebacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from tests.pipeline.coco.label_files import random_run

RUNNER = CliRunner()


def write(folder: Path, **overrides: str) -> str:
    (folder / "photos").mkdir(exist_ok=True)
    path = folder / "c.yaml"
    path.write_text(
        f"source: {{uri: {folder / 'photos'}}}\nrun: {{uri: {folder / 'run'}}}\n"
        "backbone: {name: patch-dct, weights: 'random:0'}\n"
    )
    return str(path)


@pytest.mark.parametrize("command", ["run", "status", "plan", "report", "demo"])
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
    from pipeline.sources import build_index
    from pipeline.stages import index_folder

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
        (["--set", "backbone.name=dino_vits8", "--set", "backbone.weights={weights}"], "not a checkpoint that torch"),
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
