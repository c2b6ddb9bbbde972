"""Linear probes of the tokens: the mean of a box's tokens, and what the network makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.checkpoint.detectron2 import class_counts
from model.panoptic.network import PanopticCascadeRCNN
from model.panoptic.probes import LinearProbe, TokenSums
from model.panoptic.roi_heads import BoxPredictor
from tests.model.panoptic.test_frozen import photo, square
from tests.tiny_panoptic import tiny_vit

STRIDE = 8


def mean_by_pixels(tokens: Tensor, box: list[int]) -> Tensor:
    """Of a map of which every pixel of the frame has the token of its patch."""
    pixels = tokens.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)
    x0, y0, x1, y1 = box
    return pixels[:, y0:y1, x0:x1].mean((1, 2))


@pytest.mark.parametrize("box", [[0, 0, 48, 32], [8, 16, 16, 24], [3, 5, 41, 30], [40, 24, 48, 32], [1, 2, 9, 10]])
def test_the_mean_of_a_box_is_that_of_its_pixels(box: list[int]) -> None:
    tokens = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    found = TokenSums(tokens, stride=STRIDE).means([torch.zeros(0, 4), torch.tensor([box]).float()])
    torch.testing.assert_close(found, mean_by_pixels(tokens[1], box)[None], atol=1e-5, rtol=1e-5)


def test_boxes_of_no_size_or_outside_have_the_nearest_token() -> None:
    tokens = torch.arange(24.0).view(1, 1, 4, 6)
    boxes = torch.tensor([[20.0, 12.0, 20.0, 12.0], [-90.0, -90.0, -80.0, -80.0], [70.0, 70.0, 90.0, 90.0]])
    found = TokenSums(tokens, stride=STRIDE).means([boxes])[:, 0]
    torch.testing.assert_close(found, torch.tensor([8.0, 0.0, 23.0]))


def test_probes_tell_the_class_of_an_object_and_not_whether_there_is_one() -> None:
    assert not LinearProbe(5, 3)(torch.randn(2, 5)).any()
    model = tiny_vit(score_threshold=0.0, linear_probes=True, class_agnostic=True)
    (before,) = model.predict([photo(64, 96)])
    with torch.no_grad():
        for head in model.roi_heads.box_predictor:
            head.probe.bias[0] += 99.0
        assert model.sem_seg_head.probe is not None
        model.sem_seg_head.probe.bias[1] += 99.0
    (after,) = model.predict([photo(64, 96)])
    torch.testing.assert_close(before.scores, after.scores)
    torch.testing.assert_close(before.boxes, after.boxes)
    assert set(before.classes.tolist()) != {0} == set(after.classes.tolist())
    assert set(after.semantic.flatten().tolist()) == {0, 2}


def test_logits_are_of_an_object_times_its_class() -> None:
    predictor = BoxPredictor(6, 3, probed=5)
    assert predictor.probe is not None
    torch.nn.init.normal_(predictor.probe.weight)
    x, tokens = torch.randn(4, 6), torch.randn(4, 5)
    probs = predictor(x, tokens)[0].softmax(1)
    told = predictor.cls_score(x).softmax(1)
    torch.testing.assert_close(probs[:, 3], told[:, 1])
    torch.testing.assert_close(probs[:, :3], told[:, :1] * predictor.probe(tokens).softmax(1))


def test_classes_are_counted_by_the_probes() -> None:
    assert class_counts(tiny_vit(7, 4, linear_probes=True).state_dict()) == (7, 4)
    assert class_counts(tiny_vit(7, 0, linear_probes=True).state_dict()) == (7, 0)


def test_boxes_that_are_not_finite_are_left_out_as_without_probes() -> None:
    model = tiny_vit(score_threshold=0.0, linear_probes=True)
    with torch.no_grad():
        model.roi_heads.box_predictor[0].bbox_pred.bias.fill_(float("nan"))
    (found,) = model.predict([photo(64, 96)])
    assert len(found.scores) == 0


def test_probes_without_tokens_are_an_error_and_no_other_logits() -> None:
    model = tiny_vit(linear_probes=True)
    features = model.features([photo(64, 96)])
    with pytest.raises(ValueError, match="needs the tokens"):
        model.sem_seg_head(features)
    with pytest.raises(ValueError, match="need the tokens"):
        model.roi_heads.detect(features[:-1], [(64, 96)], [torch.tensor([[0.0, 0.0, 9.0, 9.0]])])


def test_without_stuff_all_is_things() -> None:
    (found,) = tiny_vit(3, 0, linear_probes=True).predict([photo(64, 96)])
    assert not found.semantic.any()


@pytest.mark.parametrize("settings", [{}, {"finest_stride": 8, "anchor_sizes": (16, 32, 64, 128)}, {"patch_stride": 8}])
def test_probes_learn_with_the_heads(settings: dict[str, object]) -> None:
    model = tiny_vit(linear_probes=True, **settings).train()
    sum(model([photo(60, 90)], [square(60, 90)]).values()).backward()  # type: ignore[union-attr]
    told = {name: bool(p.grad.any()) for name, p in model.named_parameters() if "probe" in name and p.grad is not None}
    assert len(told) == 8 and all(told.values())


def test_probes_need_a_transformer() -> None:
    with pytest.raises(ValueError, match="linear_probes needs the tokens of a vit"):
        PanopticCascadeRCNN(2, 1, linear_probes=True)
