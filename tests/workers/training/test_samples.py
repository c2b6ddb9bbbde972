"""Rows of a panoptic part and COCO annotations as training samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.panoptic.targets import Target, check_targets
from workers.decode import DecodeLimits, decode_image
from workers.masks import encode_panoptic_png, encode_rle, mask_box
from workers.merge import merge_panoptic
from workers.training.samples import Sample, coco_categories, from_coco, from_panoptic_row, to_target

K, S = 3, 2  # things 1..3, stuff 4..5


def segment(number: int, category: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "category": category, "is_thing": category <= K, **changes}


def row_of(ids: Any, segments: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A row of a panoptic part; its areas, boxes and scores do not matter here."""
    ids = np.array(ids, np.int32)
    height, width = ids.shape
    row = {"image_id": "a.jpg", "height": height, "width": width, "status": "ok", "error": None, "segments": segments}
    return {**row, "panoptic": encode_panoptic_png(ids), **changes}


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def sample_of(row: dict[str, Any], **changes: Any) -> Sample:
    arguments = {"image": photo(row["height"], row["width"]), "num_things": K, "num_stuff": S, **changes}
    return from_panoptic_row(row, **arguments)


def test_a_row_becomes_classes_boxes_masks_and_a_semantic_map() -> None:
    row = row_of([[0, 1, 1, 9], [7, 7, 1, 9]], [segment(1, 1), segment(7, 3), segment(9, 5)])
    sample = sample_of(row)
    assert sample.image_id == "a.jpg"
    assert sample.classes.tolist() == [0, 2], "category 1 is class 0, category K is class K - 1"
    assert sample.boxes.tolist() == [[1, 0, 3, 2], [0, 1, 2, 2]]
    assert sample.masks.astype(int).tolist() == [[[0, 1, 1, 0], [0, 0, 1, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]]]
    assert sample.semantic.tolist() == [[255, 0, 0, 2], [0, 0, 0, 2]]
    assert (sample.boxes.dtype, sample.classes.dtype) == (np.float32, np.int64)
    assert (sample.masks.dtype, sample.semantic.dtype) == (np.bool_, np.uint8)


def test_no_class_is_lost_at_the_seams() -> None:
    """The published off-by-one: category 0 is nobody's, the last thing is not the first stuff."""
    things = [[1, 2, 3]]
    stuff = [[4, 5, 0]]
    row = row_of(things + stuff, [segment(number, number) for number in range(1, K + S + 1)])
    sample = sample_of(row)
    assert sample.classes.tolist() == [0, 1, 2]
    assert sample.semantic.tolist() == [[0, 0, 0], [1, 2, 255]]
    for category in (0, K + S + 1):
        with pytest.raises(ValueError, match=rf"a\.jpg: categories \[{category}\] are outside 1\.\.5 \(3 things, 2"):
            sample_of(row_of([[1]], [segment(1, category)]))


def test_ids_may_be_as_large_as_a_png_holds() -> None:
    sample = sample_of(row_of([[(1 << 24) - 1, 65536]], [segment((1 << 24) - 1, 2), segment(65536, 4)]))
    assert (sample.classes.tolist(), sample.semantic.tolist()) == ([1], [[0, 1]])


def test_an_image_without_instances_and_one_without_labels() -> None:
    sample = sample_of(row_of([[4, 4]], [segment(4, 4)]))
    assert (sample.boxes.shape, sample.classes.shape, sample.masks.shape) == ((0, 4), (0,), (0, 1, 2))
    empty = sample_of(row_of([[0, 0]], [], status="no_masks"))
    assert empty.semantic.tolist() == [[255, 255]]


@pytest.mark.parametrize(
    ("ids", "segments", "message"),
    [
        ([[1, 2]], [segment(1, 1)], r"a\.jpg: segment ids \[2\] in the map but not listed"),
        ([[1, 0]], [segment(1, 1), segment(8, 2)], r"a\.jpg: segment ids \[8\] listed but not in the map"),
        ([[1, 0]], [segment(1, 1), segment(1, 2)], r"a\.jpg: segment ids \[1\] listed twice"),
        ([[1, 0]], [segment(1, 1), segment(0, 4)], r"a\.jpg: segment ids \[0\] listed but not in the map"),
        ([[6]], [segment(6, 4, is_thing=True)], r"a\.jpg: \(id, category\) \[\(6, 4\)\] disagree with is_thing at 3"),
    ],
)
def test_labels_that_contradict_themselves_are_refused(
    ids: list[list[int]], segments: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_of(row_of(ids, segments))


def test_sizes_must_agree() -> None:
    row = row_of([[1, 0]], [segment(1, 1)])
    with pytest.raises(ValueError, match=r"a\.jpg: the image is \(2, 1\), its row \(1, 2\)"):
        sample_of(row, image=photo(2, 1))
    with pytest.raises(ValueError, match=r"a\.jpg: the image is \(3, 2\), its panoptic map \(1, 2\)"):
        sample_of({**row, "height": 3})
    with pytest.raises(ValueError, match=r"a\.jpg: an image is \(h, w, 3\) uint8, got \(1, 2, 4\) uint8"):
        sample_of(row, image=np.zeros((1, 2, 4), np.uint8))


def test_a_row_without_labels_is_refused() -> None:
    row = row_of([[0]], [], status="undecodable", error="cut short", panoptic=None)
    with pytest.raises(ValueError, match=r"a\.jpg: a row of status undecodable \(cut short\)"):
        sample_of(row)


def test_more_stuff_than_a_byte_names_is_refused() -> None:
    row = row_of([[4]], [segment(4, 4)])
    assert sample_of(row, num_stuff=254).semantic.tolist() == [[1]]
    with pytest.raises(ValueError, match=r"num_stuff must be in 0\.\.254, got 255"):
        sample_of(row, num_stuff=255)


def merged(masks: np.ndarray, categories: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the panoptic and the instances part say of the same masks."""
    labels = merge_panoptic(masks, np.array(categories), None, num_things=K, num_stuff=S)
    segments = [{"id": s.id, "category": s.category, "is_thing": s.is_thing} for s in labels.segments]
    row = row_of(labels.ids, segments)
    keys = ("image_id", "height", "width")
    instances = {**{key: row[key] for key in keys}, "rle": [encode_rle(mask) for mask in masks]}
    return row, instances


def overlapping() -> np.ndarray:
    """A small mask, a large one under it, and one that is hidden wholly under the large one's successor."""
    masks = np.zeros((4, 6, 8), bool)
    masks[0, 1:3, 1:3] = True
    masks[1, 0:6, 0:6] = True
    masks[2, 4:6, 5:8] = True
    masks[3, 4:6, 5:8] = True  # painted after its twin, which is hidden
    return masks


def test_whole_masks_come_from_the_instances_part() -> None:
    masks = overlapping()
    row, instances = merged(masks, [1, 2, 3, 1])
    visible, whole = sample_of(row), sample_of(row, instances=instances)
    assert visible.classes.tolist() == whole.classes.tolist() == [1, 0, 0], "painting order; the hidden one is out"
    assert visible.masks.sum(axis=0).max() == 1
    np.testing.assert_array_equal(whole.masks, masks[[1, 3, 0]])
    assert whole.boxes.tolist() == [list(mask_box(mask)) for mask in masks[[1, 3, 0]]]
    np.testing.assert_array_equal(visible.semantic, whole.semantic)


def test_nested_masks_are_all_learnt_with_their_own_classes() -> None:
    whole, part, empty = np.zeros((3, 2, 4), bool)
    whole[:, :3], part[0, 1] = True, True
    row = row_of([[1, 1, 1, 4], [1, 1, 1, 4]], [segment(1, 2), segment(4, 4)])
    masks = [encode_rle(mask) for mask in (whole, part, empty)]
    targets = {"image_id": "a.jpg", "height": 2, "width": 4, "rle": masks, "category": [3, 1, 2]}
    targets["score"] = [0.5, None, 0.9]
    sample = sample_of(row, instances=targets, nested=True)
    assert sample.classes.tolist() == [2, 0]
    assert sample.scores is not None and sample.scores.tolist() == [0.5, 1.0]
    assert to_target(sample)[1].scores.tolist() == [0.5, 1.0]  # type: ignore[union-attr]
    assert sample.boxes.tolist() == [[0, 0, 3, 2], [1, 0, 2, 1]]
    assert np.array_equal(sample.masks, np.stack([whole, part]))
    assert sample.semantic.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]  # the map is that of the labels
    none = sample_of(row, instances={**targets, "rle": [], "category": [], "score": []}, nested=True)
    assert none.masks.shape == (0, 2, 4)
    with pytest.raises(ValueError, match=r"a\.jpg: categories \[3, 1, 4\] of masks are not all in 1\.\.3"):
        sample_of(row, instances={**targets, "category": [3, 1, 4]}, nested=True)
    with pytest.raises(ValueError, match="wanted one of"):
        sample_of(row, instances={**targets, "image_id": "b.jpg"}, nested=True)


def test_instances_of_another_image_or_run_are_refused() -> None:
    row, instances = merged(overlapping(), [1, 2, 3, 1])
    with pytest.raises(ValueError, match=r"a\.jpg: a row of instances of \('b\.jpg', 6, 8\), wanted one of"):
        sample_of(row, instances={**instances, "image_id": "b.jpg"})
    for foreign in ([encode_rle(overlapping()[2])], [encode_rle(mask) for mask in np.roll(overlapping(), 3, axis=1)]):
        with pytest.raises(ValueError, match=r"a\.jpg: the segments \[.*\] do not lie on .* were merged from"):
            sample_of(row, instances={**instances, "rle": foreign})


CATEGORIES = [
    {"id": 200, "name": "rug", "isthing": 0},
    {"id": 90, "name": "toothbrush", "isthing": 1},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 92, "name": "banner", "isthing": 0},
]


def test_coco_categories_become_contiguous_things_first() -> None:
    assert coco_categories(CATEGORIES) == ({1: 1, 90: 2, 92: 3, 200: 4}, 2, 2)
    with pytest.raises(ValueError, match="5 COCO categories, but only 4 different ids"):
        coco_categories([*CATEGORIES, CATEGORIES[0]])


def test_crowds_are_no_instances_but_things_in_the_semantic_map() -> None:
    ids, num_things, num_stuff = coco_categories(CATEGORIES)
    info = [
        {"id": 70000, "category_id": 90, "iscrowd": 0},
        {"id": 300, "category_id": 1, "iscrowd": 1},
        {"id": 5, "category_id": 200, "iscrowd": 0},
    ]
    annotation = {"image_id": 42, "segments_info": info}
    png = encode_panoptic_png(np.array([[70000, 300, 5, 0]], np.int32))
    sample = from_coco(annotation, png, photo(1, 4), ids, num_things=num_things, num_stuff=num_stuff)
    assert (sample.image_id, sample.classes.tolist()) == ("42", [1])
    assert sample.semantic.tolist() == [[0, 0, 2, 255]]
    info[0]["category_id"] = 91
    with pytest.raises(ValueError, match=r"42: category_id \[91\] is not among the 4 given categories"):
        from_coco(annotation, png, photo(1, 4), ids, num_things=num_things, num_stuff=num_stuff)


def test_cocos_own_examples_are_read(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "coco-panoptic-sample"
    content = json.loads((folder / "panoptic_examples.json").read_text())
    ids, num_things, num_stuff = coco_categories(content["categories"])
    assert (num_things, num_stuff) == (80, 53)
    for annotation in content["annotations"]:
        name = Path(annotation["file_name"])
        image = decode_image((folder / "input_images" / f"{name.stem}.jpg").read_bytes(), DecodeLimits())
        png = (folder / "panoptic_examples" / name.name).read_bytes()
        sample = from_coco(annotation, png, image, ids, num_things=num_things, num_stuff=num_stuff)
        things = [s for s in annotation["segments_info"] if ids[s["category_id"]] <= 80 and not s["iscrowd"]]
        assert sample.masks.sum(axis=(1, 2)).tolist() == [s["area"] for s in things]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (s["bbox"] for s in things)]
        assert sample.boxes.tolist() == boxes
        image_tensor, target = to_target(sample)
        check_targets([target], [tuple(image_tensor.shape[1:])], num_things=80, num_stuff=53)


def test_tensors_hold_the_same_arrays() -> None:
    sample = sample_of(row_of([[0, 1, 1, 9], [7, 7, 1, 9]], [segment(1, 1), segment(7, 3), segment(9, 5)]))
    image, target = to_target(sample)
    assert isinstance(target, Target)
    assert (image.shape, image.dtype) == ((3, 2, 4), torch.uint8)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), sample.image)
    for name in ("boxes", "classes", "masks", "semantic"):
        np.testing.assert_array_equal(getattr(target, name).numpy(), getattr(sample, name))


def test_the_target_of_the_reference_has_these_forms(shared_dir: Path) -> None:
    """The training batch of the original: boxes are those of its masks, and things are 0 in its semantic map."""
    golden = np.load(shared_dir / "parity" / "panoptic_rcnn" / "golden_300.npz")
    picture = np.asarray(Image.open(shared_dir / "parity" / "panoptic_rcnn" / "inputs" / "train0.png"))
    semantic = golden["train/img0/gt_sem_seg"]
    masks = np.unpackbits(golden["train/img0/gt_masks_packed"], axis=-1)[..., : semantic.shape[1]].astype(bool)
    classes = golden["train/img0/gt_classes"]
    labels = merge_panoptic(masks, classes + 1, None, num_things=300, num_stuff=27)
    segments = [{"id": s.id, "category": s.category, "is_thing": True} for s in labels.segments]
    instances = {"image_id": "a.jpg", "height": masks.shape[1], "width": masks.shape[2]}
    sample = from_panoptic_row(
        row_of(labels.ids, segments),
        picture,
        num_things=300,
        num_stuff=27,
        instances={**instances, "rle": [encode_rle(mask) for mask in masks]},
    )
    order = [int(np.flatnonzero((masks == mask).all(axis=(1, 2)))[0]) for mask in sample.masks]
    np.testing.assert_array_equal(sample.boxes, golden["train/img0/gt_boxes"][order])
    np.testing.assert_array_equal(sample.classes, classes[order])
