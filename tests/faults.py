"""Faults that are done to a run on purpose, and the damage that is looked for when it has ended.

A `Victim` is a run folder, the driver of its run (the command itself, in a process of its own) and the Ray cluster that
the driver joins. What is done to it follows from a seed; when, from the time that things take. Shared by the tests and
`benchmarks/chaos.py`.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from ray.cluster_utils import Cluster

from pipeline.config import load_config
from pipeline.engine.shards import read_columns
from pipeline.store import storage
from tests.conftest import RAY_ENVIRONMENT

NODE_CPUS = 2
# Either is 130 to a shell. CPython ends itself by SIGINT, whatever the program returns, when the interrupt came while
# an `exec` made a data class during an import.
INTERRUPTED = frozenset({130, -signal.SIGINT})
DEADLINE_S = 180


@contextmanager
def small_cluster(nodes: int = 2) -> Iterator[Cluster]:
    """A head without CPUs, to which drivers connect, and `nodes` nodes of 2 CPUs. This process does not join it."""
    before = {name: os.environ.get(name) for name in RAY_ENVIRONMENT}
    os.environ.update(RAY_ENVIRONMENT)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=NODE_CPUS)
        yield cluster
    finally:
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A file system of its own at `folder`; False, and an ordinary folder, where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Victim:
    """A run that is disturbed, and whose driver ends with the `with` block. Each fault is a method that says whether it
    could be done just now."""

    def __init__(self, config: Path, cluster: Cluster, *, seed: int, disk: Path | None = None) -> None:
        loaded = load_config(str(config))
        self.config, self.cluster, self.disk = config, cluster, disk
        self.run_uri, self.photos = loaded.run.uri, Path(loaded.source.uri)
        self.shard_size = loaded.source.shard_size
        self.random = random.Random(seed)
        self.done: collections.Counter[str] = collections.Counter()
        self.log = config.with_suffix(".log")
        self.driver: subprocess.Popen[bytes] | None = None
        self._silent = 0  # bytes of the log before the driver said anything

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.driver is not None and self.poll() is None:
            self.driver.kill()
            self.driver.wait()

    def start(self) -> None:
        command = [sys.executable, "-m", "pipeline", "run", str(self.config), "--address", self.cluster.address]
        self._silent = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                command, env=os.environ | RAY_ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
            )

    def poll(self) -> int | None:
        """The exit code of the driver, None while it runs."""
        assert self.driver is not None
        return self.driver.poll()

    def wait(self, until: Callable[[], bool]) -> None:
        """Until something is true, or the driver ends, or it takes far too long."""
        deadline = time.monotonic() + DEADLINE_S
        while not until() and self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing came in {DEADLINE_S} s; see {self.log}")
            time.sleep(0.02)

    def do(self, kind: str) -> bool:
        """Do one fault by its name, and count it when it could be done."""
        done: bool = getattr(self, kind)()
        if done:
            self.done[kind] += 1
        return done

    # While it runs.

    def kill_actor(self) -> bool:
        return self._signal_actor(signal.SIGKILL)

    def suspend_actor(self) -> bool:
        """Stopped for two seconds: late, but not lost."""
        actor = self._signal_actor(signal.SIGSTOP)
        if actor:
            time.sleep(2)
            for process in self.actors():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
        return actor

    def kill_node(self) -> bool:
        """SIGKILL of a node's raylet and all its processes; another node joins in its place."""
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id)
        at_work = [node for node in nodes if self._actors_of(node)]
        self.cluster.remove_node(self.random.choice(at_work or nodes), allow_graceful=False)
        self.cluster.add_node(num_cpus=NODE_CPUS)
        return True

    def hang_actor(self) -> bool:
        """A pipe that nobody writes to in place of a photo, until the worker that opened it has ended itself."""
        shard = self._shard_to_come()
        if shard is None:
            return False
        photo = sorted(self.photos.iterdir())[shard * self.shard_size]
        aside = self.photos.parent / photo.name
        before = {actor.pid for actor in self.actors()}
        photo.rename(aside)
        os.mkfifo(photo)
        try:
            self.wait(lambda: shard in self.parts("instances") or self._one_is_gone(before))
            return shard not in self.parts("instances") and self.poll() is None
        finally:
            aside.replace(photo)

    def fill_disk(self) -> bool:
        """No room on the disk of the run folder for two seconds."""
        if self.disk is None or not self.actors():  # before there are workers, the driver refuses to begin
            return False
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        time.sleep(2)
        filler.unlink()
        return True

    # Ends of the driver.

    def kill_driver(self) -> bool:
        return self._end_driver(signal.SIGKILL, frozenset({-signal.SIGKILL}))

    def terminate_driver(self) -> bool:
        return self._end_driver(signal.SIGTERM, INTERRUPTED)

    def interrupt_driver(self) -> bool:
        return self._end_driver(signal.SIGINT, INTERRUPTED)

    # While it is stopped.

    def delete_part(self) -> bool:
        return self._harm(storage.remove)

    def truncate_part(self) -> bool:
        return self._harm(lambda uri: os.truncate(uri, Path(uri).stat().st_size * self.random.randrange(100) // 100))

    def garbage_part(self) -> bool:
        return self._harm(lambda uri: Path(uri).write_bytes(self.random.randbytes(Path(uri).stat().st_size)))

    def leave_litter(self) -> bool:
        def litter(part: str) -> None:
            folder = self.random.choice([self.run_uri, part.rsplit("/", 1)[0]])
            Path(storage.join(folder, f"{storage.TEMPORARY}part-00000.parquet-1")).write_bytes(b"half")

        return self._harm(litter)

    def parts(self, stage: str) -> dict[int, str]:
        """The parts of a stage that are there, by shard."""
        found = {}
        for fingerprint in folders(self.run_uri, stage):
            folder = storage.join(self.run_uri, stage, fingerprint)
            names = [name for name in storage.list_folder(folder) if name.startswith("part-")]
            found.update({int(name[5:-8]): storage.join(folder, name) for name in names})
        return found

    def actors(self) -> list[psutil.Process]:
        """Workers of shard stages in the nodes of the cluster."""
        found = [actor for node in self.cluster.list_all_nodes() for actor in self._actors_of(node)]
        return sorted(found, key=lambda process: process.pid)

    def _actors_of(self, node: Any) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            (raylet,) = node.all_processes["raylet"]
            return [child for child in psutil.Process(raylet.process.pid).children() if _is_actor(child)]
        return []

    def _signal_actor(self, number: int) -> bool:
        actors = self.actors()
        with contextlib.suppress(psutil.NoSuchProcess):
            if actors:
                self.random.choice(actors).send_signal(number)
                return True
        return False

    def _one_is_gone(self, before: set[int]) -> bool:
        return bool(before - {actor.pid for actor in self.actors()})

    def _shard_to_come(self) -> int | None:
        """A shard that no worker has yet, but soon will have; None at the end of the stage, or when none is at work."""
        shards = len(list(self.photos.iterdir())) // self.shard_size
        done = self.parts("instances")
        pending = [shard for shard in range(shards) if shard not in done]
        return pending[8] if len(pending) > 8 and self.actors() else None

    def _end_driver(self, number: int, expected: frozenset[int]) -> bool:
        assert self.driver is not None
        if self.poll() is not None or self.log.stat().st_size == self._silent:  # before that it has not begun
            return False
        self.driver.send_signal(number)
        code = self.driver.wait(timeout=DEADLINE_S)
        if code not in expected and code != 0:  # 0: it was just about to end
            raise AssertionError(f"the driver ended with {code} after signal {number}: {self.log.read_text()[-6000:]}")
        return code in expected

    def _harm(self, harm: Callable[[str], Any]) -> bool:
        parts = [uri for stage in ("instances", "panoptic") for uri in self.parts(stage).values()]
        if not parts:
            return False
        harm(self.random.choice(sorted(parts)))
        return True


def _is_actor(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "Shards)" in " ".join(process.cmdline())
    return False


def torment(
    victim: Victim,
    running: Mapping[str, float],
    ends: Mapping[str, float],
    stopped: Mapping[str, float],
    *,
    limit: int,
    pause_s: tuple[float, float],
    first: Iterable[str] = (),
) -> None:
    """Do faults to a run, `limit` of them at most, and start its driver again until it has ended well.

    The mappings weigh the kinds: while it runs, those that end its driver, and while it is stopped (up to three).
    Those that are named `first` come before any that are drawn.
    RuntimeError when the driver ends with an error that the faults do not explain.
    """
    weights, planned = {**running, **ends}, list(first)
    victim.start()
    while (code := victim.poll()) != 0:
        if code is not None:
            if code not in {1, -signal.SIGKILL, *INTERRUPTED}:  # 1: shards failed, for want of disk
                raise RuntimeError(f"the driver ended with {code}: {victim.log.read_text()[-2000:]}")
            for _ in range(victim.random.randrange(4)):
                if victim.done.total() < limit:
                    victim.do(_draw(victim.random, stopped))
            victim.start()
        victim.wait(_after(victim.random.uniform(*pause_s)))
        if victim.done.total() < limit and victim.poll() is None:
            kind = planned[0] if planned else _draw(victim.random, weights)
            if victim.do(kind):
                planned = planned[1:]


def _draw(source: random.Random, weights: Mapping[str, float]) -> str:
    return source.choices(list(weights), list(weights.values()))[0]


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@dataclass(frozen=True)
class Damage:
    """What is not as in the undisturbed run."""

    lost: int  # rows
    duplicated: int
    wrong: int  # other content, and artifacts of fits that differ
    litter: int  # temporary files
    leases: int


def damage(run_uri: str, undisturbed_uri: str) -> Damage:
    """Compare the rows of every stage with those of an undisturbed run, and look for what a run must not leave."""
    lost = duplicated = wrong = 0
    for stage in ("instances", "panoptic"):
        ours, theirs = (rows(uri, stage) for uri in (run_uri, undisturbed_uri))
        names = collections.Counter(row["image_id"] for row in ours)
        expected = {row["image_id"]: row for row in theirs}
        lost += len(expected.keys() - names.keys())
        duplicated += names.total() - len(names)
        wrong += sum(row != expected.get(row["image_id"]) for row in ours)
    wrong += artifact(run_uri) != artifact(undisturbed_uri)
    litter = [name for name in every_file(run_uri) if name.rsplit("/", 1)[-1].startswith(storage.TEMPORARY)]
    return Damage(lost, duplicated, wrong, len(litter), int(storage.exists(storage.join(run_uri, "lease.json"))))


def rows(run_uri: str, stage: str) -> list[dict[str, Any]]:
    """All rows of the one fingerprint of a stage, in the order of the parts."""
    (fingerprint,) = folders(run_uri, stage)
    folder = storage.join(run_uri, stage, fingerprint)
    names = sorted(name for name in storage.list_folder(folder) if name.startswith("part-"))
    return [row for name in names for row in read_columns(storage.join(folder, name)).to_pylist()]


def artifact(run_uri: str) -> bytes:
    """The centroids of the run's clusters."""
    (fingerprint,) = folders(run_uri, "clusters")
    return storage.read_bytes(storage.join(run_uri, "clusters", fingerprint, "centroids.npy"))


def folders(run_uri: str, stage: str) -> list[str]:
    """The fingerprints of a stage that have files."""
    return sorted({name.split("/")[1] for name in every_file(run_uri) if name.startswith(f"{stage}/")})


def every_file(run_uri: str) -> list[str]:
    if not storage.is_remote(run_uri):
        folder = Path(run_uri)
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    with contextlib.suppress(FileNotFoundError):  # nothing there yet
        return [info.path for info in storage.walk(run_uri)]
    return []


def remove_run(run_uri: str) -> None:
    if storage.is_remote(run_uri):
        for name in every_file(run_uri):
            storage.remove(storage.join(run_uri, name))
    else:
        shutil.rmtree(run_uri, ignore_errors=True)
