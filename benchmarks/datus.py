"""DatUS2's segments stage by step, and its graph against a loop over the pairs of patches.

    python benchmarks/datus.py [--backbone dino_vits8] [--images 8] [--photos FOLDER] [--threads 2] [--repeats 3]
                               [--device cpu] [--output FILE]

Photos, or generated scenes, squashed to 224 pixels. The loop tests the dot products of all pairs, computed by one
matrix product as here, one by one. Prints JSON; seconds are per image, the least of `repeats`; `graph_ratio` is loop
seconds / graph seconds, `processes_ratio` is what as many processes as threads win on graph, Louvain and components
together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from machine import describe_machine
from PIL import Image

from model.backbone import Backbone, load_backbone
from pipeline.operations.demo.scenes import make_scene
from workers.embeddings import embed_crops, to_images
from workers.semantics.datus import resize_bicubic, segment_crop
from workers.semantics.louvain import SegmentFinder, affinity_graph, communities, connected_segments

SIDE = 224
LOOPED = 4  # images that the slow loop runs on, at most


def graph_by_pairs(keys_ND: np.ndarray) -> scipy.sparse.csr_matrix:
    """The same graph as `affinity_graph`, by a straightforward loop over the pairs."""
    products = keys_ND @ keys_ND.T
    joined = np.zeros(products.shape, bool)
    for i in range(len(products)):
        for j in range(len(products)):
            if products[i, j] > 0:
                joined[i, j] = True
    return scipy.sparse.csr_matrix(joined)


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def steps(backbone: Backbone, squares: Sequence[np.ndarray], device: str) -> tuple[dict[str, float], list[np.ndarray]]:
    """Seconds of each step over all images, and the keys."""
    patches = SIDE // backbone.patch_size
    images = np.stack(squares)
    keys_s, keys = timed(lambda: backbone.keys(to_images(images, device)).cpu().numpy(), device)
    graph_s, graphs = timed(lambda: [affinity_graph(k) for k in keys], device)
    louvain_s, found = timed(lambda: [communities(graph) for graph in graphs], device)
    grids = [labels.reshape(patches, patches) for labels in found]
    components_s, segments = timed(lambda: [connected_segments(grid) for grid in grids], device)

    def embed() -> np.ndarray:
        pairs = zip(squares, segments, strict=True)
        crops = [segment_crop(square, s == i, SIDE) for square, s in pairs for i in range(s.max() + 1)]
        return embed_crops(backbone, crops, batch_size=16, device=device)

    embeddings_s, vectors = timed(embed, device)
    seconds = {"keys": keys_s, "graph": graph_s, "louvain": louvain_s, "components": components_s}
    return seconds | {"embeddings": embeddings_s, "segments": float(len(vectors))}, list(keys)


def processes_ratio(keys: Sequence[np.ndarray], grid: tuple[int, int], processes: int, repeats: int) -> float:
    alone, many = SegmentFinder(), SegmentFinder(processes)
    many(keys, grid)  # starts them
    pairs = [
        (timed(lambda: alone(keys, grid), "cpu")[0], timed(lambda: many(keys, grid), "cpu")[0]) for _ in range(repeats)
    ]
    many.close()
    return min(a for a, _ in pairs) / min(b for _, b in pairs)


def load_squares(folder: Path | None, count: int) -> list[np.ndarray]:
    if folder is None:
        return [resize_bicubic(make_scene(seed).image, SIDE) for seed in range(count)]
    paths = sorted(path for path in folder.iterdir() if path.is_file())[:count]
    return [resize_bicubic(np.array(Image.open(path).convert("RGB")), SIDE) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dino_vits8")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = load_backbone(options.backbone, "random:0", device=options.device)
    squares = load_squares(options.photos, options.images)
    runs = [steps(backbone, squares, options.device) for _ in range(options.repeats + 1)][1:]
    keys = runs[0][1]
    least = {name: min(run[name] for run, _ in runs) / len(squares) for name in runs[0][0]}
    loop_s, looped = timed(lambda: [graph_by_pairs(k) for k in keys[:LOOPED]], "cpu")
    grid = (SIDE // backbone.patch_size,) * 2
    result = {
        "benchmark": "datus",
        "machine": describe_machine(options.device),
        "threads": options.threads,
        "backbone": options.backbone,
        "images": len(squares),
        "patches": len(keys[0]),
        "segments_an_image": round(least.pop("segments"), 2),
        "seconds_an_image": {name: round(seconds, 5) for name, seconds in least.items()},
        "total_s": round(sum(least.values()), 4),
        "pairs_loop_s": round(loop_s / len(looped), 4),
        "graph_ratio": round(loop_s / len(looped) / least["graph"], 1),
        "identical_graphs": all((affinity_graph(k) != g).nnz == 0 for k, g in zip(keys, looped, strict=False)),
        "processes_ratio": round(processes_ratio(keys, grid, options.threads, options.repeats), 2),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
