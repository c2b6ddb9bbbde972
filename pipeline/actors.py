"""The actors of the shard stages, one a stage: what a shard's table is made of."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.config import Config
from pipeline.shards import PhotoShards, ShardActor, read_part
from pipeline.stages import base_name, features_sample, round_of, threshold_of
from workers.masks import open_png
from workers.phases import Phases
from workers.records import ImageRecord

if TYPE_CHECKING:
    from workers.images import LoadedImage


class InstanceShards(PhotoShards):
    """Photos -> masks and their embeddings."""

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


class FeatureShards(PhotoShards):
    """Photos -> the teacher's patch features that STEGO learns from. Photos outside the sample are never fetched."""

    def make_worker(self) -> Any:
        from workers.stego import TeacherParams, TeacherWorker

        params = TeacherParams(crops=self.config.semantics.crops)
        workers = self.config.workers
        return TeacherWorker(self.load_backbone(), params, device=workers.device, batch_size=workers.batch_size)

    def process(self, shard: int, phases: Phases) -> pa.Table:
        from pipeline.semantics.stego_sample import sampled_rows
        from workers.stego import with_rows_left_out

        index, records = self.index, self.index.records(shard)
        rows = sampled_rows(
            shard * index.shard_size,
            len(records),
            images=index.images,
            wanted=features_sample(self.config, index),
            seed=self.config.seed,
        )
        table = self.process_records([records[row] for row in rows], phases)
        return with_rows_left_out(table, [record.image_id for record in records], rows)


class StegoShards(PhotoShards):
    """Photos -> class maps of the fitted STEGO head."""

    def make_worker(self) -> Any:
        from pipeline.semantics.stego import load_stego
        from pipeline.stages import teacher_identity
        from workers.crf import STEGO
        from workers.stego import ClassMapParams, StegoWorker

        semantics, workers = self.config.semantics, self.config.workers
        folder = self.job.inputs["semantics_fit"].folder
        fitted = load_stego(folder, teacher=teacher_identity(self.config), classes=semantics.classes)
        params = ClassMapParams(semantics.image_size, semantics.flip, crf=STEGO if semantics.crf else None)
        return StegoWorker(
            self.load_backbone(),
            fitted.head,
            fitted.probe,
            params,
            device=workers.device,
            batch_size=workers.batch_size,
        )


class SegmentShards(PhotoShards):
    """Photos -> DatUS2's segments, one embedding each."""

    def make_worker(self) -> Any:
        from workers.datus import SegmentParams, SegmentWorker

        workers = self.config.workers
        return SegmentWorker(
            self.load_backbone(),
            SegmentParams(),
            device=workers.device,
            batch_size=workers.batch_size,
            crop_batch=workers.crop_batch,
            processes=min(workers.batch_size, max(1, int(workers.cpus))),
        )


class DatusShards(ShardActor):
    """Segments and the centroids of their classes -> class maps. No device, no pixels."""

    def setup(self) -> None:
        from workers.datus import DatusWorker

        centroids = read_centroids(self.job.inputs["semantics_fit"].folder)
        self._worker = DatusWorker(
            centroids, fill_holes=self.config.semantics.fill_holes, threads=max(1, int(self.config.workers.cpus))
        )

    def process(self, shard: int, phases: Phases) -> pa.Table:
        with phases("read"):
            segments = read_part(self.job.inputs["segments"], shard)
        with phases("label"):
            return self._worker.process(segments)


class RefineShards(PhotoShards):
    """Photos -> class maps of the network that was trained on the first ones."""

    def make_worker(self) -> Any:
        from pipeline.semantics.refine import load_deeplab
        from workers.refine import RefineWorker

        model, settings = load_deeplab(self.job.inputs["refine_fit"].folder)
        workers = self.config.workers
        return RefineWorker(model, image_size=settings.image_size, device=workers.device, batch_size=workers.batch_size)


class PanopticShards(ShardActor):
    """Instances, the centroids and the class maps -> panoptic labels. No device, no pixels."""

    def setup(self) -> None:
        from workers.panoptic import PanopticWorker

        semantics = self.config.semantics
        self._worker = PanopticWorker(
            read_centroids(self.job.inputs["clusters"].folder),
            spherical=self.config.clusters.spherical,
            num_stuff=0 if semantics.method == "none" else semantics.classes,
            max_cover=self.config.panoptic.max_cover,
            threads=max(1, int(self.config.workers.cpus)),
        )

    def process(self, shard: int, phases: Phases) -> pa.Table:
        with phases("read"):
            records = self.index.records(shard)
            instances = read_part(self.job.inputs["instances"], shard)
            maps = None
            if "semantics" in self.job.stage.inputs:
                labels = read_part(self.job.inputs["semantics"], shard, ["labels"])["labels"].to_pylist()
                maps = [None if png is None else np.asarray(open_png(png)) for png in labels]
        with phases("merge"):
            return self._worker.process(records, instances, maps)

    def pixels(self, table: pa.Table) -> dict[str, int]:
        """Pixels of things, of stuff, and void."""
        counts = {"thing": 0, "stuff": 0, "void": 0}
        for row in table.select(["height", "width", "panoptic", "segments"]).to_pylist():
            if row["panoptic"] is not None:
                areas = {
                    kind: sum(s["area"] for s in row["segments"] if s["is_thing"] is kind) for kind in (True, False)
                }
                counts["thing"] += areas[True]
                counts["stuff"] += areas[False]
                counts["void"] += row["height"] * row["width"] - areas[True] - areas[False]
        return counts


class PredictionShards(PhotoShards):
    """Photos -> what the trained panoptic model sees in them."""

    def make_worker(self) -> Any:
        from pipeline.predict.weights import load_weights
        from workers.predict import PredictWorker

        test, workers = self.config.predictions, self.config.workers
        (trained,) = self.job.stage.inputs
        model = load_weights(self.job.inputs[trained].folder).model
        return PredictWorker(
            model, device=workers.device, batch_size=workers.batch_size, short=test.short, max_side=test.max_side
        )

    def compute(self, images: Iterable[LoadedImage], records: Sequence[ImageRecord], phases: Phases) -> pa.Table:
        return self.worker.process(images, phases, uris={record.image_id: record.uri for record in records})


class SelfLabelShards(ShardActor):
    """Predictions and the labels before them -> the labels of the next round of self-training."""

    def setup(self) -> None:
        from workers.self_training import SelfTrainingParams, SelfTrainingWorker

        config = self.config
        params = SelfTrainingParams(
            threshold=threshold_of(config, round_of(self.job.stage.name)),
            max_iou=config.self_training.max_iou,
            most=config.self_training.most,
            max_cover=config.panoptic.max_cover,
        )
        self._worker = SelfTrainingWorker(params, num_things=config.clusters.k, num_stuff=config.num_stuff)

    def process(self, shard: int, phases: Phases) -> pa.Table:
        with phases("read"):
            predictions, *old = (read_part(self.job.inputs[name], shard) for name in self.job.stage.inputs)
        if round_of(self.job.stage.name) > 1:
            old = old * 3  # one part that is panoptic, instances and semantics
        panoptic, instances, semantics = (*old, None)[:3]
        with phases("merge"):
            return self._worker.process(predictions, panoptic, instances=instances, semantics=semantics)


def actor_for(stage: str, config: Config) -> type[ShardActor]:
    """The actor of a shard stage; that of `semantics` depends on the method."""
    if stage == "semantics" and config.semantics.refine != "none":
        return RefineShards
    maps = StegoShards if config.semantics.method == "stego" else DatusShards
    return {
        "instances": InstanceShards,
        "features": FeatureShards,
        "segments": SegmentShards,
        "semantics_draft": DatusShards,
        "semantics": maps,
        "panoptic": PanopticShards,
        "predictions": PredictionShards,
        "labels": SelfLabelShards,
    }[base_name(stage)]


def read_centroids(folder: str) -> np.ndarray:
    """(K, D) float32 of a k-means artifact."""
    data = io.BytesIO(storage.read_bytes(storage.join(folder, "centroids.npy")))
    centroids: np.ndarray = np.load(data, allow_pickle=False)
    return centroids
