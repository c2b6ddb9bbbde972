"""Connecting to Ray: a local instance of just the size that is needed, or a running cluster, checked before work."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
import ray.data
from ray.autoscaler.sdk import request_resources

from pipeline.config.workers import WorkersConfig
from pipeline.engine.heap import ONE_HEAP
from pipeline.engine.log import say
from pipeline.errors import ConfigError

RECEIPT_STORE_BYTES = 150 * 2**20  # the object store carries receipts, shard numbers and centroids
CONNECT_S = 10.0  # until an address that does not answer is given up
LOOK_S = 5.0  # between looks for nodes that a run waits for
CLIENT_PORT = 10001  # of `ray://head`
SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes that the system takes
SOCKET = (
    "/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store"  # in the temporary folder, at its longest
)
SHORT_FOLDER = "/tmp/ray"
STARTS = 3  # of a local Ray that does not come up in time
SLOW_START = "timed out during startup"  # in what Ray raises then, a plain Exception


@contextmanager
def connect(workers: WorkersConfig, address: str | None, *, trains: bool = False, wait_s: float = 0) -> Iterator[None]:
    """A Ray connection for the time of the block, with resources checked; one that exists already is kept as it is.

    `trains`: a fit will want `workers.train_workers` processes. `wait_s`: how long a cluster may take to get the nodes
    that are asked for, of its autoscaler if it has one.
    """
    if ray.is_initialized():
        await_resources(workers, trains=trains, wait_s=wait_s)
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _quieten_ray()
    with _keeping_sigterm():
        if address:
            _join(address)
        else:
            _start_local(workers)
    try:
        await_resources(workers, trains=trains, wait_s=wait_s if address else 0)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """What the program does on SIGTERM stays: ray.init puts an exit of its own in its place."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _join(address: str) -> None:
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # Ray asks 20 times, for 40 s each
    try:
        _require_listener(address)
        ray.init(address=address, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--address: cannot join the Ray cluster {address!r}: {reason}; is it running, and reachable from here?"
        ) from error


def _require_listener(address: str) -> None:
    """OSError when nobody listens at an address: Ray would try for minutes, and say so in lines of its own."""
    scheme, _, place = (_named_by_auto() if address == "auto" else address).rpartition("://")
    url = urllib.parse.urlsplit(f"//{place}")
    host, port = url.hostname, url.port or (CLIENT_PORT if scheme == "ray" else None)
    if host is None or port is None:  # for Ray to judge
        return
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError:
        if host not in {"localhost", "127.0.0.1", "::1"}:
            raise
        own = ray.util.get_node_ip_address()  # under which Ray speaks to this machine
        socket.create_connection((own, port), timeout=CONNECT_S).close()


def _named_by_auto() -> str:
    """The address that `auto` stands for; empty where only Ray can tell."""
    with suppress(OSError):
        return os.environ.get("RAY_ADDRESS") or (Path(_temporary_folder()) / "ray/ray_current_cluster").read_text()
    return ""


def _temporary_folder() -> str:
    """Below which Ray keeps what belongs to a session, unless it is told another."""
    of_system = os.environ.get("TMPDIR") if sys.platform == "linux" else None  # Ray heeds it there alone
    return os.environ.get("RAY_TMPDIR") or of_system or "/tmp"


def _quieten_ray() -> None:
    """Our own lines tell the progress; Ray's remarks stay in its log files."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    for handler in logging.getLogger(ray.data.__name__).handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def await_resources(workers: WorkersConfig, *, trains: bool = False, wait_s: float = 0) -> None:
    """As `check_resources`, which is asked again for so long while an autoscaler is asked for nodes."""
    deadline, said = time.monotonic() + wait_s, ""
    try:
        while (lacking := _lacking(workers, trains=trains)) is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConfigError(f"{lacking}; waited {wait_s:.0f} s for it") if said else lacking
            if str(lacking) != said:
                say(f"waiting for nodes, {left:.0f} s at most: {lacking}")
                _ask_for_nodes(workers)
            said = str(lacking)
            time.sleep(LOOK_S)
    finally:
        if said:  # from here on the actors ask for themselves; nobody is to bring nodes for a run that has given up
            request_resources(bundles=[])
    if said:
        say("the nodes are there")


def _lacking(workers: WorkersConfig, *, trains: bool) -> ConfigError | None:
    """What `check_resources` has to say."""
    try:
        check_resources(workers, trains=trains)
    except ConfigError as error:
        return error
    return None


def _ask_for_nodes(workers: WorkersConfig) -> None:
    """Tell the autoscaler which actors there will be; a cluster that has none takes no notice."""
    actor = {"CPU": workers.cpus, "GPU": workers.gpus, "memory": math.ceil(workers.memory_gb * 2**30)}
    bundle = {name: each for name, each in (actor | workers.resources).items() if each}
    request_resources(bundles=[bundle] * max(workers.size.min, workers.train_workers))


def check_resources(workers: WorkersConfig, *, trains: bool = False) -> None:
    """ConfigError with the numbers when the cluster cannot hold the actors that are asked for, node by node."""
    nodes = _nodes()
    size, count = workers.size.min, "workers.size" if workers.size.min == workers.size.max else "workers.size.min"
    _require_custom(workers.resources, nodes)
    wanted = {
        "CPU": (workers.cpus, 1, "CPUs", "cpus"),
        "GPU": (workers.gpus, 1, "GPUs", "gpus"),
        "memory": (workers.memory_gb * 2**30, 2**30, "GiB of memory", "memory_gb"),
        **{name: (each, 1, name, f"resources.{name}") for name, each in workers.resources.items()},
    }
    for resource, (each, unit, name, key) in wanted.items():
        offered = [node.get(resource, 0) for node in nodes]
        total, largest = sum(offered), max(offered, default=0)
        have = f"the cluster has {total / unit:.3g}, its largest node {largest / unit:.3g}"
        if size * each > total or each > largest:
            raise ConfigError(
                f"{count} x workers.{key} asks for {size * each / unit:g} {name} in actors of "
                f"{each / unit:g}, {have}; lower these keys or connect to a larger cluster with --address"
            )
    places = _places(nodes, {resource: each for resource, (each, *_) in wanted.items()})
    if places < size:
        custom = "".join(f" and {each:g} {name}" for name, each in workers.resources.items())
        raise ConfigError(
            f"{count} asks for {size} actors of {workers.cpus:g} CPUs, {workers.gpus:g} GPUs and "
            f"{workers.memory_gb:g} GiB{custom}, of which the {len(nodes)} nodes hold {places}; lower {count}"
        )
    if trains and workers.train_workers:
        require_room(
            "workers of a training", "workers.train_workers", workers.train_workers, workers.cpus, workers.gpus
        )
    if workers.kmeans_device == "cuda" and not any(node.get("GPU", 0) for node in nodes):
        raise ConfigError("workers.kmeans_device is 'cuda', the cluster has no GPU; set it to cpu")


def actors_now(workers: WorkersConfig) -> int:
    """How many actors of a k-means the cluster has room for at this moment, within `workers.size`."""
    size = workers.size
    if size.min == size.max:
        return size.min
    wanted = {"CPU": workers.cpus, "memory": workers.memory_gb * 2**30}
    if workers.kmeans_device == "cuda":
        wanted["GPU"] = workers.gpus or 1
    return min(max(_places(_nodes(), wanted), size.min), size.max)


def _nodes() -> list[dict[str, float]]:
    """The resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _places(nodes: Sequence[Mapping[str, float]], wanted: Mapping[str, float]) -> int:
    """How many actors fit the nodes, each of which must lie on one node with all that it asks for."""
    slack = 1e-6  # 0.3 holds three times 0.1
    return sum(min(int(node.get(name, 0) / each + slack) for name, each in wanted.items() if each) for node in nodes)


def _require_custom(resources: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> None:
    offered = sorted({name for node in nodes for name in node if not name.startswith("node:")})
    for name, each in resources.items():
        if name not in offered:
            given = json.dumps({name: max(1, each)})
            raise ConfigError(
                f"workers.resources asks for {name!r}, which no node of the cluster has (they have "
                f"{', '.join(offered)}); correct the name, or start nodes with: ray start --resources='{given}'"
            )


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


def _start_local(workers: WorkersConfig) -> None:
    """Ray in this machine. CPUs are logical there: as many as the least number of actors asks for, and two to spare."""
    needed = workers.size.min * workers.memory_gb
    installed = psutil.virtual_memory().total / 2**30
    if needed > installed:
        raise ConfigError(
            f"workers.size x workers.memory_gb asks for {needed:g} GiB of memory, this machine has {installed:.3g}; "
            "lower them"
        )
    folder = _session_folder()
    for name, value in ONE_HEAP.items():
        os.environ.setdefault(name, value)  # Ray's processes have the environment of this one
    try:
        start_ray(
            max(os.cpu_count() or 1, math.ceil(max(workers.size.min, workers.train_workers) * workers.cpus)) + 2, folder
        )
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot start Ray on this machine, in {folder or _temporary_folder()}: {error}; set RAY_TMPDIR to a "
            f"folder that you may write to, with a path of at most {SOCKET_PATH - len(SOCKET)} bytes"
        ) from error


def start_ray(num_cpus: int, folder: str | None = None) -> None:
    """A Ray instance in this machine, with its session in `folder`. Ray gives it half a minute to come up, which a busy
    machine may not; such a start is repeated, then a ConfigError. Other failures are Ray's own."""
    for left in reversed(range(STARTS)):
        there = psutil.Process().children()
        try:
            ray.init(
                address="local",  # never a cluster that happens to run on this machine: --address names that one
                num_cpus=num_cpus,
                object_store_memory=RECEIPT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=folder,
            )
            return
        except Exception as error:
            if SLOW_START not in str(error):
                raise
            _stop_servers(set(psutil.Process().children()) - set(there))
            if not left:
                raise ConfigError(
                    f"Ray did not come up on this machine, {STARTS} times in half a minute each; let other work on it "
                    f"end first, or read what Ray says in {folder or _temporary_folder() + '/ray'}/session_latest/logs"
                ) from error
            say("Ray did not come up in half a minute, is the machine busy? starting it again")


def _stop_servers(processes: Iterable[psutil.Process]) -> None:
    """What Ray leaves of a start that failed; its other processes end without these."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.name() in ("gcs_server", "raylet"):
                process.kill()
                process.wait()


def _session_folder() -> str | None:
    """A short folder for Ray's session where the path of its sockets would be too long; None: Ray's own choice."""
    folder = _temporary_folder()
    if len(os.fsencode(folder)) + len(SOCKET) <= SOCKET_PATH:
        return None
    say(
        f"Ray keeps its session in {SHORT_FOLDER}, as sockets in {folder} would have a path of more than {SOCKET_PATH} "
        f"bytes; set RAY_TMPDIR to a folder of at most {SOCKET_PATH - len(SOCKET)} bytes to choose another"
    )
    return SHORT_FOLDER
