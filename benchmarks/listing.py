"""Listing of a large bucket, and its index: request after request, side by side, by several processes.

    python benchmarks/listing.py [--folders 300] [--each 1000] [--wait-ms 150] [--processes 1 2] [--output FILE]

The bucket is made up; it answers after --wait-ms, with 1000 keys. `listing` asks it in this process and counts what the
program itself takes; `index` is `build_index` of the same bucket behind HTTP, with all that botocore takes to read the
answers, where the server, a process beside it, takes processor time too.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine, publish
from s3_server import Classes, list_page, serving

from pipeline.sources import index
from pipeline.store.held import Held
from pipeline.store.s3 import list_keys
from pipeline.store.s3_walk import walk


class Bucket:
    """`list_objects_v2` in this process."""

    def __init__(self, names: Sequence[str], wait_s: float) -> None:
        self.names, self.wait_s, self.asked = names, wait_s, 0

    def __call__(self, method: str, *, Delimiter: str = "", Prefix: str = "", **request: str) -> dict[str, Any]:
        self.asked += 1
        time.sleep(self.wait_s)
        after = request.get("ContinuationToken") or request.get("StartAfter", "")
        keys, folders, more = list_page(self.names, prefix=Prefix, delimiter=Delimiter, after=after)
        answer: dict[str, Any] = {"IsTruncated": bool(more), "NextContinuationToken": more}
        answer["CommonPrefixes"] = [{"Prefix": name} for name in folders]
        return answer | {"Contents": [{"Key": name, "Size": 100_000} for name in keys]}


def listing(args: argparse.Namespace) -> dict[str, Any]:
    ways = {
        "one after the other": lambda b: list_keys(b, "b", "", below=True),
        "side by side": lambda b: walk(b, "b", ""),
    }
    result: dict[str, Any] = {}
    for name, way in ways.items():
        bucket = Bucket(Classes(args.folders, args.each), args.wait_ms / 1000)
        started, spent = time.perf_counter(), time.process_time()
        assert sum(1 for _ in way(bucket)) == args.folders * args.each
        seconds, cpu = time.perf_counter() - started, time.process_time() - spent
        result[name] = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "requests": bucket.asked}
    return result


def build(args: argparse.Namespace) -> dict[str, Any]:
    """The index of the served bucket; with `processes` 1 all is done by one."""
    result = {}
    for processes in args.processes:
        index.Held = lambda number=processes: Held(number)  # type: ignore[misc, assignment]
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            made = index.build_index(folder, "s3://bucket", "folder", shard_size=1000)
            seconds = time.perf_counter() - started
        assert made.images == args.folders * args.each
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        result[f"processes: {processes}"] = {
            "seconds": round(seconds, 1),
            "keys/s": round(made.images / seconds),
            "memory MiB": round(memory),
            "digest": made.digest[:12],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=300)
    parser.add_argument("--each", type=int, default=1000)
    parser.add_argument("--wait-ms", type=float, default=150)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="of the index; none: no index")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    ways = listing(args)
    ratio = ways["one after the other"]["seconds"] / ways["side by side"]["seconds"]
    with serving((args.folders, args.each), args.wait_ms / 1000):
        made = build(args)
    about = {"keys": args.folders * args.each, "wait_ms": args.wait_ms, "ratio": round(ratio, 1)}
    result = {"benchmark": "listing", "machine": describe_machine(), **about, "listing": ways, "index": made}
    publish(result, args.output)


if __name__ == "__main__":
    main()
