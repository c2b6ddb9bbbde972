"""Time and peak memory of the panoptic model: one image at test size, and a training step of two.

    python benchmarks/rcnn.py --threads 2

Prints one JSON object. Each part runs in a process of its own, whose highest resident size is its peak memory, and is
compared with what detectron2 took for the same on two CPU threads in float32. Inference includes the resizing of masks
and map to the photo's size, and the panoptic combination; a step includes SGD. Weights are random, or with --weights
those of the reference (see `weights.py` there), which find many objects as trained ones would.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, publish
from PIL import Image

from model.panoptic.network import PanopticCascadeRCNN, Target
from model.panoptic.resize import test_size

SHARED = Path(__file__).resolve().parents[2] / "shared"
NUM_THINGS, NUM_STUFF, INSTANCES = 300, 27, 7
ORIGINAL = {"inference": {"seconds": 3.0, "peak_gb": 1.7}, "training": {"seconds": 12.0, "peak_gb": 3.9}}


def load_photo(path: Path, short: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """(3, h, w) uint8 resized for the model, and the size before; a noise image of 375 x 500 without the file."""
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    image = Image.open(path).convert("RGB") if path.is_file() else Image.fromarray(noise)
    height, width = test_size(image.height, image.width, short)
    resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(resized).permute(2, 0, 1), (image.height, image.width)


def build_model(weights: Path, device: str) -> PanopticCascadeRCNN:
    torch.manual_seed(0)
    model = PanopticCascadeRCNN(NUM_THINGS, NUM_STUFF)
    if weights.is_file():
        spec = importlib.util.spec_from_file_location("reference_weights", weights)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, value in model.state_dict().items():
            value.copy_(torch.from_numpy(np.asarray(module.tensor(name, value.shape))))
    return model.to(device)


def random_target(size: tuple[int, int]) -> Target:
    """Rectangles of a tenth to a half of the image's sides over stuff in bands."""
    height, width = size
    rng = np.random.default_rng(0)
    sides = rng.uniform(0.1, 0.5, (INSTANCES, 2)) * (width, height)
    corners = rng.uniform(0, 1, (INSTANCES, 2)) * ((width, height) - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    masks = np.zeros((INSTANCES, height, width), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    bands = np.arange(height)[:, None] * NUM_STUFF // height + 1
    semantic = np.where(masks.any(0), 0, np.broadcast_to(bands, (height, width))).astype(np.uint8)
    classes = torch.from_numpy(rng.integers(0, NUM_THINGS, INSTANCES))
    return Target(torch.from_numpy(boxes), classes, torch.from_numpy(masks), torch.from_numpy(semantic))


def inference_call(args: argparse.Namespace) -> Callable[[], object]:
    model = build_model(args.weights, args.device).eval()
    image, size = load_photo(args.photo, args.test_short)

    def call() -> object:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            (prediction,) = model.predict([image], output_sizes=[size])
            return prediction.panoptic()

    return call


def training_call(args: argparse.Namespace) -> Callable[[], object]:
    model = build_model(args.weights, args.device).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-5)
    image, _ = load_photo(args.photo, args.train_short)
    target = random_target((image.shape[1], image.shape[2]))
    images, targets = [image] * args.batch, [target] * args.batch

    def call() -> object:
        optimiser.zero_grad()
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            losses = model(images, targets)
        sum(losses.values(), torch.zeros((), device=args.device)).backward()
        return optimiser.step()

    return call


PARTS = {"inference": inference_call, "training": training_call}


def measure(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Best and all seconds of the calls after the first, and the peak memory of the process or the device."""
    torch.set_num_threads(args.threads)
    call, cuda = PARTS[part](args), args.device.startswith("cuda")
    seconds, busy = [], []
    for _ in range(args.repeats + 1):
        start, start_busy = time.perf_counter(), time.process_time()
        call()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "best_s": round(min(seconds[1:]), 3),
        "seconds": [round(s, 3) for s in seconds[1:]],
        "processor_s": round(min(busy[1:]), 3),
        "peak_gb": round(peak / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=sorted(PARTS), help="what to measure")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls, after one that is not")
    parser.add_argument("--test-short", type=int, default=480, help="short side at inference in pixels")
    parser.add_argument("--train-short", type=int, default=320, help="short side in training in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images of a training step")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--photo", type=Path, default=SHARED / "data/photos/n01440764/n01440764_tench.JPEG")
    parser.add_argument("--weights", type=Path, default=SHARED / "parity/panoptic_rcnn/weights.py")
    parser.add_argument("--output", type=Path, help="JSON file to keep the result in")
    args = parser.parse_args()
    results = {}
    for part in args.parts:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            results[part] = pool.submit(measure, part, args).result()
        original = ORIGINAL[part]
        results[part]["original"] = original
        results[part]["time_over_original"] = round(results[part]["best_s"] / original["seconds"], 2)
        results[part]["memory_over_original"] = round(results[part]["peak_gb"] / original["peak_gb"], 2)
    settings = {name: getattr(args, name) for name in ("threads", "test_short", "train_short", "batch", "bf16")}
    publish({"benchmark": "rcnn", "machine": describe_machine(args.device), **settings, **results}, args.output)


if __name__ == "__main__":
    main()
