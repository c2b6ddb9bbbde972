"""Connecting to Ray: a local instance of just the size that is needed, or a running cluster, checked before work."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray
import ray.data

from pipeline.config import Config
from pipeline.errors import ConfigError

RECEIPT_STORE_BYTES = 150 * 2**20  # the object store carries receipts, shard numbers and centroids


@contextmanager
def connect(config: Config, address: str | None) -> Iterator[None]:
    """A Ray connection for the time of the block, with resources checked; one that exists already is kept as it is."""
    if ray.is_initialized():
        check_resources(config)
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _quieten_ray()
    if address:
        try:
            ray.init(address=address, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--address: cannot join the Ray cluster {address!r}: {error}; is it running, and reachable from here?"
            ) from error
    else:
        _start_local(config)
    try:
        check_resources(config)
        yield
    finally:
        ray.shutdown()


def _quieten_ray() -> None:
    """Our own lines tell the progress; Ray's remarks stay in its log files."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    for handler in logging.getLogger(ray.data.__name__).handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def check_resources(config: Config) -> None:
    """ConfigError with the numbers when the cluster cannot hold the actors that the config asks for, node by node."""
    workers = config.workers
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {
        "CPU": (workers.cpus, 1, "CPUs", "cpus"),
        "GPU": (workers.gpus, 1, "GPUs", "gpus"),
        "memory": (workers.memory_gb * 2**30, 2**30, "GiB of memory", "memory_gb"),
    }
    for resource, (each, unit, name, key) in wanted.items():
        total, largest = (pick(node.get(resource, 0) for node in nodes) for pick in (sum, max))
        have = f"the cluster has {total / unit:.3g}, its largest node {largest / unit:.3g}"
        if workers.size * each > total or each > largest:
            raise ConfigError(
                f"workers.size x workers.{key} asks for {workers.size * each / unit:g} {name} in actors of "
                f"{each / unit:g}, {have}; lower these keys or connect to a larger cluster with --address"
            )
    places = sum(min(int(node.get(r, 0) / w[0]) for r, w in wanted.items() if w[0]) for node in nodes)
    if places < workers.size:
        raise ConfigError(
            f"workers.size asks for {workers.size} actors of {workers.cpus:g} CPUs, {workers.gpus:g} GPUs and "
            f"{workers.memory_gb:g} GiB, of which the {len(nodes)} nodes hold {places}; lower workers.size"
        )
    if trains_with_ray(config):
        require_room(
            "workers of a training", "workers.train_workers", workers.train_workers, workers.cpus, workers.gpus
        )
    if workers.kmeans_device == "cuda" and not any(node.get("GPU", 0) for node in nodes):
        raise ConfigError("workers.kmeans_device is 'cuda', the cluster has no GPU; set it to cpu")


def trains_with_ray(config: Config) -> bool:
    """Whether a fit of this config has workers of Ray Train."""
    trained = config.semantics.method == "stego" or config.semantics.refine != "none" or config.train.steps > 0
    return trained and config.workers.train_workers > 0


def require_room(what: str, key: str, count: int, cpus: float, gpus: float) -> None:
    """ConfigError, with the numbers, unless Ray is there and has room for `count` processes at once: it would wait for
    ever. `what` they are and under which `key` they are counted goes into the message."""
    if not ray.is_initialized():
        raise RuntimeError(f"Ray is not initialised: call ray.init before asking for {count} {what}")
    for name, each in {"CPU": cpus, "GPU": gpus}.items():
        found = ray.cluster_resources().get(name, 0)
        if count * each > found:
            raise ConfigError(
                f"{count} {what} of {each:g} {name} need {count * each:g}, the Ray cluster has {found:g}: lower {key}, "
                f"or add nodes{' or compute on the CPU' if name == 'GPU' else ''}"
            )


def _start_local(config: Config) -> None:
    """Ray in this machine. CPUs are logical there: as many as the actors ask for, and two to spare."""
    workers = config.workers
    needed = workers.size * workers.memory_gb
    installed = psutil.virtual_memory().total / 2**30
    if needed > installed:
        raise ConfigError(
            f"workers.size x workers.memory_gb asks for {needed:g} GiB of memory, this machine has {installed:.3g}; "
            "lower them"
        )
    ray.init(
        address="local",  # never a cluster that happens to run on this machine: --address names that one
        num_cpus=max(os.cpu_count() or 1, math.ceil(max(workers.size, workers.train_workers) * workers.cpus)) + 2,
        object_store_memory=RECEIPT_STORE_BYTES,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
