"""The instances stage of one worker on generated scenes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model.backbone import load_backbone
from pipeline.operations.demo.scenes import make_scene
from workers.crf import CrfParams
from workers.images import LoadedImage
from workers.instances import InstanceWorker
from workers.instances.cuts import CutParams, MaskCuts
from workers.masks import decode_rle
from workers.overlap import Flow, Overlapped, SideBySide
from workers.phases import Phases
from workers.records import Status

PARAMS = CutParams(160, "square", "keys", 0.4, 3, CrfParams(), min_iou=0.5, crop_size=64)


def worker(params: CutParams = PARAMS, batch_size: int = 1, flow: Flow | None = None) -> InstanceWorker:
    cuts = MaskCuts(load_backbone("patch-dct", "random:0"), params, device="cpu")
    return InstanceWorker(cuts, batch_size=batch_size, flow=flow)


def scenes(count: int = 4) -> list[LoadedImage]:
    return [LoadedImage(f"{i}.jpg", make_scene(i, (160, 160 + 40 * (i % 2))).image) for i in range(count)]


def test_rows_keep_the_order_and_say_what_became_of_each_image() -> None:
    images = [
        *scenes(2),
        LoadedImage("bad.jpg", None, Status.EMPTY, "no bytes"),
        LoadedImage("flat.png", np.full((50, 70, 3), 9, np.uint8)),
    ]
    phases = Phases()
    rows = worker().process(images, phases).to_pylist()
    assert [row["image_id"] for row in rows] == ["0.jpg", "1.jpg", "bad.jpg", "flat.png"]
    assert [row["status"] for row in rows] == ["ok", "ok", "empty", "no_masks"]
    assert (rows[2]["height"], rows[2]["error"], rows[2]["rle"]) == (None, "no bytes", [])
    assert (rows[3]["height"], rows[3]["width"], rows[3]["error"]) == (50, 70, None)
    assert set(phases.seconds) == {"resize", "backbone", "maskcut", "crf", "embedding", "encode"}


def test_masks_follow_the_objects() -> None:
    found = total = 0
    for i in range(8):
        scene = make_scene(i, (160, 200))
        row = worker().process([LoadedImage("x", scene.image)], Phases()).to_pylist()[0]
        masks = [decode_rle(counts, 160, 200) for counts in row["rle"]]
        for truth in scene.masks:
            total += 1
            found += any((mask & truth).sum() > 0.5 * (mask | truth).sum() for mask in masks)
    assert found >= 0.6 * total


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("flow", [None, SideBySide(2), Overlapped(2)], ids=["in turn", "side by side", "overlapped"])
def test_neither_the_batch_size_nor_the_flow_changes_the_rows(flow: Flow | None) -> None:
    images = [*scenes(4), LoadedImage("bad.jpg", None, Status.EMPTY, "no bytes")]
    one = worker().process(images, Phases()).to_pylist()
    many = worker(batch_size=3, flow=flow).process(images, Phases()).to_pylist()
    for a, b in zip(one, many, strict=True):
        assert {k: v for k, v in a.items() if k != "embedding"} == {k: v for k, v in b.items() if k != "embedding"}
        np.testing.assert_allclose(np.float32(a["embedding"]), np.float32(b["embedding"]), atol=2e-3)


def test_keep_aspect_does_not_distort_and_square_does() -> None:
    tall = LoadedImage("tall", make_scene(3, (320, 160)).image)
    kept = worker(replace(PARAMS, resize="keep_aspect")).process([tall], Phases()).to_pylist()[0]
    squashed = worker().process([tall], Phases()).to_pylist()[0]
    assert kept["status"] == squashed["status"] == "ok"
    assert kept["rle"] != squashed["rle"]


def test_a_mask_that_the_crf_changes_too_much_is_dropped() -> None:
    strict = worker(replace(PARAMS, min_iou=1.0)).process(scenes(2), Phases()).to_pylist()
    assert [row["status"] for row in strict] == ["no_masks", "no_masks"]
    loose = worker(replace(PARAMS, min_iou=0.0)).process(scenes(2), Phases()).to_pylist()
    assert all(0 <= score <= 1 for row in loose for score in row["score"])
    assert sum(len(row["rle"]) for row in loose) >= 3


def test_a_score_may_be_how_little_the_crf_changed_a_mask() -> None:
    params = replace(PARAMS, min_iou=0.0)
    for_objects, for_crf = (
        worker(replace(params, score=score)).process(scenes(3), Phases()).to_pylist()
        for score in ("objectness", "crf_iou")
    )
    assert [row["rle"] for row in for_objects] == [row["rle"] for row in for_crf]
    assert for_objects[0]["score"] != for_crf[0]["score"]
    strict = worker(replace(params, score="crf_iou", min_iou=0.8)).process(scenes(3), Phases()).to_pylist()
    kept = [[score for score in row["score"] if score >= 0.8] for row in for_crf]
    assert [row["score"] for row in strict] == kept


def test_an_accident_names_the_image() -> None:
    class Broken:
        patch_size, dim = 8, 4

        def features(self, images: object, wanted: object) -> None:
            raise MemoryError("out of memory")

    broken = InstanceWorker(MaskCuts(Broken(), PARAMS, device="cpu"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"MemoryError on 0\.jpg: out of memory"):
        broken.process(scenes(1), Phases())
