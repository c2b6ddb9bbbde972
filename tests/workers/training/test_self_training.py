"""Sure predictions and the old labels that they do not contradict -> the labels of the next round."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.tiny_panoptic import scene
from workers.masks import decode_panoptic_png, encode_panoptic_png, encode_rle, mask_box
from workers.merge import merge_panoptic
from workers.predict import encode_class_map
from workers.records import PANOPTIC_SCHEMA, PREDICTIONS_SCHEMA, SEMANTICS_SCHEMA
from workers.training.samples import from_panoptic_row
from workers.training.self_training import (
    CUTLER_THRESHOLDS,
    MergedInstances,
    SelfTrainingParams,
    SelfTrainingWorker,
    mask_ious,
    merge_predictions,
    suppress,
)

H, W, K, S = 4, 6, 3, 2
Masks = NDArray[np.bool_]


def box(top: int, bottom: int, left: int, right: int) -> Masks:
    mask = np.zeros((H, W), bool)
    mask[top:bottom, left:right] = True
    return mask


def stack(*masks: Masks) -> Masks:
    return np.stack(masks) if masks else np.zeros((0, H, W), bool)


def merge(
    predictions: list[tuple[Masks, float, int]], old: list[tuple[Masks, int]], threshold: float = 0.7, **numbers: float
) -> MergedInstances:
    return merge_predictions(
        stack(*(mask for mask, _, _ in predictions)),
        [score for _, score, _ in predictions],
        np.array([category for _, _, category in predictions], int),
        stack(*(mask for mask, _ in old)),
        np.array([category for _, category in old], int),
        threshold=threshold,
        **numbers,  # type: ignore[arg-type]
    )


LEFT, RIGHT, MOST = box(0, 4, 0, 3), box(0, 4, 3, 6), box(0, 4, 0, 5)

# The pure function


def test_a_sure_prediction_replaces_the_old_mask_that_it_covers_and_leaves_the_others() -> None:
    merged = merge([(LEFT, 0.9, 2), (RIGHT, 0.6, 1)], [(box(0, 4, 0, 4), 3), (RIGHT, 1)])
    assert merged.categories.tolist() == [2, 1]
    assert np.array_equal(merged.masks, [LEFT, RIGHT]), "the IoU of the first old mask is 12/16, of the second 0"
    assert merged.scores[0] == 0.9 and np.isnan(merged.scores[1])


def test_areas_boxes_and_sizes_are_those_of_the_masks() -> None:
    """The published program writes the area of the box, and height and width the wrong way round."""
    ell = box(0, 4, 0, 1) | box(3, 4, 0, 5)
    merged = merge([(ell, 0.9, 1)], [])
    assert merged.areas == [8]
    assert merged.boxes == [(0, 0, 5, 4)]
    assert merged.masks.shape == (1, H, W)


def test_at_the_limits() -> None:
    half = box(0, 4, 0, 6)  # IoU with LEFT exactly 0.5
    assert len(merge([(LEFT, 0.7, 1)], [(half, 1)]).masks) == 1, "an old mask stays below max_iou, not at it"
    assert len(merge([(LEFT, 0.7, 1), (half, 0.8, 1)], []).masks) == 2, "a prediction falls above nms_iou, not at it"
    assert len(merge([(LEFT, 0.699, 1)], []).masks) == 0
    assert len(merge([(LEFT, 0.9, 1)], [(RIGHT, 1)], max_iou=0.0).masks) == 1
    assert len(merge([], [(RIGHT, 1)], max_iou=0.0).masks) == 1, "without a prediction the old masks stay as they are"


def test_duplicates_are_suppressed_by_masks_whatever_their_category() -> None:
    merged = merge([(MOST, 0.8, 1), (LEFT, 0.9, 2), (RIGHT, 0.75, 3)], [])
    assert merged.categories.tolist() == [2, 3], "MOST has IoU 0.6 with the surer LEFT"
    assert merge([(MOST, 0.8, 1), (LEFT, 0.9, 2)], [], nms_iou=0.7).categories.tolist() == [2, 1]


def test_a_suppressed_prediction_does_not_drive_out_an_old_mask() -> None:
    merged = merge([(LEFT, 0.9, 1), (MOST, 0.8, 1)], [(box(0, 4, 1, 6), 2)])
    assert merged.categories.tolist() == [1, 2], "its IoU is 0.67 with MOST and 0.33 with LEFT"


def test_only_the_surest_are_looked_at() -> None:
    merged = merge([(LEFT, 0.9, 1), (RIGHT, 0.95, 2)], [], most=1)
    assert merged.categories.tolist() == [2]


def test_empty_masks_are_left_out() -> None:
    nothing = np.zeros((H, W), bool)
    merged = merge([(nothing, 0.9, 1), (LEFT, 0.8, 2)], [(nothing, 1), (RIGHT, 3)])
    assert merged.categories.tolist() == [2, 3]


def test_cutlers_thresholds() -> None:
    assert CUTLER_THRESHOLDS == (0.7, 0.65)
    assert SelfTrainingParams().threshold == 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred_scores": [1.5]}, "scores in"),
        ({"pred_scores": [float("nan")]}, "scores in"),
        ({"pred_scores": []}, "as many scores"),
        ({"pred_categories": [1.0]}, "integer categories"),
        ({"old_masks": np.zeros((1, W, H), bool)}, r"predicted masks are \(4, 6\), old ones \(6, 4\)"),
        ({"pred_masks": np.zeros((1, H, W), int)}, "predicted masks must be .* bool"),
        ({"threshold": 7}, r"threshold must be in \[0, 1\], got 7"),
        ({"max_iou": -0.1}, "max_iou must be"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    """The published program keeps the old labels instead, and says nothing."""
    fitting: dict[str, Any] = {
        "pred_masks": stack(LEFT),
        "pred_scores": [0.9],
        "pred_categories": [1],
        "old_masks": stack(RIGHT),
        "old_categories": [2],
        "threshold": 0.7,
    }
    with pytest.raises(ValueError, match=message):
        merge_predictions(**{**fitting, **changes})


boxes = st.tuples(st.integers(0, H - 1), st.integers(1, H), st.integers(0, W - 1), st.integers(1, W)).map(
    lambda sides: box(min(sides[0], sides[1] - 1), sides[1], min(sides[2], sides[3] - 1), sides[3])
)
categories = st.integers(1, K)
predictions = st.lists(st.tuples(boxes, st.floats(0, 1), categories), max_size=6)
old_labels = st.lists(st.tuples(boxes, categories), max_size=6)
ious = st.floats(0, 1)


@given(predictions, old_labels, st.floats(0, 1), ious, ious)
def test_what_is_kept(
    predicted: list[tuple[Masks, float, int]],
    old: list[tuple[Masks, int]],
    threshold: float,
    max_iou: float,
    nms_iou: float,
) -> None:
    merged = merge(predicted, old, threshold, max_iou=max_iou, nms_iou=nms_iou)
    new = ~np.isnan(merged.scores)
    kept, rest = merged.masks[new], merged.masks[~new]
    assert (merged.scores[new] >= threshold).all() and (np.diff(merged.scores[new]) <= 0).all()
    assert np.all(np.triu(mask_ious(kept, kept), 1) <= nms_iou)
    assert np.all(mask_ious(rest, kept) < max_iou) if len(kept) else len(rest) == len(old)
    sure = stack(*(mask for mask, score, _ in predicted if score >= threshold))
    assert not len(sure) or (mask_ious(sure, kept).max(axis=1) > min(nms_iou, 0.999)).all(), "all others are duplicates"
    lost = [mask for mask, _ in old if not (rest == mask).all(axis=(1, 2)).any()]
    assert all((mask_ious(mask[None], kept) >= max_iou).any() for mask in lost)


@given(st.lists(boxes, max_size=5), st.lists(boxes, max_size=5))
def test_mask_ious_are_those_of_the_pixels(masks: list[Masks], others: list[Masks]) -> None:
    expected = [[(a & b).sum() / (a | b).sum() for b in others] for a in masks]
    found = mask_ious(stack(*masks), stack(*others))
    np.testing.assert_allclose(found, np.array(expected).reshape(len(masks), len(others)))


@given(st.lists(boxes, max_size=6), ious)
def test_suppressing_again_changes_nothing(masks: list[Masks], max_iou: float) -> None:
    kept = stack(*masks)[suppress(stack(*masks), max_iou)]
    assert np.array_equal(suppress(kept, max_iou), np.arange(len(kept)))


# Parts


def prediction_row(predicted: list[tuple[Masks, float, int]], stuff: Any = None, **changes: Any) -> dict[str, Any]:
    masks = [mask for mask, _, _ in predicted]
    row = {
        "image_id": "a.jpg",
        "uri": "/photos/a.jpg",
        "height": H,
        "width": W,
        "status": "ok",
        "panoptic": encode_panoptic_png(np.zeros((H, W), int)),
        "segments": [],
        "hidden_instances": 0,
        "labels": encode_class_map(np.ones((H, W), np.uint8) if stuff is None else stuff),
        "rle": [encode_rle(mask) for mask in masks],
        "bbox": [mask_box(mask) for mask in masks],
        "area": [int(mask.sum()) for mask in masks],
        "score": [score for _, score, _ in predicted],
        "category": [category for _, _, category in predicted],
    }
    return row | changes


def old_rows(old: list[tuple[Masks, int]], stuff: NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of the panoptic and of the instances part of labels that were merged from whole masks."""
    masks = stack(*(mask for mask, _ in old))
    labels = merge_panoptic(masks, np.array([c for _, c in old], int), stuff, num_things=K, num_stuff=S)
    segments = [{name: getattr(segment, name) for name in segment.__slots__} for segment in labels.segments]
    common = {"image_id": "a.jpg", "height": H, "width": W, "status": "ok", "error": None}
    panoptic = {"uri": "/photos/a.jpg", "panoptic": encode_panoptic_png(labels.ids), "segments": segments}
    instances = common | {"rle": [encode_rle(mask) for mask in masks]}
    return common | panoptic | {"hidden_instances": labels.hidden}, instances


def predictions_table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=PREDICTIONS_SCHEMA)


def panoptic_table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=PANOPTIC_SCHEMA)


def worker(**params: Any) -> SelfTrainingWorker:
    return SelfTrainingWorker(SelfTrainingParams(**params), num_things=K, num_stuff=S)


STUFF = np.where(box(0, 4, 0, 5), np.uint8(0), np.uint8(1))
PANOPTIC, INSTANCES = old_rows([(box(0, 3, 0, 4), 1), (box(1, 3, 2, 6), 2)], STUFF)


def merged_row(predicted: dict[str, Any], old_map: Any = STUFF, **params: Any) -> dict[str, Any]:
    parts = {
        "instances": pa.Table.from_pylist([INSTANCES]),
        "semantics": None
        if old_map is None
        else pa.Table.from_pylist(
            [{"image_id": "a.jpg", "status": "ok", "labels": encode_class_map(old_map)}], schema=SEMANTICS_SCHEMA
        ),
    }
    table = worker(max_cover=1.0, **params).process(predictions_table(predicted), panoptic_table(PANOPTIC), **parts)
    assert table.schema == PREDICTIONS_SCHEMA
    row: dict[str, Any] = table.to_pylist()[0]
    return row


def test_old_masks_are_whole_and_the_stuff_is_the_old_one() -> None:
    row = merged_row(prediction_row([(box(3, 4, 0, 6), 0.9, 3)]))
    assert row["category"] == [3, 1, 2] and row["area"] == [6, 12, 8], "the second old mask hides part of the first"
    assert row["score"] == [pytest.approx(0.9), None, None]
    categories = {segment["id"]: segment["category"] for segment in row["segments"]}
    ids = decode_panoptic_png(row["panoptic"])
    shown = [[categories[i] for i in line] for line in ids.tolist()]
    assert shown == [[1, 1, 1, 1, 4, 5], [1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3]]
    assert [segment["score"] for segment in row["segments"] if segment["category"] == 1] == [None]


def test_the_stuff_of_the_model_instead() -> None:
    row = merged_row(prediction_row([(box(3, 4, 0, 6), 0.9, 3)]), semantics="model")
    assert {s["category"] for s in row["segments"]} == {1, 2, 3, 5}


def merged_labels(row: dict[str, Any]) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(row["labels"])))


def test_without_the_semantics_part_nothing_is_known_of_the_stuff_behind_an_old_thing() -> None:
    row = merged_row(prediction_row([(box(0, 4, 0, 1), 0.9, 3), (box(0, 3, 0, 4), 0.8, 3)]), old_map=None)
    assert merged_labels(row)[1].tolist() == [255] * 6
    assert merged_labels(row)[3].tolist() == [0, 0, 0, 0, 0, 1]


def test_the_result_is_what_the_next_round_begins_with() -> None:
    first = merged_row(prediction_row([(box(3, 4, 0, 6), 0.9, 3)]))
    part = predictions_table(first)
    nothing_sure = predictions_table(prediction_row([(LEFT, 0.2, 1)]))
    again = (
        worker(threshold=0.65, max_cover=1.0).process(nothing_sure, part, instances=part, semantics=part).to_pylist()[0]
    )
    assert sorted(zip(again["category"], again["area"], strict=True)) == [(1, 12), (2, 8), (3, 6)]
    assert again["panoptic"] == first["panoptic"] and again["labels"] == first["labels"]
    sample = from_panoptic_row(first, scene(H, W), num_things=K, num_stuff=S, instances=first)
    assert sorted(sample.masks.sum(axis=(1, 2)).tolist()) == [6, 8, 12], "training finds the whole masks in it"


def test_soft_scores_are_those_of_the_round_that_learnt_them() -> None:
    first = merged_row(prediction_row([(box(3, 4, 0, 6), 0.9, 3)]))
    part = predictions_table(first)
    again = prediction_row([(box(0, 3, 0, 4), 0.8, 1)])
    for soft, expected in {False: [None, None, 0.8], True: [0.9, 1, 0.8]}.items():  # that of category 2 was learnt as 1
        rounds = worker(max_cover=1.0, nested=True, soft=soft)
        (row,) = rounds.process(predictions_table(again), part, instances=part, semantics=part).to_pylist()
        scores = dict(zip(row["category"], row["score"], strict=True))
        assert [scores[3], scores[2], scores[1]] == [s and pytest.approx(s) for s in expected]
        assert {s["category"]: s["score"] for s in row["segments"] if s["is_thing"]} == scores


def test_an_image_without_old_labels_has_its_predictions() -> None:
    unread = {**PANOPTIC, "status": "missing", "error": "gone", "panoptic": None, "segments": []}
    table = worker().process(predictions_table(prediction_row([(LEFT, 0.9, 2)])), panoptic_table(unread))
    row = table.to_pylist()[0]
    assert (row["status"], row["category"]) == ("ok", [2])
    assert {s["category"] for s in row["segments"]} == {2, 5}, "on the stuff that the model sees"


def test_a_photo_that_cannot_be_read_keeps_its_row() -> None:
    bad = {"image_id": "a.jpg", "uri": "u", "status": "undecodable", "error": "cut short", "hidden_instances": 0}
    bad |= {name: [] for name in ("segments", "rle", "bbox", "area", "score", "category")}
    row = worker().process(predictions_table(bad), panoptic_table(PANOPTIC)).to_pylist()[0]
    assert (row["status"], row["error"], row["panoptic"]) == ("undecodable", "cut short", None)


def test_without_stuff_the_rest_is_void() -> None:
    plain = SelfTrainingWorker(SelfTrainingParams(), num_things=K, num_stuff=0)
    labels, _ = old_rows([(RIGHT, 2)], np.full((H, W), 255, np.uint8))
    row = plain.process(predictions_table(prediction_row([(LEFT, 0.9, 1)])), panoptic_table(labels)).to_pylist()[0]
    assert [s["category"] for s in row["segments"]] == [1, 2] and row["labels"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": "b.jpg"}, r"b\.jpg: the parts to merge have \['a\.jpg'\] in its place"),
        ({"category": [K + 1], "score": [0.9], "rle": [encode_rle(LEFT)]}, r"a\.jpg: categories must be in 1\.\.3"),
        ({"height": 6, "width": 4, "labels": encode_class_map(np.zeros((6, 4), np.uint8))}, r"a\.jpg: .*\(4, 6\)"),
        ({"labels": encode_class_map(np.zeros((2, 2), np.uint8))}, r"a\.jpg: its class map is \(2, 2\)"),
    ],
)
def test_parts_that_do_not_fit_name_the_image(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        worker().process(predictions_table(prediction_row([], **changes)), panoptic_table(PANOPTIC))


def test_parts_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hold \[1, 2\] images"):
        worker().process(predictions_table(prediction_row([])), panoptic_table(PANOPTIC, PANOPTIC))
