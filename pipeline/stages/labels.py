"""Predictions and the labels before them -> the labels of the next round of self-training (CutLER, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Self

from pipeline.config import Config
from pipeline.engine.shards import ShardActor, read_part
from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.stages.base import Run, ShardStage, round_of, stage_of_round, thing_stage
from pipeline.stages.facts import Content, Facts
from workers.records import PREDICTIONS_SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.phases import Phases


class SelfLabelShards(ShardActor):
    """No device, no pixels."""

    def setup(self) -> None:
        from workers.training.self_training import SelfTrainingParams, SelfTrainingWorker

        config = self.config
        params = SelfTrainingParams(
            threshold=_threshold(config, round_of(self.job.stage.name)),
            max_iou=config.self_training.max_iou,
            most=config.self_training.most,
            max_cover=config.panoptic.max_cover,
            nested=config.train.nested is not None or _learnt_softly(config, round_of(self.job.stage.name)),
            soft=_learnt_softly(config, round_of(self.job.stage.name)),
        )
        self._worker = SelfTrainingWorker(params, num_things=config.clusters.k, num_stuff=config.num_stuff)

    def process(self, shard: int, phases: Phases) -> pa.Table:
        with phases("read"):
            predictions, *old = (read_part(used, shard) for used in self.job.stage.reads)
        if round_of(self.job.stage.name) > 1:
            old = old * 3  # one part that is panoptic, instances and semantics
        panoptic, instances, semantics = (*old, None)[:3]
        with phases("merge"):
            return self._worker.process(predictions, panoptic, instances=instances, semantics=semantics)


class SelfLabels(ShardStage):
    name = "labels"
    holds_labels = True

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls(number) for number in range(1, config.self_training.rounds + 1)]

    def inputs(self, config: Config) -> tuple[str, ...]:
        predictions = stage_of_round("predictions", self.round - 1)
        if self.round > 1:
            return (predictions, f"labels_{self.round - 1}")
        return (predictions, "panoptic", learnt_masks(config), *(("semantics",) if config.num_stuff else ()))

    def content(self, config: Config, facts: Facts) -> Content:
        settings = config.self_training.model_dump(include={"max_iou", "most"})
        soft = {"soft": True} if _learnt_softly(config, self.round) else {}
        return {"threshold": _threshold(config, self.round), **settings, **soft}

    def schema(self, config: Config) -> pa.Schema:
        return PREDICTIONS_SCHEMA

    def actor(self) -> type[SelfLabelShards]:
        return SelfLabelShards


def learnt_masks(config: Config) -> str:
    """The stage whose parts hold the whole masks that the model learns."""
    return thing_stage(config) if config.train.nested is None else "targets"


def require_predictions(run: Run, number: int) -> None:
    """ConfigError when no prediction was sure enough for the labels of a round: it would learn the old ones again."""
    predictions = run.stages[stage_of_round("predictions", number - 1)]
    if any(score >= _threshold(run.config, number) for score in _scores(predictions)):
        return
    surest = max(_scores(predictions), default=None)
    seen = "the model detects nothing" if surest is None else f"the surest has {surest:.3g}"
    raise ConfigError(
        f"no prediction has a score of self_training.thresholds {_threshold(run.config, number):g}, and {seen}, so "
        f"that round {number} would learn its old labels again: lower the threshold, or train the model longer first"
    )


def _scores(stage: Stage) -> Iterator[float]:
    """Of all predictions in the parts of a stage."""
    for shard in range(stage.shards):
        yield from read_part(stage, shard, ["score"])["score"].combine_chunks().flatten().drop_null().to_pylist()


def _learnt_softly(config: Config, number: int) -> bool:
    """Whether the labels that round `number` adds to were learnt with the probabilities that their scores say."""
    return config.train.soft or (number > 1 and config.self_training.soft)


def _threshold(config: Config, number: int) -> float:
    """The least score of a prediction that becomes a label in a round."""
    thresholds = config.self_training.thresholds
    return thresholds[min(number, len(thresholds)) - 1]


STAGES = (SelfLabels,)
