"""The command of a job, its environment, and what is said before it starts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from ray.runtime_env import RuntimeEnv

from pipeline.config import Config, parse_config
from pipeline.errors import ConfigError
from pipeline.operations.parcel import Parcel, checkout
from pipeline.operations.submit import (
    _runtime_env,
    entrypoint,
    local_places,
    remarks,
    with_absolute_paths,
)

CHECKOUT = checkout()


def config(**sections: Any) -> Config:
    sections = {"source": {"uri": "s3://bucket/photos"}, "run": {"uri": "s3://bucket/run"}} | sections
    return parse_config(sections, origin="test")


def test_the_command_checks_the_image_and_quotes_its_options() -> None:
    check, run = entrypoint(["--stages", "a b;c"], "image").split(" && ")
    assert check == "python -m pipeline.operations.pins"
    words = ["exec", "python", "-m", "pipeline", "run", "submitted.yaml", "--stages", "a b;c", "--address", "auto"]
    assert shlex.split(run) == words
    assert entrypoint([], "pip").startswith("exec python")
    assert entrypoint([], "unchecked").startswith("exec python")


def test_variables_go_along_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert _runtime_env(CHECKOUT, "image", ["AWS_ENDPOINT_URL"]) == {
        "env_vars": {"MALLOC_ARENA_MAX": "1", "AWS_ENDPOINT_URL": "http://store:9000"}
    }
    with pytest.raises(ConfigError, match="--env: NOT_SET_HERE is not set here"):
        _runtime_env(CHECKOUT, "image", ["NOT_SET_HERE"])
    said = " ".join(remarks(config(), Parcel(CHECKOUT, (), (), True), "http://head:8265", ["AWS_SECRET_ACCESS_KEY"]))
    assert "AWS_SECRET_ACCESS_KEY: whoever may talk to the job server can read" in said
    assert "secret" not in said.replace("AWS_SECRET_ACCESS_KEY", "")


def test_pip_installs_the_pinned_versions_but_never_ray() -> None:
    packages = _runtime_env(CHECKOUT, "pip", [])["pip"]["packages"]
    assert packages[1] == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert "torch==2.15.0" in packages
    assert not [line for line in packages if line.startswith("ray")]
    assert RuntimeEnv(pip={"packages": packages})["pip"]["packages"] == packages


def test_a_changed_constraint_makes_another_environment(tmp_path: Path) -> None:
    def environment(constraints: str) -> str:
        (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch"]\n')
        (tmp_path / "constraints.txt").write_text(constraints)
        return str(RuntimeEnv(pip=_runtime_env(tmp_path, "pip", [])["pip"]).pip_uri())

    assert environment("torch==2.15.0\nsympy==1\n") == environment("torch==2.15.0\nsympy==1\n")
    assert environment("torch==2.15.0\nsympy==1\n") != environment("torch==2.15.0\nsympy==2\n")


def test_an_installed_package_has_no_pins_to_check(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="submit from a clone, or with --environment unchecked"):
        _runtime_env(tmp_path, "image", [])
    assert _runtime_env(tmp_path, "unchecked", []) == {"env_vars": {"MALLOC_ARENA_MAX": "1"}}


def test_local_paths_are_absolute_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = config(run={"uri": "runs/x"}, backbone={"weights": "dino.pth"}, semantics={"refine_backbone": "resnet.pth"})
    sent = with_absolute_paths(here)
    assert local_places(sent) == {
        "run.uri": f"{tmp_path}/runs/x",
        "backbone.weights": f"{tmp_path}/dino.pth",
        "semantics.refine_backbone": f"{tmp_path}/resnet.pth",
    }
    parcel = Parcel(CHECKOUT, (), (), True)
    assert "every node of the cluster must see" in " ".join(remarks(sent, parcel, "http://head:8265"))
    assert "must see" not in " ".join(remarks(sent, parcel, "http://127.0.0.1:8265"))
    assert local_places(config()) == {}
    for word in ("random:0", "index"):
        named = config(backbone={"name": "dinov2_vits14", "weights": word})
        assert with_absolute_paths(named) == named
        assert local_places(named) == {}


def test_what_stays_here_is_told() -> None:
    parcel = Parcel(CHECKOUT, ("pyproject.toml",), ("runs/a", ".env"), False, ("pipeline/new.py",))
    said = remarks(config(), parcel, "http://head:8265")
    assert "sending 1 files" in said[0]
    assert "no git checkout" in said[0]
    assert said[1].endswith("runs/a, .env")
    assert "git does not track them: pipeline/new.py" in said[2]
