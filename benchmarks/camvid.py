"""Class maps against the 11 human classes of CamVid: mIoU and accuracy, mean and spread over seeds.

    python benchmarks/camvid.py ../shared/data/camvid [--clusters 11 27] [--seeds 0 1 2]
        [--run stego-patch-dct=runs/camvid-stego-0 ...] > camvid.json

The folder holds `images` and `labels`. The baseline is plain: spherical k-means on the patch features of all photos,
and of every pixel the cluster that its bilinearly interpolated features are most similar to. `position` has no features
but the place in the photo: what a street scene gives away without being looked at. Finished runs of `u2label run` on
the images are added with `--run NAME=FOLDER`; runs of one name are its seeds. The table goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from model.backbone import load_backbone
from pipeline.evaluate.class_maps import VOID, Prediction
from pipeline.evaluate.labels import open_labels
from pipeline.evaluate.semantic import count_pixels, evaluate_semantic, summarise
from workers import kmeans as kernel
from workers.decode import resize_keep_aspect

CLASSES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
IGNORE = (11, 255)
SIZE = 360  # pixels of the shorter side
FIT_ROWS = 60_000  # patches that k-means sees
ITERATIONS = 50
BASELINES = {
    "position": None,
    "patch-dct": ("patch-dct", "random:0"),
    "dino_vits8 random:0": ("dino_vits8", "random:0"),
}
MEASURES = [(convention, measure) for measure in ("miou", "accuracy") for convention in ("strict", "published")]


def position_features(height: int, width: int) -> torch.Tensor:
    """(1, 3, h, w): the place in the photo and a constant, so that angles between rows tell places apart."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([y, x, torch.ones_like(x)])[None]


def photo_features(path: Path, backbone: Any) -> torch.Tensor:
    """(1, D, h, w) float32 unit-norm features of the patches of one photo."""
    pixels = resize_keep_aspect(np.array(Image.open(path).convert("RGB")), SIZE, backbone.patch_size if backbone else 8)
    height, width = pixels.shape[:2]
    if backbone is None:
        return F.normalize(position_features(height // 8, width // 8))
    keys_1ND = backbone.keys(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    grid = (height // backbone.patch_size, width // backbone.patch_size)
    return F.normalize(keys_1ND.mT.unflatten(2, grid))


def spherical_kmeans(x_ND: np.ndarray, k: int, seed: int) -> np.ndarray:
    """(K, D) float32 centroids of unit norm, by the kernels of the distributed fit on at most `FIT_ROWS` rows."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(x_ND), min(len(x_ND), FIT_ROWS), replace=False)
    x_ND = kernel.on_grid(kernel.unit_rows(x_ND[np.sort(rows)].astype(np.float32)), kernel.SPHERICAL_STEP)
    centroids = x_ND[kernel.plus_plus(x_ND, k, rng)]
    for _ in range(ITERATIONS):
        labels = kernel.NearestCentroid(centroids)(x_ND)
        sums, counts = kernel.cluster_sums(x_ND, labels, k, kernel.SPHERICAL_STEP)
        centroids = kernel.updated_centroids(sums, counts, kernel.SPHERICAL_STEP, centroids, spherical=True)
    return centroids


def class_maps(
    features: list[torch.Tensor], photos: list[Path], centroids_KD: np.ndarray, size: tuple[int, int]
) -> Iterator[Prediction]:
    weights = torch.from_numpy(centroids_KD)[:, :, None, None]
    for path, feature in zip(photos, features, strict=True):
        similar = F.conv2d(feature.float(), weights)
        full = F.interpolate(similar, size=size, mode="bilinear", align_corners=False)
        yield path.name, full[0].argmax(dim=0).to(torch.uint8).numpy()


def baseline_rows(data: Path, clusters: list[int], seeds: list[int]) -> Iterator[dict[str, Any]]:
    photos = sorted((data / "images").iterdir())
    width, height = Image.open(photos[0]).size
    for name, spec in BASELINES.items():
        started = time.monotonic()
        backbone = load_backbone(*spec) if spec else None
        features = [photo_features(path, backbone).half() for path in photos]
        seconds = (time.monotonic() - started) / len(photos)
        x_ND = torch.cat([f[0].flatten(1).T for f in features]).numpy()
        for k in clusters:
            for seed in seeds:
                centroids = spherical_kmeans(x_ND, k, seed)
                maps = class_maps(features, photos, centroids, (height, width))
                source = open_labels(str(data / "labels"), names=CLASSES, ignore=IGNORE)
                result = summarise(count_pixels(maps, source, k, void=VOID), source, [str(c) for c in range(k)])
                yield scored(f"k-means, {name}", k, seed, result) | {"feature_seconds_per_image": seconds}


def run_rows(data: Path, runs: list[str]) -> Iterator[dict[str, Any]]:
    """`NAME=FOLDER` of finished runs; the n-th of a name is seed n of it."""
    seen: dict[str, int] = {}
    for run in runs:
        name, _, folder = run.partition("=")
        result = evaluate_semantic(folder, str(data / "labels"), names=CLASSES, ignore=IGNORE)
        seen[name] = seen.get(name, -1) + 1
        yield scored(name, result["clusters"], seen[name], result)


def scored(method: str, clusters: int, seed: int, result: dict[str, Any]) -> dict[str, Any]:
    kept = ("images", "clusters_seen", "void_share", "one_to_one", "other_half", "many_to_one")
    return {"method": method, "clusters": clusters, "seed": seed} | {key: result[key] for key in kept}


def spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard deviation (of the sample) and number of seeds of each method and number of clusters."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["clusters"]), []).append(row)
    found = []
    for (method, clusters), members in groups.items():
        entry: dict[str, Any] = {"method": method, "clusters": clusters, "seeds": len(members)}
        for mapping in ("one_to_one", "other_half", "many_to_one"):
            for convention, measure in MEASURES:
                values = [m[mapping][convention][measure] for m in members]
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                entry[f"{mapping}_{convention}_{measure}"] = {"mean": float(np.mean(values)), "sd": deviation}
        found.append(entry)
    return found


def print_table(summary: list[dict[str, Any]]) -> None:
    heads = ["mIoU strict", "as published", "accuracy strict", "as published"]
    table = Table("method", "clusters", *heads, "mIoU strict, mapping of the other half", title="CamVid, one to one")
    for entry in summary:
        columns = [f"one_to_one_{convention}_{measure}" for convention, measure in MEASURES]
        cells = [entry[column] for column in (*columns, "other_half_strict_miou")]
        table.add_row(entry["method"], str(entry["clusters"]), *(_cell(cell) for cell in cells))
    Console(stderr=True, highlight=False, width=140).print(table)


def _cell(value: dict[str, float | None]) -> str:
    mean, deviation = value["mean"], value["sd"]
    return f"{100 * (mean or 0):.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with images and labels")
    parser.add_argument("--clusters", type=int, nargs="*", default=[11, 27], help="of the k-means baselines")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER", help="a finished run to add")
    args = parser.parse_args()
    if not (args.data / "labels").is_dir():
        parser.error(f"no folder labels in {args.data}; give the CamVid folder with images and labels")
    rows = [*baseline_rows(args.data, args.clusters, args.seeds), *run_rows(args.data, args.run)]
    summary = spread(rows)
    print_table(summary)
    json.dump(
        {"machine": describe_machine(), "classes": CLASSES, "summary": summary, "runs": rows}, sys.stdout, indent=1
    )
    print()


if __name__ == "__main__":
    main()
