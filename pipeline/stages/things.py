"""Nested masks -> those that become things: the flat choice that clusters and panoptic labels are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from model.backbone.names import embedding_dim
from pipeline.config import Config
from pipeline.engine.shards import ShardActor, read_part
from pipeline.stages.base import ShardStage, thing_stage
from pipeline.stages.facts import Content, Facts, sections
from workers.records import instances_schema

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases


class ThingShards(ShardActor):
    """No device, no pixels."""

    def setup(self) -> None:
        from workers.things import ThingParams

        self._params = ThingParams(**self.config.things.model_dump())

    def process(self, shard: int, phases: Phases) -> pa.Table:
        from workers.things import choose_things

        with phases("read"):
            instances = read_part(self.job.inputs["instances"], shard)
        with phases("choose"):
            return choose_things(instances, self._params)


class Things(ShardStage):
    name = "things"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if thing_stage(config) == cls.name else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("instances",)

    def content(self, config: Config, facts: Facts) -> Content:
        return sections(config, "things")

    def schema(self, config: Config) -> pa.Schema:
        return instances_schema(embedding_dim(config.backbone.name))

    def actor(self) -> type[ThingShards]:
        return ThingShards


STAGES = (Things,)
