"""Labels against human ones: every method at hand on every labelled set of photos, with seeds where there is chance.

    python benchmarks/quality.py ../shared/data WEIGHTS [--runs runs/quality] [--only masks stuff panoptic student few]
        [--seeds 0 1 2] [--methods NAME] [--output benchmarks/results/quality-cpu.json]

DATA holds `camvid`, `msrc-200`, `coco-panoptic-100` and `coco-instances-150`; WEIGHTS are those of a DINOv2 ViT-S/14.
Masks: class-agnostic AP and AR, and the purity of 80 clusters. Stuff: strict mIoU, one to one, the mapping learnt on
the same photos and on the other half, without CRF and mirrored photos. Panoptic: PQ over all classes by K = 80,
likewise. Student: labels, by MaskCut and by merge trees, without stuff; the model of `configs/photos.yaml` that learnt
them, of `coco-instances-150` and, if DATA has it, `imagenette-1000`, whose human labels it does not see; and that after
a round of self-training: by the class-agnostic AP and AR of masks, on photos it learnt from and on those of
`coco-panoptic-100`, which it never saw; there also by PQ, with the mapping of the other half. Few: 10 and 50 photos of
`coco-panoptic-100` with human labels, learnt from the weights of the student of merge trees and from scratch, scored on
its other 50. A run keeps its folder, so that a benchmark that was stopped goes on; the table, means over the seeds with
the least and the largest, goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from machine import describe_machine, publish

from pipeline.config import Config, load_config, parse_config
from pipeline.errors import ConfigError, StageFailed
from pipeline.evaluate.mask_scores import MaskTally, evaluate_masks
from pipeline.evaluate.masks import FoundPhoto, TrueMasks, instance_of
from pipeline.evaluate.score import evaluate_run
from pipeline.evaluate.semantic import evaluate_semantic
from pipeline.operations.run import run
from pipeline.predict import load_predictor, predict_photos
from pipeline.predict.output import PANOPTIC_JSON
from pipeline.stages.table import define_stages
from workers.decode import DecodeLimits, decode_image
from workers.predict import encode_masks
from workers.training.samples import coco_categories

M = TypeVar("M")
DINOV2 = "dinov2_vits14"
DCT = "patch-dct"
MASKCUT = {"instances": {"method": "maskcut"}}
PLAIN = {"crf": False, "flip": False}  # for stuff, so that it is the classes that are compared
PUBLISHED = {"conditioned": False, "shifts": {"intra": 0.08, "inter": 0.02, "negative": 0.66}}
MASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "patch-dct, MaskCut": (DCT, {}),
    "DINOv2, MaskCut of tokens": (DINOV2, MASKCUT),
    "DINOv2, merge trees": (DINOV2, {}),
}
STUFF: dict[str, tuple[str, dict[str, Any]]] = {
    "patch-dct, clusters of patches": (DCT, {"method": "kmeans"}),
    "DINOv2, k-means of conditioned patches": (DINOV2, {"method": "kmeans", "overclustering": 1}),
    "DINOv2, clusters of patches": (DINOV2, {"method": "kmeans"}),
    "DINOv2, STEGO with published shifts": (DINOV2, {"method": "stego", "steps": 1000, **PUBLISHED}),
    "DINOv2, STEGO": (DINOV2, {"method": "stego", "steps": 300}),
    "DINOv2, DatUS²": (DINOV2, {"method": "datus"}),
}
PANOPTIC_SEMANTICS = {"method": "kmeans", "classes": 54}
PANOPTIC: dict[str, dict[str, Any]] = {
    "DINOv2, MaskCut of tokens, STEGO with published shifts": {
        **MASKCUT,
        "semantics": {"method": "stego", "steps": 1000, **PUBLISHED},
    },
    "DINOv2, merge trees, 27 clusters of patches": {"semantics": {"method": "kmeans"}},
    "DINOv2, merge trees, 54 clusters of patches": {"semantics": PANOPTIC_SEMANTICS},
}
STUFF_SETS = {"camvid": (11, (11, 255)), "msrc-200": (21, (0, 5, 8, 255))}  # classes, and label values left out
MASK_SETS = {"coco-panoptic-100": "panoptic.json", "coco-instances-150": "instances.json"}
PANOPTIC_SET = "coco-panoptic-100"
STUDENT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "photos.yaml"
STEPS = 2000  # of the student
FEW_STEPS = 600  # on photos with human labels
FEW = (10, 50)  # of them
LEARNT, MORE = "coco-instances-150", "imagenette-1000"  # photos the student learns from, as many as there are
TAUGHT = {"merge trees": "merge_tree", "MaskCut": "maskcut"}  # by labels of these
STUDENTS = {
    "labels, before things are chosen": "instances",
    "labels": "panoptic",
    "student": "predictions",
    "student, a round later": "predictions_1",
}  # each with the stage that has its masks


def config_of(args: argparse.Namespace, photos: str, backbone: str, seed: int, sections: dict[str, Any]) -> Config:
    base = {
        "source": {"uri": str(args.data / photos / "images"), "shard_size": 25},
        "run": {"uri": str(args.runs / photos), "max_empty": 1},
        "backbone": {"name": backbone, "weights": "random:0" if backbone == DCT else str(args.weights)},
        "seed": seed,
        "clusters": {"k": 80},
        "workers": {"size": 1, "cpus": 2, "memory_gb": 4},
    }
    return parse_config(base | sections, origin="benchmarks/quality.py")


def wanted(args: argparse.Namespace, methods: dict[str, M]) -> Iterator[tuple[str, M]]:
    return ((name, how) for name, how in methods.items() if args.methods in name)


def run_up_to(config: Config, *last: str) -> set[str]:
    """Run these stages and what they are made from; the names of all of those."""
    defined, names = define_stages(config), set[str]()
    queue = [name for name in last if name in defined]
    while queue:
        names.add(name := queue.pop())
        queue += defined[name].inputs(config)
    run(config, stages=names)
    return names


def score_masks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for photos, truth in MASK_SETS.items():
        for method, (backbone, sections) in wanted(args, MASKS):
            for seed in args.seeds:
                config = config_of(args, photos, backbone, seed, sections)
                chosen = "things" if "things" in run_up_to(config, "clusters") else "instances"
                labels, folder = str(args.data / photos / truth), str(args.runs / "scores" / photos)
                masks = evaluate_masks(config.run.uri, labels, output=folder)
                clusters = evaluate_masks(config.run.uri, labels, stage=chosen, output=folder)["clusters"] or {}
                yield {
                    "set": photos,
                    "method": method,
                    "seed": seed,
                    **_chosen(masks),
                    "with a mask": 1 - masks["share_without_mask"],
                    "purity": clusters.get("purity"),
                    "purity by chance": clusters.get("purity_by_chance"),
                    "NMI": clusters.get("nmi"),
                }


def score_stuff(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for photos, (classes, ignore) in STUFF_SETS.items():
        for method, (backbone, settings) in wanted(args, STUFF):
            for seed in args.seeds:
                config = config_of(
                    args, photos, backbone, seed, {"semantics": {**PLAIN, **settings, "classes": classes}}
                )
                entry = {"set": photos, "method": method, "seed": seed}
                try:
                    run_up_to(config, "semantics")
                except (ConfigError, StageFailed) as error:  # a fit that lost its classes is a result too
                    yield entry | {"failed": str(error).splitlines()[0]}
                    continue
                labels, folder = str(args.data / photos / "labels"), str(args.runs / "scores" / photos)
                found = evaluate_semantic(config.run.uri, labels, ignore=ignore, output=folder)
                yield entry | {
                    "mIoU": found["one_to_one"]["strict"]["miou"],
                    "mIoU, other half": found["other_half"]["strict"]["miou"],
                    "accuracy": found["one_to_one"]["strict"]["accuracy"],
                    "gain": _gain(found["same_features"]),
                }


def _gain(found: dict[str, Any] | None) -> float | None:
    """In mIoU with the mapping of the other half, over k-means of the same features; None where none are kept."""
    return None if found is None else found["gain"]["other_half"]["miou"]


def score_panoptic(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for method, sections in wanted(args, PANOPTIC):
        for seed in args.seeds:
            config = config_of(args, PANOPTIC_SET, DINOV2, seed, sections)
            entry = {"set": PANOPTIC_SET, "method": method, "seed": seed}
            try:
                run_up_to(config, "panoptic")
            except StageFailed as error:
                yield entry | {"failed": str(error).splitlines()[0]}
                continue
            labels, folder = str(args.data / PANOPTIC_SET / "panoptic.json"), str(args.runs / "scores" / PANOPTIC_SET)
            found = evaluate_run(config.run.uri, labels, output=folder, leftover="argmax")
            same, other = found["all_images"], found["other_half"]
            yield entry | {
                **{name: same[name] for name in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "mIoU")},
                "PQ, other half": other["PQ"],
            }


def score_student(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        for labels, method in TAUGHT.items():
            for found in taught_scores(args, seed, method):
                yield found | {"method": f"{labels}: {found['method']}", "seed": seed}


def taught_scores(args: argparse.Namespace, seed: int, labels: str) -> Iterator[dict[str, Any]]:
    """Each on the photos that were learnt from, and on those of the other set, whose labels a run of its own makes."""
    config = student_config(args, seed, labels)
    trained = run(config).stages
    sections = {"instances": {"method": labels}, "semantics": {"method": "none"}}
    apart = config_of(args, PANOPTIC_SET, DINOV2, seed, sections)
    run_up_to(apart, "panoptic")
    for method, stage in wanted(args, STUDENTS):
        yield {"set": LEARNT, "method": method, **mask_scores(args, config.run.uri, LEARNT, stage)}
        if stage in ("instances", "panoptic"):
            scores = mask_scores(args, apart.run.uri, PANOPTIC_SET, stage)
        else:
            weights = trained[stage.replace("predictions", "train")].folder
            truth = args.data / PANOPTIC_SET / MASK_SETS[PANOPTIC_SET]
            scores = unseen_scores(args, weights, truth) | panoptic_scores(args, weights, truth, "hungarian")
        yield {"set": PANOPTIC_SET, "method": method, **scores}


def score_few(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same network on a few human labels, from the student's weights and from scratch, on the other half."""
    for seed in args.seeds:
        student = student_config(args, seed, "merge_tree")
        run_up_to(student, "train")
        yield from few_scores(args, student, run(student, stages={"train"}).stages["train"].folder)


def few_scores(args: argparse.Namespace, student: Config, weights: str) -> Iterator[dict[str, Any]]:
    held = half_of_truth(args, 50, None)
    for count in FEW:
        labels = half_of_truth(args, 0, count)
        starts = {f"{count} human labels, from scratch": "null", f"{count} human labels, from the student": weights}
        for method, init in wanted(args, starts):
            values = {
                "run.uri": args.runs / f"few-{student.seed}-{count}-{method.split()[-1]}",
                "train.labels": labels,
                "train.label_pngs": args.data / PANOPTIC_SET / "panoptic",
                "train.label_images": args.data / PANOPTIC_SET / "images",
                "train.init": init,
                "train.init_classes": "new",
                "train.network.droploss_threshold": "null",  # people leave little out
                "train.steps": FEW_STEPS,
                "train.rate": 5e-4,
                "predictions.enabled": "false",
                "self_training.rounds": 0,
            }
            config = student_config(args, student.seed, "merge_tree", values)
            trained = run(config, stages={"train"}).stages["train"].folder
            scores = unseen_scores(args, trained, held) | panoptic_scores(args, trained, held, "identity")
            yield {"set": PANOPTIC_SET, "method": method, "seed": student.seed, **scores}


def half_of_truth(args: argparse.Namespace, start: int, count: int | None) -> Path:
    """A COCO panoptic JSON of some photos of the set, from number `start` on, with categories as a model lists them."""
    whole = json.loads((args.data / PANOPTIC_SET / MASK_SETS[PANOPTIC_SET]).read_text())
    ids = coco_categories(whole["categories"]).ids
    chosen = sorted(whole["annotations"], key=lambda entry: entry["file_name"])[start:][:count]
    for entry in chosen:
        for segment in entry["segments_info"]:
            segment["category_id"] = ids[segment["category_id"]]
    images = {entry["image_id"] for entry in chosen}
    part = {
        "images": [image for image in whole["images"] if image["id"] in images],
        "annotations": chosen,
        "categories": sorted(({**c, "id": ids[c["id"]]} for c in whole["categories"]), key=lambda c: int(c["id"])),
    }
    path = Path(args.runs / "scores" / f"{PANOPTIC_SET}-from-{start}-{len(chosen)}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(part))
    return path


def student_config(args: argparse.Namespace, seed: int, labels: str, more: Mapping[str, Any] | None = None) -> Config:
    photos = [f"/{LEARNT}/images/*", f"/{MORE}/*"]
    values = {
        "source.uri": args.data,
        "source.format": "folder",
        "source.include": json.dumps(photos),
        "run.uri": args.runs / f"student-{seed}",
        "instances.method": labels,
        "semantics.method": "none",
        "backbone.weights": args.weights,
        "train.steps": STEPS,
        "predictions.enabled": "true",
        "self_training.rounds": 1,
        "seed": seed,
        "workers.size": 2,
        "workers.cpus": 1,
        "workers.train_workers": 2,
        **(more or {}),
    }
    return load_config(str(STUDENT_CONFIG), [f"{key}={value}" for key, value in values.items()])


def mask_scores(args: argparse.Namespace, run_folder: str, photos: str, stage: str) -> dict[str, float]:
    labels, folder = str(args.data / photos / MASK_SETS[photos]), str(args.runs / "scores" / photos)
    return _chosen(evaluate_masks(run_folder, labels, stage=stage, output=folder))


def unseen_scores(args: argparse.Namespace, weights: str, labels: Path) -> dict[str, float]:
    """The masks of a model on photos of the other set, those of a COCO panoptic JSON."""
    predictor = load_predictor(weights, backbone_weights=str(args.weights))
    truth = TrueMasks(str(labels), str(args.data / PANOPTIC_SET / "panoptic"))
    tally = MaskTally(clusters=None, has_stuff=False)
    for name in truth.names:
        photo = decode_image((args.data / PANOPTIC_SET / "images" / name).read_bytes(), DecodeLimits())
        found = predictor(photo)
        size = photo.shape[:2]
        masks = [
            instance_of(int(category) + 1, {"size": list(size), "counts": counts}, score=float(score))
            for category, counts, score in zip(found.classes, encode_masks(found.masks), found.scores, strict=True)
        ]
        tally.add(truth.read(name), FoundPhoto(name, size, masks))
    return _chosen(tally.result())


def panoptic_scores(
    args: argparse.Namespace, weights: str, labels: Path, mode: Literal["hungarian", "identity"]
) -> dict[str, float | None]:
    """The panoptic labels of a model on the same photos, written and read again."""
    folder = args.runs / "scores" / "predictions" / Path(weights).name
    photos = [str(args.data / PANOPTIC_SET / "images" / name) for name in TrueMasks(str(labels), "").names]
    backbone = str(args.weights)
    predict_photos(weights, photos, str(folder), backbone_weights=backbone)
    found = evaluate_run(
        str(folder / PANOPTIC_JSON),
        str(labels),
        output=str(folder / "scores"),
        truth_pngs=str(args.data / PANOPTIC_SET / "panoptic"),
        mode=mode,
        leftover="argmax" if mode == "hungarian" else "error",
    )
    other = {} if mode == "identity" else {"PQ, other half": found["other_half"]["PQ"]}
    return {name: found["all_images"][name] for name in ("PQ", "PQ_things", "PQ_stuff")} | other


def _chosen(result: dict[str, Any]) -> dict[str, float]:
    return {name: result["scores"]["all"][name] for name in ("AP", "AP50", "AR1", "AR10", "AR100")}


PARTS = {
    "masks": score_masks,
    "stuff": score_stuff,
    "panoptic": score_panoptic,
    "student": score_student,
    "few": score_few,
}


def print_table(entries: list[dict[str, Any]]) -> None:
    """Each method once a set: means over the seeds in percent, with the least and the largest where they differ."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["part"], entry["set"], entry["method"]), []).append(entry)
    for (_, photos, method), seeds in groups.items():
        names = dict.fromkeys(name for seed in seeds for name, value in seed.items() if isinstance(value, float))
        figures = (f"{name} {_spread([s[name] for s in seeds if s.get(name) is not None])}" for name in names)
        print(f"{photos} | {method} | {', '.join(figures) or seeds[0].get('failed')}", file=sys.stderr)


def _spread(values: list[float]) -> str:
    mean, least, most = (f"{100 * value:.1f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", default="", help="only those whose name holds this")
    parser.add_argument("--output", type=Path, help="a file that is there keeps its other scores")
    args = parser.parse_args()
    known = args.output is not None and args.output.is_file()
    entries = {_key(entry): entry for entry in json.loads(args.output.read_text())["scores"]} if known else {}
    for part in args.only:
        for entry in PARTS[part](args):
            found = {"part": part} | entry
            entries[_key(found)] = found
            print(json.dumps(found), file=sys.stderr, flush=True)
    ordered = sorted(entries.values(), key=_place)
    publish({"benchmark": "quality", "machine": describe_machine(), "scores": ordered}, args.output)
    print_table(ordered)


def _key(entry: dict[str, Any]) -> tuple[str, str, str, int]:
    return entry["part"], entry["set"], entry["method"], entry["seed"]


def _place(entry: dict[str, Any]) -> tuple[int, str, int, int]:
    """In the order of the tables of this file."""
    methods = [*MASKS, *STUFF, *PANOPTIC, *(f"{labels}: {method}" for labels in TAUGHT for method in STUDENTS)]
    place = methods.index(entry["method"]) if entry["method"] in methods else len(methods)
    return list(PARTS).index(entry["part"]), entry["set"], place, entry["seed"]


if __name__ == "__main__":
    main()
