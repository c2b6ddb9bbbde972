"""What the engine costs a shard that is no work: shards/s and the driver's memory.

    python benchmarks/many_shards.py [--shards 10000] [--workers 2] [--output FILE]

A shard writes a part of one row; attempts are booked and receipts come back as in every stage. Prints JSON: seconds to
the first receipt and from there to the last, shards/s of the latter, and the driver's resident memory before and at its
most.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
from machine import describe_machine, publish

from pipeline.config import Config
from pipeline.engine.cluster import connect
from pipeline.engine.pool import run_shards
from pipeline.engine.shards import ShardActor, StageJob
from pipeline.engine.stage import index_folder
from pipeline.operations.demo.scenes import write_scenes
from pipeline.sources.index import build_index
from pipeline.stages.table import resolve_stages
from workers.phases import Phases


class NoWorkShards(ShardActor):
    def setup(self) -> None:
        pass

    def process(self, shard: int, phases: Phases) -> pa.Table:
        return pa.table({"image_id": [str(shard)], "status": ["ok"]})


def job_for(folder: Path, workers: int) -> StageJob:
    write_scenes(str(folder), 1, seed=0, size=(64, 64))
    config = Config.model_validate(
        {
            "source": {"uri": str(folder / "images")},
            "run": {"uri": str(folder / "run")},
            "backbone": {"name": "patch-dct", "weights": "random:0"},
            "workers": {"size": workers, "memory_gb": 0.3},
        }
    )
    table = resolve_stages(config, build_index(index_folder(config), config.source.uri))
    return StageJob(table["instances"], config, index_folder(config), table, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = job_for(Path(folder), options.workers)
        with connect(job.config.workers, None):
            before, start = psutil.Process().memory_info().rss, time.perf_counter()
            times, done = [], set()
            for receipt in run_shards(NoWorkShards, job, range(options.shards), job.config.workers):
                assert receipt.ok, receipt.error
                times.append(time.perf_counter() - start)
                done.add(receipt.shard)
    assert len(done) == len(times) == options.shards
    result = {
        "benchmark": "many shards",
        "machine": describe_machine(),
        "shards": options.shards,
        "workers": options.workers,
        "first_receipt_s": round(times[0], 2),
        "then_s": round(times[-1] - times[0], 2),
        "shards_per_s": round((options.shards - 1) / (times[-1] - times[0]), 1),
        "driver_memory_mb": {
            "before": round(before / 2**20),
            "most": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        },
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
