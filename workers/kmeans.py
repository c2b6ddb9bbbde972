"""k-means over rows in any number of processes: what is done to the rows of one part, and the rules between iterations.

The result must not depend on how parts are spread over processes, so nothing here depends on it. Labels are a pure
function of (rows of the part, centroids, threads). Rows are rounded once to a grid of 24-bit fixed point numbers, so
that the sums of a cluster are integers and adding them is exact in any order. Which process holds a part can then
change nothing. Labels near a tie may still differ between CPU types, BLAS builds, thread counts, and CPU and GPU.

The objective is the sum of squared distances to the nearest centroid. Spherical k-means has rows and centroids of unit
norm, where that distance is 2 (1 - cosine). Shapes: N rows, D dimensions, K centroids. faiss and scipy are loaded by
those who compute: a look at a run need not wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from workers.conditioning import unit_rows

GRID_BITS = 24  # float32 has 24 significant bits: every point of the grid is a float32
SPHERICAL_STEP = 2.0**-GRID_BITS
MAX_ROWS = 2 ** (62 - GRID_BITS)  # at most 2^24 steps a value, so that int64 sums cannot overflow below this
_TILE = 4096  # rows a faiss call, and rows that are turned to float64 at once
_SMALLEST_GEMM = 64  # faiss leaves BLAS below 20 queries: short tiles are padded with zero rows to a multiple of this

Search = Callable[[np.ndarray, np.ndarray], np.ndarray]


def embedding_rows(column: pa.ChunkedArray) -> np.ndarray:
    """A list<fixed_size_list<float, D>> column -> (N, D) float32, in the order of its rows and inside each row.

    ValueError when the column has another type or an entry is null.
    """
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_fixed_size_list(kind.value_type):
        raise ValueError(f"expected a list of fixed-size lists of floats, got {kind}")
    dim = kind.value_type.list_size
    blocks = [_flat_values(chunk).reshape(-1, dim) for chunk in column.chunks]
    return np.concatenate([np.zeros((0, dim), np.float32), *blocks])


def _flat_values(chunk: pa.Array) -> np.ndarray:
    vectors = chunk.flatten()
    values = vectors.flatten()
    if vectors.null_count or values.null_count:
        raise ValueError("an embedding is null")
    return values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)


def grid_step(peak: float) -> float:
    """The power of two that puts values up to `peak` in magnitude on integers of at most 2^24. 2^-24 when peak is 0."""
    mantissa, exponent = math.frexp(peak)
    return math.ldexp(1.0, exponent - (mantissa == 0.5) - GRID_BITS) if peak > 0 else SPHERICAL_STEP


def on_grid(x_ND: np.ndarray, step: float) -> np.ndarray:
    """(N, D) float32 rounded to multiples of `step`. Exact for float16 rows up to 1 in magnitude."""
    return (np.rint(x_ND.astype(np.float64) / step) * step).astype(np.float32)


def faiss_search(device: str = "cpu", threads: int | None = None) -> Search:
    """A function (x (N, D), centroids (K, D)) -> (N,) nearest centroid by squared distance, float32 arithmetic.

    `threads` pins faiss's threads on the CPU (None: as they are): another count can change the last bit of a product.
    ValueError for an unknown device, RuntimeError when cuda is asked for and faiss or the machine cannot.
    """
    if device == "cpu":
        return lambda x_ND, c_KD: _cpu_search(x_ND, c_KD, threads)
    if device != "cuda":
        raise ValueError(f"workers.device for k-means is 'cpu' or 'cuda', got {device!r}")
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise RuntimeError(
            "workers.device is 'cuda', but the installed faiss has no GPU support: "
            "replace faiss-cpu by faiss-gpu (pip install 'u2label[gpu]'), or set workers.device to 'cpu'"
        )
    if faiss.get_num_gpus() == 0:
        raise RuntimeError("workers.device is 'cuda', but faiss sees no GPU in this process")
    resources = faiss.StandardGpuResources()
    return lambda x_ND, c_KD: faiss.knn_gpu(resources, x_ND, c_KD, 1, metric=faiss.METRIC_L2)[1][:, 0]


def _cpu_search(x_ND: np.ndarray, c_KD: np.ndarray, threads: int | None) -> np.ndarray:
    import faiss

    if threads is not None:  # at every call: the setting belongs to the calling thread
        faiss.omp_set_num_threads(threads)
    # Spherical rows too: among centroids of unit norm the order is the same, and faiss 1.15 breaks ties of inner
    # products in no fixed order, those of distances by the lowest index.
    return faiss.knn(x_ND, c_KD, 1, metric=faiss.METRIC_L2)[1][:, 0]


class NearestCentroid:
    """(N, D) float32 rows -> (N,) int32 nearest of its centroids; of equal centroids the lowest index."""

    def __init__(self, centroids_KD: np.ndarray, search: Search | None = None) -> None:
        self._centroids_KD = np.ascontiguousarray(centroids_KD, np.float32)
        self._search = search or faiss_search()
        # A GEMM can give equal columns different last bits, so that faiss alone may pick any of several equal ones.
        first: dict[bytes, int] = {}
        rows = enumerate(self._centroids_KD + np.float32(0))  # -0.0 + 0.0 is 0.0
        self._lowest = np.array([first.setdefault(row.tobytes(), i) for i, row in rows], np.int32)

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        labels = np.empty(len(x_ND), np.int32)
        for start in range(0, len(x_ND), _TILE):
            tile = x_ND[start : start + _TILE]
            labels[start : start + _TILE] = self._lowest[self._search(_padded(tile), self._centroids_KD)[: len(tile)]]
        return labels


def _padded(tile_ND: np.ndarray) -> np.ndarray:
    missing = -len(tile_ND) % _SMALLEST_GEMM
    return np.ascontiguousarray(np.pad(tile_ND, ((0, missing), (0, 0))) if missing else tile_ND, np.float32)


def squared_distances(x_ND: np.ndarray, centroids_KD: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """(N,) float64 squared distance of each row to the centroid of its label, by differences (no cancellation)."""
    distances = np.empty(len(x_ND))
    for start in range(0, len(x_ND), _TILE):
        rows = slice(start, start + _TILE)
        difference = x_ND[rows].astype(np.float64) - centroids_KD[labels_N[rows]]
        distances[rows] = np.einsum("nd,nd->n", difference, difference)
    return distances


def assign(
    x_ND: np.ndarray,
    centroids_KD: np.ndarray,
    *,
    spherical: bool,
    device: str = "cpu",
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, D) and centroids (K, D) -> (N,) int32 labels and (N,) float32 squared distances.

    Spherical: rows are brought to unit norm first, and the distance is 2 (1 - cosine). ValueError when the dimensions
    differ, else as `faiss_search`.
    """
    x_ND, centroids_KD = np.asarray(x_ND, np.float32), np.asarray(centroids_KD, np.float32)
    if x_ND.ndim != 2 or centroids_KD.ndim != 2 or x_ND.shape[1] != centroids_KD.shape[1]:
        raise ValueError(f"rows of shape {x_ND.shape} do not fit centroids of shape {centroids_KD.shape}")
    if spherical:
        x_ND = on_grid(unit_rows(x_ND), SPHERICAL_STEP)
    labels = NearestCentroid(centroids_KD, faiss_search(device, threads))(x_ND)
    return labels, squared_distances(x_ND, centroids_KD, labels).astype(np.float32)


def cluster_sums(
    x_ND: np.ndarray, labels_N: np.ndarray, k: int, step: float, units_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the rows of each cluster: (K, D) int64 in units of `step`, and (K,) int64. Exact.

    `x_ND` must lie on the grid of `step`. `units_N`: how often a row counts, up to 2^12; None: once. A tile sums at
    most 2^12 values of 2^24 steps, each 2^12 times at most, which float64 holds exactly.
    """
    import scipy.sparse

    sums = np.zeros((k, x_ND.shape[1]), np.int64)
    weights = np.ones(len(x_ND)) if units_N is None else units_N.astype(np.float64)
    for start in range(0, len(x_ND), _TILE):
        labels = labels_N[start : start + _TILE]
        tile_ND = x_ND[start : start + _TILE].astype(np.float64)
        pointers = np.arange(len(labels) + 1)
        one_hot_KN = scipy.sparse.csc_matrix((weights[start : start + _TILE], labels, pointers), shape=(k, len(labels)))
        sums += (one_hot_KN @ tile_ND / step).astype(np.int64)
    return sums, np.bincount(labels_N, weights, minlength=k).astype(np.int64)


def move_row(
    x_D: np.ndarray, old: int, new: int, step: float, sums_KD: np.ndarray, counts_K: np.ndarray, units: int = 1
) -> None:
    """Take one row on the grid, `units` times, out of cluster `old` and into `new`, in place in the sums and counts."""
    steps_D = (x_D.astype(np.float64) / step).astype(np.int64) * units
    sums_KD[old] -= steps_D
    sums_KD[new] += steps_D
    counts_K[old] -= units
    counts_K[new] += units


def updated_centroids(
    sums_KD: np.ndarray, counts_K: np.ndarray, step: float, old_KD: np.ndarray, *, spherical: bool
) -> np.ndarray:
    """(K, D) float32 means of the clusters, of unit norm if spherical.

    The old centroid stays where a cluster is empty or, if spherical, where its rows cancel to a mean of zero.
    """
    mean_KD = sums_KD * step / np.maximum(counts_K, 1)[:, None]
    moved = counts_K > 0
    if spherical:
        norms = np.sqrt(np.einsum("kd,kd->k", mean_KD, mean_KD))
        moved &= norms > 0
        mean_KD /= np.where(moved, norms, 1)[:, None]
    return np.where(moved[:, None], mean_KD, old_KD).astype(np.float32)


def inertia(
    squared_norm: float, sums_KD: np.ndarray, counts_K: np.ndarray, step: float, centroids_KD: np.ndarray
) -> float:
    """Sum of squared distances of all rows to their centroids, from the sums alone: |x|^2 - 2 x.c + |c|^2, added up.

    `squared_norm` is the sum of |x|^2 over all rows. Float64 on exact sums: independent of the order of the rows.
    """
    centroids = centroids_KD.astype(np.float64)
    cross = float(np.einsum("kd,kd->", centroids, sums_KD * step))
    own = float(counts_K @ np.einsum("kd,kd->k", centroids, centroids))
    return max(0.0, squared_norm - 2 * cross + own)


def spherical_kmeans(x_ND: np.ndarray, k: int, seed: int, *, restarts: int = 4, iterations: int = 50) -> np.ndarray:
    """(N, D) rows, N >= K -> (K, D) float32 unit centroids: in this process, on one thread, the best of `restarts`.

    Each starts from k-means++ on at most 256 K rows. A cluster that becomes empty stays where it was.
    """
    x_ND = on_grid(unit_rows(x_ND), SPHERICAL_STEP)
    found = [_spherical_once(x_ND, k, np.random.default_rng([seed, run]), iterations) for run in range(restarts)]
    return min(found, key=lambda each: each[0])[1]


def _spherical_once(x_ND: np.ndarray, k: int, rng: np.random.Generator, iterations: int) -> tuple[float, np.ndarray]:
    """The inertia at the last assignment, and the centroids after it."""
    start = np.sort(rng.permutation(len(x_ND))[: 256 * k])
    centroids = x_ND[start][plus_plus(x_ND[start], k, rng)]
    norm = float(np.einsum("nd,nd->", x_ND, x_ND, dtype=np.float64))
    search, history = faiss_search("cpu", 1), list[float]()
    for _ in range(iterations):
        sums, counts = cluster_sums(x_ND, NearestCentroid(centroids, search)(x_ND), k, SPHERICAL_STEP)
        history.append(inertia(norm, sums, counts, SPHERICAL_STEP, centroids))
        centroids = updated_centroids(sums, counts, SPHERICAL_STEP, centroids, spherical=True)
        if has_converged(history, changed=1, repaired=0, tolerance=1e-5):
            break
    return history[-1], centroids


def farthest(distances_N: np.ndarray, n: int, floor: float) -> np.ndarray:
    """Indices of the at most `n` rows with the largest distance above `floor`, farthest first, ties by lower index."""
    far = np.flatnonzero(distances_N > floor)
    return far[np.argsort(-distances_N[far], kind="stable")[:n]]


def distance_floor(dim: int, step: float) -> float:
    """Squared distance below which the grid cannot tell a row from its centroid: a move of 4 steps a dimension."""
    return dim * (4 * step) ** 2


def has_converged(inertias: Sequence[float], *, changed: int, repaired: int, tolerance: float) -> bool:
    """Whether an iteration was the last: no label changed, or the inertia fell by less than `tolerance` of itself.

    Never after an iteration that moved empty clusters: the next assignment uses them for the first time.
    """
    if repaired:
        return False
    return changed == 0 or (len(inertias) > 1 and inertias[-2] - inertias[-1] <= tolerance * inertias[-2])


def plus_plus(x_ND: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++: (K,) int64 distinct row numbers of (N, D) float32 rows, N >= K.

    Arthur and Vassilvitskii 2007: a row is drawn with probability proportional to its squared distance to the rows
    chosen so far; of 2 + floor(ln K) draws the one that leaves the smallest sum is kept. When every row equals a
    chosen one, the lowest row number that is free.
    """
    norms_N = np.einsum("nd,nd->n", x_ND, x_ND)
    trials = 2 + int(math.log(k))
    chosen = np.empty(k, np.int64)
    chosen[0] = rng.integers(len(x_ND))
    closest_N = _distances_to(x_ND, norms_N, chosen[:1])[0]
    closest_N[chosen[0]] = 0
    for i in range(1, k):
        mass_N = np.cumsum(closest_N, dtype=np.float64)
        draws = np.searchsorted(mass_N, rng.random(trials) * mass_N[-1], side="right")
        if mass_N[-1] == 0:
            chosen[i] = np.setdiff1d(np.arange(k), chosen[:i])[0]
            continue
        draws = np.minimum(draws, np.flatnonzero(closest_N)[-1])
        left_TN = np.minimum(closest_N, _distances_to(x_ND, norms_N, draws))
        best = int(np.argmin(left_TN.sum(axis=1, dtype=np.float64)))
        chosen[i], closest_N = draws[best], left_TN[best]
        closest_N[chosen[i]] = 0
    return chosen


def _distances_to(x_ND: np.ndarray, norms_N: np.ndarray, rows_T: np.ndarray) -> np.ndarray:
    return np.maximum(norms_N + norms_N[rows_T, None] - 2 * (x_ND[rows_T] @ x_ND.T), 0)
