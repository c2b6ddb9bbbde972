"""`predict` with a model behind a frozen transformer, against that transformer alone on the same resized photos.

    python benchmarks/predict.py CHECKPOINT PHOTOS [--weights FILE] [--photos 8] [--rounds 3] [--threads 2]
                                 [--device cpu] [--amp] [--output FILE]

CHECKPOINT is a folder of a training with `train.network.backbone: vit`, WEIGHTS those of its transformer if they are
elsewhere now. Each photo is seen by both in turn, in one process, by the one or the other first. Decoding is left out;
`predict` resizes, detects, pastes masks at the photo's size and combines the panoptic map. Prints one JSON object:
medians over the photos of the least seconds of all rounds, and `ratio`, predict / transformer.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from machine import describe_machine, publish, seconds
from torch import Tensor

from model.panoptic.frozen import FrozenPatches
from pipeline.predict.weights import load_weights, make_worker, sides_of
from workers.decode import DecodeLimits, decode_image
from workers.images import LoadedImage
from workers.phases import Phases
from workers.predict import PredictWorker, resize_to_model


def look(frozen: FrozenPatches, resized: Tensor) -> None:
    with torch.inference_mode():
        frozen([resized])


def predict(worker: PredictWorker, image: LoadedImage) -> int:
    """How many detections there are."""
    (found,) = worker.predict([image], Phases())
    assert found.prediction is not None
    found.prediction.panoptic()
    return len(found.prediction.scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path, metavar="PHOTOS")
    parser.add_argument("--weights")
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_weights(args.checkpoint, device=args.device, backbone_weights=args.weights)
    frozen = loaded.model.frozen
    if frozen is None:
        parser.error(f"{args.checkpoint}: its network has no frozen transformer")
    short, max_side = sides_of(loaded, None, None)
    worker = make_worker(loaded, args.device, batch_size=1, short=short, max_side=max_side, amp=args.amp)
    alone, whole, found = list[float](), list[float](), 0
    for path in sorted(args.folder.iterdir())[: args.photos]:
        photo = decode_image(path.read_bytes(), DecodeLimits())
        resized = torch.from_numpy(resize_to_model(photo, short, max_side)).permute(2, 0, 1).to(args.device)
        image = LoadedImage(path.name, photo)
        calls = (partial(look, frozen, resized), partial(predict, worker, image))
        found += predict(worker, image)
        times = [list[float](), list[float]()]
        for number in range(args.rounds):
            for which in (0, 1) if number % 2 else (1, 0):
                times[which].append(seconds(calls[which], args.device))
        alone.append(min(times[0]))
        whole.append(min(times[1]))
    medians = {"transformer_s": statistics.median(alone), "predict_s": statistics.median(whole)}
    result = {
        "benchmark": "predict",
        "machine": describe_machine(args.device),
        "threads": args.threads,
        "photos": len(alone),
        "amp": args.amp,
        "detections_a_photo": found / len(alone),
        **medians,
        "ratio": round(medians["predict_s"] / medians["transformer_s"], 3),
    }
    publish(result, args.output)


if __name__ == "__main__":
    main()
