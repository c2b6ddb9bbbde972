"""Listing of a large bucket: request after request, and side by side as `pipeline.store.s3_walk` does.

    python benchmarks/listing.py [--folders 300] [--each 1000] [--wait-ms 150] [--output FILE]

The bucket is made up in memory and answers after --wait-ms, with 1000 keys. Prints JSON: of both ways the seconds, the
processor seconds and the requests.
"""

from __future__ import annotations

import argparse
import bisect
import time
from pathlib import Path
from typing import Any

from machine import describe_machine, publish

from pipeline.store.s3 import list_keys
from pipeline.store.s3_walk import walk

PAGE = 1000


class Bucket:
    """`list_objects_v2` over folders of as many keys each."""

    def __init__(self, folders: int, each: int, wait_s: float) -> None:
        self.keys = [f"class{folder:06d}/{number:06d}.jpg" for folder in range(folders) for number in range(each)]
        self.folders = [f"class{folder:06d}/" for folder in range(folders)]
        self.wait_s, self.asked = wait_s, 0

    def __call__(self, method: str, *, Delimiter: str = "", **request: str) -> dict[str, Any]:
        self.asked += 1
        time.sleep(self.wait_s)
        names = self.folders if Delimiter else self.keys
        start = bisect.bisect_right(names, request.get("ContinuationToken") or request.get("StartAfter", ""))
        page = names[start : start + PAGE]
        more = start + PAGE < len(names)
        answer: dict[str, Any] = {"IsTruncated": more, "NextContinuationToken": page[-1] if page else ""}
        if Delimiter:
            return answer | {"CommonPrefixes": [{"Prefix": name} for name in page]}
        return answer | {"Contents": [{"Key": name, "Size": 100_000} for name in page]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=300)
    parser.add_argument("--each", type=int, default=1000)
    parser.add_argument("--wait-ms", type=float, default=150)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    ways = {
        "one after the other": lambda b: list_keys(b, "b", "", below=True),
        "side by side": lambda b: walk(b, "b", ""),
    }
    result: dict[str, Any] = {}
    for name, listing in ways.items():
        bucket = Bucket(args.folders, args.each, args.wait_ms / 1000)
        started, spent = time.perf_counter(), time.process_time()
        assert sum(1 for _ in listing(bucket)) == args.folders * args.each
        seconds, cpu = time.perf_counter() - started, time.process_time() - spent
        result[name] = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "requests": bucket.asked}
    ratio = result["one after the other"]["seconds"] / result["side by side"]["seconds"]
    about = {"keys": args.folders * args.each, "wait_ms": args.wait_ms, "ratio": round(ratio, 1)}
    publish({"benchmark": "listing", "machine": describe_machine(), **about, "ways": result}, args.output)


if __name__ == "__main__":
    main()
