"""DatUS2 (arXiv 2401.12820): segments with an embedding each -> clusters of them -> class maps of all photos."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from model.backbone.names import embedding_dim
from pipeline.clusters.artifact import read_centroids
from pipeline.config import Config
from pipeline.engine.fits import kmeans_actors, said_now_and_then
from pipeline.engine.shards import PhotoShards, ShardActor, read_part
from pipeline.engine.stage import Stage
from pipeline.stages.base import FitStage, Run, ShardStage
from pipeline.stages.facts import Content, Facts
from workers.records import SEMANTICS_SCHEMA, segments_schema

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases


class SegmentShards(PhotoShards):
    """Photos -> segments, one embedding each."""

    def make_worker(self) -> Any:
        from workers.semantics.datus import SegmentParams, SegmentWorker

        workers = self.config.workers
        return SegmentWorker(
            self.load_backbone(),
            SegmentParams(),
            device=workers.device,
            batch_size=workers.batch_size,
            crop_batch=workers.crop_batch,
            processes=min(workers.batch_size, max(1, int(workers.cpus))),
        )


class DatusShards(ShardActor):
    """Segments and the centroids of their classes -> class maps. No device, no pixels."""

    def setup(self) -> None:
        from workers.semantics.datus import DatusWorker

        centroids = read_centroids(self.job.inputs["semantics_fit"].folder)
        self._worker = DatusWorker(
            centroids, fill_holes=self.config.semantics.fill_holes, threads=max(1, int(self.config.workers.cpus))
        )

    def process(self, shard: int, phases: Phases) -> pa.Table:
        with phases("read"):
            segments = read_part(self.job.inputs["segments"], shard)
        with phases("label"):
            return self._worker.process(segments)


class Segments(ShardStage):
    name = "segments"
    after = ("clusters",)

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.method == "datus" else []

    def content(self, config: Config, facts: Facts) -> Content:
        return facts.photos()

    def schema(self, config: Config) -> pa.Schema:
        return segments_schema(embedding_dim(config.backbone.name))

    def actor(self) -> type[SegmentShards]:
        return SegmentShards


class DatusFit(FitStage):
    name = "semantics_fit"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.method == "datus" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("segments",)

    def content(self, config: Config, facts: Facts) -> Content:
        return {"method": "datus", "seed": config.seed, "classes": config.semantics.classes}

    def fit(self, run: Run, stage: Stage) -> str:
        from pipeline.semantics.datus import fit_datus

        result = fit_datus(
            run.stages["segments"].parts(),
            stage.folder,
            classes=run.config.semantics.classes,
            seed=run.config.seed,
            **kmeans_actors(run.config.workers),
            on_iteration=said_now_and_then(stage.name),
        )
        return f"{result.iterations} iterations, inertia {result.inertia[-1]:.6g}"


class DatusMaps(ShardStage):
    """The class maps; where a network is to refine them, its first ones."""

    name = "semantics"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.method == "datus" and config.semantics.refine == "none" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("semantics_fit", "segments")

    def content(self, config: Config, facts: Facts) -> Content:
        return {"fill_holes": config.semantics.fill_holes}

    def schema(self, config: Config) -> pa.Schema:
        return SEMANTICS_SCHEMA

    def actor(self) -> type[DatusShards]:
        return DatusShards


class DatusDraft(DatusMaps):
    name = "semantics_draft"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.semantics.method == "datus" and config.semantics.refine != "none" else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("segments", "semantics_fit")


STAGES = (Segments, DatusFit, DatusMaps, DatusDraft)
