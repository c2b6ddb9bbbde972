"""Clusters of patches: a sample's patch features -> their conditioning -> merged clusters -> class maps of all photos.

The conditioning also serves the other methods, where `semantics.conditioned` says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from model.backbone.names import embedding_dim
from pipeline.config import Config
from pipeline.engine.fits import kmeans_actors, said_now_and_then
from pipeline.engine.shards import PhotoShards
from pipeline.engine.stage import Stage
from pipeline.semantics.sample import sample_size, sampled_rows
from pipeline.sources.index import Index
from pipeline.stages.base import FitStage, Run, ShardStage
from pipeline.stages.facts import Content, Facts
from workers.images import with_rows_left_out
from workers.records import SEMANTICS_SCHEMA, patches_schema

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases

PATCHES = 1 << 16  # of the whole sample, about
LEAST_PATCHES, MOST_PATCHES = 32, 1024  # of a photo
DIFFERENCES = 128  # of each kind, of a photo


class PatchShards(PhotoShards):
    """Photos of the sample -> some of their patch features. Photos outside the sample are never fetched."""

    def make_worker(self) -> Any:
        from workers.semantics.patches import PatchParams, PatchSampler

        semantics, workers = self.config.semantics, self.config.workers
        patches = min(MOST_PATCHES, max(LEAST_PATCHES, -(-PATCHES // _sample_size(self.config, self.index))))
        params = PatchParams(
            semantics.features, semantics.image_size, patches, min(patches, DIFFERENCES), self.config.seed
        )
        return PatchSampler(self.load_backbone(), params, device=workers.device, batch_size=workers.batch_size)

    def process(self, shard: int, phases: Phases) -> pa.Table:
        index, records = self.index, self.index.records(shard)
        wanted = _sample_size(self.config, index)
        rows = sampled_rows(
            shard * index.shard_size, len(records), images=index.first_images, wanted=wanted, seed=self.config.seed
        )
        table = self.process_records([records[row] for row in rows], phases)
        return with_rows_left_out(table, [record.image_id for record in records], rows)


class PatchMapShards(PhotoShards):
    """Photos -> class maps."""

    def make_worker(self) -> Any:
        from pipeline.semantics.patches import load_codebook
        from workers.semantics.class_maps import crf_of
        from workers.semantics.patches import PatchMapWorker

        semantics, workers = self.config.semantics, self.config.workers
        return PatchMapWorker(
            self.load_backbone(),
            load_codebook(self.job.inputs["semantics_fit"].folder),
            output=semantics.features,
            image_size=semantics.image_size,
            flip=bool(semantics.flip),
            crf=crf_of(semantics.crf),
            device=workers.device,
            batch_size=workers.batch_size,
            flow=self.flow,
        )


class Patches(ShardStage):
    name = "patches"
    after = ("clusters",)

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.conditions_patches else []

    def content(self, config: Config, facts: Facts) -> Content:
        wanted = _sample_size(config, facts.index)
        sampled = config.semantics.model_dump(include={"features", "image_size"})
        return facts.photos() | sampled | {"sample": wanted, "seed": config.seed}

    def images(self, config: Config, index: Index) -> int:
        return _sample_size(config, index)

    def schema(self, config: Config) -> pa.Schema:
        return patches_schema(embedding_dim(config.backbone.name))

    def actor(self) -> type[PatchShards]:
        return PatchShards


class ConditioningFit(FitStage):
    name = "conditioning"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.conditions_patches else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("patches",)

    def content(self, config: Config, facts: Facts) -> Content:
        return {"components": config.semantics.components}

    def fit(self, run: Run, stage: Stage) -> str:
        from pipeline.semantics.patches import fit_conditioning

        fitted = fit_conditioning(run.stages["patches"].parts(), stage.folder, run.config.semantics.components)
        return f"{fitted.directions.shape[1]} components of {len(fitted.mean)} channels"


class PatchFit(FitStage):
    name = "semantics_fit"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.method == "kmeans" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("patches", "conditioning")

    def content(self, config: Config, facts: Facts) -> Content:
        fit = config.semantics.model_dump(include={"classes", "overclustering"})
        return {"method": "kmeans", "seed": config.seed, **fit}

    def fit(self, run: Run, stage: Stage) -> str:
        from pipeline.semantics.merged import MergeSettings
        from pipeline.semantics.patches import fit_patches, read_conditioning

        semantics = run.config.semantics
        record = fit_patches(
            run.stages["patches"].parts(),
            read_conditioning(run.stages["conditioning"].folder),
            stage.folder,
            MergeSettings(semantics.classes, int(semantics.overclustering), run.config.seed),
            actors=kmeans_actors(run.config.workers),
            on_iteration=said_now_and_then(stage.name),
        )
        return f"{record['clusters']} clusters after {record['iterations']} iterations are {record['classes']} classes"


class PatchMaps(ShardStage):
    name = "semantics"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.method == "kmeans" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("semantics_fit",)

    def content(self, config: Config, facts: Facts) -> Content:
        return config.semantics.model_dump(include={"features", "image_size", "flip", "crf"})

    def schema(self, config: Config) -> pa.Schema:
        return SEMANTICS_SCHEMA

    def actor(self) -> type[PatchMapShards]:
        return PatchMapShards


def _sample_size(config: Config, index: Index) -> int:
    return sample_size(index.first_images, config.semantics.sample_images)


STAGES = (Patches, ConditioningFit, PatchFit, PatchMaps)
