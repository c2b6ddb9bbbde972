"""A run as the report and the evaluation find it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.sources import Index
from pipeline.stages import Stage
from workers.decode import DecodeLimits


@dataclass(frozen=True, slots=True)
class Run:
    """`done` are the finished shards of each shard stage, `fitted` says whether the clusters are."""

    uri: str
    config: Config
    index: Index
    stages: dict[str, Stage]
    done: dict[str, set[int]]
    fitted: bool

    @property
    def limits(self) -> DecodeLimits:
        return DecodeLimits(max_pixels=self.config.decode.max_pixels, min_side=self.config.decode.min_side)
