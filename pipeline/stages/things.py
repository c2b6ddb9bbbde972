"""Nested masks -> those that become things: the flat choice that clusters and panoptic labels are made of, with their
embeddings conditioned by a fit over a sample."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

import numpy as np

from pipeline.config import Config
from pipeline.engine.shards import ShardActor, read_part
from pipeline.engine.stage import ARTIFACT, Stage
from pipeline.stages.base import FitStage, Run, ShardStage, thing_stage
from pipeline.stages.facts import Content, Facts, sections
from pipeline.store import storage
from workers.conditioning import Conditioning, Moments
from workers.records import instances_schema
from workers.things import ThingParams, choose_things, embeddings_of, with_embeddings

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases

CONDITIONING = "conditioning.npz"
SAMPLED_PARTS = 64  # spread over the source: some ten thousand masks tell the directions of a few hundred channels


class ThingShards(ShardActor):
    """No device, no pixels."""

    def setup(self) -> None:
        self._params = _params(self.config)
        self._conditioning = read_conditioning(self.job.inputs["embedding_fit"].folder)

    def process(self, shard: int, phases: Phases) -> pa.Table:
        with phases("read"):
            instances = read_part(self.job.inputs["instances"], shard)
        with phases("choose"):
            things = choose_things(instances, self._params)
            return with_embeddings(things, self._conditioning(embeddings_of(things)))


class EmbeddingFit(FitStage):
    """Embeddings of a sample of the chosen masks -> mean and whitened principal components."""

    name = "embedding_fit"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if thing_stage(config) == Things.name else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("instances",)

    def content(self, config: Config, facts: Facts) -> Content:
        return sections(config, "things")

    def fit(self, run: Run, stage: Stage) -> str:
        instances, settings = run.stages["instances"], run.config.things
        moments: Moments | None = None
        for shard in np.unique(np.linspace(0, instances.shards - 1, SAMPLED_PARTS).astype(int)).tolist():
            rows = embeddings_of(choose_things(read_part(instances, shard), _params(run.config)))
            moments = moments or Moments(rows.shape[1])
            moments.add(rows)
        assert moments is not None
        fitted = moments.whitening(settings.components, settings.whitening)
        stream = io.BytesIO()
        np.savez(stream, mean=fitted.mean, directions=fitted.directions)
        storage.write_bytes(storage.join(stage.folder, CONDITIONING), stream.getvalue())
        record = {"masks": moments.count, "components": int(fitted.directions.any(0).sum())}
        storage.write_bytes(storage.join(stage.folder, ARTIFACT), json.dumps(record).encode())
        return f"{record['components']} components of the embeddings of {moments.count} masks"


class Things(ShardStage):
    name = "things"

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls()] if thing_stage(config) == cls.name else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("instances", "embedding_fit")

    def content(self, config: Config, facts: Facts) -> Content:
        return sections(config, "things")

    def schema(self, config: Config) -> pa.Schema:
        return instances_schema(config.things.components)

    def actor(self) -> type[ThingShards]:
        return ThingShards


def read_conditioning(folder: str) -> Conditioning:
    """The conditioning in the artifact folder of a fit."""
    data = io.BytesIO(storage.read_bytes(storage.join(folder, CONDITIONING)))
    with np.load(data, allow_pickle=False) as saved:
        return Conditioning(saved["mean"], saved["directions"])


def _params(config: Config) -> ThingParams:
    return ThingParams(**config.things.model_dump(include={"min_score", "max_overlap", "most"}))


STAGES = (EmbeddingFit, Things)
