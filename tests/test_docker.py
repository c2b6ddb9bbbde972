"""The files of `docker/`, as far as they can be checked without building or starting anything."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.scripts.scripts import start as ray_start

from pipeline.command.cli import app
from pipeline.config import load_config
from pipeline.operations.pins import pins

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
KUBE = {name: yaml.safe_load((ROOT / f"docker/{name}.yaml").read_text()) for name in ("rayjob", "raycluster")}
GIB = 2**30


def cluster(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = KUBE[name]["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


def pods(name: str) -> list[dict[str, Any]]:
    spec = cluster(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def stages() -> dict[str, str]:
    """Target -> its part of the Dockerfile."""
    parts = re.split(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def assert_parses(command: Any, arguments: list[str]) -> None:
    """The options exist and their values have the right types; nothing is run."""
    command.make_context(command.name, list(arguments))


def assert_is_a_command_of_ours(words: list[str]) -> None:
    program, name, *arguments = words
    assert program == "u2label"
    group: Any = typer.main.get_command(app)
    assert_parses(group.commands[name], arguments)


def test_the_images_are_pinned_copy_what_exists_and_end_as_a_user_of_their_own() -> None:
    assert list(stages()) == ["base", "cpu", "gpu"]
    for target in ("cpu", "gpu"):
        assert re.findall(r"^USER (\w+)$", stages()[target], re.MULTILINE)[-1] == "ray"
    installs = re.findall(r"pip install [^&\n]*", DOCKERFILE)
    assert installs and all("-c constraints.txt" in install for install in installs)
    assert "faiss-gpu-cu12" in pins(ROOT)
    allowed = set((ROOT / ".dockerignore").read_text().splitlines())
    sources = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "model", "workers", "pipeline", "configs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in allowed


def test_compose_starts_what_is_there_with_pinned_versions() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"head", "worker", "s3", "photos"}
    for service in ("head", "worker", "photos"):
        build = services[service]["build"]
        assert (ROOT / "docker" / build["context"] / build["dockerfile"]).is_file()
        assert build["target"] in stages()
    assert services["s3"]["image"] == f"motoserver/moto:{pins(ROOT)['moto']}"
    assert all(port.startswith("127.0.0.1:") for port in services["head"]["ports"])
    for service in ("head", "worker"):
        ray, start, *options = shlex.split(services[service]["command"])
        assert (ray, start) == ("ray", "start")
        assert_parses(ray_start, options)
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
    compile(services["photos"]["command"][2], "photos", "exec")


@pytest.mark.parametrize("name", KUBE)
def test_manifests_have_the_shape_that_kuberay_wants(name: str) -> None:
    manifest = KUBE[name]
    assert (manifest["apiVersion"], manifest["kind"].lower()) == ("ray.io/v1", name)
    assert cluster(name)["rayVersion"] == pins(ROOT)["ray"]
    for group in [cluster(name)["headGroupSpec"], *cluster(name)["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert_parses(ray_start, [f"--{key}={value}" for key, value in group["rayStartParams"].items()])
    for pod in pods(name):
        (container,) = pod["containers"]
        assert container["image"].split(":")[1] in stages()
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        for resource, limit in container["resources"]["limits"].items():
            assert amount(container["resources"]["requests"][resource]) <= amount(limit)


@pytest.mark.parametrize("name", KUBE)
def test_one_node_holds_the_actors_and_the_trainers_of_the_imagenet_config(name: str) -> None:
    workers = load_config(str(ROOT / "configs/imagenet.yaml")).workers
    count = max(workers.size.max, workers.train_workers)
    node = pods(name)[1]["containers"][0]["resources"]["limits"]
    assert amount(node["nvidia.com/gpu"]) >= count * workers.gpus
    assert amount(node["cpu"]) >= count * workers.cpus + 2
    assert amount(node["memory"]) >= (count * workers.memory_gb + 16) * GIB  # and the object store in /dev/shm


def amount(text: str) -> float:
    for unit, factor in {"Gi": GIB, "Mi": 2**20}.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)


def test_the_job_runs_a_command_that_exists_on_a_file_of_the_image() -> None:
    words = shlex.split(KUBE["rayjob"]["spec"]["entrypoint"])
    assert_is_a_command_of_ours(words)
    assert words[2].startswith("/opt/u2label/")
    assert (ROOT / words[2].removeprefix("/opt/u2label/")).is_file()


@pytest.mark.parametrize("name", ["docker/compose.yaml", "docker/raycluster.yaml", "docs/operations.md"])
def test_commands_in_comments_and_docs_exist(name: str) -> None:
    text = re.sub(r"\\\n\s*|\n#\s+(?=--)", " ", (ROOT / name).read_text())
    commands = re.findall(r"^(?:#)?\s*(u2label (?!.*\.\.\. )[^#\n]*)", text, re.MULTILINE)
    assert commands
    for command in commands:
        assert_is_a_command_of_ours(shlex.split(command.split(" | ")[0].replace(" --set ...", "")))
