"""The assembled model, small: batches and images of every kind, precision, and what chance may decide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.panoptic.network import PanopticCascadeRCNN, image_sizes
from model.panoptic.targets import Target

NUM_THINGS, NUM_STUFF = 4, 3
LOSSES = {"loss_sem_seg", "loss_rpn_cls", "loss_rpn_loc", "loss_mask"} | {
    f"loss_{kind}_stage{k}" for kind in ("cls", "box_reg") for k in range(3)
}


def small_model(**settings: object) -> PanopticCascadeRCNN:
    torch.manual_seed(0)
    return PanopticCascadeRCNN(
        NUM_THINGS,
        NUM_STUFF,
        depths=(1, 1, 1, 1),
        width=4,
        channels=8,
        box_dim=8,
        mask_channels=8,
        semantic_channels=64,
        rpn_sampled=32,
        roi_sampled=24,
        **settings,  # type: ignore[arg-type]
    )


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def truth(height: int, width: int, boxes: list[list[int]]) -> Target:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    semantic = torch.ones(height, width, dtype=torch.uint8)
    semantic[: height // 2] = 3
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    semantic[masks.any(0)] = 0
    classes = torch.arange(len(boxes)) % NUM_THINGS
    return Target(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), classes, masks, semantic)


IMAGES = [photo(70, 96), photo(90, 60, seed=1)]
TARGETS = [truth(70, 96, [[5, 5, 45, 50], [50, 10, 90, 60]]), truth(90, 60, [[10, 20, 50, 80]])]


def losses_of(model: PanopticCascadeRCNN, targets: list[Target], seed: int = 0) -> dict[str, Tensor]:
    return model(IMAGES, targets, generators=[torch.Generator().manual_seed(seed + i) for i in range(2)])


def check_gradients(model: PanopticCascadeRCNN, losses: dict[str, Tensor]) -> None:
    """Finite losses, and a gradient for every parameter, as distributed training needs."""
    assert set(losses) == LOSSES
    assert all(value.isfinite() and value.shape == () for value in losses.values())
    sum(losses.values(), torch.zeros(())).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_ten_losses_with_gradients_for_every_parameter() -> None:
    model = small_model()
    losses = losses_of(model, TARGETS)
    check_gradients(model, losses)
    assert all(value > 0 for value in losses.values())


@pytest.mark.parametrize("without", [(0,), (0, 1)])
def test_images_without_instances(without: tuple[int, ...]) -> None:
    targets = [truth(*t.semantic.shape, []) if i in without else t for i, t in enumerate(TARGETS)]
    model = small_model(droploss_threshold=0.01)
    losses = losses_of(model, targets)
    check_gradients(model, losses)
    assert (losses["loss_mask"] == 0) == (len(without) == 2)


def test_a_batch_whose_semantic_pixels_are_all_ignored() -> None:
    model = small_model()
    losses = losses_of(model, [replace(t, semantic=torch.full_like(t.semantic, 255)) for t in TARGETS])
    check_gradients(model, losses)
    assert losses["loss_sem_seg"] == 0


def test_one_tiny_image_can_be_trained_on() -> None:
    model = small_model()
    check_gradients(model, model([photo(1, 1)], [truth(1, 1, [[0, 0, 1, 1]])]))


def test_the_generators_alone_decide_what_is_sampled() -> None:
    results = []
    for global_seed, seed in ((1, 0), (2, 0), (3, 5)):
        model = small_model()
        torch.manual_seed(global_seed)
        results.append(torch.stack(list(losses_of(model, TARGETS, seed).values())))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = small_model()
    whole = losses_of(model, TARGETS)
    with torch.autocast("cpu", dtype):
        halves = losses_of(model, TARGETS)
        (prediction,) = model.eval().predict(IMAGES[:1])
    assert {value.dtype for value in halves.values()} == {torch.float32}
    assert prediction.boxes.dtype == prediction.scores.dtype == torch.float32
    # Proposals, and with them the other losses, jump where rounding changes which boxes are suppressed.
    for name in ("loss_sem_seg", "loss_rpn_cls", "loss_rpn_loc"):
        assert halves[name].item() == pytest.approx(whole[name].item(), rel=0.1, abs=0.05)
    check_gradients(model, halves)


def test_losses_do_not_depend_on_where_the_target_was_padded_and_semantic_weight_scales() -> None:
    plain, heavier = (losses_of(small_model(semantic_weight=w), TARGETS) for w in (0.5, 1.5))
    assert heavier["loss_sem_seg"].item() == pytest.approx(3 * plain["loss_sem_seg"].item(), rel=1e-6)
    assert all(torch.equal(plain[n], heavier[n]) for n in LOSSES - {"loss_sem_seg"})


def eager_model() -> PanopticCascadeRCNN:
    """It reports whatever it sees: an untrained model is sure of nothing."""
    return small_model(score_threshold=0.0, combine_confidence=0.0, combine_stuff_area=1).eval()


@pytest.mark.parametrize("size", [(1, 1), (31, 65), (600, 8), (5000, 30)])
def test_predictions_at_any_size(size: tuple[int, int]) -> None:
    (prediction,) = eager_model().predict([photo(*size)])
    n = len(prediction.boxes)
    assert prediction.masks.shape == (n, *size) and prediction.semantic.shape == size
    assert prediction.scores.shape == prediction.classes.shape == (n,)
    ids, segments = prediction.panoptic()
    assert ids.shape == size and sum(s.area for s in segments) == int((ids > 0).sum())


def test_predictions_of_a_batch_at_other_sizes() -> None:
    outputs = [(35, 48), (180, 120)]
    predictions = eager_model().predict(IMAGES, output_sizes=outputs)
    for (height, width), prediction in zip(outputs, predictions, strict=True):
        assert prediction.masks.shape[1:] == prediction.semantic.shape == (height, width)
        assert prediction.masks.dtype == torch.bool and prediction.semantic.dtype == torch.uint8
        assert 0 < len(prediction.boxes) <= 100
        assert (prediction.boxes >= 0).all() and (prediction.boxes[:, 2] <= width).all()
        assert (prediction.scores.diff() <= 0).all()
        assert {s.category for s in prediction.panoptic().segments} <= set(range(1, NUM_THINGS + NUM_STUFF + 1))


def test_a_prediction_without_instances() -> None:
    (prediction,) = small_model(score_threshold=1.0, combine_stuff_area=1).eval().predict(IMAGES[:1])
    assert prediction.boxes.shape == (0, 4) and prediction.masks.shape == (0, 70, 96)
    assert not any(s.is_thing for s in prediction.panoptic().segments)


def test_folded_batch_norms_predict_what_the_plain_ones_do() -> None:
    model = small_model().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    batch = model.prepare(IMAGES)
    plain = model.backbone(batch)
    with torch.no_grad():
        folded = model.backbone(batch)
    for a, b in zip(plain, folded, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_images_are_normalised_then_padded_with_zeros() -> None:
    batch = small_model().prepare([torch.full((3, 33, 20), 255.0), photo(10, 40)])
    assert batch.shape == (2, 3, 64, 64)
    torch.testing.assert_close(batch[0, :, 32, 19], torch.tensor([2.2489, 2.4286, 2.64]), atol=1e-4, rtol=0)
    assert not batch[0, :, 33:].any() and not batch[0, :, :, 20:].any()


def test_constants_are_not_part_of_a_checkpoint() -> None:
    assert not [name for name in small_model().state_dict() if "pixel" in name or "anchors" in name]


def test_a_model_in_training_does_not_predict() -> None:
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        small_model().predict(IMAGES)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        ([torch.zeros(1, 5, 5)], r"images\[0\].*\(1, 5, 5\)"),
        ([torch.zeros(3, 0, 5)], "0, 5"),
    ],
)
def test_images_that_are_none(images: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_sizes(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": torch.tensor([0, NUM_THINGS])}, r"targets\[0\] has classes outside 0\.\.3"),
        ({"semantic": torch.full((70, 96), 4, dtype=torch.uint8)}, r"semantic ids outside 0\.\.3 and 255"),
        ({"boxes": torch.tensor([[5.0, 5, 45, 50], [5, 5, 5, 50]])}, "empty boxes"),
    ],
)
def test_targets_that_the_model_cannot_learn(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses_of(small_model(), [replace(TARGETS[0], **change), TARGETS[1]])


def test_targets_of_other_images() -> None:
    with pytest.raises(ValueError, match=r"targets\[0\] is \(90, 60\) pixels, its image \(70, 96\)"):
        losses_of(small_model(), TARGETS[::-1])
    with pytest.raises(ValueError, match="2 images, but 1 targets"):
        losses_of(small_model(), TARGETS[:1])


def test_a_target_must_fit_itself() -> None:
    with pytest.raises(ValueError, match=r"Target\.masks must be \(2, 70, 96\).*bool"):
        replace(TARGETS[0], masks=TARGETS[0].masks.float())


@pytest.mark.parametrize(
    ("things", "stuff", "settings", "message"),
    [
        (0, 27, {}, "num_things >= 1"),
        (3, 255, {}, r"num_stuff in 0\.\.254"),
        (3, 3, {"anchor_sizes": (32,)}, "5 strides, but 1 sizes"),
        (3, 3, {"roi_ious": (0.5,)}, "3 thresholds"),
    ],
)
def test_settings_that_make_no_model(things: int, stuff: int, settings: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        PanopticCascadeRCNN(things, stuff, **settings)  # type: ignore[arg-type]
