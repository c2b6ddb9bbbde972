"""Distributed k-means: the same numbers for any number of actors, through lost actors and restarts."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipeline.clusters import shards as kmeans_shards
from pipeline.clusters.artifact import KMeansResult, KMeansSettings, load_kmeans
from pipeline.clusters.embeddings import read_embeddings
from pipeline.clusters.kmeans import IterationReport, fit_kmeans
from pipeline.clusters.shards import KMeansShard
from pipeline.errors import ConfigError
from tests.pipeline.clusters.embedded_parts import write_parts
from workers.kmeans import assign

DIM, GROUPS = 24, 15
SETTINGS = KMeansSettings(k=40, seed=3, max_iterations=12, tolerance=0)


@dataclass(frozen=True)
class Fit:
    result: KMeansResult
    reports: tuple[tuple[int, float, int, int], ...]
    labels: tuple[np.ndarray, ...]


def fit(parts: list[str], out: Path, settings: KMeansSettings, actors: int, **options: Any) -> Fit:
    """Fit with one thread an actor; the reports without their seconds; the labels of each part."""
    reports: list[IterationReport] = []
    options = {"on_iteration": reports.append} | options
    result = fit_kmeans(parts, str(out), settings, num_actors=actors, cpus_per_actor=0.5, device="cpu", **options)
    labels = tuple(
        assign(read_embeddings(part), result.centroids, spherical=settings.spherical, threads=1)[0] for part in parts
    )
    return Fit(result, tuple((r.iteration, r.inertia, r.changed, r.repaired) for r in reports), labels)


def assert_same(a: Fit, b: Fit) -> None:
    assert_same_result(a.result, b.result)
    assert a.reports == b.reports
    for left, right in zip(a.labels, b.labels, strict=True):
        assert (left == right).all()


def assert_same_result(a: KMeansResult, b: KMeansResult) -> None:
    assert a.centroids.tobytes() == b.centroids.tobytes()
    assert (a.sizes == b.sizes).all()
    assert (a.seed_rows == b.seed_rows).all()
    assert (a.inertia, a.repaired) == (b.inertia, b.repaired)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """12,345 float16 rows around 15 directions, with duplicates; no tile or part border divides them."""
    rng = np.random.default_rng(7)
    directions = rng.standard_normal((GROUPS, DIM))
    x = directions[rng.integers(0, GROUPS, 12_345)] + 0.7 * rng.standard_normal((12_345, DIM))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[5000:5300] = x[100]
    return x.astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def parts(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Nine parts of unlike sizes: one of 5,500 rows (two tiles), one without masks, one of 7."""
    return write_parts(tmp_path_factory.mktemp("parts"), rows, [5500, 5500, 5507, 7000, 8001, 9100, 10000, 12000])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(ray_session: None, parts: list[str], artifact: Path) -> Fit:
    """The spherical fit with a single actor, that the others must equal; `artifact` is its folder."""
    return fit(parts, artifact, SETTINGS, 1)


def test_parts_are_read_in_order(parts: list[str], rows: np.ndarray) -> None:
    assert (np.concatenate([read_embeddings(part) for part in parts]) == rows).all()


@pytest.mark.parametrize("actors", [2, 3, 7])
def test_any_number_of_actors_gives_the_same_bits(alone: Fit, parts: list[str], tmp_path: Path, actors: int) -> None:
    assert_same(fit(parts, tmp_path, SETTINGS, actors), alone)


def test_labels_agree_with_the_sizes_that_the_actors_counted(alone: Fit) -> None:
    counted = np.bincount(np.concatenate(alone.labels), minlength=SETTINGS.k)
    assert (counted == alone.result.sizes).all()
    assert np.linalg.norm(alone.result.centroids, axis=1) == pytest.approx(1, abs=1e-6)
    assert alone.result.centroids.dtype == np.float32


def test_the_inertia_falls_and_its_last_value_is_that_of_the_result(alone: Fit, rows: np.ndarray) -> None:
    result = alone.result
    assert len(result.inertia) == result.iterations + 1 == 13
    assert all(after < before for before, after in zip(result.inertia, result.inertia[1:], strict=False))
    x = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = (x.astype(np.float64) @ result.centroids.T).max(axis=1)
    assert result.inertia[-1] == pytest.approx((2 - 2 * similarity).sum(), rel=1e-6)
    assert alone.reports[0][2] == len(rows)  # every label is new at first


def test_euclidean_on_rows_that_are_not_unit_equals_float64_lloyd(
    ray_session: None, rows: np.ndarray, tmp_path: Path
) -> None:
    x = (rows * np.random.default_rng(1).uniform(1, 300, (len(rows), 1)) + 20).astype(np.float16).astype(np.float32)
    parts = write_parts(tmp_path / "parts", x, [3000, 4097, 9000])
    seeds = tuple(range(11, 12_000, 499))
    settings = KMeansSettings(k=len(seeds), spherical=False, seed_rows=seeds, max_iterations=6, tolerance=0)
    one, two = (fit(parts, tmp_path / str(n), settings, n) for n in (1, 2))
    assert_same(one, two)
    inertia, centroids = lloyd(x.astype(np.float64), np.array(seeds), 6)
    assert one.result.inertia == pytest.approx(inertia, rel=1e-5)
    assert one.result.centroids == pytest.approx(centroids, rel=1e-3)


def lloyd(x: np.ndarray, seeds: np.ndarray, iterations: int) -> tuple[list[float], np.ndarray]:
    """Textbook k-means in float64: the inertia at each assignment, and the centroids after the last update."""
    centroids, inertia = x[seeds], []
    for i in range(iterations + 1):
        distances = (x**2).sum(1)[:, None] - 2 * x @ centroids.T + (centroids**2).sum(1)
        labels = distances.argmin(axis=1)
        inertia.append(float(distances.min(axis=1).sum()))
        if i < iterations:
            centroids = np.stack([x[labels == k].mean(axis=0) for k in range(len(seeds))])
    return inertia, centroids


def test_inertia_is_that_of_faiss_from_the_same_start(alone: Fit, rows: np.ndarray) -> None:
    x = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    reference = faiss.Kmeans(
        DIM, SETTINGS.k, niter=alone.result.iterations, spherical=True, max_points_per_centroid=len(x)
    )
    reference.train(x, init_centroids=x[alone.result.seed_rows])
    _, distances = assign(x, reference.centroids, spherical=True)
    assert alone.result.inertia[-1] == pytest.approx(float(distances.sum(dtype=np.float64)), rel=0.005)


def test_an_actor_killed_in_the_middle_of_iteration_3_changes_nothing(
    alone: Fit, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "killed"

    class Fragile(KMeansShard):
        def assign(self, version: int, centroids: np.ndarray, previous: np.ndarray | None) -> Any:
            answer = super().assign(version, centroids, previous)
            if version == 2 and "part-00000" in self._parts[0] and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

    monkeypatch.setattr(kmeans_shards, "KMeansShard", Fragile)
    killed = fit(parts, tmp_path / "out", SETTINGS, 2)
    assert marker.exists()
    assert_same(killed, alone)


def test_an_actor_that_always_dies_ends_in_an_error_that_names_its_parts(
    ray_session: None, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(KMeansShard):
        def survey(self) -> Any:
            os._exit(1)

    monkeypatch.setattr(kmeans_shards, "KMeansShard", Dying)
    monkeypatch.setattr(kmeans_shards, "MAX_DEATHS", 2)
    with pytest.raises(RuntimeError, match=r"part-00000.parquet to .*part-00008.parquet died 2 times in a row"):
        fit(parts, tmp_path, SETTINGS, 1)


def test_a_fit_stopped_at_iteration_3_goes_on_to_the_same_result(alone: Fit, parts: list[str], tmp_path: Path) -> None:
    def stop(report: IterationReport) -> None:
        if report.iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(parts, tmp_path, SETTINGS, 2, on_iteration=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]
    with pytest.raises(ValueError, match=r"checkpoint.npz is of a fit with other settings or rows; delete it"):
        fit(parts, tmp_path, KMeansSettings(k=41), 1)

    resumed = fit(parts, tmp_path, SETTINGS, 1)
    assert_same_result(resumed.result, alone.result)
    assert resumed.reports == alone.reports[3:]  # `changed` of the 4th needs labels that no actor had any more
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact.json", "centroids.npy"]


def test_the_artifact_reads_back_and_is_not_computed_again(alone: Fit, parts: list[str], artifact: Path) -> None:
    assert_same_result(load_kmeans(str(artifact)), alone.result)
    record = json.loads((artifact / "artifact.json").read_text())
    assert (record["k"], record["dim"], record["seed"], record["spherical"]) == (40, DIM, 3, True)
    assert record["iterations"] == 12
    assert sum(record["sizes"]) == 12_345
    assert len(set(record["seed_rows"])) == 40
    again = fit(parts, artifact, SETTINGS, 1)
    assert again.reports == ()
    assert_same_result(again.result, alone.result)


def test_it_stops_when_no_label_changes(ray_session: None, tmp_path: Path) -> None:
    x = np.array([[0, 0], [0, 2], [8, 0], [8, 2]], np.float32)
    parts = write_parts(tmp_path / "parts", x, [3])
    done = fit(parts, tmp_path / "out", KMeansSettings(k=2, spherical=False, seed_rows=(0, 2)), 1)
    assert done.reports == ((1, 8.0, 4, 0), (2, 4.0, 0, 0))
    assert done.result.inertia == (8.0, 4.0, 4.0)
    assert done.result.centroids.tolist() == [[0, 1], [8, 1]]


def test_an_empty_cluster_moves_to_the_farthest_row(ray_session: None, tmp_path: Path) -> None:
    x = np.array([[0, 0], [0, 0], [0, 1], [9, 0], [9, 0], [0, 5]], np.float32)
    parts = write_parts(tmp_path / "parts", x, [2, 4])
    settings = KMeansSettings(k=4, spherical=False, seed_rows=(0, 1, 2, 3), tolerance=0)
    done = fit(parts, tmp_path / "out", settings, 2)
    assert done.result.repaired == (1, 0, 0)  # row 1 equals row 0: its cluster starts empty, and takes row 5
    assert done.result.centroids.tolist() == [[0, 0], [0, 5], [0, 1], [9, 0]]
    assert done.result.sizes.tolist() == [2, 1, 1, 2]
    assert done.result.inertia == (16.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("spherical", [True, False])
def test_more_clusters_than_different_rows_ends_with_finite_centroids(
    ray_session: None, tmp_path: Path, spherical: bool
) -> None:
    points = np.random.default_rng(2).standard_normal((6, 16)).astype(np.float32)
    parts = write_parts(tmp_path / "parts", points[np.arange(50) % 6], [20, 33])
    done = fit(parts, tmp_path / "out", KMeansSettings(k=9, spherical=spherical), 1)
    assert np.isfinite(done.result.centroids).all()
    assert (done.result.sizes > 0).sum() == 6
    assert done.result.sizes.sum() == 50
    assert done.result.inertia[-1] == pytest.approx(0, abs=1e-9)
    assert done.result.iterations <= 3


def test_fewer_masks_than_clusters_names_the_key_and_both_numbers(ray_session: None, tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts", np.ones((3, 4), np.float32), [1])
    for some, masks in ((parts, 3), ([], 0)):
        with pytest.raises(ValueError, match=rf"clusters.k is 4, but the {len(some)} .* hold {masks} masks: lower"):
            fit(some, tmp_path / "out", KMeansSettings(k=4), 1)


def test_bad_parts_are_refused_by_name(ray_session: None, tmp_path: Path) -> None:
    x = np.ones((9, 4), np.float32)
    x[5, 2] = np.nan
    parts = write_parts(tmp_path / "nan", x, [3])
    with pytest.raises(ValueError, match=r"part-00001.parquet: the embedding of mask 2 of the part is NaN"):
        fit(parts, tmp_path / "out", KMeansSettings(k=2), 1)
    (tmp_path / "cut.parquet").write_bytes(Path(parts[0]).read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut.parquet: cannot read embeddings"):
        read_embeddings(str(tmp_path / "cut.parquet"))
    other = write_parts(tmp_path / "wide", np.ones((3, 5), np.float32), [])
    with pytest.raises(ValueError, match=r"wide/part-00000.parquet: embeddings of 5 values, 4 in the first part"):
        fit([parts[0], *other], tmp_path / "out", KMeansSettings(k=2), 1)


def test_what_the_cluster_cannot_do_is_refused_with_the_numbers(
    ray_session: None, parts: list[str], tmp_path: Path
) -> None:
    options = {"num_actors": 2, "cpus_per_actor": 1}
    with pytest.raises(ConfigError, match=r"2 k-means actors of 1 GPU need 2, the Ray cluster has 0"):
        fit_kmeans(parts, str(tmp_path), SETTINGS, device="cuda", **options)
    with pytest.raises(ConfigError, match=r"2 k-means actors of 3 CPU need 6, the Ray cluster has 4"):
        fit_kmeans(parts, str(tmp_path), SETTINGS, device="cpu", num_actors=2, cpus_per_actor=3)
    with pytest.raises(ValueError, match="'mps'"):
        fit_kmeans(parts, str(tmp_path), SETTINGS, device="mps", **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, r"clusters.k must be at least 1, got 0"),
        ({"k": 3, "tolerance": -1.0}, r"clusters.tolerance must be at least 0"),
        ({"k": 3, "seed_rows": (1, 2, 2)}, r"clusters.k = 3 different rows, got 2"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KMeansSettings(**values)


def test_a_new_actor_recomputes_the_labels_that_a_lost_one_had(parts: list[str], rows: np.ndarray) -> None:
    def shard() -> KMeansShard:
        return KMeansShard(parts, spherical=True, device="cpu", threads=1, step=2.0**-24)

    old, new, first, second = shard(), shard(), rows[:8], rows[8:16]
    assert old.assign(0, first, None)[2] == len(rows)
    kept, again = old.assign(1, second, first), new.assign(1, second, first)
    assert kept[2] == again[2] > 0
    assert (kept[0] == again[0]).all()
    assert old.assign(1, second, first)[2] == kept[2]  # asked twice, the same answer
    numbers = np.array([0, 5499, 5500, 5506, 5507, 12_344])
    unit = rows[numbers] / np.linalg.norm(rows[numbers], axis=1, keepdims=True)
    assert new.take(numbers) == pytest.approx(unit, abs=1e-6)
