"""The panoptic stage of one worker: nearest centroids, stuff below, rows for bad images."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from workers.masks import decode_panoptic_png, encode_rle, mask_box
from workers.panoptic import PanopticWorker
from workers.records import PANOPTIC_SCHEMA, ImageRecord, instances_schema

CENTROIDS = np.eye(3, 4, dtype=np.float32)


def instances(rows: list[dict[str, object]]) -> pa.Table:
    empty = {"height": 4, "width": 6, "status": "ok", "error": None, "rle": [], "bbox": [], "area": [], "score": []}
    return pa.Table.from_pylist([{**empty, "embedding": [], **row} for row in rows], schema=instances_schema(4))


def one_instance(image_id: str, mask: np.ndarray, embedding: list[float]) -> dict[str, object]:
    return {
        "image_id": image_id,
        "rle": [encode_rle(mask)],
        "bbox": [mask_box(mask)],
        "area": [int(mask.sum())],
        "score": [0.75],
        "embedding": [np.float16(embedding)],
    }


def records(*names: str) -> list[ImageRecord]:
    return [ImageRecord(name, f"/photos/{name}", 0, 9) for name in names]


def merge(rows: list[dict[str, object]], semantics: list[np.ndarray | None] | None = None) -> list[dict[str, object]]:
    worker = PanopticWorker(CENTROIDS, spherical=True, num_stuff=5, max_cover=0.7, threads=1)
    table = worker.process(records(*[str(row["image_id"]) for row in rows]), instances(rows), semantics)
    assert table.schema == PANOPTIC_SCHEMA
    return list(table.to_pylist())


def test_category_is_the_nearest_centroid_plus_one() -> None:
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    (row,) = merge([one_instance("a.jpg", mask, [0.1, 0.2, 0.9, 0.3])])
    assert row["uri"] == "/photos/a.jpg"
    assert row["segments"] == [
        {"id": 1, "category": 3, "is_thing": True, "area": 6, "bbox": [2, 1, 5, 3], "score": 0.75}
    ]
    assert np.array_equal(decode_panoptic_png(row["panoptic"]), mask.astype(np.int32))  # type: ignore[arg-type]


def test_stuff_lies_under_things_and_ids_start_again_in_every_image() -> None:
    mask = np.zeros((4, 6), bool)
    mask[:2, :2] = True
    stuff = np.full((4, 6), 4, np.uint8)
    rows = merge(
        [
            one_instance("a", mask, [1, 0, 0, 0]),
            one_instance("b", mask, [0, 1, 0, 0]),
            {"image_id": "c", "status": "no_masks"},
        ],
        [stuff, None, stuff],
    )
    segments = [[(s["id"], s["category"], s["area"]) for s in row["segments"]] for row in rows]  # type: ignore[attr-defined]
    assert segments == [[(1, 1, 4), (2, 8, 20)], [(1, 2, 4)], [(1, 8, 24)]]


def test_bad_images_stay_rows() -> None:
    (row,) = merge([{"image_id": "x", "status": "empty", "error": "no bytes", "height": None, "width": None}])
    assert (row["status"], row["error"], row["panoptic"], row["segments"]) == ("empty", "no bytes", None, [])


def test_a_photo_that_was_replaced_between_the_stages_is_a_row_with_both_sizes() -> None:
    mask = np.ones((4, 6), bool)
    (row,) = merge([one_instance("a.jpg", mask, [1, 0, 0, 0])], [np.zeros((5, 9), np.uint8)])
    assert (row["status"], row["panoptic"], row["segments"]) == ("changed", None, [])
    assert "6 x 4 pixels when its masks were found, 9 x 5 when its class map was made" in str(row["error"])


def test_a_photo_without_a_class_map_says_what_became_of_it() -> None:
    row = one_instance("a.jpg", np.ones((4, 6), bool), [1, 0, 0, 0])
    worker = PanopticWorker(CENTROIDS, spherical=True, num_stuff=5, max_cover=0.7, threads=1)
    table = worker.process(records("a.jpg"), instances([row]), [None], [("crashed", "it killed its worker")])
    (found,) = table.to_pylist()
    assert (found["status"], found["error"], found["panoptic"]) == ("crashed", "it killed its worker", None)


def test_a_shard_of_which_every_photo_was_dropped_is_a_table_without_rows() -> None:
    assert merge([]) == []


def test_parts_of_other_images_are_refused() -> None:
    worker = PanopticWorker(CENTROIDS, spherical=True, num_stuff=0, max_cover=0.7, threads=1)
    with pytest.raises(ValueError, match="hold different images"):
        worker.process(records("a"), instances([{"image_id": "b"}]), None)
