"""Distributed k-means: seconds an iteration with one and two actors, beside faiss.Kmeans with as many threads.

    python benchmarks/kmeans.py [--rows 200000] [--dim 384] [--k 300] [--iterations 8] > kmeans.json

Every actor has one thread. Both start from the same rows, and spherical k-means runs for the same iterations. Reading
the parts and k-means++ are not timed. A time is the median over the iterations.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from machine import describe_machine, publish

from pipeline.clusters.artifact import KMeansSettings
from pipeline.clusters.kmeans import IterationReport, fit_kmeans

ROWS_A_PART = 8000


def clustered_rows(rows: int, dim: int, groups: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((groups, dim), dtype=np.float32)
    x = centers[rng.integers(0, groups, rows)] + rng.standard_normal((rows, dim), dtype=np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def write_parts(folder: Path, x_ND: np.ndarray) -> list[str]:
    """Parts with the embedding column alone, four masks an image."""
    paths = []
    for i, start in enumerate(range(0, len(x_ND), ROWS_A_PART)):
        part = x_ND[start : start + ROWS_A_PART]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1), pa.float16()), x_ND.shape[1])
        offsets = pa.array(np.append(np.arange(0, len(part), 4), len(part)), pa.int32())
        paths.append(str(folder / f"part-{i:05d}.parquet"))
        pq.write_table(pa.table({"embedding": pa.ListArray.from_arrays(offsets, vectors)}), paths[-1])
    return paths


def ours(parts: list[str], out: str, settings: KMeansSettings, actors: int) -> dict[str, Any]:
    reports: list[IterationReport] = []
    started = time.monotonic()
    result = fit_kmeans(
        parts, out, settings, num_actors=actors, cpus_per_actor=1, device="cpu", on_iteration=reports.append
    )
    return {
        "seconds_per_iteration": statistics.median(report.seconds for report in reports),
        "fastest_iteration": min(report.seconds for report in reports),
        "total_seconds": time.monotonic() - started,
        "inertia": result.inertia[-1],
    }


def reference(x_ND: np.ndarray, settings: KMeansSettings, threads: int) -> dict[str, Any]:
    faiss.omp_set_num_threads(threads)
    assert settings.seed_rows is not None
    model = faiss.Kmeans(
        x_ND.shape[1], settings.k, niter=settings.max_iterations, spherical=True, max_points_per_centroid=len(x_ND)
    )
    model.train(x_ND, init_centroids=x_ND[list(settings.seed_rows)])
    steps = np.diff([0.0, *(entry["time"] for entry in model.iteration_stats)])  # "time" counts from the start
    return {"seconds_per_iteration": float(np.median(steps)), "fastest_iteration": float(steps.min())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=300)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    x = clustered_rows(args.rows, args.dim, args.k)
    seeds = tuple(int(row) for row in np.random.default_rng(1).choice(args.rows, args.k, replace=False))
    settings = KMeansSettings(k=args.k, seed_rows=seeds, max_iterations=args.iterations, tolerance=0)
    gflop = 2 * args.rows * args.dim * args.k / 1e9
    report: dict[str, Any] = {
        "benchmark": "kmeans",
        "machine": describe_machine() | {"faiss": faiss.__version__},
        **{name: value for name, value in vars(args).items() if name != "output"},
        "runs": [],
    }
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else ray writes a token into the home folder
    ray.init("local", num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        parts = write_parts(Path(folder), x)
        for threads in (1, 2):
            run = ours(parts, f"{folder}/out-{threads}", settings, threads)
            base = reference(x.astype(np.float32), settings, threads)
            run["gflop_per_second"] = gflop / run["seconds_per_iteration"]
            run["faiss_seconds_per_iteration"] = base["seconds_per_iteration"]
            run["time_over_faiss"] = run["seconds_per_iteration"] / base["seconds_per_iteration"]
            run["fastest_over_faiss_fastest"] = run["fastest_iteration"] / base["fastest_iteration"]
            report["runs"].append({"actors": threads, **run})
    ray.shutdown()
    publish(report, args.output)


if __name__ == "__main__":
    main()
