"""One training step: schedule, clipping, decay, statistics, what resumes, and what two processes share."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.panoptic.network import PanopticCascadeRCNN
from model.panoptic.targets import Target
from model.ranks import Ranks
from tests.model.panoptic.test_frozen import square
from tests.tiny_panoptic import NETWORK, tiny_vit
from tests.two_processes import in_two_processes
from workers.training.trainer import (
    Batch,
    LossNotFinite,
    Optimisation,
    PanopticTrainer,
    clip_each,
    parameter_groups,
    precise_statistics,
)

SETTINGS = Optimisation(steps=20, batch_size=4)


def tiny_model() -> PanopticCascadeRCNN:
    torch.manual_seed(0)
    return PanopticCascadeRCNN(3, 2, **NETWORK)


def item(number: int) -> tuple[torch.Tensor, Target]:
    """An image of noise with 0, 1 or 2 squares, one of them in another size than the others."""
    generator = torch.Generator().manual_seed(number)
    height, width, count = 64 + 8 * (number % 3), 96, number % 3
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    boxes = [[5 + 20 * k, 8 + 10 * k, 30 + 20 * k, 38 + 10 * k] for k in range(count)]
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    semantic = torch.ones(height, width, dtype=torch.uint8)
    semantic[:5] = 255 if number % 2 else 2
    return image, Target(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.arange(count), masks, semantic)


def batch(step: int, ranks: Ranks) -> Batch:
    rows = ranks.rows(4)
    images, targets = zip(*(item(4 * step + place) for place in range(rows.start, rows.stop)), strict=True)
    return Batch(images, targets, [f"photo-{place}" for place in range(rows.start, rows.stop)], rows.start)


def run(ranks: Ranks, settings: Optimisation, steps: int) -> tuple[PanopticTrainer, list[float]]:
    trainer = PanopticTrainer(tiny_model(), settings, device="cpu", ranks=ranks)
    return trainer, [trainer.advance(batch(step, ranks))["total"] for step in range(steps)]


def test_the_rate_warms_up_and_drops() -> None:
    published = Optimisation()
    assert published.rate_at(0) == pytest.approx(1e-5)
    assert published.rate_at(500) == pytest.approx(0.01 * (0.5 * 0.001 + 0.5))
    assert [published.rate_at(step) for step in (1000, 209_999, 210_000, 250_000)] == pytest.approx(
        [0.01, 0.01, 2e-4, 4e-6]
    )


def test_the_rate_falls_along_half_a_wave() -> None:
    settings = Optimisation(steps=100, rate=0.01, warmup_steps=10, warmup_factor=0.0, schedule="cosine")
    assert [settings.rate_at(step) for step in (0, 50, 100)] == pytest.approx([0.0, 0.005, 0.0])
    assert settings.rate_at(5) == pytest.approx(0.005 * 0.5 * (1 + math.cos(0.05 * math.pi)))


def test_adamw_learns_and_goes_on_bit_for_bit() -> None:
    settings = replace(SETTINGS, warmup_steps=0, rate=1e-3, optimiser="adamw", schedule="cosine")
    unbroken, losses = run(Ranks(), settings, 4)
    assert losses[-1] < losses[0]
    first, _ = run(Ranks(), settings, 2)
    second = PanopticTrainer(tiny_model(), settings, device="cpu", ranks=Ranks())
    second.load_state(first.state())
    for step in (2, 3):
        second.advance(batch(step, Ranks()))
    for name, values in unbroken.model.state_dict().items():
        assert torch.equal(values, second.model.state_dict()[name]), name


def test_each_tensor_is_clipped_by_itself() -> None:
    small, large = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    small.grad, large.grad = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    clip_each([small, large], 1.0)
    torch.testing.assert_close(small.grad, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(large.grad, torch.tensor([0.6, 0.8]))


def test_norms_have_no_decay_and_biases_have() -> None:
    model = tiny_model()
    plain, normed = parameter_groups(model, 5e-5, 10.0)
    assert (plain["weight_decay"], normed["weight_decay"]) == (5e-5, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(".norm." in names[id(parameter)] for parameter in normed["params"])
    assert not any(".norm." in names[id(parameter)] for parameter in plain["params"])
    assert len(plain["params"]) + len(normed["params"]) == len(names)


def test_linear_probes_alone_learn_at_ten_times_the_rate() -> None:
    model = tiny_vit(linear_probes=True)
    probes = {id(p) for name, p in model.named_parameters() if ".probe." in name}
    trainer = PanopticTrainer(model, SETTINGS, device="cpu", ranks=Ranks())
    images = [torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]
    trainer.step = 5
    trainer.advance(Batch(images, [square(64, 96)], ["a"]))
    rates = [(group["lr"], {id(p) for p in group["params"]}) for group in trainer.optimiser.param_groups]
    once = SETTINGS.rate_at(5)
    assert [rate for rate, _ in rates] == pytest.approx([once, once, 10 * once])
    assert rates[2][1] == probes and not probes & (rates[0][1] | rates[1][1])
    assert sum(len(each) for _, each in rates) == len(list(model.parameters()))


def test_a_training_that_goes_on_is_the_same_bit_for_bit() -> None:
    settings = replace(SETTINGS, warmup_steps=2, ema=0.5)
    unbroken, _ = run(Ranks(), settings, 4)
    first, _ = run(Ranks(), settings, 2)
    second = PanopticTrainer(tiny_model(), settings, device="cpu", ranks=Ranks())
    second.load_state(first.state())
    for step in (2, 3):
        second.advance(batch(step, Ranks()))
    for name, values in unbroken.best_model().state_dict().items():
        assert torch.equal(values, second.best_model().state_dict()[name]), name


def test_averaged_weights_lag_behind() -> None:
    trainer, _ = run(Ranks(), replace(SETTINGS, warmup_steps=0, ema=0.9), 2)
    name = "backbone.bottom_up.res2.0.conv1.weight"
    start, now, mean = (m.state_dict()[name] for m in (tiny_model(), trainer.model, trainer.best_model()))
    assert 0 < (mean - start).norm() < (now - start).norm()


def test_a_loss_that_is_not_finite_names_the_images_and_changes_nothing() -> None:
    trainer = PanopticTrainer(tiny_model(), SETTINGS, device="cpu", ranks=Ranks())
    with torch.no_grad():
        trainer.model.sem_seg_head.predictor.bias.fill_(math.nan)
    before = trainer.model.backbone.fpn_lateral2.weight.clone()
    with pytest.raises(LossNotFinite, match=r"step 1: .*loss_sem_seg nan.*photo-0, photo-1, photo-2, photo-3"):
        trainer.advance(batch(0, Ranks()))
    assert torch.equal(trainer.model.backbone.fpn_lateral2.weight, before)


def test_a_loss_beyond_all_measure_is_as_bad() -> None:
    trainer = PanopticTrainer(tiny_model(), SETTINGS, device="cpu", ranks=Ranks())
    with torch.no_grad():
        trainer.model.sem_seg_head.predictor.bias[1] = -1e9  # the class of most pixels
    with pytest.raises(LossNotFinite, match=r"step 1: the loss is \d\.\d+e\+\d+ \(loss_sem_seg.*lower train\.rate"):
        trainer.advance(batch(0, Ranks()))


def test_precise_statistics_are_the_mean_over_the_batches() -> None:
    model, images = tiny_model(), [[item(n)[0] for n in pair] for pair in ((0, 3), (1, 4))]
    norm = model.backbone.bottom_up.stem.conv1.norm
    precise_statistics(model, images, Ranks())
    with torch.no_grad():
        inputs = [torch.nn.Conv2d.forward(_without_norm(model), model.prepare(batch)) for batch in images]
    expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1


def test_precise_statistics_are_as_exact_as_those_of_a_step_on_a_cpu() -> None:
    """With channels last a CPU adds up hundreds of thousands of values one by one in float32."""
    model, image = tiny_model(), torch.randint(0, 256, (3, 480, 640), generator=torch.Generator().manual_seed(0)).byte()
    precise_statistics(model, [[image]], Ranks())
    first = model.backbone.bottom_up.stem.conv1
    inputs = torch.nn.functional.conv2d(model.prepare([image]).double(), first.weight.double(), stride=2, padding=3)
    torch.testing.assert_close(first.norm.running_var.double(), inputs.var((0, 2, 3)), rtol=3e-6, atol=0)


def test_precise_statistics_of_a_photo_of_32_pixels_are_of_the_frame_of_a_step() -> None:
    model = tiny_model()
    precise_statistics(model, [[item(0)[0][:, :32, :32]]], Ranks())
    assert all(values.isfinite().all() for values in model.state_dict().values())


def _without_norm(model: PanopticCascadeRCNN) -> torch.nn.Conv2d:
    conv = torch.nn.Conv2d(3, 8, 7, 2, 3, bias=False)
    conv.weight = model.backbone.bottom_up.stem.conv1.weight
    return conv


def test_bfloat16_learns_too() -> None:
    _, losses = run(Ranks(), replace(SETTINGS, precision="bfloat16", warmup_steps=0), 3)
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "train.steps"), ({"rate": 0.0}, "train.rate"), ({"ema": 1.0}, "train.ema")],
)
def test_settings_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimisation(**options)  # type: ignore[arg-type]


def _train(rank: int) -> dict[str, Any]:
    trainer, losses = run(Ranks(rank, 2), SETTINGS, 20)
    return {"losses": losses, "state": trainer.model.state_dict()}


def test_two_processes_have_the_losses_of_one_on_the_same_batches(tmp_path: Path) -> None:
    first, second = in_two_processes(_train, tmp_path)
    alone, losses = run(Ranks(), SETTINGS, 20)
    assert first["losses"] == second["losses"]
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(losses), rtol=1e-3, atol=0)
    for name, values in alone.model.state_dict().items():
        torch.testing.assert_close(first["state"][name], values, rtol=0, atol=2e-3, msg=name)
        assert torch.equal(first["state"][name], second["state"][name]), name
