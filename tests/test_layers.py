"""The layers: model <- workers <- pipeline, ray in `pipeline` alone, the rooms of `pipeline` in their order, no circle
of modules anywhere, and cheap imports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
THIRD_PARTY = {
    "model": {"torch", "torchvision", "timm", "numpy", "scipy", "safetensors", "pycocotools"},
    "workers": {"torch", "numpy", "scipy", "pyarrow", "PIL", "pillow_heif", "faiss", "pycocotools", "sknetwork"},
}
OWN = {"model": {"model"}, "workers": {"model", "workers"}, "pipeline": {"model", "workers", "pipeline"}}
ROOMS = (  # of `pipeline`, from the top: each imports only what stands behind it
    "command",
    "operations",
    "report",
    "evaluate",
    "export",
    "stages",
    "train",
    "predict",
    "semantics",
    "clusters",
    "engine",
    "sources",
    "config",
    "store",
    "errors",
)


def modules(package: str) -> dict[str, Path]:
    """Files by the name that they are imported under."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def imports(file: Path) -> tuple[str, ...]:
    """Full names of everything a file imports, also inside functions and for types alone: the modules, and the names
    taken out of them."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def own_imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules among `known` that a file imports."""
    for name in imports(file):
        module = name if name in known else name.rpartition(".")[0]
        if module in known and known[module] != file:
            yield module


def test_pillow_opens_only_formats_that_are_named() -> None:
    """It finds the format by content, and starts programs for some."""
    calls = [
        line
        for path in ("model", "workers", "pipeline")
        for file in (ROOT / path).rglob("*.py")
        for line in file.read_text().splitlines()
        if "Image.open(" in line and "photo.jpg" not in line
    ]
    assert len(calls) == 2
    assert all("formats=" in line for line in calls)


@pytest.mark.parametrize("package", ["model", "workers", "pipeline"])
def test_a_layer_imports_only_what_lies_below(package: str) -> None:
    for module, file in modules(package).items():
        for name in {name.split(".")[0] for name in imports(file)}:
            if name in {"model", "workers", "pipeline", "tests", "benchmarks"}:
                assert name in OWN[package], f"{module} imports {name}"
            elif package in THIRD_PARTY and name not in sys.stdlib_module_names:
                assert name in THIRD_PARTY[package], f"{module} imports {name}"


def test_the_rooms_of_the_pipeline_are_those_that_are_listed() -> None:
    entries = {entry.stem for entry in (ROOT / "pipeline").iterdir() if entry.name != "__pycache__"}
    assert entries == {"__init__", "__main__", *ROOMS}
    assert len(entries) <= 17


def test_a_room_imports_only_what_stands_behind_it() -> None:
    known = modules("pipeline")
    for module, file in known.items():
        if module in {"pipeline", "pipeline.__main__"}:
            continue
        here = ROOMS.index(module.split(".")[1])
        for used in own_imports(file, known):
            if used != "pipeline":
                assert ROOMS.index(used.split(".")[1]) >= here, f"{module} imports {used}"


def test_there_is_no_circle_of_modules() -> None:
    known = {name: file for package in OWN for name, file in modules(package).items()}
    graph = {module: set(own_imports(file, known)) for module, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another: {' <- '.join(error.args[1])}")


def test_the_engine_knows_no_stage_by_name() -> None:
    """It runs what it is handed, as do the commands that look at a run."""
    from pipeline.config import Config
    from pipeline.stages.table import all_stages

    sections = {*Config.model_fields, "instances"}  # keys of the config, and what receipts count
    names = {stage.name for stage in all_stages()} - sections
    files = [*(ROOT / "pipeline" / "engine").glob("*.py"), *(ROOT / "pipeline" / "operations").glob("*.py")]
    for file in files:
        words = {
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not words & names, f"{file.relative_to(ROOT)} names {words & names}"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("pipeline.command.cli, pipeline.config", {"torch", "ray", "pyarrow"}),
        (  # nothing to do, `status`
            "pipeline.operations.run, pipeline.operations.status, pipeline.stages.things, pipeline.stages.targets",
            {"torch", "ray", "faiss", "scipy"},
        ),
        ("pipeline.stages.panoptic, workers.panoptic", {"torch", "timm"}),  # each worker of a stage without pixels
        ("workers.instances, pipeline.engine.shards", {"timm", "torchvision"}),  # each worker with `patch-dct`
        (  # what runs where little is installed: the tests of a GPU
            "tests.conftest, tests.gpu.parity, workers.batch_cuts, workers.maskcut, workers.fast_crf, "
            "workers.embeddings, workers.training.trainer, model.backbone.build, model.panoptic.network",
            {"ray", "pyarrow", "pydantic", "faiss", "pycocotools", "fsspec"},
        ),
    ],
)
def test_what_is_not_used_is_not_loaded(modules: str, heavy: set[str]) -> None:
    """These take seconds, in every command and every worker."""
    code = f"import sys, {modules}; sys.exit(', '.join({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.stderr.strip() == ""


def test_benchmarks_ask_for_what_there_is() -> None:
    """They are run by hand, so that nobody else would notice."""
    wanted = [
        (file.name, node.module, alias.name)
        for file in sorted((ROOT / "benchmarks").glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] in OWN
        for alias in node.names
    ]
    assert len(wanted) > 100
    gone = []
    for file, module, name in wanted:
        try:
            found = hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            found = False
        if not found:
            gone.append(f"{file}: {module} has no {name}")
    assert gone == []
