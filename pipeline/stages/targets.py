"""Nested masks above a score, each with its class: what the panoptic model learns beside the few that became things."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from pipeline.clusters.artifact import read_centroids
from pipeline.config import Config
from pipeline.engine.shards import ShardActor, read_part
from pipeline.stages.base import ShardStage
from pipeline.stages.facts import Content, Facts
from pipeline.stages.things import read_conditioning
from workers.panoptic import nearest_categories
from workers.records import TARGETS_SCHEMA
from workers.things import ThingParams, choose_things, embeddings_of, with_categories, with_embeddings

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases

EVERYTHING = 1.0  # of a mask may lie in one chosen before


class TargetShards(ShardActor):
    """No device, no pixels."""

    def setup(self) -> None:
        train = self.config.train
        assert train.nested is not None  # else there is no such stage
        self._params = ThingParams(train.nested, EVERYTHING, train.nested_most)
        self._conditioning = read_conditioning(self.job.inputs["embedding_fit"].folder)
        self._centroids_KD = read_centroids(self.job.inputs["clusters"].folder)

    def process(self, shard: int, phases: Phases) -> pa.Table:
        with phases("read"):
            instances = read_part(self.job.inputs["instances"], shard)
        with phases("choose"):
            chosen = choose_things(instances, self._params)
            chosen = with_embeddings(chosen, self._conditioning(embeddings_of(chosen)))
            spherical, threads = self.config.clusters.spherical, max(1, int(self.config.workers.cpus))
            classes = nearest_categories(chosen["embedding"], self._centroids_KD, spherical=spherical, threads=threads)
            return with_categories(chosen, classes)


class Targets(ShardStage):
    name = "targets"
    version = 2  # a mask in another is none of it less for a share that was rounded to above 1

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if config.train.steps and config.train.nested is not None else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("instances", "embedding_fit", "clusters")

    def content(self, config: Config, facts: Facts) -> Content:
        return config.train.model_dump(include={"nested", "nested_most"})

    def schema(self, config: Config) -> pa.Schema:
        return TARGETS_SCHEMA

    def actor(self) -> type[TargetShards]:
        return TargetShards


STAGES = (Targets,)
