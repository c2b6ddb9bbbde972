"""MaskCut without the ViT, against a dense generalised eigensolver on the same features, interleaved in one process.

    python benchmarks/maskcut.py [--threads 2] [--grid 60] [--repeats 3] [--device cpu] [--output FILE]

Reference: the same three stages with the affinity in float64 and `scipy.linalg.eigh(D - W, D, subset_by_index=[1, 2])`.
Features are `patch-dct` keys of generated scenes. Prints JSON; `ratio` is dense seconds / iterative seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from machine import describe_machine, publish

from model.backbone import load_backbone
from pipeline.operations.demo.scenes import make_scene
from workers.maskcut import Cut, cut_from_vector, maskcut_stages

EPS = 1e-5
TAU, MASKS = 0.15, 3


def dense_stages(feats_ND: np.ndarray, grid: tuple[int, int], tau: float, max_masks: int) -> list[Cut]:
    """The published procedure as it is: a dense pencil, rebuilt and solved again at every stage."""
    cuts: list[Cut] = []
    painted = np.zeros(grid, bool)
    for _ in range(max_masks):
        free = feats_ND.astype(np.float64) * ~painted.reshape(-1, 1)
        unit = free / np.maximum(np.linalg.norm(free, axis=1, keepdims=True), 1e-12)
        weights = np.where(unit @ unit.T > tau, 1.0, EPS)
        degree = np.diag(weights.sum(1))
        _, vectors = scipy.linalg.eigh(degree - weights, degree, subset_by_index=[1, 2])
        vector = vectors[:, 0] * np.sign(vectors[np.abs(vectors[:, 0]).argmax(), 0])
        cuts.append(cut_from_vector(vector.reshape(grid), cuts))
        painted |= cuts[-1].mask
    return cuts


def iterative_stages(feats_BND: torch.Tensor, grid: tuple[int, int]) -> list[Cut]:
    return maskcut_stages(feats_BND, grid, tau=TAU, max_masks=MASKS)[0]


def timed(call: Callable[[], list[Cut]], device: str, best_of: int = 1) -> tuple[list[Cut], float]:
    """What the call returns and its fastest time in seconds."""
    times = []
    for _ in range(best_of):
        start = time.perf_counter()
        cuts = call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return cuts, min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--grid", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid, side = (options.grid, options.grid), options.grid * 8
    backbone = load_backbone("patch-dct", "random:0", device=options.device)
    pairs, agree = [], []
    for seed in range(options.repeats):
        scene = torch.from_numpy(make_scene(seed, (side, side)).image).permute(2, 0, 1)[None].float() / 255
        feats = backbone.keys(scene)
        stages, iterative = timed(partial(iterative_stages, feats, grid), options.device, best_of=3)
        reference, dense = timed(partial(dense_stages, feats[0].cpu().numpy(), grid, TAU, MASKS), "cpu")
        pairs.append((dense, iterative))
        agree += [bool(np.array_equal(a.mask, b.mask)) for a, b in zip(stages, reference, strict=True)]
    dense_s, iterative_s = (float(np.median([pair[i] for pair in pairs])) for i in (0, 1))
    result = {
        "benchmark": "maskcut",
        "machine": describe_machine(options.device),
        "threads": options.threads,
        "patches": options.grid**2,
        "dense_s": round(dense_s, 3),
        "iterative_s": round(iterative_s, 4),
        "ratio": round(float(np.median([d / i for d, i in pairs])), 1),
        "identical_masks": f"{sum(agree)}/{len(agree)}",
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
