"""The fit stages: reductions over all parts of their inputs into one artifact folder, each by the module that owns it.

A function here takes the stage, the config and the stage table, and returns a line that says what came out.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.log import say
from pipeline.progress import FitProgress
from pipeline.sections import WorkersConfig
from pipeline.shards import read_part
from pipeline.sources import open_index
from pipeline.stages import Stage, index_folder, teacher_identity

if TYPE_CHECKING:
    from pipeline.clusters.kmeans import IterationReport

Table = Mapping[str, Stage]


def fit_clusters(stage: Stage, config: Config, table: Table) -> str:
    """Instance classes: k-means over all embeddings."""
    from model.names import embedding_dim
    from pipeline.clusters.kmeans import KMeansSettings, fit_kmeans, write_empty

    clusters = config.clusters
    settings = KMeansSettings(
        k=clusters.k,
        seed=config.clusters_seed,
        spherical=clusters.spherical,
        max_iterations=clusters.max_iterations,
        tolerance=clusters.tolerance,
    )
    if not _has_masks(table["instances"]):
        write_empty(stage.folder, settings, embedding_dim(config.backbone.name))
        return "no image has a mask, so there are no things; lower maskcut.tau or crf.min_iou to find some"
    result = fit_kmeans(
        table["instances"].parts(),
        stage.folder,
        settings,
        **_kmeans_actors(config.workers),
        on_iteration=_said_now_and_then("clusters"),
    )
    return f"{result.iterations} iterations, inertia {result.inertia[-1]:.6g}"


def _kmeans_actors(workers: WorkersConfig) -> dict[str, Any]:
    """The arguments of a fit by k-means that say where its actors run."""
    from pipeline.cluster import actors_now

    return {
        "num_actors": actors_now(workers),
        "cpus_per_actor": workers.cpus,
        "device": workers.kmeans_device,
        "gpus_per_actor": workers.gpus or 1,
    }


def _has_masks(instances: Stage) -> bool:
    parts = (read_part(instances, shard, ["area"])["area"] for shard in range(instances.shards))
    return any(len(areas.combine_chunks().flatten()) for areas in parts)


def _said_now_and_then(stage: str, every_s: float = 10.0) -> Callable[[IterationReport], None]:
    last = time.monotonic()

    def tell(report: IterationReport) -> None:
        nonlocal last
        if time.monotonic() - last > every_s:
            last = time.monotonic()
            say(f"{stage}: iteration {report.iteration}, inertia {report.inertia:.6g}", stage=stage)

    return tell


def fit_semantics(stage: Stage, config: Config, table: Table) -> str:
    """Stuff classes: STEGO's head and probe, or the clusters of DatUS2's segments."""
    return _fit_stego(stage, config, table) if config.semantics.method == "stego" else _fit_datus(stage, config, table)


def _fit_stego(stage: Stage, config: Config, table: Table) -> str:
    from pipeline.semantics.stego import fit_stego
    from pipeline.semantics.stego_job import StegoSettings

    semantics, workers = config.semantics, config.workers
    settings = StegoSettings(
        classes=semantics.classes,
        terms=semantics.loss_terms(),
        neighbours=semantics.neighbours,
        batch_size=semantics.batch_size,
        steps=semantics.steps,
        seed=config.seed,
        max_images=semantics.max_images,
    )
    # A step is many small products, which more threads do not make faster.
    with FitProgress(stage.name, settings.steps) as progress, _threads(config, workers.cpus) as cpus:
        fitted = fit_stego(
            table["features"].parts(),
            stage.folder,
            settings,
            teacher=teacher_identity(config),
            num_workers=workers.train_workers,
            device=_device(config),
            cpus_per_worker=cpus,
            gpus_per_worker=workers.gpus,
            on_log=lambda entry: progress.update(int(entry["step"]), entry["correspondence"]),
        )
    return f"{semantics.steps} steps, loss {fitted.record['history'][-1]['correspondence']:.4g}"


def _fit_datus(stage: Stage, config: Config, table: Table) -> str:
    from pipeline.semantics.datus import fit_datus

    result = fit_datus(
        table["segments"].parts(),
        stage.folder,
        classes=config.semantics.classes,
        seed=config.seed,
        **_kmeans_actors(config.workers),
        on_iteration=_said_now_and_then("semantics_fit"),
    )
    return f"{result.iterations} iterations, inertia {result.inertia[-1]:.6g}"


def fit_refine(stage: Stage, config: Config, table: Table) -> str:
    """DatUS2's second stage: a DeepLabV3 trained on the first class maps."""
    from pipeline.semantics.refine import fit_deeplab
    from pipeline.semantics.refine_photos import PhotosOfParts
    from workers.decode import DecodeLimits
    from workers.refine import RefineSettings

    semantics, workers = config.semantics, config.workers
    settings = RefineSettings(
        classes=semantics.classes,
        steps=semantics.refine_steps,
        batch_size=semantics.refine_batch_size,
        image_size=semantics.refine_image_size,
        seed=config.seed,
    )
    limits = DecodeLimits(max_pixels=config.decode.max_pixels, min_side=config.decode.min_side)
    photos = PhotosOfParts(open_index(index_folder(config)), table["semantics_draft"].parts(), limits=limits)
    with FitProgress(stage.name, settings.steps) as progress, _threads(config) as cpus:
        fit_deeplab(
            photos,
            stage.folder,
            settings,
            num_workers=workers.train_workers,
            device=_device(config),
            cpus_per_worker=cpus,
            gpus_per_worker=workers.gpus,
            backbone=semantics.refine_backbone,
            on_log=lambda entry: progress.update(int(entry["step"]), entry["loss"]),
        )
    return f"{settings.steps} steps on {len(photos)} photos"


def fit_train(stage: Stage, config: Config, table: Table) -> str:
    """The panoptic model, on the labels of the run or on human ones."""
    from pipeline.stages import categories
    from pipeline.train.stage import fit_stage, train_steps

    steps = train_steps(stage, config)
    with FitProgress(stage.name, steps) as progress, _threads(config) as cpus:
        result, photos = fit_stage(
            stage,
            config,
            table,
            device=_device(config),
            cpus=cpus,
            categories=categories(config),
            on_log=lambda entry: progress.update(int(entry["step"]), entry["total"]),
        )
    return f"{steps} steps on {photos} photos, loss {result.loss:.4g}"


@contextlib.contextmanager
def _threads(config: Config, cpus: float | None = None) -> Iterator[float]:
    """The CPUs of each worker of a training; in the driver's own process, where no actor is at work meanwhile, `cpus`
    or as many as all workers have, up to those of this machine, as threads of torch for the time of the block."""
    import torch

    workers = config.workers
    if workers.train_workers:
        yield workers.cpus
        return
    threads = max(1, min(int(cpus or workers.size.max * workers.cpus), _machine_cpus()))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def _machine_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(config: Config) -> str:
    """Training in the driver's own process stays on its CPU: Ray assigns GPUs to workers alone."""
    return config.workers.device if config.workers.train_workers else "cpu"


FITS: dict[str, Callable[[Stage, Config, Table], str]] = {
    "clusters": fit_clusters,
    "semantics_fit": fit_semantics,
    "refine_fit": fit_refine,
    "train": fit_train,
}
