"""Levels and pooling, labels and samples of the cascade, DropLoss, detections, and the losses of the boxes."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from rcnn_reference import Reference

from model.panoptic.box_labels import LabelledBoxes, droploss_weights, label_boxes, sample_boxes
from model.panoptic.boxes import BoxCoder
from model.panoptic.detections import detect
from model.panoptic.roi_align import assign_levels, pool_boxes
from model.panoptic.roi_heads import CODE_WEIGHTS, CascadeRoIHeads, box_losses, soft_entropies
from model.panoptic.sampling import even_choice
from model.panoptic.targets import Target


def squares(*sides: float) -> Tensor:
    return torch.tensor([[0, 0, side, side] for side in sides], dtype=torch.float32)


def test_the_side_of_a_box_decides_its_level() -> None:
    levels = assign_levels(squares(0, 1, 111.9, 112, 223.9, 224, 447.9, 448, 5000), finest=2, coarsest=5)
    assert levels.tolist() == [2, 2, 2, 3, 3, 4, 4, 5, 5]


def test_pooling_keeps_the_order_of_the_boxes_over_levels_and_images() -> None:
    features = [
        torch.stack([torch.full((1, n, n), level + 10.0 * i) for i in range(2)]) for level, n in ((2, 128), (3, 64))
    ]
    pooled = pool_boxes(features, [squares(300, 50), squares(60, 310, 20)], 7)
    assert pooled.shape == (5, 1, 7, 7)
    assert pooled[:, 0, 3, 3].tolist() == pytest.approx([3, 2, 12, 13, 12])


def test_a_pooled_ramp_has_the_values_of_its_pixel_centres() -> None:
    """Aligned pooling: feature pixel j covers 4 j .. 4 j + 4 of the image, so position x lies at x / 4 - 0.5."""
    ramp = torch.arange(32.0).expand(1, 1, 32, 32).contiguous()
    pooled = pool_boxes([ramp], [torch.tensor([[8.0, 8, 64, 64]])], 7)
    centres = torch.arange(7) * 8 + 8 + 4
    torch.testing.assert_close(pooled[0, 0, 0], centres / 4 - 0.5)


def truth(boxes: Tensor, classes: list[int]) -> Target:
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return Target(boxes, torch.tensor(classes, dtype=torch.int64), masks, torch.zeros(64, 64, dtype=torch.uint8))


def test_each_stage_asks_for_more_overlap() -> None:
    target, boxes = (
        truth(squares(20), [3]),
        torch.tensor([[0.0, 0, 20, 11], [0, 0, 20, 13], [0, 0, 20, 15], [30, 30, 40, 40]]),
    )
    classes = [label_boxes(boxes, target, iou=iou, num_things=5).classes.tolist() for iou in (0.5, 0.6, 0.7)]
    assert classes == [[3, 3, 3, 5], [5, 3, 3, 5], [5, 5, 3, 5]]
    assert label_boxes(boxes, truth(boxes[:0], []), iou=0.5, num_things=5).classes.tolist() == [5] * 4


def test_an_unsure_object_is_wanted_with_its_probability() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    scores, boxes = torch.tensor([0.7, 1.0, 0.2]), squares(10, 20, 30)
    classes = torch.tensor([0, 1, 2])  # the last is background, whose score means nothing
    unsure = LabelledBoxes(boxes, classes, torch.tensor([0, 1, 0]), boxes, scores)
    sure = LabelledBoxes(boxes, classes, torch.tensor([0, 1, 0]), boxes)
    minus_log = -logits.log_softmax(1)
    wanted = torch.stack([0.7 * minus_log[0, 0] + 0.3 * minus_log[0, 2], minus_log[1, 1], minus_log[2, 2]])
    torch.testing.assert_close(soft_entropies(logits, [unsure]), wanted)
    both = soft_entropies(torch.cat([logits, logits]), [sure, unsure])
    torch.testing.assert_close(both, torch.cat([minus_log[torch.arange(3), classes], wanted]))
    assert unsure[torch.tensor([2, 0])].scores.tolist() == pytest.approx([0.2, 0.7])  # type: ignore[union-attr]


def test_a_box_has_the_score_of_its_object() -> None:
    target = replace(truth(squares(20, 30), [3, 1]), scores=torch.tensor([0.5, 0.9]))
    labelled = label_boxes(squares(30, 20), target, iou=0.5, num_things=5)
    assert labelled.scores is not None and labelled.scores.tolist() == pytest.approx([0.9, 0.5])
    with pytest.raises(ValueError, match=r"Target\.scores must be \(2,\)"):
        replace(target, scores=torch.ones(3))


def test_objects_come_first_and_fill_at_most_their_fraction() -> None:
    labelled = LabelledBoxes(
        torch.arange(32.0).reshape(8, 4), torch.tensor([5, 1, 5, 1, 1, 5, 5, 1]), torch.zeros(8), torch.zeros(8, 4)
    )
    sampled = sample_boxes(labelled, num_things=5, count=6, positive_fraction=0.5, choose=even_choice, generator=None)
    assert sampled.classes.tolist() == [1, 1, 1, 5, 5, 5]
    assert sampled.boxes[:, 0].tolist() == [4, 12, 16, 0, 8, 20]


def test_droploss_forgives_what_lies_far_from_every_label() -> None:
    decoded = torch.tensor([[0.0, 0, 10, 10], [9, 9, 19, 19], [50, 50, 60, 60]])
    assert droploss_weights(decoded, squares(10), 0.01).tolist() == [1, 0, 0], "the second overlaps by 1 of 199 pixels"
    assert droploss_weights(decoded, squares(10), 0.001).tolist() == [1, 1, 0]
    assert droploss_weights(decoded, squares(), 0.01).tolist() == [1, 1, 1], "an image without labels punishes all"


def test_box_losses_by_hand() -> None:
    labelled = LabelledBoxes(squares(10, 10), torch.tensor([1, 2]), torch.tensor([0, 0]), squares(20, 20))
    logits, deltas = torch.zeros(2, 3), torch.zeros(2, 4)
    coder = BoxCoder(CODE_WEIGHTS[0])
    entropy, distance = box_losses(logits, deltas, [labelled], coder)
    assert math.isclose(entropy.item(), math.log(3), rel_tol=1e-6)
    wanted = 10 * 0.5 * 2 + 5 * math.log(2) * 2
    assert math.isclose(distance.item(), wanted / 2, rel_tol=1e-6), "one object, divided by both boxes"
    weighted, _ = box_losses(logits, deltas, [labelled], coder, torch.tensor([1.0, 0.0]))
    assert math.isclose(weighted.item(), math.log(3) / 2, rel_tol=1e-6), "dropped boxes still count in the divisor"


def small_heads(droploss_threshold: float | None = None) -> CascadeRoIHeads:
    torch.manual_seed(0)
    return CascadeRoIHeads(
        4, 5, dim=8, mask_channels=4, sampled=16, choose=even_choice, droploss_threshold=droploss_threshold
    )


def feature_maps(images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(images, 4, n, n, generator=generator, requires_grad=True) for n in (16, 8, 4, 2)]


def test_droploss_changes_only_the_class_losses() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20], [2, 0, 22, 20], [40, 40, 60, 60], [30, 0, 60, 30]])
    targets = [truth(squares(20), [3]), truth(squares(20)[:0], [])]
    plain, dropped = (
        small_heads(threshold).losses(feature_maps(), [(64, 64)] * 2, [boxes, boxes], targets)
        for threshold in (None, 0.01)
    )
    changed = {name for name in plain if not torch.equal(plain[name], dropped[name])}
    assert changed == {"loss_cls_stage0", "loss_cls_stage1", "loss_cls_stage2"}
    # An untrained head predicts boxes near its proposals, so two of nine boxes are forgiven, each costing about log 6.
    assert dropped["loss_cls_stage0"].item() == pytest.approx(plain["loss_cls_stage0"].item() * 7 / 9, rel=0.01)


def test_each_stage_sends_a_third_of_its_gradient_into_the_features() -> None:
    heads, features = small_heads(), feature_maps(1)
    boxes = [torch.tensor([[0.0, 0, 20, 20]])]
    logits, _ = heads.stage(0, features, boxes)
    (through_stage,) = torch.autograd.grad(logits.sum(), features[:1])
    direct, _ = heads.box_predictor[0](heads.box_head[0](pool_boxes(features, boxes, 7)))
    (whole,) = torch.autograd.grad(direct.sum(), features[:1])
    assert whole.abs().sum() > 0
    torch.testing.assert_close(through_stage, whole / 3)


def test_without_objects_the_losses_are_finite_and_reach_every_parameter() -> None:
    heads, none = small_heads(), truth(squares()[:0].reshape(0, 4), [])
    losses = heads.losses(feature_maps(), [(64, 64)] * 2, [squares(20, 30), torch.zeros(0, 4)], [none, none])
    assert [losses[f"loss_box_reg_stage{k}"].item() for k in range(3)] == [0, 0, 0]
    assert losses["loss_mask"] == 0
    sum(losses.values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


def test_detections_suppress_within_a_class_only() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 40, 50], [0, float("nan"), 5, 5]])
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.05, 0.9, 0.05], [0.9, 0.1, 0.0]])
    found = detect(boxes, probs, (30, 30), score_threshold=0.05, nms_threshold=0.5, limit=100)
    assert found.scores.tolist() == pytest.approx([0.9, 0.5, 0.35])
    assert found.classes.tolist() == [1, 0, 1]
    assert found.row.tolist() == [2, 0, 1]
    assert found.boxes[0].tolist() == [20, 20, 30, 30]
    assert len(detect(boxes, probs, (30, 30), score_threshold=0.05, nms_threshold=0.5, limit=2).boxes) == 2
    assert len(detect(boxes, probs, (30, 30), score_threshold=0.95, nms_threshold=0.5, limit=2).boxes) == 0


def test_the_published_box_losses(shared_dir: Path) -> None:
    reference, key = Reference(shared_dir), "unit/box_loss/"
    logits, deltas, boxes = (reference.tensor(name) for name in (f"{key}logits", "unit/deltas", "unit/boxes"))
    for k in range(3):
        classes = reference.tensor(f"{key}stage{k}_gt_classes").long()
        labelled = LabelledBoxes(boxes, classes, torch.zeros_like(classes), reference.tensor(f"{key}stage{k}_gt_boxes"))
        losses = torch.stack(box_losses(logits, deltas, [labelled], BoxCoder(CODE_WEIGHTS[k]))).double()
        torch.testing.assert_close(losses, reference.tensor(f"{key}stage{k}"), rtol=1e-5, atol=0)


def test_a_score_falls_by_the_overlap_with_a_better_box_of_its_class() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6], [20, 20, 30, 30], [0, 0, 10, 9]])
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.7, 0.3]])
    settings = {"score_threshold": 0.05, "nms_threshold": 0.8, "limit": 100, "class_agnostic": True}
    found = detect(boxes, probs, (40, 40), soft_nms=True, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.5, 0.8 * 0.4]))
    assert found.row.tolist() == [0, 2, 1]  # the fourth is above the threshold
    hard = detect(boxes, probs, (40, 40), **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(hard.scores, torch.tensor([0.9, 0.8, 0.5]))
    nothing = detect(boxes, probs, (40, 40), soft_nms=True, **{**settings, "score_threshold": 0.99})  # type: ignore[arg-type]
    assert len(nothing.boxes) == 0


def test_a_score_of_any_class_is_a_probability() -> None:
    """A sum of rounded probabilities may be above 1, and would be refused as a score."""
    logits = torch.cat(
        [torch.randn(300, 80, generator=torch.Generator().manual_seed(0)), torch.full((300, 1), -20.0)], 1
    )
    probs = logits.softmax(1)
    assert (probs[:, :-1].sum(1) > 1).any()
    boxes = torch.arange(300.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    settings = {"score_threshold": 0.5, "nms_threshold": 0.5, "limit": 300, "class_agnostic": True}
    assert detect(boxes, probs, (9000, 9000), **settings).scores.max() <= 1  # type: ignore[arg-type]


def test_boxes_of_other_classes_do_not_lower_a_score() -> None:
    boxes, probs = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8]]), torch.tensor([[0.9, 0, 0.1], [0, 0.8, 0.2]])
    found = detect(boxes, probs, (40, 40), score_threshold=0.05, nms_threshold=0.9, limit=9, soft_nms=True)
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.8]))
