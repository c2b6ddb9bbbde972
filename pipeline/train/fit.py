"""The fit of the panoptic model: labelled photos in, one artifact folder out (U2Seg, arXiv 2312.17243, section 4).

The folder holds the checkpoint of `model.checkpoint.detectron2` (safetensors and JSON), `predictions/`, `tensorboard/`,
and `artifact.json`, which is written last and is the mark that the folder is complete. `checkpoint.pt` and
`progress.json` lie there while the training runs: one that was stopped, or whose workers died, goes on from the
checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from model.checkpoint.files import Checkpoint, to_files
from model.ranks import Ranks
from pipeline.engine import ray_train
from pipeline.engine.fit_progress import PROGRESS, Entry, watching
from pipeline.predict.weights import identifying_file
from pipeline.store import storage
from pipeline.train.job import (
    ARTIFACT,
    CHECKPOINT,
    TrainJob,
    TrainSettings,
    build_model,
    read_progress_of,
)
from pipeline.train.loop import train
from pipeline.train.photos import TrainingPhotos
from workers.predict import SHORT

GROWTH = 10.0  # times the loss of the first step, at the end: beyond what a spike leaves behind
LEAST = 3.0  # that it is taken for; of a model that was trained before, or a batch without things, it may be near 0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished training: `artifact.json`, with `history`, a mapping of losses each."""

    record: dict[str, Any]

    @property
    def loss(self) -> float:
        """The mean total loss over the last steps."""
        return float(self.record["history"][-1]["total"])


def fit_panoptic(
    photos: TrainingPhotos,
    out: str,
    settings: TrainSettings,
    *,
    num_workers: int = 0,
    device: str = "cpu",
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 1,
    threads: int = 4,
    checkpoint_every: int = 1000,
    picture_every: int = 5000,
    max_failures: int = 3,
    tokens: str | None = None,
    config: dict[str, Any] | None = None,
    on_log: Callable[[Entry], None] | None = None,
) -> TrainResult:
    """Train PanopticCascadeRCNN on `photos` and write the artifact folder `out` (URI).

    A complete `out` is read and returned; one with a checkpoint goes on from there. `num_workers` 0 trains in this
    process, else as many of Ray Train share each batch and are started again up to `max_failures` times; the weights
    are the same but for rounding (with copy-paste they are not: instances are pasted among a process's own images).
    `threads` read and augment images in each process. `tokens` is a folder in which those of a frozen transformer are
    kept for every photo at every size, and are mirrored and cut with it: without one the transformer sees the augmented
    photo at every step. `config` goes into the checkpoint as it is. `on_log` gets the entries of the history; those of
    Ray's workers now and then, in a thread.

    ValueError: a batch that the workers cannot share equally, weights that do not fit, a checkpoint of another
    training, labels that do not fit their photo, a loss that is not finite or beyond all measure (with the ids of the
    images), or that has grown. RuntimeError: Ray is not initialised or too small, or workers that die again and again.
    """
    if storage.exists(storage.join(out, ARTIFACT)):
        return TrainResult(json.loads(storage.read_bytes(storage.join(out, ARTIFACT))))
    _require_compatible(settings, num_workers, kept=tokens is not None)
    identity = _identity(photos, settings, kept=tokens is not None)
    every = max(1, checkpoint_every), max(1, picture_every)
    job = TrainJob(photos, settings, out, identity, device, *every, max(1, threads), tokens)
    build_model(job)  # weights that do not fit are refused before the work
    read_progress_of(job)
    storage.remove(storage.join(out, PROGRESS))
    if num_workers == 0:
        _train_and_write(job, Ranks(), torch.device(device), config or {}, on_log)
    else:
        with watching(out, on_log):
            ray_train.train_with_ray(
                functools.partial(_worker, job, config or {}),
                num_workers=num_workers,
                cpus=cpus_per_worker,
                gpus=gpus_per_worker if device != "cpu" else 0,
                name=f"train-{identity}",
                storage_path=storage.join(out, "ray"),
                max_failures=max_failures,
            )
    return TrainResult(json.loads(storage.read_bytes(storage.join(out, ARTIFACT))))


def _require_compatible(settings: TrainSettings, num_workers: int, *, kept: bool) -> None:
    """ValueError: settings that do not go together, or not with the number of workers or with kept tokens."""
    batch = settings.optimisation.batch_size
    if num_workers < 0 or batch % max(1, num_workers):
        raise ValueError(f"train.batch_size {batch} cannot be shared equally by {num_workers} workers")
    if not 0 < settings.mixing <= 1:
        raise ValueError(f"mixing must be above 0 and at most 1, got {settings.mixing:g}")
    if settings.mixing < 1 and settings.init is None:
        raise ValueError(f"mixing {settings.mixing:g} is with the weights to start from: give init, or no mixing")
    if settings.mixing < 1 and settings.frozen is None and not settings.precise_statistics:
        raise ValueError("mixed weights need new statistics of their batch norms: set train.precise_statistics")
    if kept and settings.copy_paste is not None:
        raise ValueError("tokens are kept of whole photos, and copy-paste makes new ones: leave out either")
    if not kept and settings.crop:
        raise ValueError(f"crop {settings.crop:g} enlarges parts of kept tokens: give the folder of tokens, or no crop")


def _worker(job: TrainJob, config: dict[str, Any], ranks: Ranks, device: torch.device) -> None:
    """What each worker of Ray Train runs; nothing when it is started again after the end."""
    if storage.exists(storage.join(job.out, ARTIFACT)):
        _tidy(job)
        return
    _train_and_write(job, ranks, device, config, None)


def _train_and_write(
    job: TrainJob,
    ranks: Ranks,
    device: torch.device,
    config: dict[str, Any],
    on_log: Callable[[Entry], None] | None,
) -> None:
    trainer, record = train(job, ranks, device, on_log)
    ranks.wait()  # for one that was started again, and has yet to read the last checkpoint
    if ranks.rank == 0:
        _require_sound(record["history"])
        state = {name: values.detach().cpu() for name, values in trainer.best_model().state_dict().items()}
        _write_artifact(job, state, record["history"], config)


def _require_sound(history: list[Entry]) -> None:
    """ValueError for a training that has ended far above the loss that it began with."""
    first, last = (float(history[place]["total"]) for place in (0, -1))
    if last > GROWTH * max(first, LEAST):
        raise ValueError(
            f"the training has diverged: its loss is {last:.3g} in the last steps and was {first:.3g} in the first; "
            "lower train.rate (in a round of self-training self_training.rate) or raise train.warmup_steps"
        )


def _write_artifact(
    job: TrainJob, state: dict[str, torch.Tensor], history: list[Entry], config: dict[str, Any]
) -> None:
    photos, settings = job.photos, job.settings
    about = {
        "num_things": photos.num_things,
        "num_stuff": photos.num_stuff,
        "model": settings.model,
        "short": min(max(SHORT, min(settings.short_sides)), max(settings.short_sides)),  # as near as it has learnt from
        "max_side": settings.max_side,
        "frozen": settings.frozen and settings.frozen.about(),
        **config,
    }
    about = {key: value for key, value in about.items() if value is not None}
    for name, data in to_files(Checkpoint(state, about)).items():
        storage.write_bytes(storage.join(job.out, name), data)
    record = {
        "num_things": photos.num_things,
        "num_stuff": photos.num_stuff,
        "images": len(photos),
        "settings": asdict(settings),
        "history": history,
        "software": f"u2label {version('u2label')}",
    }
    storage.write_bytes(storage.join(job.out, ARTIFACT), json.dumps(record, indent=1).encode())
    _tidy(job)


def _tidy(job: TrainJob) -> None:
    for name in (CHECKPOINT, PROGRESS):
        storage.remove(storage.join(job.out, name))


def _identity(photos: TrainingPhotos, settings: TrainSettings, *, kept: bool) -> str:
    """What a checkpoint must be of to go on from it. `kept`: tokens are, and so are mirrored in place of the photo."""
    settled = dataclasses.asdict(dataclasses.replace(settings, init=None, backbone=None, frozen=None))
    del settled["frozen"]  # said below
    for key, before in (("optimiser", "sgd"), ("schedule", "drops"), ("teacher", None)):  # from when there was no other
        if settled["optimisation"][key] == before:
            del settled["optimisation"][key]
    for key, none in (("crop", 0.0), ("mixing", 1.0)):  # likewise
        if settled[key] == none:
            del settled[key]
    if not settings.model.get("linear_probes"):
        del settled["optimisation"]["probe_rate"]
    content = {
        "settings": settled,
        **({"mirrored": "tokens"} if kept and settings.flip else {}),
        **({} if settings.frozen is None else {"frozen": settings.frozen.content()}),
        "init": settings.init and storage.sha256(identifying_file(settings.init)),
        "backbone": settings.backbone and storage.sha256(settings.backbone),
        "classes": [photos.num_things, photos.num_stuff],
        "photos": photos.identity,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
