"""Copy-paste: what is pasted where, what is refused, and the bank of crops by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.training.copy_paste import CopyPaste, InstanceBank, copy_paste, crops_of, paste
from workers.training.samples import Sample, mask_boxes

Rectangle = tuple[int, int, int, int]  # x0, y0, x1, y1
WHOLE = CopyPaste(ratio=(1.0, 1.0))


def scene(name: str, grey: int, rectangles: Sequence[Rectangle], *, label: int = 0, size: tuple[int, int]) -> Sample:
    """A plain image whose instances are rectangles; stuff 1 around them."""
    masks = np.zeros((len(rectangles), *size), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, rectangles, strict=True):
        mask[y0:y1, x0:x1] = True
    semantic = np.where(masks.any(axis=0), 0, 1).astype(np.uint8)
    image = np.full((*size, 3), grey, np.uint8)
    return Sample(name, image, mask_boxes(masks), np.full(len(masks), label), masks, semantic)


def arrays(sample: Sample) -> list[np.ndarray]:
    return [sample.image, sample.boxes, sample.classes, sample.masks, sample.semantic]


def assert_equal(left: Sample, right: Sample) -> None:
    assert left.image_id == right.image_id
    for one, other in zip(arrays(left), arrays(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_pasted_instance_hides_what_lies_below() -> None:
    target = scene("t", 10, [(0, 0, 4, 4), (6, 6, 8, 8)], label=3, size=(8, 8))
    source = scene("s", 200, [(3, 0, 6, 4)], size=(8, 8))
    result = paste(target, source.image, source.masks, [7])
    assert result.classes.tolist() == [3, 3, 7]
    assert result.boxes.tolist() == [[0, 0, 3, 4], [6, 6, 8, 8], [3, 0, 6, 4]]
    assert result.masks.sum(axis=0).max() == 1
    alpha = source.masks[0]
    assert (result.image[alpha] == 200).all()
    assert (result.image[~alpha] == 10).all()
    assert (result.semantic[alpha] == 0).all(), "pasted pixels are things, whatever stuff was there"
    np.testing.assert_array_equal(result.semantic[~alpha], target.semantic[~alpha])


@pytest.mark.parametrize(("columns", "pasted"), [(1, True), (2, False), (4, False)])
def test_an_existing_object_is_never_half_buried(columns: int, pasted: bool) -> None:
    """The share of the existing mask counts, and a half is too much."""
    target = scene("t", 10, [(0, 0, 4, 4)], size=(8, 8))
    source = scene("s", 200, [(0, 0, columns, 8)], size=(8, 8))
    assert (len(paste(target, source.image, source.masks, [1]).classes) == 2) is pasted


def test_only_the_masks_that_bury_are_refused() -> None:
    target = scene("t", 10, [(0, 0, 4, 4)], size=(8, 8))
    source = scene("s", 200, [(0, 0, 4, 3), (5, 5, 8, 8), (0, 0, 0, 0)], size=(8, 8))
    result = paste(target, source.image, source.masks, [1, 2, 3])
    assert result.classes.tolist() == [0, 2]
    assert (result.image[0, 0] == 10).all()


def test_a_target_with_nothing_left_to_paste_comes_back_itself() -> None:
    target = scene("t", 10, [(0, 0, 4, 4)], size=(8, 8))
    source = scene("s", 200, [(0, 0, 4, 4)], size=(8, 8))
    assert paste(target, source.image, source.masks, [1]) is target


def test_an_instance_without_a_pixel_left_is_dropped() -> None:
    target = scene("t", 10, [(0, 0, 2, 2), (4, 4, 8, 8)], size=(8, 8))
    source = scene("s", 200, [(0, 0, 2, 2)], size=(8, 8))
    result = paste(target, source.image, source.masks, [9], max_cover=1.0)
    assert result is target, "wholly hidden is refused at any cover"
    halves = scene("s", 200, [(0, 0, 1, 2), (1, 0, 2, 2)], size=(8, 8))
    result = paste(target, halves.image, halves.masks, [8, 9], max_cover=0.6)
    assert result.classes.tolist() == [0, 8, 9]
    assert result.boxes.tolist() == [[4, 4, 8, 8], [0, 0, 1, 2], [1, 0, 2, 2]]


def test_a_target_without_instances_takes_everything_with_boxes_of_the_masks() -> None:
    """The published branch swaps x and y of the offset; an oblong image shows it."""
    target = scene("t", 10, [], size=(4, 12))
    source = scene("s", 200, [(0, 0, 1, 1), (1, 1, 3, 3), (2, 0, 4, 4)], label=5, size=(4, 4))
    large = CopyPaste(ratio=(0.75, 1.0))
    results = [copy_paste([target, source], np.random.default_rng(seed), large)[0] for seed in range(20)]
    assert all(1 <= len(result.classes) <= 2 and set(result.classes.tolist()) == {5} for result in results)
    for result in results:
        np.testing.assert_array_equal(result.boxes, mask_boxes(result.masks))


def test_at_full_ratio_the_source_is_stretched_to_the_target() -> None:
    target = scene("t", 10, [], size=(4, 12))
    source = scene("s", 200, [(1, 1, 2, 2)], size=(4, 4))
    (result, _) = copy_paste([target, source], np.random.default_rng(0), WHOLE)
    # The mask keeps every pixel it touches: one more on each side where it is stretched (here by 3 in x).
    assert result.boxes.tolist() == [[2, 1, 7, 2]]
    assert (result.image[1, 2:7] == 200).all()


def test_one_of_one_and_never_all_of_several() -> None:
    target = scene("t", 10, [], size=(8, 8))
    for count, expected in ((1, {1}), (2, {1}), (4, {1, 2, 3})):
        source = scene("s", 200, [(2 * i, 0, 2 * i + 1, 8) for i in range(count)], size=(8, 8))
        counts = {
            len(copy_paste([target, source], np.random.default_rng(seed), WHOLE)[0].classes) for seed in range(40)
        }
        assert counts == expected


@given(st.integers(2, 9), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_no_image_is_pasted_onto_itself_whatever_the_batch(count: int, seed: int) -> None:
    """Every image gives to exactly one other, also in a batch of odd size."""
    batch = [scene(str(i), i, [(0, 0, 4, 4)], label=i, size=(4, 4)) for i in range(count)]
    empty = [replace(s, boxes=s.boxes[:0], classes=s.classes[:0], masks=s.masks[:0]) for s in batch]
    sources = []
    for index in range(count):
        mixed = [empty[i] if i == index else batch[i] for i in range(count)]
        result = copy_paste(mixed, np.random.default_rng(seed), WHOLE)[index]
        sources.append(int(result.classes[0]))
    assert sorted(sources) == list(range(count))
    assert all(source != index for index, source in enumerate(sources))


def test_a_batch_of_one_stays_as_it_is() -> None:
    sample = scene("t", 10, [(0, 0, 4, 4)], size=(8, 8))
    assert copy_paste([sample], np.random.default_rng(0), CopyPaste()) == [sample]
    assert copy_paste([], np.random.default_rng(0), CopyPaste()) == []


def test_sources_are_the_images_as_they_came_and_stay_so() -> None:
    batch = [scene(str(i), 50 * i, [(i, i, i + 3, i + 3)], label=i, size=(9, 9)) for i in range(4)]
    before = [scene(str(i), 50 * i, [(i, i, i + 3, i + 3)], label=i, size=(9, 9)) for i in range(4)]
    results = copy_paste(batch, np.random.default_rng(3), CopyPaste(max_cover=1.0))
    for sample, untouched, result in zip(batch, before, results, strict=True):
        assert_equal(sample, untouched)
        assert result.classes[0] == sample.classes[0]
        assert len(np.unique(result.image)) <= 2, "a third grey came from an image that had received a paste itself"


def test_the_rate_is_the_share_of_images_that_receive() -> None:
    batch = [scene(str(i), i, [(0, 0, 2, 2)], size=(16, 16)) for i in range(200)]
    targets = copy_paste(batch, np.random.default_rng(0), CopyPaste(rate=0.0))
    assert all(result is sample for result, sample in zip(targets, batch, strict=True))
    some = copy_paste(batch, np.random.default_rng(0), CopyPaste(rate=0.5, max_cover=1.0))
    assert 70 < sum(result is not sample for result, sample in zip(some, batch, strict=True)) < 130


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_comes_out_is_a_sample_and_the_seed_decides_it(seed: int, banked: bool) -> None:
    random = np.random.default_rng(seed)
    batch = []
    for index in range(3):
        size = (int(random.integers(1, 20)), int(random.integers(1, 20)))
        corners = [(int(random.integers(size[1])), int(random.integers(size[0]))) for _ in range(random.integers(4))]
        rectangles = [(x, y, x + 1 + int(random.integers(9)), y + 1 + int(random.integers(9))) for x, y in corners]
        batch.append(scene(str(index), 90 * index, rectangles, label=index % 2, size=size))
    outcomes = []
    for _ in range(2):
        bank = InstanceBank(per_class=4) if banked else None
        generator = np.random.default_rng(seed)
        for sample in batch if bank is not None else []:
            bank.add(crops_of(sample))
        outcomes.append(copy_paste(batch, generator, CopyPaste(), bank))
    for sample, one, other in zip(batch, *outcomes, strict=True):
        assert_equal(one, other)
        assert one.size == sample.size == one.image.shape[:2]
        assert len(one.boxes) == len(one.classes) == len(one.masks)
        assert one.masks.any(axis=(1, 2)).all()
        np.testing.assert_array_equal(one.boxes, mask_boxes(one.masks))
        assert (one.semantic[one.masks.any(axis=0)] == 0).all()


def test_the_bank_fills_an_image_with_its_own_classes_only() -> None:
    bank, random = InstanceBank(), np.random.default_rng(0)
    for name, label in (("a", 1), ("b", 2), ("c", 3)):
        bank.add(crops_of(scene(name, 40 * label, [(0, 0, 3, 3)], label=label, size=(8, 8))))
    target = scene("t", 10, [(0, 0, 4, 4)], label=2, size=(16, 16))
    always = CopyPaste(semantic_aware=1.0)
    results = [copy_paste([target], random, always, bank)[0] for _ in range(30)]
    received = [result for result in results if len(result.classes) > 1]
    assert len(received) > 15
    for result in received:
        assert result.classes.tolist() == [2, 2]
        assert set(np.unique(result.image[result.masks[1]])) == {80}, "pixels of another class than 2"


def test_a_crop_keeps_the_size_its_image_would_give_it() -> None:
    bank = InstanceBank()
    bank.add(crops_of(scene("a", 99, [(2, 2, 6, 4)], label=1, size=(8, 16))))
    target = scene("t", 10, [(0, 0, 1, 1)], label=1, size=(32, 32))
    (result,) = copy_paste([target], np.random.default_rng(0), CopyPaste(ratio=(1, 1), semantic_aware=1.0), bank)
    x0, y0, x1, y1 = result.boxes[1].tolist()
    assert (x1 - x0, y1 - y0) == (8, 8), "4 of 16 columns and 2 of 8 rows, each a quarter of 32"


def test_an_image_never_receives_its_own_crops() -> None:
    bank = InstanceBank()
    sample = scene("t", 10, [(0, 0, 2, 2)], label=1, size=(8, 8))
    bank.add(crops_of(sample))
    assert bank.of_class(1, other_than="t") == []
    assert copy_paste([sample], np.random.default_rng(0), CopyPaste(semantic_aware=1.0), bank)[0] is sample


def test_without_a_crop_of_its_classes_an_image_is_filled_from_the_batch() -> None:
    batch = [scene(str(i), 10, [(i, 0, i + 1, 1)], label=i, size=(8, 8)) for i in range(2)]
    params = CopyPaste(ratio=(1, 1), semantic_aware=1.0)
    results = copy_paste(batch, np.random.default_rng(0), params, InstanceBank())
    assert [result.classes.tolist() for result in results] == [[0, 1], [1, 0]]


def test_the_bank_is_bounded_by_class_and_by_bytes() -> None:
    bank = InstanceBank(per_class=2)
    for index in range(5):
        bank.add(crops_of(scene(str(index), index, [(0, 0, 2, 2)], label=index % 2, size=(4, 4))))
    assert [crop.image_id for crop in bank.of_class(0, other_than="")] == ["2", "4"]
    assert [crop.image_id for crop in bank.of_class(1, other_than="")] == ["1", "3"]
    assert (len(bank), bank.nbytes) == (4, 4 * 2 * 2 * 4)

    small = InstanceBank(max_bytes=40)  # two crops of 16 bytes
    for index in range(4):
        small.add(crops_of(scene(str(index), index, [(0, 0, 2, 2)], label=index, size=(4, 4))))
    assert [len(small.of_class(label, other_than="")) for label in range(4)] == [0, 0, 1, 1]
    small.add(crops_of(scene("large", 0, [(0, 0, 4, 4)], label=0, size=(4, 4))))
    assert (len(small), small.nbytes) == (2, 32), "a crop that can never fit must not empty the bank"


def test_the_bank_holds_copies() -> None:
    bank, sample = InstanceBank(), scene("a", 7, [(1, 1, 3, 2)], label=4, size=(4, 4))
    bank.add(crops_of(sample))
    sample.image[:] = 0
    (crop,) = bank.of_class(4, other_than="")
    assert (crop.image.shape, crop.mask.tolist(), crop.source_size) == ((1, 2, 3), [[True, True]], (4, 4))
    assert (crop.image == 7).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("ratio", (0.0, 1.0)), ("ratio", (0.9, 0.3)), ("rate", 1.5), ("max_cover", 0), ("semantic_aware", -1)],
)
def test_parameters_out_of_range_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"copy_paste.{key}"):
        CopyPaste(**{key: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a bank needs room"):
        InstanceBank(per_class=0)
