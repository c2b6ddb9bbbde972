"""The stage `train`, and those of self-training: what the config says, for the fit of the panoptic model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config import Config
from pipeline.fit_progress import Entry
from pipeline.sources import open_index
from pipeline.stages import Stage, index_folder, round_of, stage_of_round
from pipeline.train.coco_photos import CocoPhotos
from pipeline.train.fit import TrainResult, fit_panoptic
from pipeline.train.job import TrainSettings
from pipeline.train.photos import Labels, PhotosOfLabels, TrainingPhotos
from workers.copy_paste import CopyPaste
from workers.decode import DecodeLimits
from workers.training import Optimisation


def train_steps(stage: Stage, config: Config) -> int:
    """Of this stage's training."""
    return config.self_training.steps if round_of(stage.name) else config.train.steps


def fit_stage(
    stage: Stage,
    config: Config,
    table: Mapping[str, Stage],
    *,
    device: str,
    cpus: float,
    categories: list[dict[str, Any]],
    on_log: Callable[[Entry], None],
) -> tuple[TrainResult, int]:
    """Train as the config says, into the stage's folder. Returns the result and the number of photos.

    `categories` are those of the run's labels. Raises as `fit_panoptic`; ConfigError: labels that cannot be read.
    """
    photos = _photos(stage, config, table)
    human = config.train.labels is not None
    train, workers = config.train, config.workers
    result = fit_panoptic(
        photos,
        stage.folder,
        _settings(stage, config, table),
        num_workers=workers.train_workers,
        device=device,
        cpus_per_worker=cpus,
        gpus_per_worker=workers.gpus,
        threads=train.threads,
        checkpoint_every=train.checkpoint_every,
        picture_every=train.picture_every,
        config={"categories": photos.categories if isinstance(photos, CocoPhotos) and human else categories},
        on_log=on_log,
    )
    return result, len(photos)


def _photos(stage: Stage, config: Config, table: Mapping[str, Stage]) -> TrainingPhotos:
    train = config.train
    limits = DecodeLimits(max_pixels=config.decode.max_pixels, min_side=config.decode.min_side)
    number = round_of(stage.name)
    if train.labels is not None and train.label_images is not None:
        return CocoPhotos(
            train.labels, train.label_images, pngs=train.label_pngs, limits=limits, fraction=train.fraction
        )
    panoptic = table[stage.inputs[0]]
    whole = (panoptic if number else table["instances"]) if train.whole_masks else None
    labels = Labels(panoptic.parts(), whole.parts() if whole else (), panoptic.fingerprint)
    return PhotosOfLabels(
        open_index(index_folder(config)),
        labels,
        num_things=config.clusters.k,
        num_stuff=config.num_stuff,
        limits=limits,
        fraction=train.fraction,
    )


def _settings(stage: Stage, config: Config, table: Mapping[str, Stage]) -> TrainSettings:
    train, number = config.train, round_of(stage.name)
    again = config.self_training
    optimisation = Optimisation(
        steps=again.steps if number else train.steps,
        batch_size=train.batch_size,
        rate=again.rate if number else train.rate,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup_steps,
        drops=() if number else train.drops,
        drop_factor=train.drop_factor,
        ema=train.ema,
        precision=train.precision,
        seed=config.seed,
    )
    return TrainSettings(
        optimisation,
        train.network.model_dump(),
        short_sides=train.short_sides,
        max_side=train.max_side,
        flip=train.flip,
        copy_paste=_copy_paste(config),
        precise_statistics=train.precise_statistics,
        init=table[stage_of_round("train", number - 1)].folder if number else train.init,
        init_classes="same" if number else train.init_classes,
        backbone=None if number else train.backbone,
    )


def _copy_paste(config: Config) -> CopyPaste | None:
    paste = config.train.copy_paste
    if paste.mode == "none":
        return None
    return CopyPaste(paste.rate, paste.ratio, semantic_aware=0.5 if paste.mode == "semantic" else 0.0)
