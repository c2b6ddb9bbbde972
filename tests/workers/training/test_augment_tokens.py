"""A sample and its frozen tokens stay on top of each other, however they are mirrored and cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.training.augment_tokens import augment_tokens
from workers.training.samples import Sample, mask_boxes

STRIDE = 8


def square(height: int, width: int) -> tuple[Sample, Tensor]:
    """A square of whole patches, void elsewhere, a mask of one pixel beside it; and tokens that say where it is."""
    masks = np.zeros((2, height, width), bool)
    masks[0, 16:48, 24:56] = True
    masks[1, 0, 0] = True
    image = np.repeat(masks[0][..., None] * np.uint8(255), 3, axis=2)
    semantic = np.where(masks[0], np.uint8(0), np.uint8(255))
    sample = Sample(
        "a.jpg", image, mask_boxes(masks), np.array([3, 1]), masks, semantic, np.array([0.7, 0.2], np.float32)
    )
    frame = np.zeros([-(-side // 32) * 32 for side in (height, width)], np.float32)
    frame[:height, :width] = masks[0]
    return sample, torch.from_numpy(frame[::STRIDE, ::STRIDE].copy())[None]


def at_patches(mask_hw: NDArray[np.bool_], tokens: Tensor) -> NDArray[np.bool_]:
    """The mask in the middle of each patch of the frame."""
    frame = np.zeros([side * STRIDE for side in tokens.shape[1:]], bool)
    frame[: mask_hw.shape[0], : mask_hw.shape[1]] = mask_hw
    middle = slice(STRIDE // 2, None, STRIDE)
    return frame[middle, middle]


@pytest.mark.parametrize("size", [(64, 96), (60, 90)])
def test_mirrored_tokens_are_those_of_the_mirrored_frame(size: tuple[int, int]) -> None:
    sample, tokens = square(*size)
    mirrored, others = augment_tokens(sample, tokens, np.random.default_rng(0), stride=STRIDE, flip_probability=1)
    assert mirrored.size == (size[0], 96)
    assert torch.equal(others, tokens.flip(2))
    np.testing.assert_array_equal(at_patches(mirrored.masks[0], others), others[0].numpy() > 0)
    np.testing.assert_array_equal(mirrored.boxes[0], [96 - 56, 16, 96 - 24, 48])
    np.testing.assert_array_equal(mirrored.semantic == 0, mirrored.masks[0])


def test_a_part_and_its_tokens_show_the_same_place() -> None:
    sample, tokens = square(128, 160)
    shares, sizes = [], set()
    for seed in range(200):
        part, others = augment_tokens(
            sample, tokens, np.random.default_rng(seed), stride=STRIDE, flip_probability=0.5, crop_probability=1
        )
        assert tuple(others.shape[1:]) == tuple(side // STRIDE for side in part.size)
        assert all(4 * STRIDE <= side <= most for side, most in zip(part.size, (128, 160), strict=True))
        assert part.image.shape[:2] == part.semantic.shape == part.masks.shape[1:] == part.size
        assert len(part.classes) == len(part.masks) == len(part.boxes) <= 1  # the single pixel is too small
        np.testing.assert_array_equal(part.semantic == 0, part.image[..., 0] > 0)
        sizes.add(part.size)
        if len(part.masks):
            np.testing.assert_array_equal(part.boxes, mask_boxes(part.masks))
            assert part.scores is not None
            assert (part.classes.tolist(), part.scores.tolist()) == ([3], [np.float32(0.7)])
            seen = others[0].numpy() > 0.5
            shares.append((at_patches(part.masks[0], others) == seen).mean())
    assert len(sizes) > 15
    assert np.mean(shares) > 0.97  # what is left are patches that the outline cuts
    assert len(shares) > 150


def test_what_is_too_small_to_be_cut_stays_whole_and_nothing_happens_at_probability_0() -> None:
    sample, tokens = square(64, 96)
    for stride, probability in ((STRIDE, 0.0), (24, 1.0)):
        same, others = augment_tokens(
            sample, tokens, np.random.default_rng(1), stride=stride, flip_probability=0, crop_probability=probability
        )
        assert same is sample
        assert others is tokens


def test_the_same_chance_gives_the_same_part_and_as_much_of_it_is_used_always() -> None:
    sample, tokens = square(128, 160)
    one, other = (
        augment_tokens(sample, tokens, np.random.default_rng(7), stride=STRIDE, crop_probability=1) for _ in range(2)
    )
    np.testing.assert_array_equal(one[0].masks, other[0].masks)
    assert torch.equal(one[1], other[1])
    rng = np.random.default_rng(7)
    augment_tokens(sample, tokens, rng, stride=STRIDE, flip_probability=0)
    after = np.random.default_rng(7)
    after.random(6)
    assert rng.random() == after.random()
