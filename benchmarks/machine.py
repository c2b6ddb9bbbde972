"""What the benchmarks say of the machine that they ran on."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, versions, and the GPU when one was used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    described = {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    if device != "cpu":
        described["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return described


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call, to the end of what it began on the device."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def publish(result: dict[str, Any], output: Path | None) -> None:
    """Print a result as JSON, and keep it in a file when one is named."""
    text = json.dumps(result, indent=2)
    print(text)
    if output:
        output.write_text(text + "\n")
