"""The network behind a frozen transformer: what its tokens are, the pyramid on them, and losses that learn."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backbone import load_backbone
from model.panoptic.frozen import FrozenPatches, stack_maps
from model.panoptic.mask_head import mask_certainty
from model.panoptic.network import NetworkSettings, PanopticCascadeRCNN, Prediction
from model.panoptic.roi_align import pool_boxes
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
@pytest.mark.parametrize(("finest", "strides"), [(2, [4, 8, 16, 32, 64]), (3, [8, 16, 32, 64])])
def test_the_pyramid_has_its_strides(stride: int, finest: int, strides: list[int]) -> None:
    pyramid = SimplePyramid(24, stride=stride, channels=16, finest=finest)
    maps = pyramid(torch.randn(2, 24, 128 // stride, 64 // stride))
    assert pyramid.strides == strides
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


@pytest.mark.parametrize("pyramid", [{}, {"finest_stride": 8, "anchor_sizes": (16, 32, 64, 128)}])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (200, 2), (2, 200)])
def test_single_pixels_and_strips_are_seen_and_learnt(height: int, width: int, pyramid: dict[str, Any]) -> None:
    model = tiny_vit(semantic_channels=64, **pyramid)
    (found,) = model.predict([photo(height, width)], output_sizes=[(5, 5)])
    assert found.semantic.shape == (5, 5)
    nothing = torch.zeros(0, height, width, dtype=torch.bool)
    ignored = torch.full((height, width), 255, dtype=torch.uint8)
    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), nothing, ignored)
    losses = model.train()([photo(height, width)], [target])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == losses["loss_sem_seg"] == 0


def test_a_box_has_one_mask_whatever_its_class_and_a_score_that_knows_how_sure_it_is() -> None:
    settings = {"class_agnostic": True, "score_threshold": 0.0}
    model = tiny_vit(**settings, class_agnostic_masks=True, mask_scores=True)
    assert model.roi_heads.mask_head.predictor.weight.shape[0] == 1
    (found,) = model.predict([photo(64, 96)])
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    model.mask_scores = False
    (plain,) = model.predict([photo(64, 96)])
    assert (found.scores < plain.scores).all()  # both from the surest on, and no pixel is quite sure
    sum(model.train()([photo(64, 96)], [square(64, 96)]).values()).backward()  # type: ignore[union-attr]
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_masks_get_the_outlines_of_the_photo_when_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each from its own image and tokens, in that image's pixels, at the size of the output; nothing else changes."""
    model, outlined = tiny_vit(score_threshold=0.0), tiny_vit(score_threshold=0.0, photo_outlines=True)
    outlined.load_state_dict(model.state_dict())
    images, sizes = [photo(64, 96), photo(40, 96, 1)], [(128, 192), (40, 96)]
    told: list[tuple[Tensor, ...]] = []

    def outlined_masks(
        probs: Tensor, boxes: Tensor, image: Tensor, tokens: Tensor, *, stride: int, output: tuple[int, int]
    ) -> Tensor:
        told.append((boxes, image, tokens))
        assert stride == outlined.frozen.stride and probs.shape[1:] == (28, 28)  # type: ignore[union-attr]
        return torch.ones(len(boxes), *output, dtype=torch.bool)

    monkeypatch.setattr("model.panoptic.network.outlined_masks", outlined_masks)
    plain, fine = (each.predict(images, output_sizes=sizes) for each in (model, outlined))
    assert len(told) == 2 and len(plain[0].scores)
    frames = [model.frozen([image])[0] for image in images]  # type: ignore[misc]
    for before, after, image, frame, scale, seen in zip(plain, fine, images, frames, (2, 1), told, strict=True):
        assert torch.equal(before.boxes, after.boxes) and torch.equal(before.scores, after.scores)
        torch.testing.assert_close(seen[0] * scale, before.boxes)
        assert torch.equal(seen[1], image)
        torch.testing.assert_close(seen[2], frame)
        assert after.masks.all() and after.masks.shape == before.masks.shape
    with pytest.raises(ValueError, match="photo_outlines needs the tokens of a vit"):
        PanopticCascadeRCNN(2, 1, photo_outlines=True)


def test_how_sure_a_mask_is_is_the_mean_of_what_is_inside() -> None:
    probs = torch.tensor([[[0.9, 0.7], [0.1, 0.4]], [[0.1, 0.2], [0.3, 0.4]]])
    torch.testing.assert_close(mask_certainty(probs), torch.tensor([0.8, 0.0]))


def test_a_pyramid_without_its_finest_map_learns_and_sees_at_the_size_of_the_photo() -> None:
    model = tiny_vit(finest_stride=8, anchor_sizes=(16, 32, 64, 128), score_threshold=0.0)
    losses = model.train()([photo(64, 96)], [square(64, 96)])
    assert len(losses) == 10
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not [name for name in model.state_dict() if name.startswith(("backbone.output2", "sem_seg_head.p2"))]
    (found,) = model.eval().predict([photo(60, 90)])
    assert (found.semantic.shape, found.masks.shape[1:]) == ((60, 90), (60, 90))
    assert found.boxes[:, 2].max() > 60


def test_boxes_are_pooled_where_they_lie_whatever_the_finest_map() -> None:
    """A bright square of tokens: what is pooled from its box is bright, from beside it is not."""
    heads = tiny_vit(finest_stride=8, anchor_sizes=(16, 32, 64, 128)).roi_heads
    levels = [torch.zeros(1, 1, 128 // s, 128 // s) for s in (8, 16, 32)]
    for level, s in zip(levels, (8, 16, 32), strict=True):
        level[..., : 64 // s, : 64 // s] = 1
    boxes = torch.tensor([[0.0, 0, 64, 64], [64, 64, 128, 128]])
    pooled = pool_boxes(levels, [boxes], 7, finest=heads.finest).mean((1, 2, 3))
    assert pooled[0] > 0.9
    assert pooled[1] < 0.1


@pytest.mark.parametrize(("backbone", "finest", "allowed"), [("vit", 16, "4, 8"), ("resnet50", 8, "4")])
def test_a_pyramid_that_there_is_not(backbone: str, finest: int, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"finest_stride must be one of \[{allowed}\] for {backbone}, got {finest}"):
        NetworkSettings(backbone=backbone, finest_stride=finest).finest  # type: ignore[arg-type]  # noqa: B018


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
