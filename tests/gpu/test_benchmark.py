"""`benchmarks/gpu.py`, tiny and on the CPU, so that it works where it is meant to run."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.gpu.parity import PARITIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def report(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> dict[str, Any]:
    arguments = ["gpu.py", "--device", "cpu", "--tiny", "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()
    return json.loads(output.read_text())


@pytest.mark.slow
def test_everything_is_measured(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "at_most", lambda seconds: contextlib.nullcontext())  # however busy the machine is
    found = report(benchmark, monkeypatch, tmp_path / "gpu.json", "--budget", "3600")
    assert [each for each in [*found["entries"], *found["parity"].values()] if "error" in each] == []
    assert {each["what"] for each in found["entries"]} == {
        "backbone", "resize", "transfer", "maskcut", "crf of masks", "crf of classes", "crops", "embedding",
        "stego step", "panoptic training step", "panoptic inference", "k-means",
    }  # fmt: skip
    assert all(each["seconds"] > 0 for each in found["entries"])
    assert found["parity"].keys() == PARITIES.keys() and found["machine"]["cores"] > 0
    assert len(found["instances_photos_per_s"]) == 8  # of two precisions, batches and forms of the CRF


def test_without_time_every_entry_says_so(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = report(benchmark, monkeypatch, tmp_path / "gpu.json", "--budget", "0")
    assert {each["error"] for each in found["entries"]} == {"no time was left"}
    assert found["instances_photos_per_s"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_to_do(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "there is no CUDA device: `--device cpu --tiny`" in capsys.readouterr().err


def test_what_fails_or_takes_too_long_is_an_entry(benchmark: ModuleType) -> None:
    def out_of_memory() -> dict[str, Any]:
        raise MemoryError("no 12 GiB")

    def endless() -> dict[str, Any]:
        while True:
            time.sleep(0.01)

    assert benchmark.attempt(out_of_memory, 5) == {"error": "MemoryError: no 12 GiB"}
    assert benchmark.attempt(endless, 0.05) == {"error": "TimeoutError: took more than 0.05 s"}
    assert benchmark.attempt(lambda: {"seconds": 1}, 5) == {"seconds": 1}
