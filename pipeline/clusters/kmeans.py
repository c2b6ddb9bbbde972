"""Distributed k-means over the embeddings of the instances parts, with Ray actors.

Each actor holds the rows of a contiguous range of parts and answers with exact integer sums, so labels and centroids
are the same for any number of actors (workers/kmeans.py says why). The driver holds the centroids, counts per part and,
once, the rows for k-means++. A row is one mask; rows are numbered in the order of parts, images and masks.

The artifact folder holds `centroids.npy` and `artifact.json`, which is written last and is the mark that the folder is
complete. `checkpoint.npz` lies there while the fit runs. Ray must be initialised by the caller. Left out on purpose:
restarts from other seeds, mini-batches, and splitting a part between actors.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray

from pipeline.clusters.artifact import CHECKPOINT, KMeansResult, KMeansSettings, load_kmeans, write_artifact
from pipeline.clusters.shards import FarRow, ShardPool
from pipeline.engine.cluster import require_room
from pipeline.engine.stage import ARTIFACT
from pipeline.store import storage
from workers import kmeans as kernel

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
) -> KMeansResult:
    """Cluster the `embedding` rows of instances parts (URIs) and write the artifact folder `out` (URI).

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
        rows = _survey(pool, parts, settings)
        state = _load_checkpoint(out, settings, rows) or _start(pool, rows, settings)
        state = _iterate(pool, rows, settings, state, out, on_iteration)
        result = _finish(pool, rows, state)
    finally:
        pool.close()
    write_artifact(out, settings, result)
    return result


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the driver knows of the rows: `ends` of the actors' ranges of row numbers, and the sum of squared norms."""

    ends: np.ndarray
    dim: int
    step: float
    squared_norm: float

    @property
    def count(self) -> int:
        return int(self.ends[-1])


def _survey(pool: ShardPool, parts: Sequence[str], settings: KMeansSettings) -> _Rows:
    shards = [answer for _, answer in sorted(pool.call("survey"))]
    surveyed = [part for shard in shards for part in shard]
    counts = [sum(rows for rows, _, _ in shard) for shard in shards]
    _check_rows(parts, settings.k, sum(counts))
    for uri, (_, dim, _) in zip(parts, surveyed, strict=True):
        if dim != surveyed[0][1]:
            raise ValueError(f"{storage.redact(uri)}: embeddings of {dim} values, {surveyed[0][1]} in the first part")
    peak, dim = max(peak for _, _, peak in surveyed), surveyed[0][1]
    if dim * (2 * peak) ** 2 > np.finfo(np.float32).max:
        raise ValueError(f"embeddings up to {peak:g} overflow squared distances in float32; scale them down")
    pool.step = kernel.SPHERICAL_STEP if settings.spherical else kernel.grid_step(peak)
    norms = [norm for _, answer in sorted(pool.call("settle", pool.step)) for norm in answer]
    return _Rows(np.cumsum(counts), dim, pool.step, math.fsum(norms))


def _check_rows(parts: Sequence[str], k: int, rows: int) -> None:
    if rows < k:
        raise ValueError(
            f"clusters.k is {k}, but the {len(parts)} instances parts hold {rows} masks: "
            "lower clusters.k, or give the source more images"
        )
    if rows > kernel.MAX_ROWS:
        raise ValueError(f"{rows} masks are more than the {kernel.MAX_ROWS} whose sums are exact; cluster fewer parts")


@dataclass(frozen=True, slots=True)
class _State:
    """All that the next iteration needs: the centroids after `len(repaired)` updates, and those before the last."""

    centroids: np.ndarray
    previous: np.ndarray | None
    seed_rows: np.ndarray
    inertia: tuple[float, ...] = ()
    repaired: tuple[int, ...] = ()
    converged: bool = False

    @property
    def version(self) -> int:
        return len(self.repaired)


def _start(pool: ShardPool, rows: _Rows, settings: KMeansSettings) -> _State:
    if settings.seed_rows is not None:
        chosen = np.array(settings.seed_rows, np.int64)
        if chosen.min() < 0 or chosen.max() >= rows.count:
            raise ValueError(f"seed_rows must lie in 0..{rows.count - 1}, got {chosen.min()}..{chosen.max()}")
        return _State(_take(pool, rows, chosen), None, chosen)
    rng = np.random.default_rng(settings.seed)
    size = min(rows.count, settings.init_subset_per_cluster * settings.k)
    subset = np.sort(rng.choice(rows.count, size, replace=False)) if size < rows.count else np.arange(size)
    candidates = _take(pool, rows, subset)
    chosen = kernel.plus_plus(candidates, settings.k, rng)
    return _State(candidates[chosen], None, subset[chosen])


def _take(pool: ShardPool, rows: _Rows, numbers: np.ndarray) -> np.ndarray:
    order = np.argsort(numbers, kind="stable")
    firsts = np.concatenate([[0], rows.ends[:-1]])
    shares = np.split(numbers[order], np.searchsorted(numbers[order], rows.ends[:-1]))
    requests = [(share - first,) for share, first in zip(shares, firsts, strict=True)]
    taken = np.empty((len(numbers), rows.dim), np.float32)
    taken[order] = np.concatenate([found for _, found in sorted(pool.call_each("take", requests))])
    return taken


def _iterate(
    pool: ShardPool,
    rows: _Rows,
    settings: KMeansSettings,
    state: _State,
    out: str,
    on_iteration: Callable[[IterationReport], None] | None,
) -> _State:
    previous = None if state.previous is None else ray.put(state.previous)
    while not state.converged and state.version < settings.max_iterations:
        started = time.monotonic()
        current = ray.put(state.centroids)
        state, changed = _next(pool, rows, settings, state, current, previous)
        previous = current
        _save_checkpoint(out, settings, rows, state)
        if on_iteration is not None:
            seconds = time.monotonic() - started
            on_iteration(IterationReport(state.version, state.inertia[-1], changed, state.repaired[-1], seconds))
    return state


def _next(
    pool: ShardPool,
    rows: _Rows,
    settings: KMeansSettings,
    state: _State,
    current: ray.ObjectRef,
    previous: ray.ObjectRef | None,
) -> tuple[_State, int]:
    sums, counts, changed = _assigned(pool, rows, state, current, previous)
    history = (*state.inertia, kernel.inertia(rows.squared_norm, sums, counts, rows.step, state.centroids))
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
    pool: ShardPool, rows: _Rows, state: _State, current: ray.ObjectRef, previous: ray.ObjectRef | None
) -> tuple[np.ndarray, np.ndarray, int]:
    sums, counts, changed = np.zeros(state.centroids.shape, np.int64), np.zeros(len(state.centroids), np.int64), 0
    for _, (shard_sums, shard_counts, shard_changed) in pool.call("assign", state.version, current, previous):
        sums += shard_sums
        counts += shard_counts
        changed += shard_changed
    if counts.sum() != rows.count:
        raise RuntimeError(f"{rows.count} masks at the start of the fit, now {counts.sum()}: a part was replaced")
    return sums, counts, changed


def _fill_empty(
    pool: ShardPool, rows: _Rows, version: int, current: ray.ObjectRef, sums: np.ndarray, counts: np.ndarray
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
        if row.values.tobytes() in seen or counts[row.label] == 1:
            continue
        seen.add(row.values.tobytes())
        kernel.move_row(row.values, row.label, int(empty[moved]), rows.step, sums, counts)
        moved += 1
    return moved


def _finish(pool: ShardPool, rows: _Rows, state: _State) -> KMeansResult:
    sums, counts, _ = _assigned(pool, rows, state, ray.put(state.centroids), None)
    final = kernel.inertia(rows.squared_norm, sums, counts, rows.step, state.centroids)
    return KMeansResult(state.centroids, counts, (*state.inertia, final), state.repaired, state.seed_rows)


def _identity(settings: KMeansSettings, rows: _Rows) -> dict[str, Any]:
    return {**asdict(settings), "rows": rows.count, "dim": rows.dim, "step": rows.step}


def _save_checkpoint(out: str, settings: KMeansSettings, rows: _Rows, state: _State) -> None:
    record = {
        "identity": _identity(settings, rows),
        "inertia": state.inertia,
        "repaired": state.repaired,
        "converged": state.converged,
    }
    assert state.previous is not None
    buffer = io.BytesIO()
    np.savez(
        buffer,
        centroids=state.centroids,
        previous=state.previous,
        seed_rows=state.seed_rows,
        record=np.array(json.dumps(record)),
    )
    storage.write_bytes(storage.join(out, CHECKPOINT), buffer.getvalue())


def _load_checkpoint(out: str, settings: KMeansSettings, rows: _Rows) -> _State | None:
    uri = storage.join(out, CHECKPOINT)
    if not storage.exists(uri):
        return None
    with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as saved:
        record = json.loads(str(saved["record"]))
        if record["identity"] != json.loads(json.dumps(_identity(settings, rows))):
            raise ValueError(f"{storage.redact(uri)} is of a fit with other settings or rows; delete it and run again")
        log.info("k-means goes on after iteration %d", len(record["repaired"]))
        return _State(
            saved["centroids"],
            saved["previous"],
            saved["seed_rows"],
            tuple(record["inertia"]),
            tuple(record["repaired"]),
            record["converged"],
        )
