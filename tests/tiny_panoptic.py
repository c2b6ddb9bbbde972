"""A panoptic model so small that a test can run it, with seeded weights that see something in any photo."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from model.backbone import load_backbone
from model.panoptic.frozen import FrozenPatches
from model.panoptic.network import PanopticCascadeRCNN
from workers.training.trainer import PanopticTrainer

THINGS, STUFF = 3, 2
KEYWORDS: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "width": 8,
    "channels": 32,
    "box_dim": 32,
    "mask_channels": 16,
    "semantic_channels": 32,
    "detections_per_image": 20,
    "combine_stuff_area": 16,
}
# For the trainings: keywords that a config's `train.network` knows too.
NETWORK: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "width": 8,
    "channels": 16,
    "box_dim": 32,
    "mask_channels": 16,
    "semantic_channels": 32,
    "rpn_pre_nms": [200, 100],
    "rpn_post_nms": [100, 50],
    "roi_sampled": 64,
}
# Of classes, so that some instances are sure; of boxes, so that they stay near their anchors.
GAINS = {"cls_score": 0.6, "bbox_pred": 0.3, "anchor_deltas": 0.3}


def tiny_model(num_things: int = THINGS, num_stuff: int = STUFF, **keywords: Any) -> PanopticCascadeRCNN:
    """In evaluation mode."""
    model = PanopticCascadeRCNN(num_things, num_stuff, **{**KEYWORDS, **keywords})
    seed_weights(model)
    return model.eval()


def tiny_vit(num_things: int = THINGS, num_stuff: int = STUFF, **keywords: Any) -> PanopticCascadeRCNN:
    """The same behind `patch-dct`, which needs no weights, in place of a transformer."""
    return tiny_model(num_things, num_stuff, backbone="vit", frozen=load_backbone("patch-dct", "random:0"), **keywords)


@torch.no_grad()
def seed_weights(model: nn.Module) -> None:
    """Weights that depend on their names alone, of units whose inputs cancel, so that features vary over a photo."""
    for name, values in model.named_parameters():
        if values.ndim > 1:
            random = np.random.default_rng(zlib.crc32(re.sub(r"box_(head|predictor)\.\d", r"box_\1", name).encode()))
            drawn = random.standard_normal(values.shape)
            drawn -= drawn.mean(axis=tuple(range(1, values.ndim)), keepdims=True)
            drawn *= (2 / drawn[0].size) ** 0.5 * next((g for part, g in GAINS.items() if part in name), 1)
            values.copy_(torch.from_numpy(drawn))


def scene(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, 3): a few bright rectangles on grey."""
    random = np.random.default_rng(seed)
    photo = np.full((height, width, 3), 90, np.uint8)
    for _ in range(4):
        top, left = int(random.integers(0, height // 2 + 1)), int(random.integers(0, width // 2 + 1))
        photo[top : top + height // 3, left : left + width // 3] = random.integers(0, 256, 3)
    return photo


def count_passes(patch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward pass of a frozen transformer has from here on."""
    passes: list[int] = []
    forward = FrozenPatches.__call__

    def counts(self: FrozenPatches, images: Any) -> Any:
        passes.append(len(images))
        return forward(self, images)

    patch.setattr(FrozenPatches, "__call__", counts)
    return passes


@contextlib.contextmanager
def stopped_at_step(step: int) -> Iterator[None]:
    """Trainings of the block are interrupted before this step, and with them the block."""
    advance = PanopticTrainer.advance

    def stops(self: PanopticTrainer, batch: Any) -> dict[str, float]:
        if self.step == step:
            raise KeyboardInterrupt
        return advance(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PanopticTrainer, "advance", stops)
        yield
