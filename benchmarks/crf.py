"""Time and memory of the dense CRF on one image, end to end: of some masks, and of 27 classes; exact and fast.

    python benchmarks/crf.py --threads 2 --size 480 --masks 3

Prints one JSON object: per image the best and the median time of one call for all masks and of a call a mask (each
with lattices of its own), their ratio, and the peak memory of one call; of the fast CRF its time, how often that goes
into the exact one's, and the share of pixels with the same label. Classes are 27 clusters of the patches of all photos,
by a DINOv2 ViT-S/14 where --weights has one, else by colours and textures; masks are MaskCut's of that, else ellipses.
Photos come from --photos, by default the
folder `shared/data/photos` beside the checkout; without any, one textured image is drawn.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, publish
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F

from model.backbone import load_backbone
from model.stego import ALPHA
from workers.crf import CUTLER, STEGO, Kernels, dense_crf, exact_log_odds, refine_masks
from workers.decode import resize_square
from workers.embeddings import to_images
from workers.fast_crf import fast_crf, fast_log_odds
from workers.kmeans import spherical_kmeans
from workers.maskcut import maskcut
from workers.photo_pixels import stack_photos

SHARED = Path(__file__).resolve().parents[2] / "shared"
CLASSES = 27
LANCZOS = Image.Resampling.LANCZOS
SUFFIXES = {".jpg", ".jpeg", ".png"}


def textured_image(size: int) -> np.ndarray:
    """(size, size, 3) uint8 with detail at every scale, as a photo has."""
    rng = np.random.default_rng(0)
    image = np.zeros((size, size, 3))
    for radius in (0.7, 2, 6, 20, 60):
        octave = ndimage.gaussian_filter(rng.normal(size=image.shape), (radius, radius, 0))
        image += octave / octave.std() * radius**0.5
    return np.clip(128 + 45 * image / image.std(), 0, 255).astype(np.uint8)


def load_images(photos: Path, arrays: Path, size: int, count: int) -> dict[str, np.ndarray]:
    """(size, size, 3) uint8 by name: `count` photos spread over the sorted folder, the `*_image` arrays of an npz."""
    images = {}
    paths = sorted(path for path in photos.rglob("*") if path.suffix.lower() in SUFFIXES)
    for path in paths[:: max(1, len(paths) // count)][:count]:
        with Image.open(path) as photo:
            images[path.name] = photo.convert("RGB")
    if arrays.is_file():
        with np.load(arrays) as stored:
            images |= {name: Image.fromarray(stored[name]) for name in stored.files if name.endswith("_image")}
    resized = {name: np.asarray(image.resize((size, size), LANCZOS)) for name, image in images.items()}
    return resized or {"textured": textured_image(size)}


def patch_masks(size: int, count: int) -> np.ndarray:
    """(count, size, size) bool ellipses with the 8-pixel staircase of a mask on a patch grid."""
    rng = np.random.default_rng(0)
    y, x = (np.mgrid[:size, :size] // 8 * 8) / size
    centres, radii = rng.uniform(0.3, 0.7, (count, 2)), rng.uniform(0.1, 0.3, (count, 2))
    return np.stack(
        [((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1 for (cy, cx), (ry, rx) in zip(centres, radii, strict=True)]
    )


def of_features(
    images: Mapping[str, np.ndarray], weights: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Of each image the (27, size, size) probabilities of clusters of all images' patches, as flat as STEGO's; and with
    weights, MaskCut's masks (n, size, size) of those images that have some."""
    backbone = load_backbone("dinov2_vits14", weights) if weights else load_backbone("patch-dct", "random:0")
    size = next(iter(images.values())).shape[0]
    grid = round(size / backbone.patch_size)
    resized = [resize_square(image, grid * backbone.patch_size) for image in images.values()]
    tokens = torch.cat([backbone.tokens(to_images(each[None], "cpu")) for each in resized])
    cuts = maskcut(tokens, (grid, grid), tau=0.3, max_masks=3) if weights else []
    masks = {name: enlarged(cut.masks, size) for name, cut in zip(images, cuts, strict=False) if cut.masks.any()}
    tokens = F.normalize(tokens - tokens.mean((0, 1)), dim=2)
    centroids = torch.from_numpy(spherical_kmeans(tokens.flatten(0, 1).numpy(), CLASSES, 0))
    logits = F.interpolate((ALPHA * centroids @ tokens.mT).unflatten(2, (grid, grid)), (size, size), mode="bilinear")
    return dict(zip(images, logits.softmax(1), strict=True)), masks


def enlarged(masks: np.ndarray, size: int) -> np.ndarray:
    """(n, h, w) bool of patches -> (n, size, size), empty ones left out."""
    kept = torch.from_numpy(masks[masks.any((1, 2))])[None].float()
    return (F.interpolate(kept, (size, size), mode="nearest")[0] > 0).numpy()


def timed(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Best and median seconds of each call, in turns, after a first round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"best_s": round(min(times[1:]), 4), "median_s": round(statistics.median(times[1:]), 4)}
        for name, times in seconds.items()
    }


def peak_memory_mib(call: Callable[[], object], device: str) -> float:
    """Device memory of a call; on the CPU, by how much it raised the highest resident size of the process so far."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        call()
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 2**20, 1)


def measure(image: np.ndarray, masks: np.ndarray, probs: torch.Tensor, device: str, repeats: int) -> dict[str, Any]:
    photos = stack_photos([torch.from_numpy(image.copy())], device)
    calls = {
        "lattices": lambda: Kernels(photos, CUTLER),
        "together": lambda: refine_masks(image, masks, CUTLER, device=device),
        "separate": lambda: [refine_masks(image, mask[None], CUTLER, device=device) for mask in masks],
        "fast": lambda: refine_masks(image, masks, CUTLER, device=device, log_odds=fast_log_odds),
        "classes": lambda: dense_crf(image, probs, STEGO),
        "fast_classes": lambda: fast_crf(image, probs, STEGO),
    }
    times = timed(calls, device, repeats)
    given = photos, torch.from_numpy(masks).flatten(1).t().to(device), CUTLER
    same_masks = (exact_log_odds(*given) > 0) == (fast_log_odds(*given) > 0)
    same_classes = dense_crf(image, probs, STEGO).argmax(0) == fast_crf(image, probs, STEGO).argmax(0)
    lattices = Kernels(photos, CUTLER).lattices
    return {
        "vertices": [lattice.neighbours_DV2.shape[1] - 1 for lattice in lattices],
        **times,
        "separate_over_together": round(times["separate"]["best_s"] / times["together"]["best_s"], 2),
        "together_over_fast": round(times["together"]["best_s"] / times["fast"]["best_s"], 2),
        "classes_over_fast": round(times["classes"]["best_s"] / times["fast_classes"]["best_s"], 2),
        "same_labels": {
            name: round(float(same.float().mean()), 4)
            for name, same in (("masks", same_masks), ("classes", same_classes))
        },
    }


def mean(values: Iterable[float]) -> float:
    return round(statistics.mean(values), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--size", type=int, default=480, help="height and width in pixels")
    parser.add_argument("--masks", type=int, default=3, help="masks an image")
    parser.add_argument("--images", type=int, default=4, help="photos to measure")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls, after one that is not")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--photos", type=Path, default=SHARED / "data" / "photos", help="folder of photos")
    parser.add_argument(
        "--arrays", type=Path, default=SHARED / "parity" / "densecrf.npz", help="npz with *_image arrays"
    )
    parser.add_argument("--weights", help="of a DINOv2 ViT-S/14")
    parser.add_argument("--output", type=Path, help="JSON file to keep the result in")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = load_images(args.photos, args.arrays, args.size, args.images)
    probs, masks = of_features(images, args.weights)
    ellipses = patch_masks(args.size, args.masks)
    first = next(iter(images.values()))
    memory = peak_memory_mib(lambda: refine_masks(first, ellipses, CUTLER, device=args.device), args.device)
    results = {
        name: measure(image, masks.get(name, ellipses), probs[name].to(args.device), args.device, args.repeats)
        for name, image in images.items()
    }
    report = {
        "benchmark": "crf",
        "machine": describe_machine(args.device),
        "threads": args.threads,
        "size": args.size,
        "masks": args.masks,
        "peak_memory_mib": memory,
        "fast_masks": mean(result["together_over_fast"] for result in results.values()),
        "fast_classes": mean(result["classes_over_fast"] for result in results.values()),
        "same_labels": {
            name: mean(result["same_labels"][name] for result in results.values()) for name in ("masks", "classes")
        },
        "together_worst_s": max(result["together"]["best_s"] for result in results.values()),
        "images": results,
    }
    publish(report, args.output)


if __name__ == "__main__":
    main()
