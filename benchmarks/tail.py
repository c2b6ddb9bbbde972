"""What one slow worker of eight costs a stage: with late shards done a second time by idle workers, and without.

    python benchmarks/tail.py [--workers 8] [--slow 10] [--seconds 1] [--shards 24 32 40 48] [--output FILE]

A shard is a wait of --seconds, of --slow times that with the worker that came first. Prints JSON: of each number of
shards the seconds from first to last receipt with and without second attempts, and what they are above those of the
same workers in a perfect schedule; and the means.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from machine import describe_machine, publish
from many_shards import job_for

from pipeline.engine.pool import run_shards
from pipeline.engine.receipts import Receipt
from pipeline.engine.shards import ShardActor, StageJob
from workers.phases import Phases


class WaitingShards(ShardActor):
    def setup(self) -> None:
        folder = Path(self.job.metadata["marks"])
        self.me = folder / uuid.uuid4().hex
        self.me.touch()
        while len(names := sorted(folder.iterdir())) < int(self.job.metadata["workers"]):
            time.sleep(0.01)  # all begin together
        self.wait_s = float(self.job.metadata["slow_s" if names[0] == self.me else "wait_s"])

    def process(self, shard: int, phases: Phases) -> pa.Table:
        time.sleep(self.wait_s)
        return pa.table({"image_id": [str(shard)], "status": ["ok"]})


class OnceShards(WaitingShards):
    def _seconds(self) -> list[Receipt]:
        return []


def seconds_of(actor: type[ShardActor], job: StageJob, shards: int, args: argparse.Namespace) -> float:
    """From when all workers are there to the last receipt."""
    with tempfile.TemporaryDirectory() as marks:
        waits = {"wait_s": str(args.seconds), "slow_s": str(args.slow * args.seconds)}
        todo = replace(job, metadata={"marks": marks, "workers": str(args.workers), **waits})
        receipts: Iterator[Receipt] = run_shards(actor, todo, range(shards), job.config.workers)
        first = next(receipts)
        started = time.perf_counter() - first.wall_s
        assert sum(1 for _ in receipts) == shards - 1
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--slow", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--shards", type=int, nargs="+", default=[24, 32, 40, 48])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    ray.init("local", num_cpus=args.workers + 1, include_dashboard=False, log_to_driver=False)
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        job = job_for(Path(name), args.workers)
        for shards in args.shards:
            ideal = shards * args.seconds / (args.workers - 1 + 1 / args.slow)
            took = {way.__name__: seconds_of(way, job, shards, args) for way in (OnceShards, WaitingShards)}
            once, twice = took["OnceShards"], took["WaitingShards"]
            entry = {"shards": shards, "perfect_s": ideal, "once_s": once, "second_s": twice}
            entries.append({key: round(value, 2) for key, value in entry.items()})
            print(entries[-1], file=sys.stderr, flush=True)
    cost = {
        name: round(statistics.mean(entry[name] - entry["perfect_s"] for entry in entries), 2)
        for name in ("once_s", "second_s")
    }
    about = {"workers": args.workers, "slow": args.slow, "shard_s": args.seconds}
    result = {"benchmark": "tail", "machine": describe_machine(), **about, "runs": entries, "cost": cost}
    publish(result | {"cost_ratio": round(cost["second_s"] / cost["once_s"], 2)}, args.output)


if __name__ == "__main__":
    main()
