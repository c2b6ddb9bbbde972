"""What the engine costs: the instances stage through Ray against the same worker in a plain loop, in turn.

    python benchmarks/engine.py [--photos FOLDER] [--images 200] [--cpus 1] [--repeats 2] [--backbone patch-dct]

Without --photos, generated scenes are labelled. Prints JSON: images/s of both, their ratio with the start of the actor
left out (`ratio`) and counted (`ratio_with_start`), and the worker's peak memory after the first and the last shard.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import describe_machine, publish

from pipeline.config import Config
from pipeline.engine.cluster import connect
from pipeline.engine.pool import run_shards
from pipeline.engine.shards import StageJob
from pipeline.engine.stage import index_folder
from pipeline.operations.demo.scenes import write_scenes
from pipeline.sources.index import build_index
from pipeline.stages.instances import InstanceShards
from pipeline.stages.table import resolve_stages

SHARD_SIZE = 10


def job_for(source: Path, run: Path, options: argparse.Namespace) -> StageJob:
    config = Config.model_validate(
        {
            "source": {"uri": str(source), "shard_size": SHARD_SIZE},
            "run": {"uri": str(run)},
            "backbone": {"name": options.backbone, "weights": "random:0"},
            "maskcut": {"image_size": options.size},
            "workers": {"cpus": options.cpus, "memory_gb": 2.5},
        }
    )
    index = build_index(index_folder(config), config.source.uri, shard_size=SHARD_SIZE)
    table = resolve_stages(config, index)
    return StageJob(table["instances"], config, index_folder(config), table, {})


def through_engine(job: StageJob) -> tuple[float, float, list[float]]:
    """Seconds from the start of the first shard to the last receipt, seconds before that, peak memory by shard."""
    shutil.rmtree(job.stage.folder, ignore_errors=True)
    start = time.perf_counter()
    first = 0.0
    memory = []
    for receipt in run_shards(InstanceShards, job, range(job.stage.shards), job.config.workers):
        assert receipt.ok, receipt.error
        first = first or time.perf_counter() - receipt.wall_s
        memory.append(receipt.peak_memory_mb)
    return time.perf_counter() - first, first - start, memory


def in_a_loop(job: StageJob) -> float:
    shutil.rmtree(job.stage.folder, ignore_errors=True)
    actor = InstanceShards(job)
    start = time.perf_counter()
    for shard in range(job.stage.shards):
        assert actor.run(shard).ok
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--backbone", default="patch-dct")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = options.photos
        if source is None:
            write_scenes(folder, options.images, seed=0, size=(480, 480))
            source = Path(folder) / "images"
        job = job_for(source, Path(folder) / "run", options)
        torch.set_num_threads(options.cpus)
        loops, engines = [], []
        with connect(job.config.workers, None):
            for _ in range(options.repeats):
                engines.append(through_engine(job))
                loops.append(in_a_loop(job))
        images = build_index(index_folder(job.config), job.config.source.uri, shard_size=SHARD_SIZE).images
    result = {
        "benchmark": "engine",
        "machine": describe_machine(),
        "backbone": options.backbone,
        "images": images,
        "threads": options.cpus,
        "loop_images_per_s": round(images / statistics.median(loops), 3),
        "engine_images_per_s": round(images / statistics.median(work for work, _, _ in engines), 3),
        "actor_start_s": round(statistics.median(start for _, start, _ in engines), 2),
        "ratio": round(statistics.median(loop / e[0] for loop, e in zip(loops, engines, strict=True)), 3),
        "ratio_with_start": round(
            statistics.median(loop / (e[0] + e[1]) for loop, e in zip(loops, engines, strict=True)), 3
        ),
        "peak_memory_mb": {"first_shard": round(engines[0][2][0]), "last_shard": round(engines[0][2][-1])},
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
