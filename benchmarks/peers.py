"""`u2label run` beside what users would take instead: a plain Ray Data pipeline, and a plain DataLoader loop.

    python benchmarks/peers.py PHOTOS [--images 1000] [--weights FILE] [--output benchmarks/results/peers-cpu.json]

All three find the masks of the same photos with the same worker on the same two cores. Ray Data: `read_binary_files`,
`map_batches` with an actor a core, `write_parquet`. DataLoader: a process that decodes, the worker with the other core,
one Parquet file at the end. Of each: seconds from start to end (Python and Ray included), the peak of the memory of all
its processes (each page counted once), and what is on the disk after `kill -9` of all of them half way, with the
seconds of a second start. Without --weights, features are those of patch-dct; with, of a DINOv2 ViT-S/14.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from machine import describe_machine, publish

from pipeline.config import Config, parse_config
from pipeline.stages.instances import InstanceShards
from workers.decode import DecodeError, DecodeLimits, decode_image
from workers.images import LoadedImage
from workers.overlap import InTurn
from workers.phases import Phases

BATCH = 8  # photos that a peer hands to its worker, and of a shard
SAMPLE_S = 0.5  # between looks at the memory


def config_of(photos: Path, run: Path, weights: str | None) -> dict[str, Any]:
    name = "dinov2_vits14" if weights else "patch-dct"
    return {
        "source": {"uri": str(photos), "shard_size": BATCH},
        "run": {"uri": str(run), "max_empty": 1},
        "backbone": {"name": name, "weights": weights or "random:0"},
        "workers": {"size": 2, "cpus": 1, "memory_gb": 2},
    }


class Peer(InstanceShards):
    """The worker of the instances stage by itself."""

    def __init__(self, config: Config, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.config, self.flow = config, InTurn()
        self.worker = self.make_worker()

    def table(self, images: list[LoadedImage]) -> pa.Table:
        return self.worker.process(images, Phases())


def load(name: str, data: bytes) -> LoadedImage:
    try:
        return LoadedImage(name, decode_image(data, DecodeLimits(max_pixels=100_000_000, min_side=1)))
    except DecodeError as error:
        return LoadedImage(name, None, error.status, str(error))


class RayDataActor:
    def __init__(self, config: Config) -> None:
        self.peer = Peer(config, 1)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        return self.peer.table(
            [load(*one) for one in zip(batch["path"].tolist(), batch["bytes"].tolist(), strict=True)]
        )


def with_ray_data(config: Config) -> None:
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    photos = ray.data.read_binary_files(config.source.uri, include_paths=True)
    found = photos.map_batches(
        RayDataActor, fn_constructor_args=(config,), batch_size=BATCH, concurrency=2, num_cpus=1, zero_copy_batch=True
    )
    found.write_parquet(config.run.uri)


class Files:
    """A map-style data set of a folder."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted(Path(folder).iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> LoadedImage:
        return load(self.paths[place].name, self.paths[place].read_bytes())


def with_data_loader(config: Config) -> None:
    from torch.utils.data import DataLoader

    peer = Peer(config, 1)
    loader = DataLoader(Files(config.source.uri), batch_size=BATCH, num_workers=1, collate_fn=list)  # type: ignore[arg-type]
    tables = [peer.table(batch) for batch in loader]
    Path(config.run.uri).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(tables), Path(config.run.uri) / "masks.parquet")


PEERS = {"Ray Data": with_ray_data, "DataLoader": with_data_loader}
WAYS = ["u2label", *PEERS]


def command_of(way: str, config: Path) -> list[str]:
    if way == "u2label":
        return [sys.executable, "-m", "pipeline", "run", str(config), "--stages", "instances"]
    return [sys.executable, __file__, "--peer", way, str(config)]


def processes_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    return []


def memory_of(process: subprocess.Popen[bytes]) -> int:
    """Bytes of all processes of a tree, of which a page that several share counts once."""
    total = 0
    for one in processes_of(process):
        with contextlib.suppress(psutil.Error, OSError):
            total += one.memory_full_info().pss
    return total


def watch(way: str, config: Path, kill_after_s: float | None = None) -> tuple[float, float]:
    """Seconds that a start took, and the peak of its memory in MiB."""
    started = time.perf_counter()
    said = config.with_suffix(".log")  # a pipe that nobody reads stops who writes to it
    with said.open("wb") as log:
        process = subprocess.Popen(command_of(way, config), stdout=subprocess.DEVNULL, stderr=log)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_of(process))
        if kill_after_s is not None and time.perf_counter() - started > kill_after_s:
            for one in processes_of(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAMPLE_S)
    seconds = time.perf_counter() - started
    if kill_after_s is None and process.returncode:
        raise SystemExit(f"{way} ended with {process.returncode}: {said.read_text()[-2000:]}")
    return round(seconds, 1), round(peak / 2**20)


def rows_in(folder: Path) -> int:
    """Of whole Parquet files of masks."""
    return sum(pq.read_metadata(path).num_rows for path in whole_files(folder))


def whole_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.parquet"):
        with contextlib.suppress(pa.ArrowInvalid):
            if "rle" in pq.read_schema(path).names:
                yield path


def measure(way: str, photos: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    images = len(list(photos.iterdir()))
    config, run = folder / "config.json.yaml", folder / "run"
    config.write_text(json.dumps(config_of(photos, run, args.weights)))
    seconds, memory = watch(way, config)
    assert rows_in(run) == images, (way, rows_in(run))
    shutil.rmtree(run)
    result = {"photos/s": round(images / seconds, 3), "seconds": seconds, "memory MiB": memory}
    if args.kill_at:
        killed, _ = watch(way, config, kill_after_s=seconds * args.kill_at)
        left = rows_in(run) if run.exists() else 0
        again, _ = watch(way, config)
        result |= {
            "killed after s": killed,
            "rows left": left,
            "second start s": again,
            "rows at the end": rows_in(run),
        }
    print(way, result, file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of photos; with --peer, a config")
    parser.add_argument("--images", type=int, default=1000, help="the first so many of them by name")
    parser.add_argument("--weights", help="of a DINOv2 ViT-S/14")
    parser.add_argument("--kill-at", type=float, default=0.6, help="of the undisturbed time; 0: no kill")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="all three unless told")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file to keep the result in; its other entries stay")
    args = parser.parse_args()
    if args.peer:
        PEERS[args.peer](parse_config(json.loads(args.photos.read_text()), origin=str(args.photos)))
        return
    root = str(Path(__file__).resolve().parents[1])
    os.environ |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    paths = sorted(path for path in args.photos.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        for path in paths[: args.images]:
            shutil.copy(path, photos / path.name)
        ways = {}
        for way in args.ways:
            (folder := Path(name) / way.replace(" ", "-")).mkdir()
            ways[way] = measure(way, photos, folder, args)
    key = f"{'DINOv2 ViT-S/14' if args.weights else 'patch-dct'}, {min(args.images, len(paths))} photos"
    known = json.loads(args.output.read_text())["runs"] if args.output and args.output.is_file() else {}
    runs = known | {key: known.get(key, {}) | ways}
    publish({"benchmark": "peers", "machine": describe_machine(), "runs": runs}, args.output)


if __name__ == "__main__":
    main()
