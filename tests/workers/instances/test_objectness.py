"""The score of MaskCut's masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.backbone import load_backbone
from workers.decode import resize_square
from workers.embeddings import to_images
from workers.instances import objectness as module
from workers.maskcut import maskcut

GRID = 20
AXES = torch.eye(4)


def scene(*masks: np.ndarray) -> torch.Tensor:
    """(N, 4) features: a background, and another direction in each mask."""
    features_NC = AXES[0].repeat(GRID * GRID, 1)
    for number, mask in enumerate(masks, start=1):
        features_NC[torch.from_numpy(mask.ravel())] = AXES[number]
    return features_NC


def box(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((GRID, GRID), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def objectness(features_NC: torch.Tensor, masks_mhw: np.ndarray) -> np.ndarray:
    """Of one photo."""
    scores: np.ndarray = module.objectness(features_NC[None], torch.from_numpy(masks_mhw.copy())[None])[0].numpy()
    return scores


def test_photos_of_a_batch_are_scored_as_alone() -> None:
    masks = np.stack([box(6, 6, 6, 6), box(0, 6, 6, 6)])
    features = torch.stack([scene(masks[0]), scene(masks[1])])
    together = module.objectness(features, torch.from_numpy(np.stack([masks, masks[::-1]])))
    for found, alone in zip(
        together, [objectness(features[0], masks), objectness(features[1], masks[::-1])], strict=True
    ):
        np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_an_object_in_the_middle_is_surer_than_one_that_is_cut_off_or_half_of_the_photo() -> None:
    middle, cut_off, half = box(6, 6, 6, 6), box(0, 6, 6, 6), box(0, 0, GRID, GRID // 2)
    sure = objectness(scene(middle), middle[None])[0]
    cut = objectness(scene(cut_off), cut_off[None])[0]
    halved = objectness(scene(half), half[None])[0]
    assert sure == pytest.approx(1 / 1.3)  # contrast and unlikeness 1, nothing cut off
    assert sure > cut > halved


def test_a_mask_that_does_not_follow_what_is_there_is_worth_less() -> None:
    thing = box(6, 6, 6, 6)
    scores = objectness(scene(thing), np.stack([thing, box(6, 9, 6, 6), box(13, 13, 4, 4)]))
    assert scores[0] > scores[1] > scores[2] == pytest.approx(0, abs=1e-6)


def test_none_the_whole_and_empty_masks() -> None:
    assert objectness(scene(), np.zeros((0, GRID, GRID), bool)).shape == (0,)
    both = objectness(scene(), np.stack([np.zeros((GRID, GRID), bool), np.ones((GRID, GRID), bool)]))
    assert both.tolist() == [0, 0] and both.dtype == np.float32


def picture(kind: str) -> np.ndarray:
    y, x = np.mgrid[:160, :160]
    grey = {
        "gradient": x * 255 / 159,
        "halves": np.where(x < 80, 40, 210),
        "noise": np.random.default_rng(0).integers(0, 256, (160, 160)),
        "blobs": np.where(np.hypot(x % 80 - 40, y % 80 - 40) < 24, 210, 40),
    }[kind]
    return np.repeat(grey[..., None], 3, 2).astype(np.uint8)


@pytest.mark.parametrize("kind", ["gradient", "halves", "noise"])
def test_pictures_without_an_object_score_far_below_one_with_objects(kind: str) -> None:
    backbone = load_backbone("patch-dct", "random:0")

    def best(kind: str) -> float:
        tokens = backbone.tokens(to_images(resize_square(picture(kind), 160)[None], "cpu"))
        (cut,) = maskcut(tokens, (20, 20), tau=0.4, max_masks=3)
        return float(objectness(tokens[0], cut.masks).max())

    assert best(kind) < 0.5 * best("blobs")
    assert best("blobs") > 0.7
