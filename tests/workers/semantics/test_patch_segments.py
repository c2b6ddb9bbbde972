"""Segments and their embeddings from one pass of a teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from workers.conditioning import unit_rows
from workers.images import LoadedImage
from workers.phases import Phases
from workers.records import Status, segments_schema
from workers.semantics.datus import decode_segments
from workers.semantics.louvain import CLOSEST, closest_graph, communities
from workers.semantics.patch_segments import PatchSegmentWorker, segment_means


class ColourTeacher:
    """Tokens are the mean colour of each 8 x 8 patch, less grey, of unit norm."""

    patch_size, dim = 8, 3

    def tokens(self, images: Tensor) -> Tensor:
        return F.normalize(F.avg_pool2d(images, 8).flatten(2).mT - 0.5, dim=-1)


def worker(**options: int) -> PatchSegmentWorker:
    return PatchSegmentWorker(ColourTeacher(), image_size=64, device="cpu", **options)


def halves(height: int = 64, width: int = 96) -> np.ndarray:
    """Red to the left, blue to the right, with a little noise so that no two patches are equal."""
    image = np.random.default_rng(0).integers(0, 30, (height, width, 3)).astype(np.uint8)
    image[:, : width // 2, 0] += 200
    image[:, width // 2 :, 2] += 200
    return image


def test_the_closest_pairs_are_joined_and_never_those_at_a_right_angle() -> None:
    rows = unit_rows(np.random.default_rng(0).standard_normal((40, 6)))
    joined = closest_graph(rows).toarray()
    assert (joined == joined.T).all() and joined.diagonal().all()
    cosines = (rows @ rows.T)[np.triu_indices(40, 1)]
    count = int(np.ceil(CLOSEST * len(cosines)))
    assert (joined[np.triu_indices(40, 1)] == (cosines >= np.sort(cosines)[-count])).all()
    apart = closest_graph(np.eye(5, dtype=np.float32)).toarray()
    assert (apart == np.eye(5, dtype=bool)).all()
    assert closest_graph(np.ones((1, 3), np.float32)).toarray().tolist() == [[True]]


def test_patches_that_are_all_alike_are_one_community() -> None:
    rows = np.tile(np.float32([0.6, 0.8]), (30, 1))
    assert set(communities(closest_graph(rows))) == {0}
    with pytest.raises(ValueError, match="features of a patch are not finite"):
        closest_graph(np.full((3, 2), np.nan, np.float32))


def test_a_segment_is_embedded_by_the_mean_of_its_patches() -> None:
    rows = np.float32([[1, 0], [0, 1], [0.6, 0.8], [1, 0]])
    segments = np.array([[0, -1], [0, 1]])
    means = segment_means(rows, segments)
    assert means.dtype == np.float16
    assert means == pytest.approx(np.float32([[0.8 / np.hypot(0.8, 0.4), 0.4 / np.hypot(0.8, 0.4)], [1, 0]]), abs=1e-3)
    assert segment_means(rows, np.full((2, 2), -1)).shape == (0, 2)


def test_every_image_is_a_row_whatever_the_batch_and_the_processes() -> None:
    images = [
        LoadedImage("wide", halves()),
        LoadedImage("bad", None, Status.UNDECODABLE, "cut short"),
        LoadedImage("flat", np.full((64, 64, 3), 200, np.uint8)),
        LoadedImage("tall", np.rot90(halves()).copy()),
        LoadedImage("again", np.rot90(halves()).copy()),
    ]
    table = worker().process(images, Phases())
    assert table.schema == segments_schema(3)
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "undecodable", "ok", "ok", "ok"]
    assert (rows[1]["segments"], rows[1]["embedding"], rows[1]["error"]) == (None, [], "cut short")
    assert decode_segments(rows[0]["segments"]).shape == (8, 12)
    assert (decode_segments(rows[2]["segments"]) == 0).all()
    assert worker(batch_size=5).process(images, Phases()).to_pylist() == rows
    assert worker(batch_size=2, processes=2).process(images, Phases()).to_pylist() == rows


def test_a_photo_of_noise_alone_says_so() -> None:
    class Unlike(ColourTeacher):
        dim = 64

        def tokens(self, images: Tensor) -> Tensor:
            return torch.eye(64)[None].repeat(len(images), 1, 1)

    row = PatchSegmentWorker(Unlike(), image_size=64, device="cpu").process(
        [LoadedImage("a", halves(64, 64))], Phases()
    )
    assert row["status"].to_pylist() == ["no_masks"]
    assert (decode_segments(row["segments"][0].as_py()) == -1).all()
