"""What a bucket costs: the instances stage on photos in a bucket, into a run folder there, against local folders.

    python benchmarks/s3.py [--photos FOLDER] [--images 100] [--size 480] [--repeats 1] [--endpoint URL]

Without --photos, generated scenes are labelled. Shard by shard one place and then the other is timed, by the same
worker in a plain loop. Without --endpoint the store is moto's server in a process of its own on this machine: a test
double in Python, which shares the cores with the worker, so that it is this server that is measured and not S3. One
shard more goes through a proxy that counts requests and bytes. Prints JSON: images/s of both, their ratio, images/s of
fetching alone, requests and bytes an image by method.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from machine import describe_machine, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the proxy of the tests

from pipeline.config import Config
from pipeline.engine.shards import StageJob, ahead
from pipeline.engine.stage import index_folder
from pipeline.operations.demo.scenes import write_scenes
from pipeline.sources.index import build_index
from pipeline.stages.instances import InstanceShards
from pipeline.stages.table import resolve_stages
from pipeline.store import places, storage
from tests.fault_proxy import FaultProxy

SHARD_SIZE = 10
KEYS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_DEFAULT_REGION": "us-east-1"}


def actor_for(source: str, run: str, options: argparse.Namespace) -> InstanceShards:
    config = Config.model_validate(
        {
            "source": {"uri": source, "shard_size": SHARD_SIZE},
            "run": {"uri": run},
            "backbone": {"name": "patch-dct", "weights": "random:0"},
            "maskcut": {"image_size": options.size},
        }
    )
    index = build_index(index_folder(config), source, shard_size=SHARD_SIZE)
    table = resolve_stages(config, index)
    return InstanceShards(StageJob(table["instances"], config, index_folder(config), table, {}))


def seconds_of_shard(actor: InstanceShards, shard: int) -> float:
    start = time.perf_counter()
    receipt = actor.run(shard)
    assert receipt.ok, receipt.error
    return time.perf_counter() - start


def seconds_of_fetching(actor: InstanceShards) -> float:
    """All photos, in as many threads as an actor fetches with, and nothing done with them."""
    fetcher, index = actor.index.fetcher(), actor.index
    records = (record for shard in range(index.shards) for record in index.records(shard))
    start = time.perf_counter()
    fetched = sum(1 for _ in ahead(fetcher.fetch, records, depth=actor.config.workers.prefetch))
    assert fetched == index.images
    return time.perf_counter() - start


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def count_traffic(actor: InstanceShards, endpoint: str) -> dict[str, dict[str, float]]:
    """Requests and bytes an image of the first shard, by method."""
    with FaultProxy(endpoint) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        places._filesystem.cache_clear()
        seconds_of_shard(InstanceShards(actor.job), 0)
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        places._filesystem.cache_clear()
        images = len(actor.index.records(0))
        return {
            method: {
                "requests_per_image": round(len(found) / images, 2),
                "bytes_per_image": round(sum(request.sent + request.received for request in found) / images),
            }
            for method in sorted({request.method for request in proxy.requests})
            if (found := proxy.matching(method))
        }


def copy_photos(source: Path, images: int, local: Path, bucket: str) -> None:
    photos = (path for path in sorted(source.rglob("*")) if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    for number, path in enumerate(islice(photos, images)):
        name, data = f"{number:05d}{path.suffix.lower()}", path.read_bytes()
        for place in (str(local), f"{bucket}/photos"):
            storage.write_bytes(storage.join(place, name), data)


def compare(options: argparse.Namespace, folder: Path, bucket: str, endpoint: str) -> dict[str, Any]:
    if options.photos is None:
        write_scenes(str(folder / "scenes"), options.images, seed=0, size=(480, 480))
    copy_photos(options.photos or folder / "scenes" / "images", options.images, folder / "photos", bucket)
    actors = {
        "local": actor_for(str(folder / "photos"), str(folder / "run"), options),
        "bucket": actor_for(f"{bucket}/photos", f"{bucket}/run", options),
    }
    index = actors["local"].index
    for actor in actors.values():
        seconds_of_shard(actor, 0)  # warm
    best = {place: [float("inf")] * index.shards for place in actors}
    for _ in range(options.repeats):
        for shard in range(index.shards):
            for place, actor in actors.items():
                best[place][shard] = min(best[place][shard], seconds_of_shard(actor, shard))
    fetching = {place: min(seconds_of_fetching(actor) for _ in range(3)) for place, actor in actors.items()}
    rate = {place: index.images / sum(best[place]) for place in actors}
    return {
        "images": index.images,
        "images_per_s": {place: round(value, 3) for place, value in rate.items()},
        "ratio": round(rate["bucket"] / rate["local"], 3),
        "fetch_alone_images_per_s": {place: round(index.images / value, 1) for place, value in fetching.items()},
        "traffic": count_traffic(actors["bucket"], endpoint),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--endpoint", help="An S3 server; its keys from the standard AWS variables.")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as server:
        endpoint = options.endpoint
        if endpoint is None:
            endpoint = server.enter_context(moto_server())
            os.environ.update(KEYS)
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        bucket = f"s3://u2label-benchmark-{uuid.uuid4().hex[:8]}"
        fs, name = storage.filesystem(bucket)
        fs.mkdir(name)
        try:
            measured = compare(options, Path(folder), bucket, endpoint)
        finally:
            fs.rm(name, recursive=True)
    result = {
        "benchmark": "s3",
        "machine": describe_machine(),
        "backbone": "patch-dct",
        "size": options.size,
        "store": storage.redact(options.endpoint or "")
        or "moto's server (Python) on loopback, on the same cores: its speed, and not S3's",
        **measured,
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
