"""What a run of a million images in ten thousand shards costs its driver: index, plan, status, receipts.

    python benchmarks/scale.py [--images 1000000] [--shards 10000] [--s3] [--output FILE]

The listing is made up, and so are the parts (a few bytes that count as whole) and the receipts; what is measured is the
program that reads and writes them. Each figure comes from a process of its own, so that its memory is its own.
With --s3 the run folder lies in a bucket of `s3_server`, on the same cores, which answers after --wait-ms;
`cpu_seconds` are ours alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s3_server import serving

from pipeline.config import Config
from pipeline.engine.receipts import Receipt, ReceiptLog
from pipeline.engine.stage import index_folder
from pipeline.operations.status import plan_of, run_status
from pipeline.sources.index import MANIFEST, open_index, write_index
from pipeline.sources.scan import Ignored
from pipeline.stages.table import resolve_stages
from pipeline.store import storage
from workers.records import SCHEMA_VERSION, ImageRecord

TICK_S = 3.5
WRITERS = 64  # of parts, side by side
PART = b"PAR1....PAR1"
PHASES = {"wait_for_input": 1.0, "backbone": 50.0, "ncut": 20.0, "crf": 30.0, "embed": 9.0, "write": 0.5}


def config_of(run: str, images: int, shards: int) -> Config:
    return Config.model_validate(
        {
            "source": {"uri": "s3://bucket/imagenet/train", "format": "tar", "shard_size": -(-images // shards)},
            "run": {"uri": run},
            "backbone": {"name": "patch-dct", "weights": "random:0"},
            "workers": {"size": 8},
        }
    )


def records(images: int) -> Iterator[ImageRecord]:
    """As a bucket of tar files would be listed."""
    for i in range(images):
        tar = f"train-{i // 1000:06d}.tar"
        name = f"{tar}/n{i % 1000:08d}_{i:09d}.JPEG"
        yield ImageRecord(name, f"s3://bucket/imagenet/train/{tar}", 512 + i % 1000 * 110_592, 110_000)


def make_index(config: Config, images: int) -> None:
    folder = index_folder(config)
    shards, written, digest, *_ = write_index(records(images), folder, config.source.shard_size)
    manifest = {
        "shards": shards,
        "images": written,
        "shard_size": config.source.shard_size,
        "format": "tar",
        "image_column": "image",
        "digest": digest,
        "source": config.source.uri,
        "ignored": asdict(Ignored()),
        "schema_version": SCHEMA_VERSION,
    }
    storage.write_bytes(storage.join(folder, MANIFEST), json.dumps(manifest).encode())


def make_parts(config: Config) -> None:
    """Every shard of `instances` done and half of those of `panoptic`, each with its receipt."""
    table = resolve_stages(config, open_index(index_folder(config)))
    for name, share in (("instances", 1.0), ("panoptic", 0.5)):
        stage = table[name]
        if name == "panoptic":  # as in a run, each later than what it is made of, by clocks of whole seconds
            time.sleep(TICK_S)
            storage.write_bytes(storage.join(table["clusters"].folder, "artifact.json"), b"{}")
            time.sleep(TICK_S)
        log = ReceiptLog(config.run.uri, name, stage.fingerprint, every_s=1e9)
        shards = range(int(share * stage.shards))
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda uri: storage.write_bytes(uri, PART), map(stage.part, shards)))
        for shard in shards:
            rows = {"ok": config.source.shard_size - 2, "no_masks": 2}
            log.append(
                Receipt(name, stage.fingerprint, shard, True, 100.5, rows, PHASES, 250, len(PART), host="node-7")
            )
        log.flush()


def look(config: Config) -> None:
    status = run_status(config)
    assert [stage.done for stage in status.stages] == [status.shards, 1, (status.shards or 0) // 2]


def plan(config: Config) -> None:
    assert plan_of(run_status(config))["steps"][2]["pending"] > 0


def read_all(config: Config) -> None:
    """The records of every shard, as the workers together read them."""
    index = open_index(index_folder(config))
    assert sum(len(index.records(shard)) for shard in range(index.shards)) == index.images


def measured(task: Callable[..., None], *arguments: Any, repeats: int = 1) -> dict[str, float]:
    """Least seconds, and seconds of CPU, of some processes that do the task, and their largest resident size."""
    context = multiprocessing.get_context("spawn")
    found = []
    for _ in range(repeats):
        with context.Pool(1) as pool:
            found.append(pool.apply(_timed, (task, arguments)))
    seconds, cpu_seconds, memory = zip(*found, strict=True)
    return {
        "seconds": round(min(seconds), 2),
        "cpu_seconds": round(min(cpu_seconds), 2),
        "peak_memory_mb": round(max(memory)),
    }


def _timed(task: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, float, float]:
    start, cpu = time.perf_counter(), time.process_time()
    task(*arguments)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return time.perf_counter() - start, time.process_time() - cpu, memory


def command_seconds(config: Config, folder: Path, repeats: int) -> float:
    """`u2label status --json` as a user waits for it, with the start of Python."""
    path = folder / "config.yaml"
    path.write_text(config.to_yaml())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "pipeline", "status", str(path), "--json"], check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - start)
    return round(min(seconds), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--wait-ms", type=float, default=50)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    store = serving(wait_s=options.wait_ms / 1000) if options.s3 else nullcontext()
    with tempfile.TemporaryDirectory() as name, store:
        config = config_of("s3://bucket/run" if options.s3 else f"{name}/run", options.images, options.shards)
        result: dict[str, Any] = {"benchmark": "scale", "images": options.images, "shards": options.shards}
        result["run_folder"] = f"S3, {options.wait_ms:g} ms an answer" if options.s3 else "local disk"
        result["index"] = measured(make_index, config, options.images)
        result["index"]["bytes"] = sum(storage.list_folder(index_folder(config)).values())
        if not options.s3:  # workers read them, each its own
            result["read_all_records"] = measured(read_all, config)
        make_parts(config)
        result["status"] = measured(look, config, repeats=options.repeats)
        result["plan"] = measured(plan, config, repeats=options.repeats)
        result["status_command_s"] = command_seconds(config, Path(name), options.repeats)
    from machine import describe_machine, publish  # torch, which the processes that are measured need not load

    publish(result | {"machine": describe_machine()}, options.output)


if __name__ == "__main__":
    main()
