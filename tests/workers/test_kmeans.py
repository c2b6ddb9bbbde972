"""The k-means kernel: exact sums, nearest centroids, repair, k-means++."""

from __future__ import annotations

import itertools

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import kmeans
from workers.records import instances_schema

SQUARE = np.array([[0, 0], [0, 2], [8, 0], [8, 2], [4, 9]], np.float32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def test_assign_euclidean_gives_labels_and_squared_distances() -> None:
    centroids = np.array([[8, 1], [0, 1]], np.float32)
    labels, distances = kmeans.assign(SQUARE, centroids, spherical=False)
    assert labels.dtype == np.int32
    assert labels.tolist() == [1, 1, 0, 0, 0]  # the last lies as far from both: the lower index
    assert distances.tolist() == [1, 1, 1, 1, 80]


def test_assign_spherical_ignores_length_and_measures_two_minus_two_cosines() -> None:
    labels, distances = kmeans.assign(
        np.array([[10, 0], [0, 0.1], [3, 3], [0, 0]], np.float32), np.eye(2, dtype=np.float32), spherical=True
    )
    assert labels.tolist() == [0, 1, 0, 0]
    assert distances == pytest.approx([0, 0, 2 - 2 * np.sqrt(0.5), 1], abs=1e-6)


def test_assign_of_no_rows_and_of_rows_that_do_not_fit() -> None:
    labels, distances = kmeans.assign(np.zeros((0, 2), np.float32), SQUARE, spherical=True)
    assert labels.shape == distances.shape == (0,)
    with pytest.raises(ValueError, match=r"\(1, 3\) do not fit centroids of shape \(5, 2\)"):
        kmeans.assign(np.zeros((1, 3), np.float32), SQUARE, spherical=True)


@pytest.mark.parametrize("rows", [1, 19, 64, 4095, 4097, 9000])
def test_ties_go_to_the_lowest_index_at_any_size(rows: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.choice([-1, 1], (rows, 8)).astype(np.float32)  # small integers: distances are exact, ties are many
    centroids = rng.choice([-2, 0, 2], (1100, 8)).astype(np.float32)
    exact = (x**2).sum(1)[:, None] + (centroids**2).sum(1) - 2 * x @ centroids.T
    labels, _ = kmeans.assign(x, centroids, spherical=False)
    assert (labels == exact.argmin(axis=1)).all()
    assert (np.count_nonzero(exact == exact.min(axis=1)[:, None], axis=1) > 1).all()


def test_equal_centroids_share_the_lowest_index_whatever_the_gemm_does() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 384)).astype(np.float32)
    centroids = np.tile(x[:100], (3, 1))
    labels, _ = kmeans.assign(x, centroids, spherical=False)
    assert labels.max() < 100
    assert labels[:100].tolist() == list(range(100))


def test_cuda_without_faiss_gpu_says_what_to_install() -> None:
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPU support")
    with pytest.raises(RuntimeError, match=r"no GPU support.*u2label\[gpu\]"):
        kmeans.assign(SQUARE, SQUARE, spherical=False, device="cuda")
    with pytest.raises(ValueError, match="'mps'"):
        kmeans.assign(SQUARE, SQUARE, spherical=False, device="mps")


def test_embedding_rows_follow_the_order_of_images_and_masks() -> None:
    field = instances_schema(2).field("embedding")
    values = [[[1, 2], [3, 4]], [], [[5, 6]]]
    column = pa.chunked_array([pa.array(values, field.type), pa.array([[[7, 8]]], field.type)])
    rows = kmeans.embedding_rows(column.slice(1))
    assert rows.dtype == np.float32
    assert rows.tolist() == [[5, 6], [7, 8]]
    assert kmeans.embedding_rows(column.slice(0, 0)).shape == (0, 2)


def test_embedding_rows_refuses_nulls_and_other_types() -> None:
    kind = instances_schema(2).field("embedding").type
    with pytest.raises(ValueError, match="null"):
        kmeans.embedding_rows(pa.chunked_array([pa.array([[[1, None]]], kind)]))
    with pytest.raises(ValueError, match="null"):
        kmeans.embedding_rows(pa.chunked_array([pa.array([[None]], kind)]))
    with pytest.raises(ValueError, match="fixed-size"):
        kmeans.embedding_rows(pa.chunked_array([pa.array([[1.0]])]))


@pytest.mark.parametrize(
    ("peak", "step"), [(1.0, 2**-24), (0.0, 2**-24), (0.75, 2**-24), (1.5, 2**-23), (65504, 2**-8)]
)
def test_grid_step_puts_the_peak_on_24_bits(peak: float, step: float) -> None:
    assert kmeans.grid_step(peak) == step
    assert peak / step <= 2**24


def test_the_grid_keeps_every_float16_up_to_one_and_is_idempotent() -> None:
    halves = np.arange(2**15, dtype=np.uint16).view(np.float16)
    halves = halves[halves <= 1].astype(np.float32)[:, None]
    assert (kmeans.on_grid(halves, kmeans.SPHERICAL_STEP) == halves).all()
    x = np.random.default_rng(0).uniform(-3, 3, (50, 7)).astype(np.float32)
    once = kmeans.on_grid(x, kmeans.grid_step(3))
    assert np.abs(once - x).max() <= 2**-23
    assert (kmeans.on_grid(once, kmeans.grid_step(3)) == once).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(1e-6, 1e6), st.data())
def test_cluster_sums_are_the_same_in_any_order_and_grouping(seed: int, rows: int, scale: float, data: st.DataObject):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, 3)) * scale).astype(np.float32)
    step = kmeans.grid_step(float(np.abs(x).max()))
    x, labels = kmeans.on_grid(x, step), rng.integers(0, 4, rows).astype(np.int32)
    whole, counts = kmeans.cluster_sums(x, labels, 4, step)

    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, rows), max_size=4))), rows]
    order = rng.permutation(rows)
    pieces = [kmeans.cluster_sums(x[order[a:b]], labels[order[a:b]], 4, step) for a, b in itertools.pairwise(cuts)]
    assert (sum(sums for sums, _ in pieces) == whole).all()
    assert (sum(n for _, n in pieces) == counts).all()
    by_hand = [[sum(int(v / step) for v in x[labels == k, d]) for d in range(3)] for k in range(4)]
    assert whole.tolist() == by_hand


def test_cluster_sums_are_exact_at_the_largest_values() -> None:
    x = np.full((9001, 1), 1.0, np.float32)  # 2^24 steps each, three tiles
    sums, counts = kmeans.cluster_sums(x, np.zeros(9001, np.int32), 2, kmeans.SPHERICAL_STEP)
    assert sums.tolist() == [[9001 * 2**24], [0]]
    assert counts.tolist() == [9001, 0]
    assert kmeans.MAX_ROWS * 2**24 <= 2**62


def test_updated_centroids_are_means_and_keep_what_is_empty_or_cancels() -> None:
    old = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    sums, counts = np.array([[6, 8], [0, 0], [0, 0]]), np.array([2, 0, 4])
    plain = kmeans.updated_centroids(sums, counts, 0.5, old, spherical=False)
    assert plain.tolist() == [[1.5, 2], [0, 1], [0, 0]]
    unit = kmeans.updated_centroids(sums, counts, 0.5, old, spherical=True)
    assert unit == pytest.approx(np.array([[0.6, 0.8], [0, 1], [1, 0]]))


def test_inertia_from_the_sums_is_that_of_the_rows() -> None:
    rng = np.random.default_rng(1)
    x = kmeans.on_grid(rng.uniform(-1, 1, (5000, 20)), kmeans.SPHERICAL_STEP)
    centroids = x[:7] * 0.9
    labels, _ = kmeans.assign(x, centroids, spherical=False)
    sums, counts = kmeans.cluster_sums(x, labels, 7, kmeans.SPHERICAL_STEP)
    total = float(np.square(x, dtype=np.float64).sum())
    direct = np.square(x.astype(np.float64) - centroids[labels]).sum()
    assert kmeans.inertia(total, sums, counts, kmeans.SPHERICAL_STEP, centroids) == pytest.approx(direct, rel=1e-12)
    assert kmeans.squared_distances(x, centroids, labels).sum() == pytest.approx(direct, rel=1e-12)


def test_moving_a_row_equals_summing_with_the_other_label() -> None:
    x = kmeans.on_grid(np.random.default_rng(0).uniform(-1, 1, (10, 3)), kmeans.SPHERICAL_STEP)
    labels = np.array([0, 0, 1, 1, 1, 0, 3, 3, 0, 1], np.int32)
    sums, counts = kmeans.cluster_sums(x, labels, 4, kmeans.SPHERICAL_STEP)
    kmeans.move_row(x[4], 1, 2, kmeans.SPHERICAL_STEP, sums, counts)
    labels[4] = 2
    expected_sums, expected_counts = kmeans.cluster_sums(x, labels, 4, kmeans.SPHERICAL_STEP)
    assert (sums == expected_sums).all()
    assert (counts == expected_counts).all()


def test_farthest_orders_by_distance_then_row() -> None:
    distances = np.array([0, 5, 1e-20, 7, 5, 7, 2])
    assert kmeans.farthest(distances, 4, 1e-12).tolist() == [3, 5, 1, 4]
    assert kmeans.farthest(distances, 9, 1e-12).tolist() == [3, 5, 1, 4, 6]


@pytest.mark.parametrize(
    ("inertias", "changed", "repaired", "done"),
    [
        ([9.0], 5, 0, False),
        ([9.0, 5.0], 5, 0, False),
        ([9.0, 8.9999], 5, 0, True),
        ([9.0, 9.0001], 5, 0, True),
        ([9.0, 5.0], 0, 0, True),
        ([9.0, 9.0], 0, 1, False),
        ([0.0, 0.0], 3, 0, True),
    ],
)
def test_convergence(inertias: list[float], changed: int, repaired: int, done: bool) -> None:
    assert kmeans.has_converged(inertias, changed=changed, repaired=repaired, tolerance=1e-4) is done


def test_plus_plus_finds_one_row_of_every_far_group() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.eye(12, dtype=np.float32) * 100, 40, axis=0)
    x = groups + rng.standard_normal(groups.shape).astype(np.float32)
    chosen = kmeans.plus_plus(x, 12, np.random.default_rng(5))
    assert sorted(chosen // 40) == list(range(12))
    assert (chosen == kmeans.plus_plus(x, 12, np.random.default_rng(5))).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 3))
def test_plus_plus_rows_are_distinct_even_when_the_values_are_not(seed: int, k: int, values: int) -> None:
    x = np.random.default_rng(seed).integers(0, values, (12, 2)).astype(np.float32)
    chosen = kmeans.plus_plus(x, k, np.random.default_rng(seed))
    assert len(set(chosen.tolist())) == k
    assert chosen.min() >= 0
    assert chosen.max() < 12


def test_spherical_kmeans_in_one_process_finds_directions_whatever_the_lengths() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 5, 400)
    rows = (np.eye(8)[groups] + 0.1 * rng.standard_normal((400, 8))) * rng.uniform(0.1, 9, (400, 1))
    centroids = kmeans.spherical_kmeans(rows, 5, seed=3)
    assert np.linalg.norm(centroids, axis=1) == pytest.approx(1, abs=1e-6)
    labels = kmeans.assign(rows, centroids, spherical=True)[0]
    assert {len(set(labels[groups == group])) for group in range(5)} == {1}
    assert len(set(labels)) == 5
    assert (kmeans.spherical_kmeans(rows, 5, seed=3) == centroids).all()


def test_spherical_kmeans_keeps_the_best_of_its_starts_and_stands_equal_rows() -> None:
    rows = np.random.default_rng(1).standard_normal((300, 4)).astype(np.float32)

    def inertia(restarts: int) -> float:
        return kmeans.assign(rows, kmeans.spherical_kmeans(rows, 9, 0, restarts=restarts), spherical=True)[1].sum()

    assert inertia(6) <= inertia(1)
    equal = kmeans.spherical_kmeans(np.ones((7, 3), np.float32), 4, seed=0)
    assert equal == pytest.approx(np.full((4, 3), 3**-0.5), abs=1e-6)
