"""DatUS2: the same partition as the published parts on the same graph, and what becomes of every pixel."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.ndimage
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sknetwork.clustering import Louvain

from model.backbone import load_backbone
from pipeline.operations.demo.scenes import make_scene
from workers.images import LoadedImage
from workers.phases import Phases
from workers.records import SEMANTICS_SCHEMA, Status
from workers.semantics.datus import (
    DatusWorker,
    SegmentParams,
    SegmentWorker,
    class_map,
    decode_segments,
    encode_segments,
    segment_crop,
    segments_schema,
)
from workers.semantics.louvain import (
    SegmentFinder,
    affinity_graph,
    communities,
    connected_segments,
    discover_segments,
)

ROOT = Path(__file__).resolve().parents[3]


def planted_keys(grid: tuple[int, int], seed: int) -> np.ndarray:
    """(N, 16) keys of a grid whose left and right halves lean to different sides, with noise."""
    rng = np.random.default_rng(seed)
    side = np.where(np.arange(grid[1]) < grid[1] // 2, 1.0, -1.0)
    keys = rng.normal(0, 0.2, (*grid, 16))
    keys[..., 0] += side
    return keys.reshape(-1, 16).astype(np.float32)


def worker(params: SegmentParams | None = None, **options: int) -> SegmentWorker:
    backbone = load_backbone("patch-dct", "random:0")
    return SegmentWorker(backbone, params or SegmentParams(160, 64), device="cpu", **options)


def scenes(count: int) -> list[LoadedImage]:
    return [LoadedImage(f"{i}.jpg", make_scene(i, (160, 160 + 40 * (i % 2))).image) for i in range(count)]


def part(row: dict[str, object], dim: int = 2) -> pa.Table:
    common = {"image_id": "a.jpg", "height": 6, "width": 9, "status": "ok", "error": None}
    return pa.Table.from_pylist([common | row], segments_schema(dim))


def labels_of(table: pa.Table, row: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(table["labels"][row].as_py())))


def test_two_patches_are_joined_when_their_dot_product_is_above_zero_strictly() -> None:
    keys = np.array([[1, 0], [0, 1], [2, 1e-3], [-1, 0]], np.float32)  # the first two are orthogonal: not joined
    expected = [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(affinity_graph(keys).toarray(), np.array(expected, bool))


@pytest.mark.parametrize("seed", range(4))
def test_the_graph_equals_a_loop_over_the_pairs(seed: int) -> None:
    keys = planted_keys((5, 7), seed)
    graph = affinity_graph(keys)
    assert graph.has_canonical_format and (graph != graph.T).nnz == 0
    pairs = [[float(a @ b) > 0 for b in keys.astype(np.float64)] for a in keys.astype(np.float64)]
    np.testing.assert_array_equal(graph.toarray(), pairs)


@pytest.mark.parametrize("seed", range(6))
def test_communities_are_those_of_scikit_networks_defaults(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(196, 5)).astype(np.float32) if seed % 2 else planted_keys((14, 14), seed)
    dense = np.array([[a @ b > 0 for b in keys] for a in keys])
    np.testing.assert_array_equal(
        communities(affinity_graph(keys)), Louvain().fit_predict(scipy.sparse.csr_matrix(dense))
    )


def test_a_photo_gives_the_partition_of_scikit_networks_defaults() -> None:
    scene = np.array(Image.fromarray(make_scene(5).image).resize((224, 224)))
    keys = load_backbone("patch-dct", "random:0").keys(torch.from_numpy(scene).permute(2, 0, 1)[None] / 255)[0].numpy()
    expected = Louvain().fit_predict(scipy.sparse.csr_matrix(keys @ keys.T > 0))
    np.testing.assert_array_equal(communities(affinity_graph(keys)), expected)
    assert expected.max() >= 1


def test_planted_halves_are_two_segments() -> None:
    segments = discover_segments(planted_keys((8, 12), 0), (8, 12))
    assert sorted(np.unique(segments)) == [0, 1]
    assert (segments[:, :6] == segments[0, 0]).all() and (segments[:, 6:] == segments[0, 11]).all()


@pytest.mark.parametrize("patches", [4, 36, 784])
def test_a_complete_graph_is_one_community(patches: int) -> None:
    graph = affinity_graph(np.ones((patches, 3), np.float32))
    assert graph.nnz == patches**2
    assert set(communities(graph)) == {0}
    # Every partition has modularity 0 here; left alone, rounding makes many, each too small for a segment.
    assert len(set(Louvain().fit_predict(graph))) > patches // 4


def test_keys_of_zero_are_noise_and_keys_that_are_not_finite_are_refused() -> None:
    assert (discover_segments(np.zeros((36, 3), np.float32), (6, 6)) == -1).all()
    some = planted_keys((6, 8), 1)
    some[5] = 0
    segments = discover_segments(some, (6, 8))
    assert segments[0, 5] == -1 and segments.max() == 1
    some[7, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        discover_segments(some, (6, 8))


def test_a_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="35 keys do not fill a grid of 6 x 6"):
        discover_segments(np.ones((35, 3), np.float32), (6, 6))


def test_a_segment_has_more_than_five_patches() -> None:
    strip = np.zeros((1, 11), np.int64)
    strip[0, :5] = 1
    np.testing.assert_array_equal(connected_segments(strip)[0], [-1] * 5 + [0] * 6)


def test_pieces_touch_by_their_corners_and_are_numbered_by_community_and_first_patch() -> None:
    diagonal = np.eye(6, dtype=np.int64)
    assert set(np.unique(connected_segments(diagonal))) == {0, 1}  # the two triangles also touch across it
    stripes = np.zeros((6, 5), np.int64)
    stripes[:, 2] = 1
    np.testing.assert_array_equal(connected_segments(stripes)[0], [0, 0, 2, 1, 1])


@given(arrays(np.int64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3)))
def test_components_equal_scipys(found: np.ndarray) -> None:
    segments = connected_segments(found)
    expected = []
    for community in range(4):
        pieces, count = scipy.ndimage.label(found == community, np.ones((3, 3)))
        expected += [pieces == i for i in range(1, count + 1) if (pieces == i).sum() > 5]
    assert segments.max() + 1 == len(expected)
    for i, mask in enumerate(expected):
        np.testing.assert_array_equal(segments == i, mask)
    np.testing.assert_array_equal(segments == -1, ~np.any([np.zeros_like(found, bool), *expected], axis=0))


def test_processes_give_the_same_segments_in_order_and_are_replaced_when_killed() -> None:
    keys = np.stack([planted_keys((8, 8), seed) for seed in range(5)])
    finder = SegmentFinder(processes=2)
    try:
        for one, many in zip(SegmentFinder()(keys, (8, 8)), finder(keys, (8, 8)), strict=True):
            np.testing.assert_array_equal(one, many)
        assert finder._pool is not None
        for child in finder._pool._processes:
            os.kill(child, signal.SIGKILL)
        with pytest.raises(BrokenProcessPool):
            finder(keys, (8, 8))
        assert len(finder(keys, (8, 8))) == 5
    finally:
        finder.close()


def test_processes_end_when_their_parent_is_killed() -> None:
    code = """
import os, numpy as np
from workers.semantics.louvain import SegmentFinder
finder = SegmentFinder(2)
finder(np.ones((4, 16, 2), np.float32), (4, 4))
print(len(finder._pool._processes), flush=True)
os.kill(os.getpid(), 9)
"""
    # The pipe of its output closes with the last process that holds it, so this returns only when all have ended.
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, timeout=120, check=False)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, b"2\n")


@given(arrays(np.int32, (5, 4), elements=st.integers(-1, 254)), st.booleans())
def test_segments_survive_their_png(segments: np.ndarray, many: bool) -> None:
    segments = segments * (200 if many else 1) * (segments >= 0) - (segments < 0)
    data = encode_segments(segments)
    assert Image.open(io.BytesIO(data)).mode == ("L" if segments.max() < 255 else "I;16")
    np.testing.assert_array_equal(decode_segments(data), segments)


def test_a_crop_keeps_the_whole_of_a_long_segment_on_black() -> None:
    photo = np.full((64, 64, 3), 50, np.uint8)
    photo[8:16, :8], photo[8:16, 48:56] = (250, 0, 0), (0, 250, 0)
    patches = np.zeros((8, 8), bool)
    patches[1, :7] = True
    patches[2, 3] = True
    crop = segment_crop(photo, patches, 56)  # a box of 2 x 7 patches, so 20 rows of margin above and below
    assert (crop[:18] == 0).all() and (crop[38:] == 0).all()
    np.testing.assert_array_equal(crop[24, [3, 25, 52]], [[250, 0, 0], [50, 50, 50], [0, 250, 0]])
    assert crop[32, 28].tolist() == [50, 50, 50] and crop[34, 4].tolist() == [0, 0, 0]


def test_rows_keep_the_order_and_say_what_became_of_each_image() -> None:
    flat = LoadedImage("flat.png", np.full((50, 70, 3), 9, np.uint8))
    bad = LoadedImage("bad.jpg", None, Status.EMPTY, "no bytes")
    tiny = LoadedImage("tiny.png", make_scene(1).image[100:108, 100:108])
    phases = Phases()
    table = worker(batch_size=3).process([*scenes(2), bad, flat, tiny], phases)
    rows = table.to_pylist()
    assert table.schema == segments_schema(384)
    assert [row["image_id"] for row in rows] == ["0.jpg", "1.jpg", "bad.jpg", "flat.png", "tiny.png"]
    assert [row["status"] for row in rows] == ["ok", "ok", "empty", "ok", "ok"]
    assert rows[2] == {
        "image_id": "bad.jpg",
        "height": None,
        "width": None,
        "status": "empty",
        "error": "no bytes",
        "segments": None,
        "embedding": [],
    }
    assert (rows[1]["height"], rows[1]["width"]) == (160, 200)
    assert len(rows[3]["embedding"]) == 1  # all patches are alike: the photo is one segment
    assert (decode_segments(rows[3]["segments"]) == 0).all()
    assert set(phases.seconds) == {"resize", "backbone", "segments", "embedding"}
    for row in rows:
        if row["segments"] is not None:
            assert decode_segments(row["segments"]).max() + 1 == len(row["embedding"])
        norms = np.linalg.norm(np.array(row["embedding"], np.float32).reshape(-1, 384), axis=1)
        np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_colours_are_fed_as_red_green_blue() -> None:
    """The published code feeds BGR to a backbone of RGB."""

    class Recorder:
        patch_size, dim = 8, 4
        seen: np.ndarray

        def keys(self, images: object) -> torch.Tensor:
            self.seen = np.asarray(images)
            return torch.ones(1, 9, 4)

        def cls(self, images: object) -> torch.Tensor:
            return torch.ones(1, 4)

    recorder = Recorder()
    red = LoadedImage("red.png", np.full((30, 30, 3), (255, 0, 51), np.uint8))
    SegmentWorker(recorder, SegmentParams(24, 24), device="cpu").process([red], Phases())  # type: ignore[arg-type]
    np.testing.assert_allclose(recorder.seen[0, :, 5, 5], [1, 0, 0.2])


def test_neither_the_batch_size_nor_the_processes_change_the_rows() -> None:
    images = [*scenes(4), LoadedImage("bad.jpg", None, Status.EMPTY, "no bytes")]
    one = worker().process(images, Phases()).to_pylist()
    many = worker(batch_size=3, processes=2).process(images, Phases()).to_pylist()
    for a, b in zip(one, many, strict=True):
        assert {k: v for k, v in a.items() if k != "embedding"} == {k: v for k, v in b.items() if k != "embedding"}
        np.testing.assert_allclose(np.float32(a["embedding"]), np.float32(b["embedding"]), atol=2e-3)


def test_an_accident_names_the_image() -> None:
    class Broken:
        patch_size, dim = 8, 4

        def keys(self, images: object) -> None:
            raise MemoryError("out of memory")

    broken = SegmentWorker(Broken(), SegmentParams(), device="cpu")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"MemoryError on 0\.jpg: out of memory"):
        broken.process(scenes(1), Phases())


SEGMENTS = np.array([[0, 0, 1], [0, -1, 1]], np.int32)


def test_noise_is_void_or_takes_the_nearest_class() -> None:
    np.testing.assert_array_equal(class_map(SEGMENTS, np.array([7, 0])), [[7, 7, 0], [7, 255, 0]])
    wide = np.array([[0, -1, -1, -1, 1]], np.int32)
    assert class_map(wide, np.array([7, 0]), "nearest")[0, [1, 3]].tolist() == [7, 0]
    nothing = class_map(np.full((2, 2), -1, np.int32), np.zeros(0, np.int64), "nearest")
    assert (nothing == 255).all()


def test_segments_are_named_by_the_nearest_centroid_and_enlarged_without_new_ids() -> None:
    centroids = np.eye(2, dtype=np.float32)[::-1]  # class 0 points along the second axis
    table = DatusWorker(centroids).process(
        part({"segments": encode_segments(SEGMENTS), "embedding": [[0.9, 0.1], [0.2, 0.98]]})
    )
    assert table.schema == SEMANTICS_SCHEMA
    expected = np.array([[1, 1, 0], [1, 255, 0]]).repeat(3, 0).repeat(3, 1)
    np.testing.assert_array_equal(labels_of(table), expected)


def test_several_centroids_may_be_of_one_class() -> None:
    centroids = np.float32([[1, 0], [0, 1], [-1, 0]])
    table = DatusWorker(centroids, np.array([1, 0, 1])).process(
        part({"segments": encode_segments(SEGMENTS), "embedding": [[-0.9, 0.1], [0.2, 0.98]]})
    )
    np.testing.assert_array_equal(labels_of(table)[::3, ::3], [[1, 1, 0], [1, 255, 0]])


def test_an_odd_size_is_enlarged_by_the_patch_that_holds_the_centre_of_the_pixel() -> None:
    row = {"segments": encode_segments(SEGMENTS), "embedding": [[1, 0], [0, 1]], "height": 5, "width": 7}
    labels = labels_of(DatusWorker(np.eye(2, dtype=np.float32)).process(part(row)))
    rows, columns = (np.arange(5) + 0.5) * 2 // 5, (np.arange(7) + 0.5) * 3 // 7
    expected = class_map(SEGMENTS, np.array([0, 1]))[np.ix_(rows.astype(int), columns.astype(int))]
    np.testing.assert_array_equal(labels, expected)


def test_every_image_is_a_row_of_the_class_maps() -> None:
    images = [scenes(1)[0], LoadedImage("bad.jpg", None, Status.EMPTY, "no bytes")]
    segments = worker().process(images, Phases())
    noise = part({"image_id": "noise.jpg", "status": "no_masks", "embedding": []}, 384).to_pylist()[0]
    noise["segments"] = encode_segments(np.full((20, 20), -1, np.int32))
    table = DatusWorker(np.eye(4, 384, dtype=np.float32), fill_holes="nearest").process(
        pa.concat_tables([segments, pa.Table.from_pylist([noise], segments.schema)])
    )
    assert table["image_id"].to_pylist() == ["0.jpg", "bad.jpg", "noise.jpg"]
    assert table["status"].to_pylist() == ["ok", "empty", "ok"]
    assert table["error"].to_pylist() == [None, "no bytes", None]
    assert labels_of(table).shape == (160, 160) and labels_of(table).max() < 4
    assert table["labels"][1].as_py() is None and (labels_of(table, 2) == 255).all()


def test_a_part_without_images_has_no_rows() -> None:
    empty = worker().process([], Phases())
    assert DatusWorker(np.eye(4, 384, dtype=np.float32)).process(empty).num_rows == empty.num_rows == 0


def test_centroids_of_another_backbone_or_of_too_many_classes_are_refused() -> None:
    row = part({"segments": encode_segments(SEGMENTS), "embedding": [[1, 0], [0, 1]]})
    with pytest.raises(
        ValueError, match=r"embeddings of 2 values, the classes of semantics_fit 3: .* run semantics_fit"
    ):
        DatusWorker(np.eye(3, dtype=np.float32)).process(row)
    with pytest.raises(ValueError, match=r"semantics\.classes must be in 1\.\.255, the artifact has 256"):
        DatusWorker(np.zeros((256, 2), np.float32))
