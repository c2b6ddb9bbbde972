"""Nested masks -> those that become things: the flat choice that clusters and panoptic labels are made of, with their
embeddings conditioned by a fit over a sample."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from pipeline.config import Config
from pipeline.engine.receipts import Receipt
from pipeline.engine.shards import ShardActor, read_part
from pipeline.engine.stage import ARTIFACT, Stage, digest
from pipeline.stages.base import FitStage, Run, ShardStage, thing_stage
from pipeline.stages.facts import Content, Facts, sections
from pipeline.stages.instances import GO_ON, count_empty
from pipeline.store import storage
from workers.conditioning import Conditioning, Moments, whitening
from workers.records import instances_schema
from workers.things import ThingParams, choose_things, embeddings_of, score_of_two, scores_of, with_embeddings

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases

CONDITIONING = "conditioning.npz"
SAMPLED_PARTS = 64  # spread over the source: some ten thousand masks tell the directions of a few hundred channels


class ThingShards(ShardActor):
    """No device, no pixels."""

    def setup(self) -> None:
        fitted = self.job.inputs["embedding_fit"].folder
        self._params = _params(self.config, read_min_score(fitted))
        self._conditioning = read_conditioning(fitted)

    def process(self, shard: int, phases: Phases) -> pa.Table:
        with phases("read"):
            instances = read_part(self.job.inputs["instances"], shard)
        with phases("choose"):
            things = choose_things(instances, self._params)
            return with_embeddings(things, self._conditioning(embeddings_of(things)))


class EmbeddingFit(FitStage):
    """The chosen masks of a sample -> the mean and the whitened principal components of their embeddings, and the score
    from which a mask is chosen, where the configuration leaves it open."""

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
        shards = np.unique(np.linspace(0, instances.shards - 1, SAMPLED_PARTS).astype(int)).tolist()
        parts = [choose_things(read_part(instances, shard), _params(run.config, 0.0)) for shard in shards]
        least = score_of_two(parts) if settings.min_score == "auto" else float(settings.min_score)
        chosen = [(scores_of(part) >= least, embeddings_of(part)) for part in parts]
        moments = Moments(chosen[0][1].shape[1])
        for sure, rows in chosen:
            moments.add(rows[sure])
        fitted = whitening(moments, settings.components, settings.whitening)
        data = fitted.to_bytes()
        storage.write_bytes(storage.join(stage.folder, CONDITIONING), data)
        components = int(fitted.directions.any(0).sum())
        record = {"masks": moments.count, "components": components, "min_score": least, "content": digest(data.hex())}
        storage.write_bytes(storage.join(stage.folder, ARTIFACT), json.dumps(record).encode())
        return (
            f"{components} components of the embeddings of {moments.count} masks with a score of at least {least:.3g}"
        )


class Things(ShardStage):
    name = "things"
    watched = True

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

    def complaint(self, config: Config, receipts: Sequence[Receipt], *, final: bool) -> str | None:
        """Most readable photos have no thing."""
        empty, readable = count_empty(receipts)
        if not final or empty <= config.run.max_empty * readable:
            return None
        return (
            f"{empty} of {readable} readable photos have no mask whose score is high enough for a thing. Lower "
            f"things.min_score ({config.things.min_score}). {GO_ON}"
        )


def read_conditioning(folder: str) -> Conditioning:
    """The conditioning in the artifact folder of a fit."""
    return Conditioning.from_bytes(storage.read_bytes(storage.join(folder, CONDITIONING)))


def read_min_score(folder: str) -> float:
    """The least score of a mask that becomes a thing."""
    return float(json.loads(storage.read_bytes(storage.join(folder, ARTIFACT)))["min_score"])


def _params(config: Config, min_score: float) -> ThingParams:
    return ThingParams(min_score, config.things.max_overlap, config.things.most)


STAGES = (EmbeddingFit, Things)
