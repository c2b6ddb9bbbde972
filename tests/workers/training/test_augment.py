"""Resize and flip of training samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from workers.training.augment import MAX_SIDE, SHORT_SIDES, augment, flip, nearest, resize, resize_shortest_edge
from workers.training.samples import Sample, mask_boxes


def scene(height: int, width: int, instances: int = 3, seed: int = 0) -> Sample:
    """Random pixels, random rectangles and a random semantic map."""
    random = np.random.default_rng(seed)
    masks = np.zeros((instances, height, width), bool)
    for mask in masks:
        top, left = random.integers(height), random.integers(width)
        mask[top : top + 1 + random.integers(height), left : left + 1 + random.integers(width)] = True
    return Sample(
        image_id="a.jpg",
        image=random.integers(0, 256, (height, width, 3), np.uint8),
        boxes=mask_boxes(masks),
        classes=random.integers(0, 5, instances),
        masks=masks,
        semantic=random.choice(np.array([0, 1, 2, 255], np.uint8), (height, width)),
    )


def arrays(sample: Sample) -> list[np.ndarray]:
    return [sample.image, sample.boxes, sample.classes, sample.masks, sample.semantic]


def assert_equal(left: Sample, right: Sample) -> None:
    for one, other in zip(arrays(left), arrays(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_sizes_are_those_of_detectron2(shared_dir: Path) -> None:
    """Rows h, w, short side, longest side, new h, new w."""
    table = np.load(shared_dir / "parity" / "panoptic_rcnn" / "golden_300.npz")["unit/resize_table"]
    assert len(table)
    for height, width, short, longest, *expected in table.tolist():
        if height * width < 10**6:
            resized = resize_shortest_edge(scene(height, width, instances=1), short, longest)
            assert list(resized.size) == expected
            assert resized.image.shape[:2] == resized.masks.shape[1:] == resized.size


def test_a_photo_is_resized_to_the_originals_pixels(shared_dir: Path) -> None:
    folder = shared_dir / "parity" / "panoptic_rcnn"
    photo = np.asarray(Image.open(shared_dir / "data" / "photos" / "n01440764" / "n01440764_tench.JPEG").convert("RGB"))
    sample = scene(*photo.shape[:2])
    resized = resize_shortest_edge(Sample("tench", photo, *arrays(sample)[1:]), 800)
    np.testing.assert_array_equal(resized.image, np.asarray(Image.open(folder / "inputs" / "img0.png").convert("RGB")))


@given(st.integers(1, 60), st.integers(1, 60))
def test_nearest_is_pillows(old: int, new: int) -> None:
    line = np.random.default_rng(old).integers(0, 256, (old, 3), np.uint8)
    expected = np.asarray(Image.fromarray(line).resize((3, new), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(line[nearest(old, new)], expected)


@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.tuples(st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=50, deadline=None)
def test_masks_and_semantic_map_are_resized_by_nearest_pixel(old: tuple[int, int], new: tuple[int, int]) -> None:
    sample = scene(*old, instances=4, seed=old[0])
    resized = resize(sample, *new)
    picture = Image.fromarray(sample.semantic).resize(new[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(resized.semantic, np.asarray(picture))
    masks = [
        np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(new[::-1], Image.Resampling.NEAREST)) > 0
        for mask in sample.masks
    ]
    np.testing.assert_array_equal(resized.masks, np.array([mask for mask in masks if mask.any()]).reshape(-1, *new))
    assert len(resized.classes) == len(resized.boxes) == len(resized.masks)


def test_boxes_are_scaled_and_not_taken_from_the_masks() -> None:
    sample = scene(10, 20, instances=1)
    boxes = np.array([[1.5, 2.0, 30.0, 9.0]], np.float32)  # beyond the right edge: clipped
    resized = resize(Sample("a", sample.image, boxes, *arrays(sample)[2:]), 15, 40)
    assert resized.boxes.tolist() == [[3.0, 3.0, 40.0, 13.5]]
    assert resized.boxes.dtype == np.float32


def test_instances_that_vanish_are_dropped() -> None:
    sample = scene(8, 8, instances=2)
    sample.masks[:] = False
    sample.masks[0, 0, 0] = True  # nearest sampling at half the size takes odd pixels
    sample.masks[1, 1, 1] = True
    halved = resize(Sample("a", sample.image, mask_boxes(sample.masks), np.array([3, 4]), *arrays(sample)[3:]), 4, 4)
    assert halved.classes.tolist() == [4]
    assert halved.masks.sum() == 1
    flat = np.array([[0, 0, 0, 1], [1, 1, 2, 2]], np.float32)  # an empty box over a mask that is none
    assert resize(Sample("a", sample.image, flat, np.array([3, 4]), *arrays(sample)[3:]), 8, 8).classes.tolist() == [4]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((5000, 30), (1333, 8)), ((30, 5000), (8, 1333)), ((1, 1), (800, 800)), ((1, 9000), (1, 1333))],
)
def test_extreme_shapes_keep_a_pixel(size: tuple[int, int], expected: tuple[int, int]) -> None:
    sample = scene(*size, instances=2)
    sample.masks[:] = True
    resized = resize_shortest_edge(Sample("a", sample.image, mask_boxes(sample.masks), *arrays(sample)[2:]), 800)
    assert resized.size == expected
    assert resized.boxes.tolist() == [[0, 0, expected[1], expected[0]]] * 2


def test_a_flip_mirrors_everything_and_twice_is_the_identity() -> None:
    sample = scene(7, 11)
    mirrored = flip(sample)
    np.testing.assert_array_equal(mirrored.image[:, 0], sample.image[:, -1])
    np.testing.assert_array_equal(mirrored.semantic[:, 0], sample.semantic[:, -1])
    np.testing.assert_array_equal(mirrored.boxes, mask_boxes(mirrored.masks))
    assert_equal(flip(mirrored), sample)


def test_the_same_generator_gives_the_same_sample_and_the_input_is_left_alone() -> None:
    sample, untouched = scene(40, 60), scene(40, 60)
    left, right = (augment(sample, np.random.default_rng(5), short_sides=(20, 30, 50)) for _ in range(2))
    assert_equal(left, right)
    assert_equal(sample, untouched)


def test_sizes_and_flips_are_drawn_as_configured() -> None:
    random, sample = np.random.default_rng(0), scene(4, 5)
    sample.image[:, 0] = 0
    sample.image[:, 1:] = 255
    drawn = [augment(sample, random, short_sides=(8, 12, 16)) for _ in range(300)]
    counts = {side: sum(d.size[0] == side for d in drawn) for side in (8, 12, 16)}
    assert all(70 < count < 130 for count in counts.values()), counts
    assert 120 < sum(int(d.image[0, 0, 0]) == 255 for d in drawn) < 180
    never = (augment(sample, random, short_sides=(8,), flip_probability=0) for _ in range(20))
    assert all(int(d.image[0, 0, 0]) == 0 for d in never)


def test_every_sample_draws_as_much_from_the_generator() -> None:
    states = []
    for sample in (scene(4, 5), scene(9, 2, instances=0)):
        random = np.random.default_rng(1)
        augment(sample, random, short_sides=(6, 8))
        states.append(random.bit_generator.state)
    assert states[0] == states[1]


def test_the_published_sides_are_the_default() -> None:
    assert (SHORT_SIDES, MAX_SIDE) == ((240, 320, 480, 640, 672, 704, 736, 768, 800, 1024), 1333)
    with pytest.raises(ValueError, match=r"a\.jpg: cannot resize to 0 x 3"):
        resize(scene(2, 2), 0, 3)


def test_scores_stay_with_their_instances() -> None:
    sample = scene(40, 30)
    tiny = np.zeros((1, 40, 30), bool)
    tiny[0, 39, 29] = True  # vanishes where the photo is halved
    sample = replace(
        sample,
        boxes=mask_boxes(np.concatenate([tiny, sample.masks])),
        masks=np.concatenate([tiny, sample.masks]),
        classes=np.array([9, 0, 1, 2]),
        scores=np.array([0.9, 0.1, 0.2, 0.3], np.float32),
    )
    small = flip(resize(sample, 4, 3))
    assert small.scores is not None
    assert {int(label): float(score) for label, score in zip(small.classes, small.scores, strict=True)} == {
        int(label): pytest.approx(0.1 * (label + 1)) for label in small.classes
    }
    assert len(small.scores) < 4
