"""What a training of the panoptic model is, its first weights, and the checkpoint it goes on from."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.detectron2 import load_backbone_detectron2, load_state
from model.panoptic.network import PanopticCascadeRCNN
from pipeline.predict.frozen import FrozenBackbone
from pipeline.predict.weights import read_weights
from pipeline.store import storage
from pipeline.store.weights import local_weights
from pipeline.train.photos import TrainingPhotos
from workers.training.augment import MAX_SIDE, SHORT_SIDES
from workers.training.copy_paste import CopyPaste
from workers.training.trainer import Optimisation

CHECKPOINT = "checkpoint.pt"
ARTIFACT = "artifact.json"
PREDICTIONS = "predictions"  # folder of pictures
PER_CLASS = (".cls_score.", "mask_head.predictor.", "sem_seg_head.predictor.", ".probe.")  # that may know the classes


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What decides the weights, besides the photos. `model` holds keywords of PanopticCascadeRCNN.

    `precise_statistics` counts the batches after the last step whose statistics the batch norms are given. `init` is
    the URI of a checkpoint to start from (`init_classes` "new": but for the layers that know its classes), and
    `backbone` the URI of a ResNet-50 for the backbone alone; `frozen` is the transformer of a `model` that has one.
    Below 1, `mixing` is the share of the last weights in the result; the rest are the first (arXiv 2109.01903).
    """

    optimisation: Optimisation
    model: dict[str, Any] = field(default_factory=dict)
    short_sides: tuple[int, ...] = SHORT_SIDES
    max_side: int = MAX_SIDE
    flip: float = 0.5
    crop: float = 0.0
    copy_paste: CopyPaste | None = None
    precise_statistics: int = 200
    init: str | None = None
    init_classes: str = "same"
    mixing: float = 1.0
    backbone: str | None = None
    frozen: FrozenBackbone | None = None


@dataclass(frozen=True, slots=True)
class TrainJob:
    """All that a process needs. Picklable. In `tokens`, a folder, those of the frozen transformer are kept."""

    photos: TrainingPhotos
    settings: TrainSettings
    out: str
    identity: str
    device: str
    checkpoint_every: int
    picture_every: int
    threads: int
    tokens: str | None = None


def build_model(job: TrainJob, device: str = "cpu") -> PanopticCascadeRCNN:
    """The model with its first weights, the same in every process, on the CPU; a frozen transformer is on `device`.

    ValueError, FileNotFoundError: `init`, `backbone` or `frozen` is not there, or does not fit.
    """
    settings, photos = job.settings, job.photos
    frozen = None if settings.frozen is None else settings.frozen.load(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.optimisation.seed)
        model = PanopticCascadeRCNN(photos.num_things, photos.num_stuff, frozen=frozen, **settings.model)
    if settings.backbone is not None:
        load_backbone_detectron2(model, Path(local_weights(settings.backbone, key="train.backbone")))
    if settings.init is not None:
        state, about, _ = read_weights(settings.init)
        _require_same_transformer(settings, about)
        if settings.init_classes == "new":
            state = _with_new_classes(state, model)
        load_state(
            model, state, num_things=photos.num_things, num_stuff=photos.num_stuff, origin=storage.redact(settings.init)
        )
    return model


def _require_same_transformer(settings: TrainSettings, about: dict[str, Any]) -> None:
    """ValueError: heads that were trained behind one transformer are put behind another one."""
    before = FrozenBackbone.from_checkpoint(about)
    if before is not None and (settings.frozen is None or before.content() != settings.frozen.content()):
        raise ValueError(
            f"{storage.redact(settings.init or '')} stands behind {before}, and this training behind "
            f"{settings.frozen or 'a ResNet'}: set backbone.name, backbone.weights and train.network.backbone to those"
        )


def _with_new_classes(state: dict[str, Tensor], model: PanopticCascadeRCNN) -> dict[str, Tensor]:
    """The state with the model's own layers that know classes. One that tells any object, any mask or any stuff in
    both, and so has as many rows, knows none and stays."""
    own, heads = model.state_dict(), model.roi_heads
    of_any = [".cls_score."] * heads.probed + ["mask_head.predictor."] * heads.class_agnostic_masks
    of_any += ["sem_seg_head.predictor."] * (model.sem_seg_head.probe is not None)

    def is_new(name: str) -> bool:
        alike = name in state and name in own and state[name].shape == own[name].shape
        stays = alike and any(layer in name for layer in of_any)
        return any(layer in name for layer in PER_CLASS) and not stays

    return {name: values for name, values in state.items() if not is_new(name)} | {
        name: values for name, values in own.items() if is_new(name)
    }


def write_checkpoint(job: TrainJob, state: dict[str, Any], record: dict[str, Any]) -> None:
    stream = io.BytesIO()
    torch.save({**state, "record": json.dumps(record), "identity": job.identity}, stream)
    storage.write_bytes(storage.join(job.out, CHECKPOINT), stream.getvalue())


def read_progress_of(job: TrainJob) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """State and record of the checkpoint in the job's folder; None when there is none. ValueError: it is another's."""
    uri = storage.join(job.out, CHECKPOINT)
    if not storage.exists(uri):
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(storage.read_bytes(uri)), map_location="cpu", weights_only=True)
    if state["identity"] != job.identity:
        raise ValueError(
            f"{storage.redact(uri)} is of a training with other settings or photos; delete it and run again"
        )
    return state, json.loads(state["record"])
