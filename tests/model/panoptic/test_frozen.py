"""The network behind a frozen transformer: what its tokens are, the pyramid on them, and losses that learn."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.backbone import load_backbone
from model.panoptic.frozen import FrozenPatches, stack_maps
from model.panoptic.network import PanopticCascadeRCNN, Prediction
from model.panoptic.simple_pyramid import SimplePyramid
from model.panoptic.targets import Target
from tests.tiny_panoptic import tiny_vit

PATCHES = FrozenPatches(load_backbone("patch-dct", "random:0"), stride=16)  # patches of 8 pixels


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def square(height: int, width: int) -> Target:
    masks = torch.zeros(1, height, width, dtype=torch.bool)
    masks[0, 8:40, 8:40] = True
    semantic = torch.ones(height, width, dtype=torch.uint8).masked_fill(masks[0], 0)
    return Target(torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([1]), masks, semantic)


@pytest.mark.parametrize("stride", [8, 16])
def test_a_patch_stands_for_the_stride_whatever_its_own_size(stride: int) -> None:
    maps = FrozenPatches(load_backbone("patch-dct", "random:0"), stride=stride)([photo(64, 96)])
    assert [tuple(m.shape) for m in maps] == [(384, 64 // stride, 96 // stride)]
    vit = FrozenPatches(load_backbone("dinov2_vits14", "random:0"), stride=stride)([photo(32, 32)])
    assert tuple(vit[0].shape) == (384, 32 // stride, 32 // stride)


def test_tokens_are_those_of_the_resized_frame_and_of_no_neighbour() -> None:
    images = [photo(64, 96), photo(40, 70, 1), photo(64, 96, 2)]
    together = PATCHES(images)
    for image, tokens in zip(images, together, strict=True):
        torch.testing.assert_close(PATCHES([image])[0], tokens)
    half = torch.nn.functional.interpolate(images[0][None] / 255, (32, 48), mode="bilinear", antialias=True)
    plain = load_backbone("patch-dct", "random:0").tokens(half)[0]
    torch.testing.assert_close(together[0].flatten(1).T, plain)
    assert tuple(together[1].shape) == (384, 4, 6)  # the frame is 64 x 96


def test_strips_and_single_pixels_have_tokens() -> None:
    assert [tuple(m.shape[1:]) for m in PATCHES([photo(1, 1), photo(3000, 2)])] == [(2, 2), (188, 2)]


def test_maps_are_padded_with_nothing() -> None:
    stacked = stack_maps([torch.ones(2, 2, 3), torch.ones(2, 4, 1, dtype=torch.float16)], (4, 6))
    assert (stacked.shape, stacked.dtype, float(stacked.sum())) == ((2, 2, 4, 6), torch.float32, 20.0)


@pytest.mark.parametrize("stride", [8, 16])
def test_the_pyramid_has_its_strides(stride: int) -> None:
    pyramid = SimplePyramid(24, stride=stride, channels=16)
    maps = pyramid(torch.randn(2, 24, 128 // stride, 64 // stride))
    assert pyramid.strides == [4, 8, 16, 32, 64]
    assert [tuple(m.shape) for m in maps] == [(2, 16, 128 // s, 64 // s) for s in pyramid.strides]
    with pytest.raises(ValueError, match="patch_stride must be one of"):
        SimplePyramid(24, stride=32)


def test_a_pixel_of_the_pyramid_does_not_know_what_is_padded_far_away() -> None:
    pyramid, tokens = SimplePyramid(24, stride=16, channels=16).eval(), torch.randn(1, 24, 16, 8)
    padded = pyramid(torch.nn.functional.pad(tokens, (0, 0, 0, 16)))
    for alone, beside in zip(pyramid(tokens), padded, strict=True):
        torch.testing.assert_close(alone[:, :, 0], beside[:, :, 0])


def test_nothing_of_the_transformer_is_trained_saved_or_copied() -> None:
    model = tiny_vit()
    assert not [name for name, _ in model.named_parameters() if "frozen" in name]
    assert {name.split(".")[0] for name in model.state_dict()} == {
        *("backbone", "proposal_generator", "roi_heads", "sem_seg_head")
    }
    assert copy.deepcopy(model).frozen is model.frozen


def test_known_tokens_give_the_losses_of_the_photo() -> None:
    model, images = tiny_vit(), [photo(64, 96), photo(80, 72, 1)]
    targets = [square(64, 96), square(80, 72)]
    assert model.frozen is not None

    def losses(tokens: list[Tensor] | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return model(images, targets, tokens=tokens)

    plain, known = losses(None), losses(model.frozen(images))
    assert len(plain) == 10
    for name, value in plain.items():
        torch.testing.assert_close(value, known[name], msg=name)


def test_all_parameters_have_a_gradient_from_one_photo() -> None:
    model = tiny_vit().train()
    sum(model([photo(64, 96)], [square(64, 96)]).values()).backward()  # type: ignore[union-attr]
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_a_photo_alone_and_in_a_batch_is_seen_alike() -> None:
    model = tiny_vit()
    images = [photo(64, 96), photo(64, 90, 1)]
    batch = model.predict(images)
    stuff = model.sem_seg_head(model.features(images))
    for image, found, logits in zip(images, batch, stuff, strict=True):
        (alone,) = model.predict([image])
        (seen,) = model.sem_seg_head(model.features([image]))
        torch.testing.assert_close(seen, logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.boxes, found.boxes, rtol=1e-3, atol=1e-2)
        # a product of another size sums in another order: a pixel between two classes may go the other way
        assert (alone.semantic == found.semantic).float().mean() > 0.99
        assert len(found.scores)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (200, 2), (2, 200)])
def test_single_pixels_and_strips_are_seen_and_learnt(height: int, width: int) -> None:
    model = tiny_vit(semantic_channels=64)
    (found,) = model.predict([photo(height, width)], output_sizes=[(5, 5)])
    assert found.semantic.shape == (5, 5)
    nothing = torch.zeros(0, height, width, dtype=torch.bool)
    ignored = torch.full((height, width), 255, dtype=torch.uint8)
    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), nothing, ignored)
    losses = model.train()([photo(height, width)], [target])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == losses["loss_sem_seg"] == 0


def test_one_class_is_enough() -> None:
    target = square(64, 96)
    alone = Target(target.boxes, torch.zeros(1, dtype=torch.int64), target.masks, torch.zeros_like(target.semantic))
    model = tiny_vit(1, 0)
    assert all(loss.isfinite() for loss in model.train()([photo(64, 96)], [alone]).values())
    assert set(model.eval().predict([photo(64, 96)])[0].classes.tolist()) <= {0}


def test_one_detection_a_box_when_classes_are_ignored() -> None:
    def found(agnostic: bool) -> Prediction:
        return tiny_vit(class_agnostic=agnostic, score_threshold=0.0, nms_threshold=0.7).predict([photo(64, 96)])[0]

    apart, alone = found(False), found(True)
    assert alone.scores[0] > apart.scores[0]  # the probability of any class is that of all together
    overlaps = (alone.boxes[:, None] == alone.boxes[None]).all(2).sum(1)
    assert (overlaps == 1).all()


def test_a_transformer_must_be_given_and_given_to_what_wants_it() -> None:
    with pytest.raises(ValueError, match="'vit' needs a frozen transformer"):
        PanopticCascadeRCNN(2, 1, backbone="vit")
    with pytest.raises(ValueError, match="'resnet50' needs no frozen transformer"):
        PanopticCascadeRCNN(2, 1, frozen=load_backbone("patch-dct", "random:0"))


def test_a_target_of_another_size_is_refused_here_too() -> None:
    with pytest.raises(ValueError, match="pixels, its image"):
        tiny_vit()([photo(64, 96)], [replace(square(64, 90))])
