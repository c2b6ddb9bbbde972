"""Hundreds of faults done to runs, and the damage that is left: none.

    PYTHONPATH=. python benchmarks/chaos.py [--faults 200] [--seed 0] [--images 300] [--output FILE]

Runs of generated scenes through a Ray cluster of three nodes on this machine are disturbed, one after the other, until
so many faults are done: workers and nodes killed, workers suspended or hung, the disk full, drivers killed, terminated
and interrupted, parts deleted, cut short or overwritten and temporary files left while nothing runs. One more run goes
to an S3 server whose proxy is away for 30 s, throttles and resets. Each is compared with an undisturbed run, row by
row. Prints JSON: faults by kind, rows lost, duplicated or wrong, files left, and what a fault costs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from machine import describe_machine, publish
from ray.cluster_utils import Cluster

from pipeline.operations.demo.scenes import write_scenes
from tests.conftest import KEYS
from tests.fault_proxy import SLOW_DOWN, FaultProxy, Reset, Rule
from tests.faults import Victim, damage, remove_run, rows, small_cluster, small_disk, torment

RUNNING = {"kill_actor": 10, "suspend_actor": 2, "kill_node": 1, "hang_actor": 0.5, "fill_disk": 1}
ON_S3 = {"kill_actor": 6, "outage": 0.5}
ENDS = {"kill_driver": 1.5, "terminate_driver": 1, "interrupt_driver": 1}
STOPPED = {"delete_part": 1, "truncate_part": 1, "garbage_part": 1, "leave_litter": 1}
PAUSE_S = (0.5, 3.0)
S3_FAULTS = 12
OUTAGE_S = 30.0
WEATHER = [Rule(SLOW_DOWN, method="PUT", rate=0.1, times=None), Rule(Reset(), method="GET", rate=0.05, times=None)]


def write_config(path: Path, photos: Path, run: str) -> Path:
    config = {
        "source": {"uri": str(photos), "shard_size": 2},
        "run": {"uri": run},
        "backbone": {"name": "patch-dct", "weights": "random:0"},
        "maskcut": {"image_size": 160, "tau": 0.4, "max_masks": 2},
        "embedding": {"crop_size": 64},
        "clusters": {"k": 4},
        # Workers are killed for no fault of their shards, and a hang is told from the start of a worker.
        "workers": {"size": 2, "cpus": 1, "memory_gb": 0.6, "attempts": 20, "hang_timeout_s": 25},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def undisturbed(config: Path, cluster: Cluster) -> float:
    """Run to the end; seconds."""
    started = time.perf_counter()
    with Victim(config, cluster, seed=0) as victim:
        torment(victim, {}, {}, {}, limit=0, pause_s=(0.1, 0.1))
    return time.perf_counter() - started


@contextlib.contextmanager
def bucket() -> Iterator[FaultProxy]:
    """An S3 server behind a proxy, which every process that is started inside the block finds by the AWS variables."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with FaultProxy(f"http://{host}:{port}") as proxy:
        os.environ.update({**KEYS, "AWS_ENDPOINT_URL": proxy.url})
        s3fs.S3FileSystem().mkdir("chaos")
        yield proxy
    server.stop()


class CloudVictim(Victim):
    """A run whose folder is a bucket behind a proxy."""

    def __init__(self, config: Path, cluster: Cluster, proxy: FaultProxy, *, seed: int) -> None:
        super().__init__(config, cluster, seed=seed)
        self._proxy = proxy

    def outage(self) -> bool:
        """Nobody answers for half a minute; the driver's first look at the bucket would not wait for so long."""
        if not self.actors():
            return False
        self._proxy.outage(OUTAGE_S)
        time.sleep(OUTAGE_S)
        return True


@dataclass
class Toll:
    """What was done in some runs, and what was found afterwards."""

    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    damage: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)  # of each run

    def add(self, victim: Victim, undisturbed_uri: str, seconds: float) -> None:
        self.faults += victim.done
        self.damage.update(asdict(damage(victim.run_uri, undisturbed_uri)))
        self.seconds.append(seconds)
        said = f"{self.faults.total()} faults, {seconds:.0f} s: {dict(victim.done)}, damage {dict(self.damage)}"
        print(said, file=sys.stderr, flush=True)


def disturb_on_disk(options: argparse.Namespace, folder: Path, photos: Path, cluster: Cluster, quiet: str) -> Toll:
    """Run after run, each of them disturbed, until there were faults enough."""
    toll = Toll()
    with small_disk(folder / "disk", "64m") as has_disk:
        running = {kind: weight for kind, weight in RUNNING.items() if has_disk or kind != "fill_disk"}
        while toll.faults.total() < options.faults:
            number, run = len(toll.seconds), folder / "disk" / "run"
            config = write_config(folder / f"run-{number}.yaml", photos, str(run))
            limit = min(options.faults - toll.faults.total(), options.faults_a_run)
            started = time.perf_counter()
            disk = folder / "disk" if has_disk else None
            with Victim(config, cluster, seed=options.seed + number, disk=disk) as victim:
                torment(victim, running, ENDS, STOPPED, limit=limit, pause_s=PAUSE_S, first=running)
            toll.add(victim, quiet, time.perf_counter() - started)
            remove_run(str(run))
    return toll


def disturb_on_s3(config: Path, cluster: Cluster, proxy: FaultProxy, quiet: str, seed: int) -> tuple[Toll, int]:
    """One run to a bucket in bad weather, and the requests that failed."""
    toll, started = Toll(), time.perf_counter()
    proxy.plan(WEATHER, seed=seed)
    with CloudVictim(config, cluster, proxy, seed=seed) as victim:
        torment(victim, ON_S3, ENDS, {"delete_part": 1}, limit=S3_FAULTS, pause_s=PAUSE_S, first=["outage"])
    failed = len(proxy.faults())
    proxy.plan()
    toll.add(victim, quiet, time.perf_counter() - started)
    return toll, failed


def disturb(options: argparse.Namespace, folder: Path, cluster: Cluster, proxy: FaultProxy) -> dict[str, Any]:
    photos, quiet = folder / "scenes" / "images", str(folder / "quiet")
    baseline = undisturbed(write_config(folder / "quiet.yaml", photos, quiet), cluster)
    disk = disturb_on_disk(options, folder, photos, cluster, quiet)
    config = write_config(folder / "s3.yaml", photos, "s3://chaos/run")
    cloud, failed = disturb_on_s3(config, cluster, proxy, quiet, options.seed)
    return {
        "rows_a_run": sum(len(rows(quiet, stage)) for stage in ("instances", "panoptic")),
        "runs": len(disk.seconds) + 1,
        "faults": disk.faults.total() + cloud.faults.total(),
        "faults_on_disk": dict(disk.faults.most_common()),
        "faults_on_s3": dict(cloud.faults.most_common()),
        "requests_failed_on_s3": failed,
        "damage": {kind: disk.damage[kind] + cloud.damage[kind] for kind in disk.damage},
        "undisturbed_s": round(baseline, 1),
        "disturbed_s": [round(s, 1) for s in disk.seconds],
        "disturbed_on_s3_s": round(cloud.seconds[0], 1),
        "seconds_a_fault": round((sum(disk.seconds) - baseline * len(disk.seconds)) / disk.faults.total(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--faults-a-run", type=int, default=50)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, bucket() as proxy, small_cluster() as cluster:
        folder = Path(temporary)
        write_scenes(str(folder / "scenes"), options.images, seed=options.seed, size=(160, 160))
        result = disturb(options, folder, cluster, proxy)
    publish({"benchmark": "chaos", "machine": describe_machine(), **result}, options.output)


if __name__ == "__main__":
    main()
