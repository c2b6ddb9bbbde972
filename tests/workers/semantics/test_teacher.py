"""A backbone whose tokens are conditioned patch features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.backbone import load_backbone
from workers.conditioning import Conditioning
from workers.images import LoadedImage
from workers.phases import Phases
from workers.semantics.stego import TeacherParams, TeacherWorker, read_features
from workers.semantics.teacher import ConditionedTeacher


def conditioning(channels: int = 384, components: int = 5) -> Conditioning:
    rng = np.random.default_rng(0)
    mean, directions = rng.standard_normal(channels), rng.standard_normal((channels, components))
    return Conditioning(mean.astype(np.float32), directions.astype(np.float32))


def test_its_tokens_are_the_conditioning_of_the_output_that_is_named() -> None:
    backbone, fitted = load_backbone("patch-dct", "random:0"), conditioning()
    teacher = ConditionedTeacher(backbone, "tokens", fitted, device="cpu")
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    found = teacher.tokens(images)
    assert (teacher.patch_size, teacher.dim, found.shape) == (8, 5, (2, 6, 5))
    for photo, rows in zip(found.numpy(), backbone.tokens(images).numpy(), strict=True):
        assert photo == pytest.approx(fitted(rows), abs=1e-5)


def test_stego_takes_its_features_from_it_as_from_a_backbone() -> None:
    teacher = ConditionedTeacher(load_backbone("patch-dct", "random:0"), "tokens", conditioning(), device="cpu")
    worker = TeacherWorker(teacher, TeacherParams(image_size=32), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    feats = read_features(worker.process([LoadedImage("a", pixels)], Phases()).to_pylist()[0])
    assert feats.shape == (1, 5, 4, 4)
    assert np.linalg.norm(feats.astype(np.float32), axis=1) == pytest.approx(1, abs=1e-3)


def test_a_conditioning_of_another_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="fitted to 768 channels, the backbone gives 384: fit it again"):
        ConditionedTeacher(load_backbone("patch-dct", "random:0"), "tokens", conditioning(768), device="cpu")
