"""Photos -> what the trained panoptic model sees in them, as labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

from pipeline.config import Config
from pipeline.engine.shards import PhotoShards
from pipeline.stages.base import Run, ShardStage, stage_of_round
from pipeline.stages.facts import Content, Facts
from pipeline.store import storage
from workers.records import PREDICTIONS_SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from model.panoptic.network import PanopticCascadeRCNN
    from workers.images import LoadedImage
    from workers.phases import Phases
    from workers.records import ImageRecord


class PredictionShards(PhotoShards):
    """Holds the model."""

    def make_worker(self) -> Any:
        from pipeline.predict.weights import load_weights
        from workers.predict import PredictWorker

        test, workers = self.config.predictions, self.config.workers
        (trained,) = self.job.stage.reads
        backbone = self.config.backbone.weights if self.config.train.network.backbone == "vit" else None
        model = load_weights(trained.folder, device=workers.device, backbone_weights=backbone).model
        return PredictWorker(
            model,
            kept_tokens=self._kept_tokens(model),
            device=workers.device,
            batch_size=workers.batch_size,
            short=test.short,
            max_side=test.max_side,
            flow=self.flow,
        )

    def _kept_tokens(self, model: PanopticCascadeRCNN) -> Callable[[Tensor], Tensor | None] | None:
        """Those of the training, where it saw photos at this size."""
        from pipeline.predict.frozen import FrozenBackbone
        from pipeline.train.tokens import FOLDER, TokenCache

        if model.frozen is None or not kept_alike(self.config):
            return None
        folder, backbone = storage.join(self.config.run.uri, FOLDER), FrozenBackbone.of(self.config.backbone)
        return TokenCache(folder, model.frozen, backbone, device=self.config.workers.device).kept

    def compute(self, images: Iterable[LoadedImage], records: Sequence[ImageRecord], phases: Phases) -> pa.Table:
        return self.worker.process(images, phases, uris={record.image_id: record.uri for record in records})


def kept_alike(config: Config) -> bool:
    """Whether the training keeps tokens of photos of the size that the model looks at."""
    train, test = config.train, config.predictions
    return train.cache and test.short in train.short_sides and test.max_side == train.max_side


class Predictions(ShardStage):
    name = "predictions"
    holds_labels = True

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        """Those that are asked for, and those that the next round learns from."""
        rounds = config.self_training.rounds
        last = rounds if config.predictions.enabled else rounds - 1
        return [cls(number) for number in range(last + 1)] if config.train.steps else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        return (stage_of_round("train", self.round),)

    def content(self, config: Config, facts: Facts) -> Content:
        looked_at = {key: facts.photos()[key] for key in ("index", "shard_size", "decode")}
        kept = {"tokens": "float16"} if kept_alike(config) else {}
        return {"test": config.predictions.model_dump(exclude={"enabled"}), **kept, **looked_at}

    def schema(self, config: Config) -> pa.Schema:
        return PREDICTIONS_SCHEMA

    def actor(self) -> type[PredictionShards]:
        return PredictionShards

    def categories(self, run: Run) -> list[dict[str, Any]]:
        """Those that the model was trained on, which may be human ones."""
        from pipeline.predict.weights import read_categories

        (trained,) = self.inputs(run.config)
        return read_categories(run.stages[trained].folder)


STAGES = (Predictions,)
