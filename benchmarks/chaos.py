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
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from machine import describe_machine, publish
from ray.cluster_utils import Cluster

from pipeline.demo.scenes import write_scenes
from tests.conftest import KEYS
from tests.fault_proxy import SLOW_DOWN, FaultProxy, Reset, Rule
from tests.faults import Damage, Victim, damage, remove_run, rows, small_cluster, small_disk, torment

RUNNING = {"kill_actor": 10, "suspend_actor": 2, "kill_node": 1, "hang_actor": 0.5, "fill_disk": 1}
ENDS = {"kill_driver": 1.5, "terminate_driver": 1, "interrupt_driver": 1}
STOPPED = {"delete_part": 1, "truncate_part": 1, "garbage_part": 1, "leave_litter": 1}
PAUSE_S = (1.0, 4.0)
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
    victim = Victim(config, cluster, seed=0)
    victim.start()
    victim.wait(lambda: False)
    if victim.poll() != 0:
        raise RuntimeError(f"the undisturbed run failed; see {victim.log}")
    return time.perf_counter() - started


@contextlib.contextmanager
def bucket() -> Iterator[FaultProxy]:
    """An S3 server behind a proxy, which every process that is started inside the block finds by the AWS variables."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with FaultProxy(f"http://{host}:{port}") as proxy:
        os.environ.update({**KEYS, "AWS_ENDPOINT_URL": proxy.url})
        yield proxy
    server.stop()


def disturb_on_s3(victim: Victim, proxy: FaultProxy, seed: int) -> None:
    """A run to a bucket in bad weather, away for half a minute once, while workers and drivers are killed."""
    import s3fs

    s3fs.S3FileSystem().mkdir("chaos")
    proxy.plan(WEATHER, seed=seed)
    victim.start()
    victim.wait(lambda: len(victim.parts("instances")) > 3)
    proxy.outage(OUTAGE_S)
    victim.done["outage"] += 1
    victim.wait(lambda: False)
    if victim.poll() == 0:
        remove_run(victim.run_uri)
    torment(victim, {"kill_actor": 4}, ENDS, {"delete_part": 1}, limit=S3_FAULTS, pause_s=PAUSE_S)
    victim.done["requests_failed"] += len(proxy.faults())
    proxy.plan()


def disturbed(options: argparse.Namespace, folder: Path, cluster: Cluster, proxy: FaultProxy) -> dict[str, Any]:
    photos, quiet = folder / "scenes" / "images", folder / "quiet"
    baseline = undisturbed(write_config(folder / "quiet.yaml", photos, str(quiet)), cluster)
    done: collections.Counter[str] = collections.Counter()
    found: collections.Counter[str] = collections.Counter()
    seconds = []
    with small_disk(folder / "disk", "64m") as has_disk:
        while done.total() < options.faults:
            seed = options.seed + len(seconds)
            run = folder / "disk" / "run"
            config = write_config(folder / f"run-{seed}.yaml", photos, str(run))
            victim = Victim(config, cluster, seed=seed, disk=folder / "disk" if has_disk else None)
            started = time.perf_counter()
            running = RUNNING if has_disk else {kind: RUNNING[kind] for kind in RUNNING if kind != "fill_disk"}
            limit = min(options.faults - done.total(), options.faults_a_run)
            torment(victim, running, ENDS, STOPPED, limit=limit, pause_s=PAUSE_S)
            seconds.append(time.perf_counter() - started)
            done += victim.done
            found.update(asdict(damage(str(run), str(quiet))))
            remove_run(str(run))
            print(f"{done.total()} faults, {seconds[-1]:.0f} s: {dict(victim.done)}, damage {dict(found)}", flush=True)
    stormy = Victim(write_config(folder / "s3.yaml", photos, "s3://chaos/run"), cluster, seed=options.seed)
    disturb_on_s3(stormy, proxy, options.seed)
    on_s3: Damage = damage(stormy.run_uri, str(quiet))
    found.update(asdict(on_s3))
    return {
        "rows": sum(len(rows(str(quiet), stage)) for stage in ("instances", "panoptic")),
        "runs": len(seconds) + 1,
        "faults": done.total() + stormy.done.total() - stormy.done["requests_failed"],
        "faults_by_kind": dict(done.most_common()),
        "faults_on_s3": dict(stormy.done),
        "damage": dict(found),
        "undisturbed_s": round(baseline, 1),
        "disturbed_s": [round(s, 1) for s in seconds],
        "seconds_a_fault": round((sum(seconds) - baseline * len(seconds)) / done.total(), 2),
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
        result = disturbed(options, folder, cluster, proxy)
    publish({"benchmark": "chaos", "machine": describe_machine(), **result}, options.output)


if __name__ == "__main__":
    main()
