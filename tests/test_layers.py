"""The layers: model <- workers <- pipeline, ray in `pipeline` alone, and cheap imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
THIRD_PARTY = {
    "model": {"torch", "torchvision", "timm", "numpy", "scipy", "safetensors", "pycocotools"},
    "workers": {"torch", "numpy", "scipy", "pyarrow", "PIL", "faiss", "pycocotools", "sknetwork"},
}
OWN = {"model": {"model"}, "workers": {"model", "workers"}, "pipeline": {"model", "workers", "pipeline"}}


def imports(file: Path) -> Iterator[str]:
    """Top-level names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield (node.module or "").split(".")[0]


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
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            if name in {"model", "workers", "pipeline", "tests", "benchmarks"}:
                assert name in OWN[package], f"{file.relative_to(ROOT)} imports {name}"
            elif package in THIRD_PARTY and name not in sys.stdlib_module_names:
                assert name in THIRD_PARTY[package], f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("pipeline.cli, pipeline.config", {"torch", "ray", "pyarrow"}),
        ("pipeline.runner, pipeline.status", {"torch", "ray", "faiss"}),  # a run with nothing to do, `status`
        ("pipeline.actors, workers.panoptic", {"torch", "timm"}),  # each worker of a stage without pixels
        ("workers.instances, pipeline.shards", {"timm", "torchvision"}),  # each worker with `patch-dct`
    ],
)
def test_what_is_not_used_is_not_loaded(modules: str, heavy: set[str]) -> None:
    """These take seconds, in every command and every worker."""
    code = f"import sys, {modules}; sys.exit(', '.join({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.stderr.strip() == ""
