"""STEGO (arXiv 2203.08414): a sample's teacher features -> a head and a cluster probe -> class maps of all photos."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from pipeline.config import Config
from pipeline.engine.fits import device_of_fits, fit_threads
from pipeline.engine.progress import FitProgress
from pipeline.engine.shards import PhotoShards
from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.semantics.sample import sample_size, sampled_rows
from pipeline.sources.index import Index
from pipeline.stages.base import FitStage, Photos, Run, ShardStage
from pipeline.stages.facts import Content, Facts
from pipeline.stages.teacher import conditioned_content, load_teacher
from workers.images import with_rows_left_out
from workers.records import FEATURES_SCHEMA, SEMANTICS_SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases


class FeatureShards(PhotoShards):
    """Photos -> the teacher's patch features that STEGO learns from. Photos outside the sample are never fetched."""

    def make_worker(self) -> Any:
        from workers.semantics.stego import TEACHER_SIZE, TeacherParams, TeacherWorker

        semantics, workers = self.config.semantics, self.config.workers
        # A conditioning is of patches as large as those of the class maps.
        size = semantics.image_size if semantics.conditioned else TEACHER_SIZE
        params = TeacherParams(size, semantics.crops)
        return TeacherWorker(load_teacher(self), params, device=workers.device, batch_size=workers.batch_size)

    def process(self, shard: int, phases: Phases) -> pa.Table:
        index, records = self.index, self.index.records(shard)
        rows = sampled_rows(
            shard * index.shard_size,
            len(records),
            images=index.first_images,
            wanted=_sample_size(self.config, index),
            seed=self.config.seed,
        )
        table = self.process_records([records[row] for row in rows], phases)
        return with_rows_left_out(table, [record.image_id for record in records], rows)


class StegoShards(PhotoShards):
    """Photos -> class maps of the fitted head."""

    def make_worker(self) -> Any:
        from pipeline.semantics.stego import load_stego
        from workers.semantics.class_maps import crf_of
        from workers.semantics.stego import ClassMapParams, StegoWorker

        semantics, workers = self.config.semantics, self.config.workers
        folder = self.job.inputs["semantics_fit"].folder
        fitted = load_stego(folder, teacher=self.job.teacher, classes=semantics.classes)
        params = ClassMapParams(semantics.image_size, bool(semantics.flip), crf=crf_of(semantics.crf))
        return StegoWorker(
            load_teacher(self),
            fitted.head,
            fitted.probe,
            params,
            device=workers.device,
            batch_size=workers.batch_size,
            flow=self.flow,
        )


class Features(ShardStage):
    name = "features"
    after = ("clusters",)

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.method == "stego" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("conditioning",) if config.semantics.conditioned else ()

    def content(self, config: Config, facts: Facts) -> Content:
        wanted = _sample_size(config, facts.index)
        some = None if wanted == facts.index.first_images else {"images": wanted, "seed": config.seed}
        return facts.photos() | {"crops": config.semantics.crops, "sample": some} | conditioned_content(config)

    def images(self, config: Config, index: Index) -> int:
        return _sample_size(config, index)

    def schema(self, config: Config) -> pa.Schema:
        return FEATURES_SCHEMA

    def actor(self) -> type[FeatureShards]:
        return FeatureShards


class StegoFit(FitStage):
    name = "semantics_fit"
    trains = True

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.method == "stego" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("features",)

    def content(self, config: Config, facts: Facts) -> Content:
        semantics = config.semantics
        of_fit = {"classes", "neighbours", "batch_size", "steps", "max_images"}
        fit = semantics.model_dump(include=of_fit | ({"overclustering"} if semantics.conditioned else set()))
        terms = asdict(semantics.loss_terms())  # a preset is what its numbers are
        terms |= {f"{term}_shift": "auto" for term in semantics.auto_shifts}
        return {"method": "stego", "seed": config.seed, **fit, "terms": terms}

    def check(self, config: Config, index: Photos | None) -> None:
        semantics = config.semantics
        if index is None:
            return
        images = min(index.images, semantics.max_images or index.images)
        items = images * (5 if semantics.crops == "five" else 1)
        for key, needed in {"neighbours": max(2, semantics.neighbours + 1), "batch_size": semantics.batch_size}.items():
            if items < needed:
                raise ConfigError(
                    f"semantics.{key} {getattr(semantics, key)} needs {needed} photos or crops, and {images} photos "
                    f"give {items}: lower it, or give the source more photos"
                )

    def fit(self, run: Run, stage: Stage) -> str:
        from pipeline.semantics.stego import fit_stego
        from pipeline.semantics.stego_job import StegoSettings

        semantics, workers = run.config.semantics, run.config.workers
        settings = StegoSettings(
            classes=semantics.classes,
            terms=semantics.loss_terms(),
            auto_shifts=semantics.auto_shifts,
            conditioned=bool(semantics.conditioned),
            overclustering=int(semantics.overclustering) if semantics.conditioned else 1,
            neighbours=semantics.neighbours,
            batch_size=semantics.batch_size,
            steps=semantics.steps,
            seed=run.config.seed,
            max_images=semantics.max_images,
        )
        # A step is many small products, which more threads do not make faster.
        with FitProgress(stage.name, settings.steps) as progress, fit_threads(workers, workers.cpus) as cpus:
            fitted = fit_stego(
                run.stages["features"].parts(),
                stage.folder,
                settings,
                teacher=run.teacher or "",
                num_workers=workers.train_workers,
                device=device_of_fits(workers),
                cpus_per_worker=cpus,
                gpus_per_worker=workers.gpus,
                on_log=lambda entry: progress.update(int(entry["step"]), entry["correspondence"]),
            )
        return f"{semantics.steps} steps, loss {fitted.record['history'][-1]['correspondence']:.4g}"


class StegoMaps(ShardStage):
    name = "semantics"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.method == "stego" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("semantics_fit", "conditioning") if config.semantics.conditioned else ("semantics_fit",)

    def content(self, config: Config, facts: Facts) -> Content:
        return config.semantics.model_dump(include={"image_size", "flip", "crf"}) | conditioned_content(config)

    def schema(self, config: Config) -> pa.Schema:
        return SEMANTICS_SCHEMA

    def actor(self) -> type[StegoShards]:
        return StegoShards


def _sample_size(config: Config, index: Index) -> int:
    """How many photos of the source get features."""
    return sample_size(index.first_images, config.semantics.max_images)


STAGES = (Features, StegoFit, StegoMaps)
