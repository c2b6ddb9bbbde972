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
from pipeline.semantics.sample import sample_size, sampled_rows
from pipeline.sources.index import Index
from pipeline.stages.base import FitStage, Run, ShardStage
from pipeline.stages.facts import Content, Facts
from pipeline.stages.teacher import conditioned_content, load_teacher
from workers.records import SEMANTICS_SCHEMA, segments_schema

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases


class SegmentShards(PhotoShards):
    """Photos -> segments, one embedding each."""

    def make_worker(self) -> Any:
        from workers.semantics.datus import SegmentParams, SegmentWorker
        from workers.semantics.patch_segments import PatchSegmentWorker

        semantics, workers = self.config.semantics, self.config.workers
        options: dict[str, Any] = {
            "device": workers.device,
            "batch_size": workers.batch_size,
            "processes": min(workers.batch_size, max(1, int(workers.cpus))),
        }
        if semantics.conditioned:
            return PatchSegmentWorker(load_teacher(self), image_size=semantics.image_size, **options)
        return SegmentWorker(self.load_backbone(), SegmentParams(), crop_batch=workers.crop_batch, **options)


class DatusShards(ShardActor):
    """Segments and the centroids of their classes -> class maps. No device, no pixels."""

    def setup(self) -> None:
        from pipeline.semantics.datus import read_classes
        from workers.semantics.datus import DatusWorker

        semantics, folder = self.config.semantics, self.job.inputs["semantics_fit"].folder
        self._worker = DatusWorker(
            read_centroids(folder),
            read_classes(folder) if semantics.conditioned else None,
            fill_holes="nearest" if semantics.fill_holes == "nearest" else "none",
            threads=max(1, int(self.config.workers.cpus)),
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

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("conditioning",) if config.semantics.conditioned else ()

    def content(self, config: Config, facts: Facts) -> Content:
        return facts.photos() | conditioned_content(config)

    def schema(self, config: Config) -> pa.Schema:
        dim = embedding_dim(config.backbone.name)
        return segments_schema(min(dim, config.semantics.components) if config.semantics.conditioned else dim)

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
        semantics = config.semantics
        sampled = {"overclustering", "sample_images"} if semantics.conditioned else set[str]()
        return {"method": "datus", "seed": config.seed, **semantics.model_dump(include={"classes", *sampled})}

    def fit(self, run: Run, stage: Stage) -> str:
        return (self._fit_merged if run.config.semantics.conditioned else self._fit_published)(run, stage)

    def _fit_merged(self, run: Run, stage: Stage) -> str:
        from pipeline.semantics.datus import fit_merged_segments
        from pipeline.semantics.merged import MergeSettings

        semantics, seed = run.config.semantics, run.config.seed
        record = fit_merged_segments(
            run.stages["segments"].parts(),
            sampled_of_shards(run.index, semantics.sample_images, seed),
            stage.folder,
            MergeSettings(semantics.classes, int(semantics.overclustering), seed),
            actors=kmeans_actors(run.config.workers),
            on_iteration=said_now_and_then(stage.name),
        )
        return f"{record['clusters']} clusters after {record['iterations']} iterations are {record['classes']} classes"

    def _fit_published(self, run: Run, stage: Stage) -> str:
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


def sampled_of_shards(index: Index, wanted: int, seed: int) -> list[list[int]]:
    """The rows of each shard whose segments are clustered."""
    size, images = index.shard_size, index.first_images
    options = {"images": images, "wanted": sample_size(images, wanted), "seed": seed}
    return [sampled_rows(k * size, index.size(k), **options) for k in range(index.shards)]


STAGES = (Segments, DatusFit, DatusMaps, DatusDraft)
