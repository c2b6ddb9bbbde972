"""Crops hold the instance alone, undistorted, and embeddings have unit norm whatever the batch."""

from __future__ import annotations

import numpy as np

from model.backbone import load_backbone
from workers.embeddings import FILL, embed_crops, masked_crop


def test_crop_is_tight_square_and_filled_with_the_mean_colour() -> None:
    image = np.full((40, 60, 3), 10, np.uint8)
    image[10:14, 20:36] = 200  # 4 high, 16 wide
    mask = np.zeros((40, 60), bool)
    mask[10:14, 20:36] = True
    crop = masked_crop(image, mask, 16)
    assert crop.shape == (16, 16, 3)
    assert (crop[7:9] == 200).all()  # the object spans the width, in the middle of the height
    assert (crop[:4] == FILL).all()
    assert (crop[-4:] == FILL).all()


def test_pixels_outside_the_mask_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[4:20, 4:20] = np.tri(16, dtype=bool)
    other = np.where(mask[..., None], image, 255 - image)
    assert np.array_equal(masked_crop(image, mask, 24), masked_crop(other, mask, 24))


def test_embeddings_do_not_depend_on_the_batch() -> None:
    backbone = load_backbone("dino_vits16", "random:0")
    crops = list(np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3)).astype(np.uint8))
    together = embed_crops(backbone, crops, batch_size=5, device="cpu")
    singly = embed_crops(backbone, crops, batch_size=1, device="cpu")
    assert together.shape == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(together, singly, atol=1e-5)
    assert embed_crops(backbone, [], batch_size=4, device="cpu").shape == (0, 384)
