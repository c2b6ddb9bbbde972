"""One step of the panoptic model's training: U2Seg's optimiser and schedule (u2seg_R50_{300,800}.yaml).

Everything random in a step comes from its seed, its number and the place of an image in the batch, and all divisors of
the loss are those of the whole batch. So the weights depend neither on the number of processes, but for rounding, nor
on where a training was interrupted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.panoptic.network import PanopticCascadeRCNN
from model.panoptic.probes import LinearProbe
from model.panoptic.targets import Target
from model.ranks import Ranks
from model.shared_norm import share_statistics
from workers.training.teacher import TeacherParams, taught

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)
LARGEST_LOSS = 1e6  # a training begins near 10, and never comes back from here


class LossNotFinite(ValueError):
    """The loss of a batch is NaN, infinite or above LARGEST_LOSS; the message names the step and the images."""


@dataclass(frozen=True, slots=True)
class Optimisation:
    """What decides the weights, besides the images and the first weights. ValueError for values out of range.

    `steps` in all; `rate` is multiplied by `drop_factor` from each step of `drops` on, and rises linearly from
    `warmup_factor` of it during the first `warmup_steps`; with the schedule `cosine` it falls along half a wave
    instead, to 0 at the end. AdamW (arXiv 1711.05101) has no use for `momentum`. `clip` bounds the L2 norm of each
    tensor's gradient by itself. `ema` is the decay of averaged weights, or None; the averaged model can be a `teacher`.
    `precision` is that of the forward pass.
    """

    steps: int = 270_000
    batch_size: int = 16
    rate: float = 0.01
    momentum: float = 0.9
    probe_rate: float = 10.0  # by which the rate of linear probes is multiplied: measured with AdamW, docs/student.md
    weight_decay: float = 5e-5  # of all but norms, biases included
    clip: float = 1.0
    warmup_steps: int = 1000
    warmup_factor: float = 0.001
    drops: tuple[int, ...] = (210_000, 250_000)
    drop_factor: float = 0.02
    ema: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    optimiser: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["drops", "cosine"] = "drops"
    teacher: TeacherParams | None = None

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch_size": 1, "warmup_steps": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"train.{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("rate", "probe_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be above 0, got {getattr(self, name)}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"train.ema must be between 0 and 1, got {self.ema}")
        if self.teacher is not None and self.ema is None:
            raise ValueError("a teacher is the averaged model: set train.ema, or leave out train.teacher")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        factor = self.warmup_factor * (1 - warm) + warm
        if self.schedule == "cosine":
            return self.rate * factor * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * factor * self.drop_factor ** sum(step >= drop for drop in self.drops)

    def optimiser_of(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(model, self.weight_decay, self.probe_rate)
        if self.optimiser == "adamw":
            return torch.optim.AdamW(groups, lr=self.rate, fused=True)
        return torch.optim.SGD(groups, lr=self.rate, momentum=self.momentum)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one process sees of a step: `images` (3, h, w) uint8 RGB, their targets, their ids, `first`, the place of
    the first of them in the whole batch, and the frozen tokens of each (D, h', w'), where they are known."""

    images: Sequence[Tensor]
    targets: Sequence[Target]
    image_ids: Sequence[str]
    first: int = 0
    tokens: Sequence[Tensor] | None = None


class PanopticTrainer:
    """A model and its optimiser after `step` steps; `averaged` holds the mean weights, if they are kept."""

    def __init__(
        self, model: PanopticCascadeRCNN, settings: Optimisation, *, device: str | torch.device, ranks: Ranks
    ) -> None:
        self.settings, self.device, self.ranks = settings, torch.device(device), ranks
        if ranks.size > 1:
            share_statistics(model, self.device)
        if self.device.type == "cuda":  # on a CPU the statistics of channels-last maps are summed less exactly
            model.to(memory_format=torch.channels_last)
        self.model = model.to(self.device).train()
        self.step = 0
        self.optimiser = settings.optimiser_of(model)
        self._faster = [group["faster"] for group in self.optimiser.param_groups]  # not in states of earlier versions
        self.averaged = (
            None
            if settings.ema is None
            else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        )
        self._forward: nn.Module = model
        if ranks.size > 1:
            self._forward = nn.parallel.DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def advance(self, batch: Batch) -> dict[str, float]:
        """One step on this process's share of the batch. Returns the loss terms of the whole batch and `total`, and
        `taught`, how many instances of a photo are a teacher's, if there is one.

        LossNotFinite, before the weights change, when the loss of the batch is NaN, infinite or above LARGEST_LOSS.
        """
        for group, faster in zip(self.optimiser.param_groups, self._faster, strict=True):
            group["lr"] = self.settings.rate_at(self.step) * faster
        batch, count = self._taught(self._on_device(batch))
        losses = self._losses(batch)
        total = torch.stack(list(losses.values())).sum()
        terms = {**losses, "total": total}
        if self.settings.teacher is not None:
            terms["taught"] = total.new_tensor(count)
        means = self.ranks.sum(torch.stack([*terms.values()]).detach().double()) / self.ranks.size
        values = dict(zip(terms, means.tolist(), strict=True))
        if not _is_sound(values["total"]):
            raise LossNotFinite(self._what_is_wrong(values, batch, own=float(total.detach())))
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        clip_each(self.model.parameters(), self.settings.clip)
        self.optimiser.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.step += 1
        return values

    def best_model(self) -> PanopticCascadeRCNN:
        """The model that a training is for: the averaged one if there is one."""
        model = self.model if self.averaged is None else self.averaged.module
        assert isinstance(model, PanopticCascadeRCNN)
        return model

    def state(self) -> dict[str, Any]:
        """All that the next step needs, as tensors and plain containers."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.step = state["step"]

    def _on_device(self, batch: Batch) -> Batch:
        def moved(images: Sequence[Tensor]) -> list[Tensor]:
            return [image.to(self.device, non_blocking=True) for image in images]

        return replace(batch, images=moved(batch.images), tokens=batch.tokens and moved(batch.tokens))

    def _taught(self, batch: Batch) -> tuple[Batch, float]:
        """The batch with the teacher's instances among its targets, and how many these are, the mean of its images."""
        teacher = self.settings.teacher
        if teacher is None or self.step < teacher.start * self.settings.steps:
            return batch, 0.0
        model = self.best_model().eval()
        tokens, pairs = batch.tokens, []
        if tokens is None and model.frozen is not None:
            tokens = model.frozen(batch.images)  # for the losses, too
        for place, (image, target) in enumerate(zip(batch.images, batch.targets, strict=True)):
            with self._autocast():  # each by itself, so that what is seen depends on no other image of the batch
                (seen,) = model.predict([image], tokens=tokens and tokens[place : place + 1])
            pairs.append(taught(target, seen, teacher))
        targets, counts = zip(*pairs, strict=True)
        return replace(batch, targets=targets, tokens=tokens), sum(counts) / len(counts)

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        seeds = [(self.settings.seed, self.step, batch.first + i) for i in range(len(batch.images))]
        with self._autocast():
            losses: dict[str, Tensor] = self._forward(
                batch.images,
                batch.targets,
                generators=[generator_of(*seed) for seed in seeds],
                ranks=self.ranks,
                tokens=batch.tokens,
            )
        return losses

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _what_is_wrong(self, values: Mapping[str, float], batch: Batch, *, own: float) -> str:
        wrong = [f"{name} {value:.4g}" for name, value in values.items() if not _is_sound(value) and name != "total"]
        images = "of another process" if _is_sound(own) else ", ".join(batch.image_ids)
        what = f"is {values['total']:.3g}" if math.isfinite(values["total"]) else "is not finite"
        return (
            f"step {self.step + 1}: the loss {what} ({', '.join(wrong) or 'total'}) on a batch with the images "
            f"{images}; lower train.rate or raise train.warmup_steps, and look at these images"
        )


def _is_sound(loss: float) -> bool:
    return math.isfinite(loss) and loss <= LARGEST_LOSS


def generator_of(seed: int, step: int, place: int) -> torch.Generator:
    """The source of chance for one image of one step."""
    state = np.random.SeedSequence([seed, step, place]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def parameter_groups(model: nn.Module, weight_decay: float, probe_rate: float) -> list[dict[str, Any]]:
    """All parameters, each group with its `weight_decay` and `faster`, by which its rate is multiplied, and with it the
    decay of a step: those of norms without decay, and those of linear probes, if there are any, with `probe_rate`."""
    normed, probes = (_parameters_of(model, kinds) for kinds in (NORMS, LinearProbe))
    special = {id(p) for p in (*normed, *probes)}
    plain = [p for p in model.parameters() if id(p) not in special]
    groups = [
        {"params": plain, "weight_decay": weight_decay, "faster": 1.0},
        {"params": normed, "weight_decay": 0.0, "faster": 1.0},
    ]
    return groups + [{"params": probes, "weight_decay": weight_decay, "faster": probe_rate}] * bool(probes)


def _parameters_of(model: nn.Module, kinds: type | tuple[type, ...]) -> list[nn.Parameter]:
    return [p for module in model.modules() if isinstance(module, kinds) for p in module.parameters()]


def weights_of(model: nn.Module) -> list[Tensor]:
    """A copy of all parameters, in their order."""
    return [parameter.detach().clone() for parameter in model.parameters()]


@torch.no_grad()
def mix_weights(model: nn.Module, before: Sequence[Tensor], *, share: float) -> None:
    """Make of each parameter `share` of itself and the rest of that in `before`, on its device (WiSE-FT, arXiv
    2109.01903)."""
    for own, first in zip(model.parameters(), before, strict=True):
        own.copy_(torch.lerp(first, own, share))


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale each tensor's gradient, by itself, down to an L2 norm of at most `largest` (detectron2, "norm")."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    factors = [(largest / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
    torch._foreach_mul_(gradients, factors)


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d | nn.SyncBatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]


@contextlib.contextmanager
def _cumulative(model: nn.Module) -> Iterator[None]:
    """Batch norms that keep the plain mean of the statistics from here on, from none."""
    norms = _batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def precise_statistics(model: PanopticCascadeRCNN, batches: Iterable[Sequence[Tensor]], ranks: Ranks) -> None:
    """Set the running statistics of all batch norms to their mean over `batches` of (3, h, w) images (PreciseBN).

    What a batch norm keeps in training is a mean over weights that were still changing. A model without any is left
    alone, and no batch is asked for.
    """
    if not _batch_norms(model):
        return
    with _cumulative(model):
        model.train()
        for images in batches:
            model.features(images, ranks=ranks)
