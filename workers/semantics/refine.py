"""Smoothing a class map by a network that learnt it: one training step, and the prediction (DatUS2, second stage).

What the published second stage trains with could not be read; the schedule is DeepLabV3's own (SGD, polynomial decay,
arXiv 1706.05587, section 4.1). A step must not depend on how many workers share it, and batch statistics would: so
the batch is cut into groups of a fixed size, each normalised by itself and all from the same running
statistics, and gradients and statistics are averaged over groups. Workers then differ only in the order of a sum.

Shapes: (H, W) pixels of the original, (s, s) the training size, G groups of B images, S classes, 255 = void.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbone import IMAGENET_MEAN, IMAGENET_STD
from model.deeplab import build_deeplab
from model.enlarge import argmax_at_size
from workers.embeddings import to_images
from workers.images import LoadedImage, table_of_images
from workers.phases import Phases
from workers.records import SEMANTICS_SCHEMA
from workers.semantics.datus import VOID, resize_bicubic

Group = tuple[np.ndarray, np.ndarray]  # (B, s, s, 3) uint8 photos, (B, s, s) uint8 classes


class LabelledPhotos(Protocol):
    """A picklable list of photos (H, W, 3) uint8 RGB, each with its class map (H, W) uint8, 255 = void."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, slots=True)
class RefineSettings:
    """What decides the weights, besides the photos and the first weights. ValueError for values out of range."""

    classes: int
    steps: int = 4000
    batch_size: int = 16
    group_size: int = 4  # images normalised together; at most batch_size / group_size workers can share a step
    image_size: int = 224  # pixels; photos are squashed to this square
    rate: float = 0.01  # of the first step, falls to 0 as (1 - step / steps) ** power
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"classes": 1, "steps": 1, "group_size": 2, "image_size": 16, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"refine: {name} must be at least {bound}, got {getattr(self, name)}")
        if self.classes > VOID:
            raise ValueError(f"semantics.classes must be at most {VOID} in maps of 8 bits, got {self.classes}")
        if self.batch_size < 1 or self.batch_size % self.group_size:
            raise ValueError(f"refine: batch_size {self.batch_size} is not a multiple of group_size {self.group_size}")

    @property
    def groups(self) -> int:
        return self.batch_size // self.group_size


def batch_rows(seed: int, step: int, size: int, length: int) -> np.ndarray:
    """(size,) int64 rows of batch `step`, a pure function: rows are dealt from one shuffle of all after the other."""
    places = np.arange(step * size, (step + 1) * size)
    return np.array([_shuffled(seed, int(place // length), length)[place % length] for place in places])


@functools.lru_cache(maxsize=2)  # a batch may end one shuffle and begin the next
def _shuffled(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def load_group(photos: LabelledPhotos, settings: RefineSettings, step: int, group: int) -> Group:
    """Group `group` of batch `step`: photos squashed (bicubic), classes by nearest, both mirrored at random.

    ValueError for a class map of another size than its photo, or of classes that are not there.
    """
    first = group * settings.group_size
    rows = batch_rows(settings.seed, step, settings.batch_size, len(photos))[first : first + settings.group_size]
    mirrored = np.random.default_rng([settings.seed, step, group]).random(len(rows)) < 0.5
    pairs = [_training_pair(photos, int(row), settings) for row in rows]
    turned = [(p[:, ::-1], c[:, ::-1]) if flip else (p, c) for (p, c), flip in zip(pairs, mirrored, strict=True)]
    return np.stack([photo for photo, _ in turned]), np.stack([classes for _, classes in turned])


def _training_pair(photos: LabelledPhotos, row: int, settings: RefineSettings) -> tuple[np.ndarray, np.ndarray]:
    pixels, classes_HW = photos[row]
    if pixels.shape[:2] != classes_HW.shape:
        raise ValueError(
            f"photo {row} is {pixels.shape[:2]}, its class map {classes_HW.shape}; where it was "
            "replaced between two stages, u2label run --extend does its shard again"
        )
    wrong = (classes_HW >= settings.classes) & (classes_HW != VOID)
    if wrong.any():
        raise ValueError(f"photo {row} has class {classes_HW[wrong][0]}, semantics.classes is {settings.classes}")
    side = settings.image_size
    classes = Image.fromarray(classes_HW).resize((side, side), Image.Resampling.NEAREST)
    return resize_bicubic(pixels, side), np.asarray(classes)


class DeepLabTrainer:
    """The network and its optimiser. `step` moves both; the state after it follows from the state before it."""

    def __init__(self, settings: RefineSettings, *, device: str, backbone: str | None = None) -> None:
        self._settings = settings
        self._device = device
        self.model = build_deeplab(settings.classes, seed=settings.seed, backbone=backbone).to(device).train()
        self._optimizer = torch.optim.SGD(
            self.model.parameters(), settings.rate, settings.momentum, weight_decay=settings.weight_decay
        )

    def step(self, step: int, groups: dict[int, Group], add: Callable[[Tensor], None] = lambda flat: None) -> float:
        """One update by this worker's `groups` of the batch (number: group); the mean loss of all of them.

        `add` turns a flat tensor, in place, into its sum over all workers, whose groups together are the batch.
        """
        self.model.zero_grad()
        statistics = [b for b in self.model.buffers() if b.is_floating_point()]
        before = [b.clone() for b in statistics]
        after = [torch.zeros_like(b) for b in statistics]
        loss = torch.zeros(1, device=self._device)
        for number, group in groups.items():
            _copy_each(statistics, before)
            loss += self._backward(step, number, group)
            for total, found in zip(after, statistics, strict=True):
                total += found / self._settings.groups
        gradients = [_gradient(parameter) for parameter in self.model.parameters()]
        flat = torch.cat([part.flatten() for part in (*gradients, *after, loss)])
        add(flat)
        _copy_each([*gradients, *statistics, loss], flat.split([part.numel() for part in (*gradients, *after, loss)]))
        for counter in (b for b in self.model.buffers() if not b.is_floating_point()):
            counter.fill_(step + 1)  # nothing reads it; left alone, it would count this worker's groups
        for options in self._optimizer.param_groups:
            options["lr"] = self._settings.rate * (1 - step / self._settings.steps) ** self._settings.power
        self._optimizer.step()
        return float(loss)

    def _backward(self, step: int, number: int, group: Group) -> Tensor:
        """Add this group's share of the gradients; its share of the loss. A group of void alone adds nothing."""
        photos_BHW3, classes_BHW = group
        target = torch.from_numpy(np.ascontiguousarray(classes_BHW)).to(self._device).long()
        with _seeded(self._device, self._settings.seed, step, number):  # dropout
            logits = self.model(normalised(photos_BHW3, self._device))["out"]
        total = F.cross_entropy(logits, target, ignore_index=VOID, reduction="sum")
        loss = total / (target != VOID).sum().clamp_min(1) / self._settings.groups
        loss.backward()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on as if nothing had happened."""
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


class RefineWorker:
    """Holds the trained network: photos -> the class maps that replace the first ones."""

    def __init__(self, model: nn.Module, *, image_size: int, device: str, batch_size: int = 1) -> None:
        self._model = model.to(device).eval()
        self._size = image_size
        self._device = device
        self._batch_size = batch_size

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of SEMANTICS_SCHEMA, one row each; no pixel is void.

        At most `batch_size` images are held at a time. RuntimeError, naming the images, for what is not their fault.
        """
        return table_of_images(
            images, self._batch_size, lambda batch: self._rows(batch, phases), phases, SEMANTICS_SCHEMA
        )

    @torch.inference_mode()
    def _rows(self, batch: list[LoadedImage], phases: Phases) -> Iterator[dict[str, Any]]:
        readable = [image.pixels for image in batch if image.pixels is not None]
        with phases("resize"):
            squares = [resize_bicubic(pixels, self._size) for pixels in readable]
        with phases("network"):
            logits = iter(self._model(normalised(np.stack(squares), self._device))["out"] if squares else ())
        for image in batch:
            labels = None
            if image.pixels is not None:
                with phases("enlarge"):
                    labels = _png(argmax_at_size(next(logits), image.pixels.shape[:2]).cpu().numpy())
            yield {"image_id": image.image_id, "status": str(image.status), "error": image.error, "labels": labels}


def normalised(photos_BHW3: np.ndarray, device: str) -> Tensor:
    """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32 with ImageNet's mean and standard deviation taken out."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (to_images(np.ascontiguousarray(photos_BHW3), device) - mean) / std


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@torch.no_grad()
def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source.view_as(target))


@contextlib.contextmanager
def _seeded(device: str, *entropy: int) -> Iterator[None]:
    cuda = [torch.device(device)] if device != "cpu" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        yield


def _png(classes_HW: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(classes_HW).save(stream, format="PNG")
    return stream.getvalue()
