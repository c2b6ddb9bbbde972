"""The second stage of DatUS2: a DeepLabV3 fitted to the class maps that it shall smooth, through Ray Train.

The artifact folder holds `model.safetensors` and `artifact.json`, which is written last and is the mark that the folder
is complete. `checkpoint.pt` and `progress.json` lie there while the fit runs: one that was stopped, or whose workers
died, goes on from the checkpoint to the weights of an unbroken fit. Ray Train starts, joins and restarts the workers;
its own run folder `ray` keeps no weights. Left out on purpose: mixed precision, and augmentation besides mirroring.
"""

from __future__ import annotations

import functools
import io
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.backbone.weights import file_sha256
from model.deeplab import DeepLabV3, build_deeplab
from model.ranks import Ranks
from pipeline.engine import ray_train
from pipeline.engine.fit_progress import PROGRESS, Entry, watching, write_progress
from pipeline.engine.shards import ahead
from pipeline.store import storage
from workers.semantics.refine import DeepLabTrainer, Group, LabelledPhotos, RefineSettings, load_group

log = logging.getLogger(__name__)

ARTIFACT = "artifact.json"
MODEL = "model.safetensors"
CHECKPOINT = "checkpoint.pt"
LOG_EVERY = 10  # steps


@dataclass(frozen=True, slots=True)
class RefineResult:
    """A finished fit: its settings, and the mean loss over the steps up to each checkpoint."""

    settings: RefineSettings
    loss: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """What every worker needs. Picklable."""

    photos: LabelledPhotos
    out: str
    settings: RefineSettings
    device: str
    backbone: str | None
    checkpoint_every: int
    identity: dict[str, Any]


def fit_deeplab(
    photos: LabelledPhotos,
    out: str,
    settings: RefineSettings,
    *,
    num_workers: int = 0,
    device: str = "cpu",
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 1,
    backbone: str | None = None,
    checkpoint_every: int = 200,
    max_failures: int = 3,
    on_log: Callable[[Entry], None] | None = None,
) -> RefineResult:
    """Fit DeepLabV3-R50 to photos and their class maps by cross-entropy, void ignored; write the artifact `out` (URI).

    A complete `out` is read and returned; one with a checkpoint goes on from there. `num_workers` 0 runs in this
    process, else through Ray Train, whose workers are started again up to `max_failures` times; the weights are the
    same but for the order of sums. `backbone` is the path of a DINO ResNet-50 on every node; None: random weights.
    `on_log` gets `step` and `loss` every few steps; of Ray's workers now and then, in a thread.

    ValueError: no photos, more workers than groups, a checkpoint of another fit, a backbone that does not fit.
    RuntimeError: Ray is not initialised or too small, workers that die again and again.
    """
    if storage.exists(storage.join(out, ARTIFACT)):
        return _read_artifact(out)
    if len(photos) == 0:
        raise ValueError("refine: no photo has a class map to learn; run the stages before it")
    if not 0 <= num_workers <= settings.groups:
        raise ValueError(
            f"refine: {num_workers} workers cannot share {settings.groups} groups (batch_size / group_size); "
            "lower the workers or raise batch_size"
        )
    build_deeplab(settings.classes, backbone=backbone)  # a checkpoint that does not fit is refused before the work
    identity = {
        **asdict(settings),
        "photos": len(photos),
        "backbone": None if backbone is None else file_sha256(Path(backbone)),
    }
    job = _Job(photos, out, settings, device, backbone, max(1, checkpoint_every), identity)
    _load_checkpoint(job)
    storage.remove(storage.join(out, PROGRESS))
    if num_workers == 0:
        _train(job, rank=0, workers=1, on_log=on_log)
    else:
        with watching(out, on_log):
            ray_train.train_with_ray(
                functools.partial(_ray_worker, job),
                num_workers=num_workers,
                cpus=cpus_per_worker,
                gpus=gpus_per_worker if device != "cpu" else 0,
                name="refine",
                storage_path=storage.join(out, "ray"),
                max_failures=max_failures,
            )
    return _read_artifact(out)


def load_deeplab(out: str) -> tuple[DeepLabV3, RefineSettings]:
    """The network of a complete artifact folder, in eval mode. FileNotFoundError when the folder is not complete."""
    from safetensors.torch import load

    settings = _read_artifact(out).settings
    model = build_deeplab(settings.classes)
    model.load_state_dict(load(storage.read_bytes(storage.join(out, MODEL))))
    return model.eval(), settings


def _ray_worker(job: _Job, ranks: Ranks, device: torch.device) -> None:
    """What each worker of Ray Train runs; nothing when it is started again after the end."""
    if storage.exists(storage.join(job.out, ARTIFACT)):
        _tidy(job)
        return
    job = job if device.type == "cpu" else replace(job, device=str(device))
    _train(job, rank=ranks.rank, workers=ranks.size, add=ranks.sum, wait=ranks.wait)


def _train(
    job: _Job,
    *,
    rank: int,
    workers: int,
    add: Callable[[Tensor], Any] = lambda flat: None,
    wait: Callable[[], None] = lambda: None,
    on_log: Callable[[Entry], None] | None = None,
) -> None:
    """The loop of one worker. Each takes every `workers`-th group; the first writes checkpoints and the artifact."""
    trainer = DeepLabTrainer(job.settings, device=job.device, backbone=job.backbone)
    saved = _load_checkpoint(job)
    start, history, losses = 0, list[float](), list[float]()
    if saved is not None:
        trainer.load_state(saved)
        start, history = saved["step"], saved["loss"]
        log.info("refine goes on after step %d", start)
    numbers = range(rank, job.settings.groups, workers)
    for step, groups in enumerate(_loaded(job, start, numbers), start + 1):
        losses.append(trainer.step(step - 1, dict(zip(numbers, groups, strict=True)), add))
        if rank == 0 and (step % LOG_EVERY == 1 or step == job.settings.steps):
            entry = {"step": step, "loss": losses[-1]}
            write_progress(job.out, job.settings.steps, entry)
            if on_log is not None:
                on_log(entry)
        if step % job.checkpoint_every == 0 or step == job.settings.steps:
            history, losses = [*history, float(np.mean(losses))], []
            if rank == 0:
                _save_checkpoint(job, trainer, step, history)
    wait()  # for one that was started again, and has yet to read the last checkpoint
    if rank == 0:
        _write_artifact(job, trainer, history)


def _loaded(job: _Job, start: int, numbers: range) -> Iterator[list[Group]]:
    """The groups of this worker at each step from `start` on, read while the step before is computed."""
    steps = range(start, job.settings.steps)
    with ThreadPoolExecutor(max_workers=4) as pool:
        load = functools.partial(load_group, job.photos, job.settings)
        yield from ahead(lambda step: list(pool.map(lambda group: load(step, group), numbers)), steps, depth=2)


def _save_checkpoint(job: _Job, trainer: DeepLabTrainer, step: int, loss: list[float]) -> None:
    buffer = io.BytesIO()
    torch.save({**trainer.state(), "step": step, "loss": loss, "identity": json.dumps(job.identity)}, buffer)
    storage.write_bytes(storage.join(job.out, CHECKPOINT), buffer.getvalue())


def _load_checkpoint(job: _Job) -> dict[str, Any] | None:
    uri = storage.join(job.out, CHECKPOINT)
    if not storage.exists(uri):
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(storage.read_bytes(uri)), map_location="cpu", weights_only=True)
    if state["identity"] != json.dumps(job.identity):
        raise ValueError(f"{storage.redact(uri)} is of a fit with other settings or photos; delete it and run again")
    return state


def _write_artifact(job: _Job, trainer: DeepLabTrainer, loss: list[float]) -> None:
    from safetensors.torch import save

    weights = {key: value.detach().cpu().contiguous() for key, value in trainer.model.state_dict().items()}
    record = {
        "settings": asdict(job.settings),
        "photos": len(job.photos),
        "backbone": job.identity["backbone"],
        "loss": loss,
        "software": f"u2label {version('u2label')}",
    }
    storage.write_bytes(storage.join(job.out, MODEL), save(weights))
    storage.write_bytes(storage.join(job.out, ARTIFACT), json.dumps(record, indent=1).encode())
    _tidy(job)


def _tidy(job: _Job) -> None:
    for name in (CHECKPOINT, PROGRESS):
        storage.remove(storage.join(job.out, name))


def _read_artifact(out: str) -> RefineResult:
    record = json.loads(storage.read_bytes(storage.join(out, ARTIFACT)))
    return RefineResult(RefineSettings(**record["settings"]), tuple(record["loss"]))
