"""Instances, their classes and the class maps -> panoptic labels: things painted over stuff (U2Seg, section 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.clusters.artifact import read_centroids
from pipeline.config import Config
from pipeline.engine.shards import ShardActor, read_part
from pipeline.stages.base import ShardStage, thing_stage
from pipeline.stages.facts import Content, Facts, sections
from workers.masks import open_png
from workers.records import PANOPTIC_SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases


class PanopticShards(ShardActor):
    """No device, no pixels."""

    def setup(self) -> None:
        from workers.panoptic import PanopticWorker

        self._worker = PanopticWorker(
            read_centroids(self.job.inputs["clusters"].folder),
            spherical=self.config.clusters.spherical,
            num_stuff=self.config.num_stuff,
            max_cover=self.config.panoptic.max_cover,
            threads=max(1, int(self.config.workers.cpus)),
        )

    def process(self, shard: int, phases: Phases) -> pa.Table:
        with phases("read"):
            records = self.index.records(shard)
            instances = read_part(self.job.stage.reads[0], shard)
            maps = reasons = None
            if "semantics" in self.job.stage.inputs:
                semantics = read_part(self.job.inputs["semantics"], shard)
                maps = [None if png is None else np.asarray(open_png(png)) for png in semantics["labels"].to_pylist()]
                reasons = list(zip(semantics["status"].to_pylist(), semantics["error"].to_pylist(), strict=True))
        with phases("merge"):
            return self._worker.process(records, instances, maps, reasons)


class Panoptic(ShardStage):
    name = "panoptic"
    holds_labels = True

    def inputs(self, config: Config) -> tuple[str, ...]:
        return (thing_stage(config), "clusters", *(("semantics",) if config.num_stuff else ()))

    def content(self, config: Config, facts: Facts) -> Content:
        return sections(config, "panoptic")

    def schema(self, config: Config) -> pa.Schema:
        return PANOPTIC_SCHEMA

    def actor(self) -> type[PanopticShards]:
        return PanopticShards


STAGES = (Panoptic,)
