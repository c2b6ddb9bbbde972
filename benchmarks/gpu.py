"""What a GPU does in a second: the instances stage step by step, CRF, STEGO, the panoptic model; and how far its
results are from those of the CPU.

    PYTHONPATH=. python benchmarks/gpu.py --output benchmarks/results/gpu.json

Takes less than six minutes (`--budget`), no file and no download: weights are seeded and random, photos are made. Needs
torch, timm, torchvision, numpy, scipy and pillow. What needs more, fails, runs out of memory or of its time is an entry
that says so, and what is found is written after every entry. `--device cpu --tiny` tries all of it in seconds, in the
way of a GPU.

Prints one JSON object. `entries`: the median of some calls in seconds, photos a second, the highest memory of the
device; `parity`: figures as `tests/gpu/parity.py` describes them; `instances_photos_per_s`: of all steps, one after the
other.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_cases import FULL, TINY, Cases, Entry
from machine import describe_machine, publish

from model.backbone.names import patch_size
from tests.gpu import made
from tests.gpu.parity import PARITIES

MOST_CALLS = 20
PARITY_LIMIT = 20.0  # seconds
Found = dict[str, Any]


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in what takes longer. On the main thread of a Unix."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(call: Callable[[], Found], limit: float) -> Found:
    """What the call finds, or why not: nothing that goes wrong in one is the end of the others."""
    if limit <= 0:
        return {"error": "no time was left"}
    try:
        with at_most(limit):
            return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".strip()[:300]}


def measured(entry: Entry, device: str, seconds: float) -> Found:
    """The median of calls, of two that are not measured on."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    call, times = entry.build(), list[float]()
    while len(times) < 3 or (sum(times[2:]) < seconds and len(times) < MOST_CALLS):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[2:])
    found: Found = {"seconds": round(median, 5), "calls": len(times) - 2}
    if entry.photos:
        found["photos_per_s"] = round(entry.photos / median, 2)
    return found | ({"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if cuda else {})


def free(device: str) -> None:
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def stage_speeds(entries: list[Found]) -> list[Found]:
    """Photos a second of the whole stage, of each backbone, precision and batch of which every step is known."""
    usual = (each for each in entries if not each.get("pinned"))
    known = {json.dumps({k: v for k, v in each.items() if k in KEYS}, sort_keys=True): each for each in usual}

    def per_photo(**wanted: Any) -> float:
        found = known.get(json.dumps(wanted, sort_keys=True), {})
        return 1 / found["photos_per_s"] if "photos_per_s" in found else float("nan")

    speeds = []
    for each in entries:
        if each["what"] != "backbone" or each["form"] != "as it is":
            continue
        name, batch = each["backbone"], each["batch"]
        grid = each["side"] // patch_size(name)
        same = {"backbone": name, "dtype": each["dtype"]}
        beside = [per_photo(what=what, batch=batch) for what in ("resize", "transfer", "crops")]
        beside += [per_photo(what="maskcut", batch=batch, grid=grid), per_photo(what="embedding", **same)]
        beside.append(per_photo(what="backbone", batch=batch, form="as it is", **same))
        for fast in (False, True):
            total = sum(beside) + per_photo(what="crf of masks", batch=batch, fast=fast)
            if total == total:
                speeds.append({**same, "batch": batch, "fast": fast, "photos_per_s": round(1 / total, 2)})
    return speeds


KEYS = ("what", "backbone", "dtype", "batch", "form", "grid", "fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="everything so small that a CPU does it in seconds")
    parser.add_argument("--budget", type=float, default=330, help="seconds in all")
    parser.add_argument("--only", nargs="*", help="entries of these names, such as backbone, maskcut and parity")
    parser.add_argument("--output", type=Path, help="JSON file to keep the result in")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device: `--device cpu --tiny` tries everything without one")
    start, scale = time.perf_counter(), TINY if options.tiny else FULL
    report: Found = {"benchmark": "gpu", "machine": describe_machine(options.device), "tiny": options.tiny}
    report |= {"entries": [], "parity": {}}

    def left(limit: float) -> float:
        return min(limit, options.budget - (time.perf_counter() - start))

    def keep() -> None:
        report["instances_photos_per_s"] = stage_speeds(report["entries"])
        report["seconds"] = round(time.perf_counter() - start, 1)
        if options.output:
            options.output.write_text(json.dumps(report, indent=2) + "\n")
        free(options.device)

    for name, figures in PARITIES.items() if not options.only or "parity" in options.only else ():
        with made.full_float32():
            report["parity"][name] = attempt(lambda f=figures: f(options.device, scale.parity), left(PARITY_LIMIT))
        keep()
    with made.as_a_gpu(options.device):
        for entry in Cases(options.device, scale, options.tiny).all():
            if not options.only or entry.what in options.only:
                found = attempt(lambda e=entry: measured(e, options.device, scale.seconds), left(entry.limit))
                report["entries"].append({"what": entry.what, **entry.settings, **found})
                keep()
    publish(report, options.output)


if __name__ == "__main__":
    main()
