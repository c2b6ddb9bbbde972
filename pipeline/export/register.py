"""Registers the labels beside this file with detectron2, for its own networks and for Mask2Former.

    import sys; sys.path.insert(0, "THE FOLDER OF THIS FILE")
    import register

    register.register("train")                     # image_root="photos/" where they lie elsewhere now
    register.configure_detectron2(cfg, "train")    # Panoptic FPN and Mask R-CNN; or
    register.configure_mask2former(cfg, "train")

The sets are `u2label_train_separated` (instances, and stuff with all things as its first class: Panoptic FPN) and
`u2label_train` (segments of things and stuff in one list of classes: Mask2Former). Masks are run lengths, for which
`INPUT.MASK_FORMAT` must be "bitmask", and is set to it. Labels are of photos that were turned as their EXIF data says,
as detectron2's `read_image` does. Each export has a copy of this file; it needs detectron2, and nothing of u2label.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VOID = 255  # in the PNGs of stuff


def register(name: str = "train", image_root: str | None = None, prefix: str = "u2label") -> list[str]:
    """Register the set both ways; returns the names of the data sets, the separated one first."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for separated in (True, False):
        dataset = f"{prefix}_{name}" + "_separated" * separated
        DatasetCatalog.register(dataset, lambda separated=separated: load(name, image_root, separated=separated))
        MetadataCatalog.get(dataset).set(**metadata(name, separated=separated))
    return [f"{prefix}_{name}_separated", f"{prefix}_{name}"]


def configure_detectron2(cfg: Any, name: str = "train", prefix: str = "u2label") -> None:
    """The data set, the numbers of classes and the format of masks of Panoptic FPN and Mask R-CNN."""
    things, stuff = counts(name)
    cfg.DATASETS.TRAIN = (f"{prefix}_{name}_separated",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = things
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = stuff + 1  # the first is all things
    cfg.INPUT.MASK_FORMAT = "bitmask"


def configure_mask2former(cfg: Any, name: str = "train", prefix: str = "u2label") -> None:
    """The data set, the number of classes and the format of masks of Mask2Former."""
    cfg.DATASETS.TRAIN = (f"{prefix}_{name}",)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = sum(counts(name))
    cfg.INPUT.MASK_FORMAT = "bitmask"


def counts(name: str = "train") -> tuple[int, int]:
    """(K, S): the numbers of classes of things and of stuff."""
    listed = _categories(name)
    things = sum(category["isthing"] for category in listed)
    return things, len(listed) - things


def metadata(name: str = "train", *, separated: bool) -> dict[str, Any]:
    """What detectron2's MetadataCatalog is told of the set."""
    listed, (things, _) = _categories(name), counts(name)
    first = [{"id": 0, "name": "things", "color": [0, 0, 0]}]
    of_stuff = [*first, *listed[things:]] if separated else listed
    return {
        "thing_classes": [category["name"] for category in listed[:things]],
        "thing_colors": [category["color"] for category in listed[:things]],
        "thing_dataset_id_to_contiguous_id": {category["id"]: i for i, category in enumerate(listed[:things])},
        "stuff_classes": [category["name"] for category in of_stuff],
        "stuff_colors": [category["color"] for category in of_stuff],
        "stuff_dataset_id_to_contiguous_id": {category["id"]: i for i, category in enumerate(of_stuff)},
        "panoptic_root": str(HERE / f"panoptic_{name}"),
        "panoptic_json": str(_files("panoptic", name)[0]),
        "json_file": str(_files("instances", name)[0]),
        "sem_seg_root": str(HERE / f"panoptic_stuff_{name}"),
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": VOID,
        "label_divisor": 1000,
    }


def load(name: str = "train", image_root: str | None = None, *, separated: bool) -> list[dict[str, Any]]:
    """A dict a photo, as detectron2's mappers (separated) or Mask2Former's take them."""
    found, (things, _) = [], counts(name)
    for of_panoptic, of_instances in zip(_files("panoptic", name), _files("instances", name), strict=True):
        panoptic, instances = json.loads(of_panoptic.read_text()), json.loads(of_instances.read_text())
        images = {image["id"]: image for image in panoptic["images"]}
        objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
        for one in instances["annotations"]:
            objects[one["image_id"]].append(_annotation(one))
        for labels in panoptic["annotations"]:
            image = images[labels["image_id"]]
            entry = {key: image[key] for key in ("height", "width")} | {"image_id": image["id"]}
            entry["file_name"] = _photo(image, image_root, panoptic["info"]["image_root"])
            if separated:
                entry["annotations"] = objects[image["id"]]
                entry["sem_seg_file_name"] = str(HERE / f"panoptic_stuff_{name}" / labels["file_name"])
            entry |= _segments(labels, str(HERE / f"panoptic_{name}"), things, separated)
            found.append(entry)
    return found


def _segments(labels: dict[str, Any], root: str, things: int, separated: bool) -> dict[str, Any]:
    """The PNG of segments, and the segments with their classes counted from 0 (stuff by itself: from 1)."""
    segments = []
    for segment in labels["segments_info"]:
        is_thing = segment["category_id"] <= things
        first = things if separated and not is_thing else 1
        segments.append({**segment, "category_id": segment["category_id"] - first, "isthing": is_thing})
    return {"pan_seg_file_name": f"{root}/{labels['file_name']}", "segments_info": segments}


def _annotation(one: dict[str, Any]) -> dict[str, Any]:
    from detectron2.structures import BoxMode  # a number does not do for all its versions

    kept = {key: one[key] for key in ("iscrowd", "bbox", "segmentation")}
    return {**kept, "category_id": one["category_id"] - 1, "bbox_mode": BoxMode.XYWH_ABS}


def _photo(image: dict[str, Any], image_root: str | None, root: str) -> str:
    """In the folder that is given, or the copy beside this file, or where the labels were made from."""
    if image_root is not None:
        return str(Path(image_root, image["file_name"]).absolute())
    has_copy = root.startswith("images_")
    return str(image["coco_url"] if "coco_url" in image and not has_copy else Path(HERE, root, image["file_name"]))


def _categories(name: str) -> list[dict[str, Any]]:
    """Things 1..K, then stuff K+1..K+S."""
    listed: list[dict[str, Any]] = json.loads(_files("panoptic", name)[0].read_text())["categories"]
    return listed


def _files(kind: str, name: str) -> list[Path]:
    """The JSON of a set, or its shards in their order."""
    pattern = re.compile(rf"{kind}_{re.escape(name)}(-\d+-of-\d+)?\.json")
    found = sorted(path for path in HERE.glob(f"{kind}_*.json") if pattern.fullmatch(path.name))
    if not found:
        raise FileNotFoundError(f"there is no {kind}_{name}.json in {HERE}")
    return found
