"""DatUS2's second stage: a DeepLabV3 trained on the first class maps, whose own maps replace them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from pipeline.config import Config
from pipeline.engine.fits import device_of_fits, fit_threads
from pipeline.engine.progress import FitProgress
from pipeline.engine.shards import PhotoShards
from pipeline.engine.stage import Stage
from pipeline.stages.base import FitStage, Photos, Run, ShardStage
from pipeline.stages.facts import Content, Facts, require_there, require_weights, sections
from workers.records import SEMANTICS_SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa


class RefineShards(PhotoShards):
    """Photos -> class maps of the trained network."""

    def make_worker(self) -> Any:
        from pipeline.semantics.refine import load_deeplab
        from workers.semantics.refine import RefineWorker

        model, settings = load_deeplab(self.job.inputs["refine_fit"].folder)
        workers = self.config.workers
        return RefineWorker(model, image_size=settings.image_size, device=workers.device, batch_size=workers.batch_size)


class RefineFit(FitStage):
    name = "refine_fit"
    trains = True

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.refine != "none" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("semantics_draft",)

    def content(self, config: Config, facts: Facts) -> Content:
        semantics = config.semantics
        fit = semantics.model_dump(include={"classes", "refine_steps", "refine_batch_size", "refine_image_size"})
        backbone = facts.checksum("semantics.refine_backbone", semantics.refine_backbone)
        return {"seed": config.seed, "backbone": backbone, **fit}

    def check(self, config: Config, index: Photos | None) -> None:
        weights = {"semantics.refine_backbone": config.semantics.refine_backbone}
        require_there(weights)
        require_weights(weights)

    def fit(self, run: Run, stage: Stage) -> str:
        from pipeline.semantics.refine import fit_deeplab
        from pipeline.semantics.refine_photos import PhotosOfParts
        from workers.semantics.refine import RefineSettings

        semantics, workers = run.config.semantics, run.config.workers
        settings = RefineSettings(
            classes=semantics.classes,
            steps=semantics.refine_steps,
            batch_size=semantics.refine_batch_size,
            image_size=semantics.refine_image_size,
            seed=run.config.seed,
        )
        photos = PhotosOfParts(run.index, run.stages["semantics_draft"].parts(), limits=run.limits)
        with FitProgress(stage.name, settings.steps) as progress, fit_threads(workers) as cpus:
            fit_deeplab(
                photos,
                stage.folder,
                settings,
                num_workers=workers.train_workers,
                device=device_of_fits(workers),
                cpus_per_worker=cpus,
                gpus_per_worker=workers.gpus,
                backbone=semantics.refine_backbone,
                on_log=lambda entry: progress.update(int(entry["step"]), entry["loss"]),
            )
        return f"{settings.steps} steps on {len(photos)} photos"


class RefineMaps(ShardStage):
    name = "semantics"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.refine != "none" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("refine_fit",)

    def content(self, config: Config, facts: Facts) -> Content:
        return sections(config, "decode")

    def schema(self, config: Config) -> pa.Schema:
        return SEMANTICS_SCHEMA

    def actor(self) -> type[RefineShards]:
        return RefineShards


STAGES = (RefineFit, RefineMaps)
