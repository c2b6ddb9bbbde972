"""What a photo costs in the stages that look at photos, against the backbone alone; in series, and with the CPU's share
beside the device's.

    python benchmarks/stages.py ../shared/data/coco-panoptic-100/images --weights WEIGHTS --cores 1 2 --photos 24

Prints one JSON object: of each number of cores and each stage the seconds a photo of the backbone alone (for STEGO with
the mirrored photo), of the whole stage in series and overlapped, the least of --repeats rounds that take turns, and
their ratios to the backbone. Masks are MaskCut's of DINOv2 ViT-S/14 at 476 px, or of merge trees; STEGO's 27 classes
are clusters of a random head's code.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, publish
from PIL import Image

from model.backbone import Backbone, load_backbone
from model.stego import ClusterProbe, StegoHead
from workers.crf import CUTLER, STEGO, CrfParams
from workers.decode import resize_keep_aspect, resize_square
from workers.embeddings import to_images
from workers.images import LoadedImage
from workers.instances import InstanceWorker
from workers.instances.cuts import CutParams, MaskCuts
from workers.instances.trees import MergeTrees, TreeInputs
from workers.kmeans import spherical_kmeans
from workers.overlap import Flow, InTurn, flow_of
from workers.phases import Phases
from workers.semantics.stego import ClassMapParams, StegoWorker
from workers.tree_masks import TreeParams

CLASSES, CODE = 27, 70
SIZE = 476  # pixels: 34 patches of 14
STUFF_SIZE = 448
Worker = Any  # with `process(images, phases)`


def load_photos(folder: Path, count: int) -> list[LoadedImage]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    chosen = paths[:: max(1, len(paths) // count)][:count]
    return [LoadedImage(path.name, np.array(Image.open(path).convert("RGB"))) for path in chosen]


def maskcut(backbone: Backbone, crf: CrfParams, device: str, batch: int, flow: Flow) -> Worker:
    params = CutParams(
        image_size=SIZE,
        resize="square",
        features="tokens",
        tau=0.3,
        max_masks=3,
        crf=crf,
        min_iou=0.5,
        crop_size=224,
    )
    return InstanceWorker(MaskCuts(backbone, params, device=device), batch_size=batch, flow=flow)


def merge_trees(backbone: Backbone, device: str, batch: int, flow: Flow) -> Worker:
    inputs = TreeInputs(SIZE, ("tokens", "block:9"), "tokens", "tokens", True, TreeParams())
    return InstanceWorker(MergeTrees(backbone, inputs, device=device), batch_size=batch, flow=flow)


def stego(backbone: Backbone, probe: ClusterProbe, head: StegoHead, crf: CrfParams) -> Callable[..., Worker]:
    params = ClassMapParams(image_size=STUFF_SIZE, crf=crf)

    def make(device: str, batch: int, flow: Flow) -> Worker:
        return StegoWorker(backbone, head, probe, params, device=device, batch_size=batch, flow=flow)

    return make


@torch.inference_mode()
def fitted(backbone: Backbone, photos: Sequence[LoadedImage], device: str) -> tuple[StegoHead, ClusterProbe]:
    """A random head, and a probe with clusters of its codes."""
    torch.manual_seed(0)
    head, probe = StegoHead(backbone.dim, CODE).eval().to(device), ClusterProbe(CODE, CLASSES).to(device)
    codes = [
        head(backbone.tokens(images).mT.unflatten(2, [side // backbone.patch_size for side in images.shape[2:]]))
        for images in (seen(backbone, photo, STUFF_SIZE, False, device) for photo in photos[:8])
    ]
    rows = torch.cat([code.flatten(2)[0].T for code in codes]).cpu().numpy()
    probe.clusters.copy_(torch.from_numpy(spherical_kmeans(rows, CLASSES, 0)))
    return head, probe


def seen(backbone: Backbone, photo: LoadedImage, size: int, square: bool, device: str) -> torch.Tensor:
    assert photo.pixels is not None
    patch = backbone.patch_size
    small = resize_square(photo.pixels, size) if square else resize_keep_aspect(photo.pixels, size, patch)
    return to_images(small[None], device)


def backbone_alone(
    backbone: Backbone, photos: Sequence[LoadedImage], size: int, square: bool, views: int, device: str
) -> Callable[[], None]:
    images = [seen(backbone, photo, size, square, device) for photo in photos]

    def call() -> None:
        for image in images:
            for _ in range(views):
                backbone.tokens(image)
        if device != "cpu":
            torch.cuda.synchronize()

    return call


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    make: Callable[[str, int, Flow], Worker],
    alone: Callable[[], None],
    photos: list[LoadedImage],
    args: argparse.Namespace,
    cores: int,
) -> dict[str, Any]:
    """Seconds a photo; the rounds of the three take turns."""
    phases = {"series": Phases(), "overlapped": Phases()}
    workers = {
        "series": make(args.device, args.batch, InTurn()),
        "overlapped": make(args.device, args.batch, flow_of(args.device, cores, side_by_side=True)),
    }
    calls: dict[str, Callable[[], object]] = {"backbone": alone}
    calls |= {name: (lambda name=name: workers[name].process(photos, phases[name])) for name in workers}
    spent = {name: [seconds(call) / len(photos) for _ in range(args.repeats)] for name, call in calls.items()}
    least = {name: min(times) for name, times in spent.items()}
    runs = args.repeats * len(photos)
    return {
        **{f"{name}_s": round(value, 4) for name, value in least.items()},
        "series_over_backbone": round(least["series"] / least["backbone"], 3),
        "overlapped_over_backbone": round(least["overlapped"] / least["backbone"], 3),
        "series_over_overlapped": round(least["series"] / least["overlapped"], 3),
        "phases_s": {name: round(value / runs, 4) for name, value in phases["series"].seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--weights", default="random:0", help="of a DINOv2 ViT-S/14; random ones have few masks")
    parser.add_argument("--count", type=int, default=24, help="photos")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="those stages whose name holds this")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    photos = load_photos(args.photos, args.count)
    backbone = load_backbone("dinov2_vits14", args.weights, device=args.device)
    head, probe = fitted(backbone, photos, args.device)
    fast = replace(CUTLER, fast=True), replace(STEGO, fast=True)
    stages: dict[str, tuple[Callable[[str, int, Flow], Worker], tuple[int, bool, int]]] = {
        "MaskCut": (lambda *how: maskcut(backbone, CUTLER, *how), (SIZE, True, 1)),
        "MaskCut, fast CRF": (lambda *how: maskcut(backbone, fast[0], *how), (SIZE, True, 1)),
        "merge trees": (lambda *how: merge_trees(backbone, *how), (SIZE, False, 1)),
        "STEGO": (stego(backbone, probe, head, STEGO), (STUFF_SIZE, False, 2)),
        "STEGO, fast CRF": (stego(backbone, probe, head, fast[1]), (STUFF_SIZE, False, 2)),
    }
    results: dict[str, Any] = {}
    for cores in args.cores:
        torch.set_num_threads(cores)
        for name, (make, (size, square, views)) in stages.items():
            if args.only in name:
                alone = backbone_alone(backbone, photos, size, square, views, args.device)
                results.setdefault(f"{cores} cores", {})[name] = measure(make, alone, photos, args, cores)
                print(cores, name, results[f"{cores} cores"][name], file=sys.stderr, flush=True)
    about = {"photos": len(photos), "batch": args.batch, "weights": args.weights != "random:0"}
    publish({"benchmark": "stages", "machine": describe_machine(args.device), **about, "stages": results}, args.output)


if __name__ == "__main__":
    main()
