"""STEGO class maps of photos, against the backbone alone on the same pixels, interleaved in one process.

    python benchmarks/stego.py [--backbone dino_vits8] [--height 720 --width 960] [--size 448] [--threads 2]
                               [--repeats 3] [--batch 1] [--crf] [--device cpu] [--output FILE]

Both see each photo once as it is and once mirrored. STEGO further resizes, runs head and probe, scales the scores to
the photo's size, takes the argmax and encodes the PNG; only decoding is left out. Prints JSON; `ratio` is backbone
seconds / STEGO seconds (1.0: the rest costs nothing),
`phases_s` the seconds a photo by phase.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine, seconds

from model.backbone import load_backbone
from model.ranks import Ranks
from model.stego import ClusterProbe, StegoHead
from pipeline.operations.demo.scenes import make_scene
from pipeline.semantics.stego import StegoSettings
from pipeline.semantics.stego_train import Trainer
from workers.crf import STEGO
from workers.decode import resize_keep_aspect
from workers.embeddings import to_images
from workers.images import LoadedImage
from workers.phases import Phases
from workers.semantics.stego import ClassMapParams, StegoWorker


def training_step(channels: int, device: str) -> float:
    """Seconds of a step with the default settings on random features of 28 x 28 patches, the fastest of three."""
    rng = np.random.default_rng(0)
    feats = rng.standard_normal((32, channels, 28, 28), np.float32).astype(np.float16)
    neighbours = np.stack([np.roll(np.arange(32), -shift)[:32] for shift in range(1, 8)], axis=1).astype(np.int32)
    trainer = Trainer(StegoSettings(), channels, torch.device(device))
    return min(seconds(lambda: trainer.advance(feats, neighbours, Ranks()), device) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dino_vits8")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=960)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--crf", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = options.device
    backbone = load_backbone(options.backbone, "random:0", device=device)
    head, probe = StegoHead(backbone.dim), ClusterProbe(70, 27)
    params = ClassMapParams(image_size=options.size, crf=STEGO if options.crf else None)
    worker = StegoWorker(backbone, head, probe, params, device=device, batch_size=options.batch)
    photos = [make_scene(seed, (options.height, options.width)).image for seed in range(options.batch)]
    resized = np.stack([resize_keep_aspect(photo, options.size, backbone.patch_size) for photo in photos])
    images = to_images(resized, device)
    phases, pairs = Phases(), []

    def backbone_alone() -> None:
        for view in (images, images.flip(3)):
            backbone.tokens(view)

    def stego() -> None:
        worker.process([LoadedImage(str(i), photo) for i, photo in enumerate(photos)], phases)

    backbone_alone()
    stego()
    phases.seconds.clear()
    for _ in range(options.repeats):
        pairs.append((seconds(backbone_alone, device), seconds(stego, device)))
    runs = options.repeats * options.batch
    alone, whole = (min(pair[i] for pair in pairs) for i in (0, 1))
    result = {
        "benchmark": "stego",
        "machine": describe_machine(device),
        "backbone": options.backbone,
        "threads": options.threads,
        "batch": options.batch,
        "photo": [options.height, options.width],
        "seen": list(resized.shape[1:3]),
        "crf": options.crf,
        "backbone_images_per_s": round(options.batch / alone, 3),
        "stego_images_per_s": round(options.batch / whole, 3),
        "ratio": round(alone / whole, 3),
        "ratio_of_each_pair": [round(a / w, 3) for a, w in pairs],
        "phases_s": {name: round(spent / runs, 4) for name, spent in phases.seconds.items()},
        "training_step_s": round(training_step(backbone.dim, device), 3),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
