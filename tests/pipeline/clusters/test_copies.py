"""Copies over the parts of a run, and the k-means in which a group of them counts as one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.clusters.artifact import KMeansResult, KMeansSettings
from pipeline.clusters.copies import Place, find_copies
from pipeline.clusters.kmeans import fit_kmeans
from pipeline.clusters.shards import KMeansShard
from tests.pipeline.clusters.embedded_parts import write_parts

DIM = 24
SETTINGS = KMeansSettings(k=8, seed=2, max_iterations=5, tolerance=0)


def kinds(count: int, seed: int = 0) -> np.ndarray:
    """Unit rows around few directions, none a copy of another."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((12, DIM))[rng.integers(0, 12, count)] + 0.7 * rng.standard_normal((count, DIM))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)


def copied(x_ND: np.ndarray, some: slice, times: int) -> np.ndarray:
    """Each of some rows `times` more often, behind it."""
    counts = np.ones(len(x_ND), int)
    counts[some] += times
    return np.repeat(x_ND, counts, axis=0)


def fit(parts: list[str], out: Path, settings: KMeansSettings = SETTINGS, actors: int = 1, **more: Any) -> KMeansResult:
    return fit_kmeans(parts, str(out), settings, num_actors=actors, cpus_per_actor=0.5, device="cpu", **more)


def test_shards_of_any_size_have_the_same_groups(tmp_path: Path) -> None:
    x = copied(kinds(300), slice(100, 150), 2)
    few = find_copies(write_parts(tmp_path / "few", x, [200]), 0.95)
    many = find_copies(write_parts(tmp_path / "many", x, [3, 3, 90, 101, 200, 399]), 0.95)
    assert (few.groups == many.groups).all()
    assert sorted(np.bincount(few.groups)[few.groups]) == [1] * 250 + [3] * 150
    assert few.weights().groups == 300
    assert int(many.photos.sum()) == 400
    assert sum(many.parts) == len(many.photos)


def test_groups_within_a_photo_are_no_copies_of_photos_and_places_are_found(tmp_path: Path) -> None:
    x = np.eye(DIM)[[0, 1, 1, 2, 3, 0, 4, 1, 5, 5]]
    parts = write_parts(tmp_path, x, [0, 5])
    found = find_copies(parts, 0.95)
    assert found.groups.tolist() == [0, 1, 1, 3, 4, 0, 6, 1, 8, 8]
    across = [masks.tolist() for masks in found.across_photos()]
    apart = [masks for masks in ([1, 2, 7], [0, 5], [8, 9]) if len({int(found.photo_of[mask]) for mask in masks}) > 1]
    assert across == apart and [1, 2, 7] in across
    assert found.parts[0] == 0
    placed = [found.place(mask) for mask in range(10)]
    expected = [
        Place(part, row, mask)
        for part, counts in ((1, found.photos[: found.parts[1]]), (2, found.photos[found.parts[1] :]))
        for row, count in enumerate(counts)
        for mask in range(count)
    ]
    assert placed == expected


def test_a_run_without_a_mask_has_no_copies(tmp_path: Path) -> None:
    found = find_copies(write_parts(tmp_path, np.zeros((0, DIM)), []), 0.95)
    assert (len(found.groups), found.across_photos(), found.weights().groups) == (0, [], 0)


def test_no_room_for_the_scratch_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_parts(tmp_path, kinds(20), [])
    with Path("/dev/full").open("wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", lambda buffering: full)
        with pytest.raises(ValueError, match=r"no room for the embeddings of the masks in .*TMPDIR"):
            find_copies(parts, 0.95)


def test_copies_of_one_kind_move_no_centroid(ray_session: None, tmp_path: Path) -> None:
    x = kinds(240)
    once = write_parts(tmp_path / "once", x, [100])
    often = write_parts(tmp_path / "often", copied(x, slice(60, 90), 10), [70, 333])
    weights = find_copies(often, 0.95).weights()
    alone, deduped = fit(once, tmp_path / "a"), fit(often, tmp_path / "b", actors=2, weights=weights)
    assert (alone.centroids == deduped.centroids).all()
    assert deduped.inertia == pytest.approx(alone.inertia, rel=1e-12)
    assert deduped.repaired == alone.repaired
    assert deduped.sizes.sum() == 540 and alone.sizes.sum() == 240
    assert np.abs(fit(often, tmp_path / "c").centroids - alone.centroids).max() > 0.01
    with pytest.raises(ValueError, match=r"clusters.k is 241, but the 540 masks are 240 where copies count as one"):
        fit(often, tmp_path / "d", KMeansSettings(k=241), weights=weights)
    with pytest.raises(ValueError, match=r"540 masks when copies were looked for, now 240: a part was replaced"):
        fit(once, tmp_path / "e", weights=weights)


def test_an_empty_cluster_takes_a_whole_group(ray_session: None, tmp_path: Path) -> None:
    x = 1 + np.array([[0, 0], [0, 0], [0, 1], [9, 0], [9, 0], [0, 5]], np.float64)
    often = copied(x, slice(5, 6), 9)
    parts = write_parts(tmp_path / "parts", often, [7])
    weights = find_copies(parts, 0.9999).weights()
    assert weights.groups == 4  # (1, 1), (1, 2), (10, 1), (1, 6)
    settings = KMeansSettings(k=4, spherical=False, seed_rows=(0, 1, 2, 3), tolerance=0)
    done = fit(parts, tmp_path / "out", settings, weights=weights)
    assert done.repaired[0] == 1
    assert done.centroids.tolist() == [[1, 1], [1, 6], [1, 2], [10, 1]]
    assert done.sizes.tolist() == [2, 10, 1, 2]
    assert done.inertia[:2] == (16.0, 0.0)


def test_sums_of_shares_are_exact_and_those_of_a_group_are_one_row(tmp_path: Path) -> None:
    x = kinds(50)
    parts = write_parts(tmp_path / "parts", np.concatenate([x, x[:7], x[:7]]), [20])
    weights = find_copies(parts, 0.95).weights()
    shard = KMeansShard(parts, spherical=True, device="cpu", threads=1, step=None)
    plain = KMeansShard(write_parts(tmp_path / "plain", x, []), spherical=True, device="cpu", threads=1, step=None)
    shard.settle(2.0**-24, weights)
    plain.settle(2.0**-24)
    sums, counts, changed = shard.assign(0, x[:4].astype(np.float32), None)
    once, ones, _ = plain.assign(0, x[:4].astype(np.float32), None)
    assert (sums == 4096 * once).all() and (counts == 4096 * ones).all()
    assert changed == 64
    assert shard.sizes(0, x[:4].astype(np.float32)).sum() == 64
