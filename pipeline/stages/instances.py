"""Photos -> masks, a score and an embedding each (MaskCut, CutLER, arXiv 2301.11320)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.backbone.names import embedding_dim, patch_size
from pipeline.config import Config
from pipeline.engine.shards import PhotoShards
from pipeline.errors import ConfigError
from pipeline.stages.base import ShardStage
from pipeline.stages.facts import Content, Facts, sections
from workers.records import instances_schema

if TYPE_CHECKING:
    import pyarrow as pa


class InstanceShards(PhotoShards):
    """Holds the backbone; fetches, cuts, refines and embeds."""

    def make_worker(self) -> Any:
        from workers.crf import CrfParams
        from workers.instances import InstanceParams, InstanceWorker

        config, backbone = self.config, self.load_backbone()
        params = InstanceParams(
            **config.maskcut.model_dump(),
            crf=CrfParams(**config.crf.model_dump(exclude={"min_iou"})),
            min_iou=config.crf.min_iou,
            crop_size=round(config.embedding.crop_size / backbone.patch_size) * backbone.patch_size,
        )
        workers = config.workers
        return InstanceWorker(
            backbone, params, device=workers.device, batch_size=workers.batch_size, crop_batch=workers.crop_batch
        )


class Instances(ShardStage):
    name = "instances"

    def content(self, config: Config, facts: Facts) -> Content:
        return facts.photos() | sections(config, "maskcut", "crf", "embedding")

    def check(self, config: Config) -> None:
        patch = patch_size(config.backbone.name)
        for key, size in (
            ("maskcut.image_size", config.maskcut.image_size),
            ("embedding.crop_size", config.embedding.crop_size),
        ):
            if size < 2 * patch:
                raise ConfigError(
                    f"{key}: {size} px is less than 2 patches of {config.backbone.name} ({patch} px); raise it"
                )

    def schema(self, config: Config) -> pa.Schema:
        return instances_schema(embedding_dim(config.backbone.name))

    def actor(self) -> type[InstanceShards]:
        return InstanceShards


STAGES = (Instances,)
