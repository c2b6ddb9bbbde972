"""Distributed k-means over the embeddings of the instances parts, with Ray actors.

Each actor holds the rows of a contiguous range of parts and answers with exact integer sums, so labels and centroids
are the same for any number of actors (workers/kmeans.py says why). The driver holds the centroids, counts per part and,
once, the rows for k-means++. A row is one mask; rows are numbered in the order of parts, images and masks. Where copies
count as one (`Weights`), a row counts a whole number of units of 2^-12, so that sums stay exact.

The artifact folder holds `centroids.npy` and `artifact.json`, which is written last and is the mark that the folder is
complete. `checkpoint.npz` lies there while the fit runs. Ray must be initialised by the caller. Left out on purpose:
restarts from other seeds, mini-batches, and splitting a part between actors.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import ray

from pipeline.clusters.artifact import KMeansResult, KMeansSettings, load_kmeans, write_artifact
from pipeline.clusters.shards import FarRow, ShardPool
from pipeline.clusters.state import Rows, State, load_checkpoint, save_checkpoint
from pipeline.engine.cluster import require_room
from pipeline.engine.stage import ARTIFACT
from pipeline.store import storage
from workers import kmeans as kernel
from workers.copies import UNIT, Weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IterationReport:
    """One finished iteration, counted from 1. `changed` is the number of rows whose label is new (the first time all),
    `repaired` the number of empty clusters that were moved, `seconds` its wall time."""

    iteration: int
    inertia: float
    changed: int
    repaired: int
    seconds: float


def fit_kmeans(
    parts: Sequence[str],
    out: str,
    settings: KMeansSettings,
    *,
    num_actors: int,
    cpus_per_actor: float,
    device: str,
    gpus_per_actor: float = 1,
    on_iteration: Callable[[IterationReport], None] | None = None,
    weights: Weights | None = None,
) -> KMeansResult:
    """Cluster the `embedding` rows of instances parts (URIs) and write the artifact folder `out` (URI).

    `weights`: what each row counts, so that of a group of copies all together count as one row, and the first alone may
    be the start of a cluster; None: each row counts as one.

    A complete `out` is read and returned; one with a checkpoint goes on from there, with the same result as a fit that
    was never stopped. An actor that is lost is started again and its answer computed again. `device` is "cpu" (each
    actor uses floor(cpus_per_actor) threads, at least one) or "cuda" (faiss-gpu, `gpus_per_actor` each).

    ValueError: fewer masks than clusters.k, a part that is not readable or has a value that is not finite, a
    checkpoint of another fit. RuntimeError: Ray is not initialised, no GPU for "cuda", an actor that dies again and
    again.
    """
    if storage.exists(storage.join(out, ARTIFACT)):
        return load_kmeans(out)
    if num_actors < 1:
        raise ValueError(f"workers.size must be at least 1, got {num_actors}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"workers.device for k-means is 'cpu' or 'cuda', got {device!r}")
    gpus = gpus_per_actor if device == "cuda" else 0
    require_room("k-means actors", "workers.size", min(num_actors, len(parts)), cpus_per_actor, gpus)
    pool = ShardPool(parts, num_actors, spherical=settings.spherical, device=device, cpus=cpus_per_actor, gpus=gpus)
    try:
        rows = _survey(pool, parts, settings, weights)
        state = load_checkpoint(out, settings, rows) or _start(pool, rows, settings)
        state = _iterate(pool, rows, settings, state, out, on_iteration)
        result = _finish(pool, rows, state)
    finally:
        pool.close()
    write_artifact(out, settings, result, different=None if weights is None else weights.groups)
    return result


def _survey(pool: ShardPool, parts: Sequence[str], settings: KMeansSettings, weights: Weights | None) -> Rows:
    shards = [answer for _, answer in sorted(pool.call("survey"))]
    surveyed = [part for shard in shards for part in shard]
    counts = [sum(rows for rows, _, _ in shard) for shard in shards]
    _check_rows(parts, settings.k, sum(counts), weights)
    for uri, (_, dim, _) in zip(parts, surveyed, strict=True):
        if dim != surveyed[0][1]:
            raise ValueError(f"{storage.redact(uri)}: embeddings of {dim} values, {surveyed[0][1]} in the first part")
    peak, dim = max(peak for _, _, peak in surveyed), surveyed[0][1]
    if dim * (2 * peak) ** 2 > np.finfo(np.float32).max:
        raise ValueError(f"embeddings up to {peak:g} overflow squared distances in float32; scale them down")
    pool.step = kernel.SPHERICAL_STEP if settings.spherical else kernel.grid_step(peak)
    ends = np.cumsum(counts)
    if weights is not None:
        pool.weights = [weights.of(end - count, end) for end, count in zip(ends, counts, strict=True)]
    settled = sorted(pool.call_each("settle", [(pool.step, share) for share in pool.weights]))
    return Rows(ends, dim, pool.step, math.fsum(norm for _, answer in settled for norm in answer), weights)


def _check_rows(parts: Sequence[str], k: int, rows: int, weights: Weights | None) -> None:
    if weights is not None:
        _check_weights(k, rows, weights)
    if rows < k:
        raise ValueError(
            f"clusters.k is {k}, but the {len(parts)} instances parts hold {rows} masks: "
            "lower clusters.k, or give the source more images"
        )
    if rows > kernel.MAX_ROWS:
        raise ValueError(f"{rows} masks are more than the {kernel.MAX_ROWS} whose sums are exact; cluster fewer parts")


def _check_weights(k: int, rows: int, weights: Weights) -> None:
    if len(weights.units) != rows:
        raise ValueError(f"{len(weights.units)} masks when copies were looked for, now {rows}: a part was replaced")
    if rows >= k > weights.groups:
        raise ValueError(
            f"clusters.k is {k}, but the {rows} masks are {weights.groups} where copies count as one: lower "
            "clusters.k, or raise clusters.dedup"
        )
    if weights.groups > kernel.MAX_ROWS // UNIT:
        most = kernel.MAX_ROWS // UNIT
        raise ValueError(f"{weights.groups} different masks are more than the {most} whose weighted sums are exact")


def _start(pool: ShardPool, rows: Rows, settings: KMeansSettings) -> State:
    if settings.seed_rows is not None:
        chosen = np.array(settings.seed_rows, np.int64)
        if chosen.min() < 0 or chosen.max() >= rows.count:
            raise ValueError(f"seed_rows must lie in 0..{rows.count - 1}, got {chosen.min()}..{chosen.max()}")
        return State(_take(pool, rows, chosen), None, chosen)
    rng = np.random.default_rng(settings.seed)
    size = min(rows.different, settings.init_subset_per_cluster * settings.k)
    some = np.sort(rng.choice(rows.different, size, replace=False)) if size < rows.different else np.arange(size)
    subset = rows.numbers_of(some)
    candidates = _take(pool, rows, subset)
    chosen = kernel.plus_plus(candidates, settings.k, rng)
    return State(candidates[chosen], None, subset[chosen])


def _take(pool: ShardPool, rows: Rows, numbers: np.ndarray) -> np.ndarray:
    order = np.argsort(numbers, kind="stable")
    firsts = np.concatenate([[0], rows.ends[:-1]])
    shares = np.split(numbers[order], np.searchsorted(numbers[order], rows.ends[:-1]))
    requests = [(share - first,) for share, first in zip(shares, firsts, strict=True)]
    taken = np.empty((len(numbers), rows.dim), np.float32)
    taken[order] = np.concatenate([found for _, found in sorted(pool.call_each("take", requests))])
    return taken


def _iterate(
    pool: ShardPool,
    rows: Rows,
    settings: KMeansSettings,
    state: State,
    out: str,
    on_iteration: Callable[[IterationReport], None] | None,
) -> State:
    previous = None if state.previous is None else ray.put(state.previous)
    while not state.converged and state.version < settings.max_iterations:
        started = time.monotonic()
        current = ray.put(state.centroids)
        state, changed = _next(pool, rows, settings, state, current, previous)
        previous = current
        save_checkpoint(out, settings, rows, state)
        if on_iteration is not None:
            seconds = time.monotonic() - started
            on_iteration(IterationReport(state.version, state.inertia[-1], changed, state.repaired[-1], seconds))
    return state


def _next(
    pool: ShardPool,
    rows: Rows,
    settings: KMeansSettings,
    state: State,
    current: ray.ObjectRef,
    previous: ray.ObjectRef | None,
) -> tuple[State, int]:
    sums, counts, changed = _assigned(pool, rows, state, current, previous)
    history = (*state.inertia, _inertia(rows, sums, counts, state.centroids))
    repaired = _fill_empty(pool, rows, state.version, current, sums, counts)
    if repaired:
        log.info("k-means iteration %d: %d empty clusters moved", len(history), repaired)
    centroids = kernel.updated_centroids(sums, counts, rows.step, state.centroids, spherical=settings.spherical)
    converged = kernel.has_converged(history, changed=changed, repaired=repaired, tolerance=settings.tolerance)
    return replace(
        state,
        centroids=centroids,
        previous=state.centroids,
        inertia=history,
        repaired=(*state.repaired, repaired),
        converged=converged,
    ), changed


def _assigned(
    pool: ShardPool, rows: Rows, state: State, current: ray.ObjectRef, previous: ray.ObjectRef | None
) -> tuple[np.ndarray, np.ndarray, int]:
    sums, counts, changed = np.zeros(state.centroids.shape, np.int64), np.zeros(len(state.centroids), np.int64), 0
    for _, (shard_sums, shard_counts, shard_changed) in pool.call("assign", state.version, current, previous):
        sums += shard_sums
        counts += shard_counts
        changed += shard_changed
    if counts.sum() != rows.different * rows.unit:
        now = counts.sum() // rows.unit
        raise RuntimeError(f"{rows.different} masks at the start of the fit, now {now}: a part was replaced")
    return sums, counts, changed


def _inertia(rows: Rows, sums: np.ndarray, counts: np.ndarray, centroids: np.ndarray) -> float:
    return kernel.inertia(rows.squared_norm, sums, counts, rows.step, centroids) / rows.unit


def _fill_empty(
    pool: ShardPool, rows: Rows, version: int, current: ray.ObjectRef, sums: np.ndarray, counts: np.ndarray
) -> int:
    """Move the farthest rows, in `sums` and `counts`, from their clusters to the empty ones; how many were moved.

    Fewer than are empty when there are not enough different rows away from their centroid.
    """
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return 0
    firsts = np.concatenate([[0], rows.ends[:-1]])
    found = [
        row._replace(number=int(firsts[actor]) + row.number)
        for actor, answer in pool.call("farthest", version, current, len(empty))
        for row in answer
    ]
    moved, seen = 0, set[bytes]()
    for row in sorted(found, key=FarRow.rank)[: len(empty)]:
        # Equal rows would leave all but one of these clusters empty again, a row on its own would leave its own empty.
        if row.values.tobytes() in seen or counts[row.label] <= rows.unit:
            continue
        seen.add(row.values.tobytes())
        kernel.move_row(row.values, row.label, int(empty[moved]), rows.step, sums, counts, rows.unit)
        moved += 1
    return moved


def _finish(pool: ShardPool, rows: Rows, state: State) -> KMeansResult:
    centroids = ray.put(state.centroids)
    sums, counts, _ = _assigned(pool, rows, state, centroids, None)
    final = _inertia(rows, sums, counts, state.centroids)
    sizes = sum(size for _, size in pool.call("sizes", state.version, centroids))
    return KMeansResult(state.centroids, sizes, (*state.inertia, final), state.repaired, state.seed_rows)
