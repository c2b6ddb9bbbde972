"""Labels against human ones: every method at hand on every labelled set of photos, with seeds where there is chance.

    python benchmarks/quality.py ../shared/data WEIGHTS [--runs runs/quality] [--only masks stuff panoptic]
        [--seeds 0 1 2] [--output benchmarks/results/quality-cpu.json]

DATA holds `camvid`, `msrc-200`, `coco-panoptic-100` and `coco-instances-150`; WEIGHTS are those of a DINOv2 ViT-S/14.
Masks: class-agnostic AP and AR, and the purity of 80 clusters. Stuff: strict mIoU, one to one, the mapping learnt on
the same photos and on the other half. Panoptic: PQ over all classes by K = 80 and 27 stuff classes, likewise. Runs are
kept in their folder, so that a benchmark that was stopped goes on; the table goes to stderr.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Config, parse_config
from pipeline.evaluate.mask_scores import evaluate_masks
from pipeline.evaluate.score import evaluate_run
from pipeline.evaluate.semantic import evaluate_semantic
from pipeline.operations.run import run

TREES: dict[str, Any] = {}  # what the card of DINOv2 says
MASKCUT = {"instances": {"method": "maskcut"}}
PUBLISHED = {"semantics": {"conditioned": False, "shifts": {"intra": 0.08, "inter": 0.02, "negative": 0.66}}}
MASKS = {
    "maskcut, patch-dct": ("patch-dct", {}),
    "maskcut, tokens": ("dinov2_vits14", MASKCUT),
    "merge trees": ("dinov2_vits14", TREES),
}
STUFF = {
    "k-means of patch-dct": ("patch-dct", {"method": "kmeans", "overclustering": 1}),
    "clusters of patches, patch-dct": ("patch-dct", {"method": "kmeans"}),
    "k-means of conditioned patches": ("dinov2_vits14", {"method": "kmeans", "overclustering": 1}),
    "clusters of patches": ("dinov2_vits14", {"method": "kmeans"}),
    "STEGO, published shifts": ("dinov2_vits14", {"method": "stego", "steps": 1000, **PUBLISHED["semantics"]}),
    "STEGO, auto": ("dinov2_vits14", {"method": "stego", "steps": 300}),
    "DatUS2": ("dinov2_vits14", {"method": "datus"}),
}
PANOPTIC = {
    "maskcut, STEGO with published shifts": {
        **MASKCUT,
        "semantics": {"method": "stego", "steps": 1000, **PUBLISHED["semantics"]},
    },
    "merge trees, clusters of patches": {"semantics": {"method": "kmeans"}},
}
STUFF_SETS = {"camvid": (11, (11, 255)), "msrc-200": (21, (0, 5, 8, 255))}  # classes, and label values left out
MASK_SETS = {"coco-panoptic-100": "panoptic.json", "coco-instances-150": "instances.json"}


def config_of(args: argparse.Namespace, photos: str, backbone: str, seed: int, sections: dict[str, Any]) -> Config:
    weights = args.weights if backbone != "patch-dct" else "random:0"
    base = {
        "source": {"uri": str(Path(args.data) / photos / "images"), "shard_size": 25},
        "run": {"uri": str(Path(args.runs) / photos), "max_empty": 1},
        "backbone": {"name": backbone, "weights": weights},
        "seed": seed,
        "clusters": {"k": 80},
        "workers": {"size": 1, "cpus": 2, "memory_gb": 4},
    }
    return parse_config(base | sections, origin="benchmark")


def score_masks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for photos, truth in MASK_SETS.items():
        for method, (backbone, sections) in MASKS.items():
            for seed in args.seeds:
                config = config_of(args, photos, backbone, seed, sections)
                done = run(
                    config,
                    stages=[
                        name
                        for name in ("instances", "embedding_fit", "things", "clusters")
                        if name in stages_of(config)
                    ],
                )
                folder = str(Path(args.runs) / "scores" / photos / method / str(seed))
                labels = str(Path(args.data) / photos / truth)
                nested = done.run.things.name != "instances"
                masks = evaluate_masks(config.run.uri, labels, output=folder)
                things = evaluate_masks(config.run.uri, labels, stage="things", output=folder) if nested else masks
                yield {"set": photos, "method": method, "seed": seed, **mask_figures(masks, things)}


def stages_of(config: Config) -> set[str]:
    from pipeline.stages.table import define_stages

    return set(define_stages(config))


def mask_figures(masks: dict[str, Any], things: dict[str, Any]) -> dict[str, Any]:
    everything = masks["objects"]["all"]
    figures = {name: everything[name] for name in ("AP", "AP50", "AR1", "AR10", "AR100")}
    quality = things["clusters"] or {}
    return figures | {
        "without a mask": masks["images"]["without_masks"],
        "purity": quality.get("purity"),
        "nmi": quality.get("nmi"),
    }


def score_stuff(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for photos, (classes, ignore) in STUFF_SETS.items():
        for method, (backbone, settings) in STUFF.items():
            for seed in args.seeds:
                config = config_of(args, photos, backbone, seed, {"semantics": {**settings, "classes": classes}})
                names = [
                    name
                    for name in stages_of(config)
                    if name in {"patches", "conditioning", "features", "segments", "semantics_fit", "semantics"}
                ]
                entry = {"set": photos, "method": method, "seed": seed}
                try:
                    run(config, stages=names)
                except Exception as error:  # a fit that lost its classes is a result too
                    yield entry | {"error": str(error).splitlines()[0]}
                    continue
                folder = str(Path(args.runs) / "scores" / photos / method / str(seed))
                found = evaluate_semantic(
                    config.run.uri, str(Path(args.data) / photos / "labels"), ignore=ignore, output=folder
                )
                yield entry | {
                    "mIoU": found["one_to_one"]["strict"]["miou"],
                    "mIoU, other half": found["other_half"]["strict"]["miou"],
                    "accuracy": found["one_to_one"]["strict"]["accuracy"],
                }


def score_panoptic(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    photos = "coco-panoptic-100"
    for method, sections in PANOPTIC.items():
        for seed in args.seeds:
            config = config_of(args, photos, "dinov2_vits14", seed, sections)
            run(config)
            folder = str(Path(args.runs) / "scores" / photos / method / str(seed))
            found = evaluate_run(config.run.uri, str(Path(args.data) / photos / "panoptic.json"), output=folder)
            yield {"set": photos, "method": method, "seed": seed, **panoptic_figures(found)}


def panoptic_figures(found: dict[str, Any]) -> dict[str, Any]:
    raise SystemExit(str(found)[:2000])
