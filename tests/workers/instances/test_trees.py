"""Masks from merge trees in the instances stage: rows with nested masks, and embeddings of the same forward pass."""

from __future__ import annotations

import numpy as np
import pytest

from model.backbone import load_backbone
from pipeline.operations.demo.scenes import make_scene
from workers.images import LoadedImage
from workers.instances import InstanceWorker
from workers.instances.trees import MergeTrees, TreeInputs
from workers.masks import decode_rle
from workers.phases import Phases
from workers.records import Status, instances_schema
from workers.tree_masks import TreeParams

INPUTS = TreeInputs(160, ("tokens",), "tokens", "tokens", False, TreeParams(raster_side=160, max_masks=40))


def worker(batch_size: int = 1, inputs: TreeInputs = INPUTS) -> InstanceWorker:
    trees = MergeTrees(load_backbone("patch-dct", "random:0"), inputs, device="cpu")
    return InstanceWorker(trees, batch_size=batch_size)


def scenes(count: int = 4) -> list[LoadedImage]:
    return [LoadedImage(f"{i}.jpg", make_scene(i, (160, 160 + 40 * (i % 2))).image) for i in range(count)]


def test_rows_say_how_masks_nest() -> None:
    images = [*scenes(2), LoadedImage("bad.jpg", None, Status.EMPTY, "no bytes")]
    phases = Phases()
    table = worker().process(images, phases)
    assert table.schema.equals(instances_schema(384, nested=True))
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "empty"]
    assert set(phases.seconds) == {"resize", "backbone", "trees", "embedding", "masks"}
    for row, image in zip(rows[:2], images, strict=False):
        assert 0 < len(row["rle"]) <= 40
        assert len({len(row[name]) for name in ("rle", "bbox", "area", "score", "embedding", "level", "parent")}) == 1
        assert row["score"] == sorted(row["score"], reverse=True) and len(set(row["rle"])) == len(row["rle"])
        masks = [decode_rle(counts, *image.pixels.shape[:2]) for counts in row["rle"]]
        assert [int(mask.sum()) for mask in masks] == row["area"]
        for number, (parent, level) in enumerate(zip(row["parent"], row["level"], strict=True)):
            assert level == (0 if parent < 0 else row["level"][parent] + 1)
            if parent >= 0:
                assert (masks[number] & masks[parent]).sum() > 0.8 * masks[number].sum()
        norms = np.linalg.norm(np.array(row["embedding"], np.float32), axis=1)
        np.testing.assert_allclose(norms, 1, atol=1e-2)


def test_objects_are_among_the_best_masks() -> None:
    found = total = 0
    for i in range(6):
        scene = make_scene(i, (160, 200))
        row = worker().process([LoadedImage("x", scene.image)], Phases()).to_pylist()[0]
        masks = [decode_rle(counts, 160, 200) for counts in row["rle"][:20]]
        for truth in scene.masks:
            total += 1
            found += any((mask & truth).sum() > 0.7 * (mask | truth).sum() for mask in masks)
    assert found >= 0.6 * total


def test_the_batch_size_does_not_change_the_rows() -> None:
    one, many = (worker(batch_size).process(scenes(), Phases()).to_pylist() for batch_size in (1, 3))
    for a, b in zip(one, many, strict=True):
        assert {k: v for k, v in a.items() if k not in ("embedding", "score")} == {
            k: v for k, v in b.items() if k not in ("embedding", "score")
        }
        np.testing.assert_allclose(a["score"], b["score"], rtol=1e-3)


@pytest.mark.parametrize("size", [(8, 8), (9, 400), (1, 1)])
def test_tiny_and_thin_photos_have_no_empty_or_repeated_mask(size: tuple[int, int]) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    (row,) = worker().process([LoadedImage("x", photo)], Phases()).to_pylist()
    assert row["status"] in {"ok", "no_masks"}
    assert all(area > 0 for area in row["area"]) and len(set(row["rle"])) == len(row["rle"])
    assert all(-1 <= parent < len(row["rle"]) for parent in row["parent"])


def test_a_grey_photo_of_one_tone_has_no_mask_worth_a_thing() -> None:
    (row,) = worker().process([LoadedImage("x", np.full((90, 120, 3), 128, np.uint8))], Phases()).to_pylist()
    assert max(row["score"], default=0) < 0.1
