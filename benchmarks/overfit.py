"""Whether the panoptic model learns: a few generated scenes with their true labels, by heart, on a CPU.

    python benchmarks/overfit.py [--scenes 8] [--steps 400] [--batch 4] [--rate 0.03] [--size 160] [--width 16]
                                 [--threads 2] [--output FILE]

Trains a small model (ResNet of one block a stage) through `fit_panoptic` and scores it on the same scenes. Prints
JSON: mask AP50, panoptic quality, seconds a step, and the loss now and then.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, publish
from PIL import Image
from pycocotools import mask as codec

from model.checkpoint.detectron2 import load_state
from model.checkpoint.files import load_checkpoint
from model.metrics.instances import InstanceAP, instance_of
from model.metrics.panoptic import PanopticQuality
from model.panoptic.network import PanopticCascadeRCNN, test_size
from pipeline.operations.demo.scenes import write_scenes
from pipeline.train.coco_photos import CocoPhotos
from pipeline.train.fit import fit_panoptic
from pipeline.train.job import TrainSettings
from workers.decode import DecodeLimits
from workers.training.samples import Sample
from workers.training.trainer import Optimisation


def small_model(width: int) -> dict[str, Any]:
    return {
        "depths": [1, 1, 1, 1],
        "width": width,
        "channels": 4 * width,
        "box_dim": 8 * width,
        "mask_channels": 2 * width,
        "semantic_channels": 4 * width,
        "rpn_pre_nms": [200, 100],
        "rpn_post_nms": [100, 50],
        "roi_sampled": 64,
    }


def encoded(mask: np.ndarray) -> Any:
    return codec.encode(np.asfortranarray(mask.astype(np.uint8)))


def truth(sample: Sample, things: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The id map of a sample and its segments; stuff has ids above those of the things."""
    ids = np.where(sample.semantic > 0, 1000 + sample.semantic.astype(np.int32), 0)
    segments = [{"id": int(i), "category_id": things + int(i) - 1000} for i in np.unique(ids[ids > 0])]
    for number, (mask, label) in enumerate(zip(sample.masks, sample.classes, strict=True), start=1):
        ids[mask] = number
        segments.append({"id": number, "category_id": int(label) + 1})
    return ids, segments


def score(model: PanopticCascadeRCNN, photos: CocoPhotos, short: int) -> dict[str, float]:
    quality = PanopticQuality({c: c <= photos.num_things for c in range(1, photos.num_things + photos.num_stuff + 1)})
    precision = InstanceAP("segm")
    for index in range(len(photos)):
        sample = photos.sample(index)
        height, width = test_size(*sample.size, short)
        pixels = np.array(Image.fromarray(sample.image).resize((width, height), Image.Resampling.BILINEAR))
        found = model.predict([torch.from_numpy(pixels).permute(2, 0, 1)], output_sizes=[sample.size])[0]
        true = [instance_of(int(c), encoded(m)) for c, m in zip(sample.classes, sample.masks, strict=True)]
        detections = [
            instance_of(int(c), encoded(m.numpy()), score=float(s))
            for c, m, s in zip(found.classes, found.masks, found.scores, strict=True)
        ]
        precision.update(true, detections)
        combined = found.panoptic()
        predicted = [{"id": s.id, "category_id": s.category} for s in combined.segments]
        quality.update(*truth(sample, photos.num_things), combined.ids.numpy(), predicted)
    return {"mask_ap50": precision.result().all.ap50, "pq": quality.result().all.pq}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(folder, options.scenes, 0, (256, 256))
        photos = CocoPhotos(f"{folder}/truth.json", f"{folder}/images", pngs=f"{folder}/truth", limits=DecodeLimits())
        drops = (options.steps * 3 // 4,)
        settings = TrainSettings(
            Optimisation(options.steps, options.batch, options.rate, warmup_steps=20, drops=drops, drop_factor=0.1),
            small_model(options.width),
            short_sides=(options.size,),
            precise_statistics=4,
        )
        started = time.perf_counter()
        result = fit_panoptic(photos, f"{folder}/fit", settings, threads=2, on_log=lambda e: print(e, flush=True))
        seconds = time.perf_counter() - started
        checkpoint = load_checkpoint(f"{folder}/fit")
        model = PanopticCascadeRCNN(photos.num_things, photos.num_stuff, **checkpoint.config["model"]).eval()
        load_state(model, checkpoint.state, num_things=photos.num_things, num_stuff=photos.num_stuff)
        measured = score(model, photos, options.size)
    history = result.record["history"]
    publish(
        {
            "benchmark": "overfit",
            "machine": describe_machine(),
            **{key: getattr(options, key) for key in ("scenes", "steps", "batch", "rate", "size", "width", "threads")},
            **{name: round(value, 4) for name, value in measured.items()},
            "seconds": round(seconds, 1),
            "seconds_a_step": round(seconds / options.steps, 3),
            "loss": {entry["step"]: round(entry["total"], 3) for entry in history},
        },
        options.output,
    )


if __name__ == "__main__":
    main()
