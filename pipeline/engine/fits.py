"""How a fit runs: the actors of a k-means, the threads and device of a training, and what a long one says."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from pipeline.config.workers import WorkersConfig
from pipeline.engine.log import say


class Iteration(Protocol):
    """What a k-means tells of one of its iterations."""

    @property
    def iteration(self) -> int: ...

    @property
    def inertia(self) -> float: ...


def kmeans_actors(workers: WorkersConfig) -> dict[str, Any]:
    """The arguments of a fit by k-means that say where its actors run."""
    from pipeline.engine.cluster import actors_now

    return {
        "num_actors": actors_now(workers),
        "cpus_per_actor": workers.cpus,
        "device": workers.kmeans_device,
        "gpus_per_actor": workers.gpus or 1,
    }


def said_now_and_then(stage: str, every_s: float = 10.0) -> Callable[[Iteration], None]:
    """Says how far a k-means is, but not at each iteration."""
    last = time.monotonic()

    def tell(report: Iteration) -> None:
        nonlocal last
        if time.monotonic() - last > every_s:
            last = time.monotonic()
            say(f"{stage}: iteration {report.iteration}, inertia {report.inertia:.6g}", stage=stage)

    return tell


@contextlib.contextmanager
def fit_threads(workers: WorkersConfig, cpus: float | None = None) -> Iterator[float]:
    """The CPUs of each worker of a training; in the driver's own process, where no actor is at work meanwhile, `cpus`
    or as many as all workers have, up to those of this machine, as threads of torch for the time of the block."""
    import torch

    if workers.train_workers:
        yield workers.cpus
        return
    threads = max(1, min(int(cpus or workers.size.max * workers.cpus), _machine_cpus()))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def device_of_fits(workers: WorkersConfig) -> str:
    """Training in the driver's own process stays on its CPU: Ray assigns GPUs to workers alone."""
    return workers.device if workers.train_workers else "cpu"


def _machine_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
