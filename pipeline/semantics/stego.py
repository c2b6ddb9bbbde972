"""The fit of STEGO: teacher features in, one artifact folder out (arXiv 2203.08414).

Descriptors and neighbours of all items on the driver, then the training in this process or by Ray Train, then the
artifact: `head.safetensors` (head and cluster probe), `tensorboard/`, and `artifact.json`, which is written last and is
the mark that the folder is complete. While the fit runs `neighbours.npz`, `checkpoint.pt`, `progress.json` and, with
Ray, `ray/` lie there too. A fit that is started again goes on from its checkpoint, also with another number of workers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import safetensors.torch
import torch

from model.ranks import Ranks
from model.stego import ClusterProbe, MergedProbe, StegoHead
from pipeline.engine import ray_train
from pipeline.engine.cluster import require_room
from pipeline.engine.fit_progress import PROGRESS, Entry, watching
from pipeline.semantics.stego_classes import cluster_code
from pipeline.semantics.stego_collapse import require_classes
from pipeline.semantics.stego_features import (
    FeatureSet,
    descriptors,
    open_features,
    require_distinct,
    some_patches,
    survey_features,
)
from pipeline.semantics.stego_job import (
    CHECKPOINT,
    NEIGHBOURS,
    StegoSettings,
    TrainJob,
    read_checkpoint,
    read_neighbours,
    write_neighbours,
)
from pipeline.semantics.stego_start import begin
from pipeline.semantics.stego_train import BINS, Trainer, resume, train
from pipeline.store import storage
from workers.semantics.stego import nearest_neighbours

__all__ = ["StegoArtifact", "StegoSettings", "fit_stego", "load_stego"]

log = logging.getLogger(__name__)

ARTIFACT = "artifact.json"
WEIGHTS = "head.safetensors"
MAX_FAILURES = 3  # lost workers that Ray Train makes up for


@dataclass(frozen=True, slots=True)
class StegoArtifact:
    """A fitted head and probe in eval mode on CPU. `record` is `artifact.json`: teacher, dims, settings, `history` (a
    mapping of losses each) and `histograms` (counts of cosines of codes over `record["bins"]` equal bins, -1 to 1)."""

    head: StegoHead
    probe: ClusterProbe
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class FitResources:
    """Where the training runs: `num_workers` 0 is this process, else Ray Train; `device` "cpu", "cuda" or "cuda:n"."""

    num_workers: int
    device: str
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


def fit_stego(
    parts: Sequence[str],
    out: str,
    settings: StegoSettings,
    *,
    teacher: str,
    num_workers: int,
    device: str,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 1,
    checkpoint_every: int = 100,
    scratch: str | None = None,
    on_log: Callable[[Entry], None] | None = None,
) -> StegoArtifact:
    """Fit head and cluster probe to feature parts (URIs of FEATURES_SCHEMA); write the artifact folder `out` (URI).

    A complete `out` is read and returned. `teacher` names the backbone and its weights; the artifact carries it.
    `num_workers` 0 trains in this process with its own threads and needs no Ray. `scratch` is a folder on a local disk
    of every machine (default: its temporary folder), for 2 bytes a feature value until the fit ends. `on_log` gets the
    entries of the history as they come; those of Ray's workers now and then, in a thread.

    ValueError: too few images for semantics.neighbours or semantics.batch_size, a batch that the workers cannot share
    equally, fewer different patch features than semantics.classes, parts that are not readable, a checkpoint of another
    fit, a fit that has lost its classes. RuntimeError: Ray is not initialised or too small, or workers that die again
    and again.
    """
    if storage.exists(storage.join(out, ARTIFACT)):
        return load_stego(out, teacher=teacher, classes=settings.classes)
    resources = FitResources(num_workers, device, cpus_per_worker, gpus_per_worker)
    _check_resources(resources, settings)
    features = survey_features(parts, max_images=settings.max_images, seed=settings.seed)
    _check_size(features, settings)
    identity = _identity(features, settings, teacher)
    job = TrainJob(features, settings, out, scratch or tempfile.gettempdir(), identity, checkpoint_every)
    read_checkpoint(job)  # refused here if it is of another fit, before any work
    _find_neighbours(job, resources.threads)
    job = begin(job)
    storage.remove(storage.join(out, PROGRESS))  # of a fit that was stopped after its last checkpoint
    try:
        if num_workers:
            with watching(out, on_log):
                _train_with_ray(job, resources)
        else:
            train(job, Ranks(), torch.device(device), on_log)
        _write_artifact(job, teacher)
    except ValueError:  # refused: nothing goes on from here
        job.features_file.unlink(missing_ok=True)
        raise
    job.features_file.unlink(missing_ok=True)
    return load_stego(out)


def load_stego(
    folder: str, *, teacher: str | None = None, channels: int | None = None, classes: int | None = None
) -> StegoArtifact:
    """The artifact in a complete folder (URI). FileNotFoundError when it is not there or not complete.

    ValueError when it was fitted to another teacher, number of feature channels or number of classes than those given.
    """
    record = json.loads(storage.read_bytes(storage.join(folder, ARTIFACT)))
    wanted = {"teacher": teacher, "channels": channels, "classes": classes}
    for key, value in wanted.items():
        if value is not None and record[key] != value:
            raise ValueError(
                f"{storage.redact(folder)}: this STEGO artifact has {key} {record[key]!r}, {value!r} is needed; "
                "fit it again or give the artifact that belongs to this configuration"
            )
    weights = safetensors.torch.load(storage.read_bytes(storage.join(folder, WEIGHTS)))
    head, merged = StegoHead(record["channels"], record["dim"]), weights.get("probe.classes")
    probe = ClusterProbe(record["dim"], record["classes"])
    if merged is not None:
        probe = MergedProbe(weights["probe.clusters"], merged)
    torch.nn.ModuleDict({"head": head, "probe": probe}).load_state_dict(weights)
    return StegoArtifact(head.eval().requires_grad_(False), probe.eval().requires_grad_(False), record)


def _check_resources(resources: FitResources, settings: StegoSettings) -> None:
    workers = resources.num_workers
    if workers < 0:
        raise ValueError(f"the number of workers must be 0 (in this process) or more, got {workers}")
    if settings.batch_size % max(1, workers):
        raise ValueError(f"semantics.batch_size {settings.batch_size} cannot be shared equally by {workers} workers")
    if workers:
        gpus = resources.gpus if resources.device != "cpu" else 0
        require_room("workers of a training", "workers.train_workers", workers, resources.cpus, gpus)


def _check_size(features: FeatureSet, settings: StegoSettings) -> None:
    crops = f" of {features.shape[0]} crops" if features.shape[0] > 1 else ""
    have = f"the features are of {features.images} image{'s' if features.images > 1 else ''}{crops}"
    if features.images < 2 or features.items < settings.neighbours + 1:
        raise ValueError(
            f"semantics.neighbours is {settings.neighbours}, which needs at least 2 images and "
            f"{settings.neighbours + 1} images or crops, but {have}; lower it, or give the source more images"
        )
    if features.items < settings.batch_size:
        raise ValueError(
            f"semantics.batch_size is {settings.batch_size}, but {have}; lower it, or give the source more images"
        )


def _identity(features: FeatureSet, settings: StegoSettings, teacher: str) -> str:
    known = asdict(settings)
    later = {"auto_shifts": (), "conditioned": False, "overclustering": 1}
    for name, default in later.items():  # a fit begun before there were these goes on
        if known[name] == default:
            del known[name]
    content = json.dumps([features.digest, known, teacher], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _find_neighbours(job: TrainJob, threads: int) -> None:
    """Write the neighbours of all items, unless a fit that was stopped has left them."""
    if read_neighbours(job) is not None:
        return
    mapped = open_features(job.features, job.features_file)
    require_distinct(mapped, job.settings.classes)
    found = nearest_neighbours(descriptors(mapped), job.settings.neighbours, threads=threads)
    write_neighbours(job, found)


def _train_with_ray(job: TrainJob, resources: FitResources) -> None:
    ray_train.train_with_ray(
        functools.partial(train_worker, job),
        num_workers=resources.num_workers,
        cpus=resources.cpus,
        gpus=resources.gpus if resources.device != "cpu" else 0,
        name=f"stego-{job.identity}",
        storage_path=storage.join(job.out, "ray"),
        max_failures=MAX_FAILURES,
    )


def train_worker(job: TrainJob, ranks: Ranks, device: torch.device) -> None:
    """What each worker of Ray Train runs. The first of each machine unpacks the features while the others wait."""
    import ray.train

    first = ray.train.get_context().get_local_rank() == 0
    if first:
        open_features(job.features, job.features_file)
    ranks.wait()
    train(job, ranks, device, ray.train.report)
    ranks.wait()
    if first:
        job.features_file.unlink(missing_ok=True)


def _write_artifact(job: TrainJob, teacher: str) -> None:
    channels, settings = job.features.shape[1], job.settings
    trainer = Trainer(settings, channels, torch.device("cpu"))
    progress = resume(job, trainer)
    require_classes(job, progress)
    record = {
        "teacher": teacher,
        "channels": channels,
        "dim": settings.dim,
        "classes": settings.classes,
        "images": job.features.images,
        "crops": job.features.shape[0],
        "grid": job.features.shape[2:],
        "steps": trainer.step,
        "settings": asdict(settings),
        "bins": BINS,
        **progress,
        "software": f"u2label {version('u2label')}",
    }
    probe = trainer.probe
    if settings.conditioned:
        rows = some_patches(open_features(job.features, job.features_file), settings.seed)
        probe = cluster_code(trainer.head.eval(), rows, settings)
    modules = torch.nn.ModuleDict({"head": trainer.head, "probe": probe})
    weights = {name: values.contiguous() for name, values in modules.state_dict().items()}
    storage.write_bytes(storage.join(job.out, WEIGHTS), safetensors.torch.save(weights))
    storage.write_bytes(storage.join(job.out, ARTIFACT), json.dumps(record, indent=1).encode())
    for name in (CHECKPOINT, NEIGHBOURS, PROGRESS):
        storage.remove(storage.join(job.out, name))
