"""Clusters of patches: what is sampled of a photo, what of it is nuisance, and class maps from a codebook."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from model.backbone import load_backbone
from pipeline.operations.demo.scenes import make_scene
from workers.conditioning import Conditioning
from workers.images import LoadedImage, with_rows_left_out
from workers.phases import Phases
from workers.records import Status, patches_schema
from workers.semantics.patches import (
    Codebook,
    PatchMapWorker,
    PatchParams,
    PatchSampler,
    View,
    draw_view,
    merge_clusters,
    neighbour_differences,
    view_differences,
)

DIM = 384


def scenes(count: int = 3) -> list[LoadedImage]:
    return [LoadedImage(f"{i}.jpg", make_scene(i, (96, 96 + 32 * i)).image) for i in range(count)]


def sampler(seed: int = 0, batch_size: int = 1) -> PatchSampler:
    params = PatchParams("tokens", 96, patches=10, differences=6, seed=seed)
    return PatchSampler(load_backbone("patch-dct", "random:0"), params, device="cpu", batch_size=batch_size)


def test_a_row_has_patches_and_both_kinds_of_differences() -> None:
    images = [*scenes(), LoadedImage("bad.jpg", None, Status.EMPTY, "no bytes")]
    table = sampler().process(images, Phases())
    assert table.schema.equals(patches_schema(DIM))
    assert [len(vectors) for vectors in table["embedding"].to_pylist()] == [10, 10, 10, 0]
    assert [len(vectors) for vectors in table["views"].to_pylist()] == [6, 6, 6, 0]
    for places in table["places"].to_pylist()[:3]:
        assert len(places) == 10 and places == sorted(places) and 0 < min(min(places)) < max(max(places)) < 1
    assert table["status"].to_pylist() == ["ok", "ok", "ok", "empty"]


def test_the_draw_depends_on_the_photo_and_the_seed_alone() -> None:
    one = sampler().process(scenes(), Phases())
    assert sampler(batch_size=3).process(scenes()[::-1], Phases()).to_pylist() == one.to_pylist()[::-1]
    assert sampler(seed=1).process(scenes(), Phases())["embedding"] != one["embedding"]


def test_photos_outside_the_sample_are_rows_too() -> None:
    table = with_rows_left_out(sampler().process(scenes(1), Phases()), ["a", "0.jpg", "c"], [1])
    assert table["image_id"].to_pylist() == ["a", "0.jpg", "c"]
    assert table["status"].to_pylist() == ["not_sampled", "ok", "not_sampled"]
    assert [len(vectors) for vectors in table["across"].to_pylist()] == [0, 6, 0]


def test_neighbours_differ_as_they_do() -> None:
    grid = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    assert sorted(neighbour_differences(grid)[:, 0]) == [1, 1, 1, 1, 3, 3, 3]
    assert neighbour_differences(np.zeros((1, 1, 4), np.float32)).shape == (0, 4)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_view_is_compared_with_the_same_place_of_the_photo(mirrored: bool) -> None:
    """Features that are the place itself: a view of any part has the same there, but for the photo's border."""
    view = View(0.2, 0.3, 0.6, mirrored)
    rows, columns = 40, 50
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    whole = np.stack(np.meshgrid(y, x, indexing="ij"), -1).astype(np.float32)
    seen = np.stack(np.meshgrid(0.3 + 0.6 * y, 0.2 + 0.6 * x, indexing="ij"), -1).astype(np.float32)
    difference = view_differences(whole, seen[:, ::-1].copy() if mirrored else seen, view)
    assert np.abs(difference).max() < 1e-5


def test_a_view_shows_its_part_of_the_photo() -> None:
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[20:, 30:] = 255
    assert View(0.5, 0.5, 0.5, False).of(photo, 10, 15).min() > 220
    left = View(0.25, 0.5, 0.5, False).of(photo, 10, 14).mean((0, 2))
    assert left[0] < 20 and left[-1] > 235
    np.testing.assert_array_equal(View(0.25, 0.5, 0.5, True).of(photo, 10, 14).mean((0, 2)), left[::-1])
    for seed in range(20):
        drawn = draw_view(np.random.default_rng(seed))
        assert 0.5 <= drawn.side <= 0.9 and drawn.left + drawn.side <= 1 and drawn.top + drawn.side <= 1


def test_clusters_that_are_alike_become_one_class() -> None:
    angles = np.array([0.0, 0.1, 1.5, 1.6, 3.0])
    centroids = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert merge_clusters(centroids, np.ones(5, np.int64), 3).tolist() == [0, 0, 1, 1, 2]
    assert merge_clusters(centroids, np.ones(5, np.int64), 5).tolist() == [0, 1, 2, 3, 4]
    assert set(merge_clusters(centroids, np.array([9, 0, 1, 5, 2]), 1).tolist()) == {0}


def test_the_linkage_weighs_clusters_by_size() -> None:
    """Between 0 and 60 degrees, a cluster at 31 joins the pair (0, 2) whose mass lies near or far."""
    angles = np.radians([0, 2, 31, 60, 84])
    centroids = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    near = merge_clusters(centroids, np.array([1, 1, 5, 100, 1]), 2)
    far = merge_clusters(centroids, np.array([1, 1, 5, 1, 100]), 2)
    assert near[2] == near[3] and far[2] == far[0]


def codebook() -> Codebook:
    """Two classes by the brightness that patch-dct's first channels hold, the first with two clusters."""
    directions = np.zeros((DIM, 2), np.float32)
    directions[:2] = np.eye(2)
    return Codebook(
        Conditioning(np.zeros(DIM, np.float32), directions),
        np.array([[1, 0], [0, 1], [-1, 0]], np.float32),
        np.array([0, 1, 0]),
    )


@pytest.mark.parametrize("flip", [False, True])
def test_maps_cover_the_photo_and_classes_score_as_their_nearest_cluster(flip: bool) -> None:
    backbone = load_backbone("patch-dct", "random:0")
    worker = PatchMapWorker(backbone, codebook(), output="tokens", image_size=96, flip=flip, crf=None, device="cpu")
    rows = worker.process([*scenes(2), LoadedImage("bad.jpg", None, Status.EMPTY, "no bytes")], Phases()).to_pylist()
    for row, image in zip(rows[:2], scenes(2), strict=True):
        labels = np.asarray(Image.open(io.BytesIO(row["labels"]), formats=("PNG",)))
        assert labels.shape == image.pixels.shape[:2] and set(np.unique(labels)) <= {0, 1}
    assert rows[2]["labels"] is None
    probs = worker.log_probs(np.stack([image.pixels for image in scenes(1)]), Phases()).exp()
    assert probs.shape == (1, 2, 12, 12) and np.allclose(probs.sum(1), 1, atol=1e-5)


def test_a_codebook_of_another_backbone_is_refused() -> None:
    book = Codebook(
        Conditioning(np.zeros(5, np.float32), np.zeros((5, 2), np.float32)), np.eye(2, dtype=np.float32), np.arange(2)
    )
    with pytest.raises(ValueError, match="fitted to 5 channels, the backbone gives 384"):
        PatchMapWorker(
            load_backbone("patch-dct", "random:0"),
            book,
            output="tokens",
            image_size=96,
            flip=False,
            crf=None,
            device="cpu",
        )
