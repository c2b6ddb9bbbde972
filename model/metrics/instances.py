"""Average precision and recall of instances over a stream of images, by pycocotools' COCOeval.

COCOeval matches one image at a time; what is kept of an image are a few bytes a detection (its score, and at each IoU
whether it hit), so that masks need not be held. Masks may overlap, on either side.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_DETECTIONS = [1, 10, 100]  # an image and category, the surest first
MATCH_IOU = 0.5
Region = Literal["bbox", "segm"]
Size = Literal["all", "small", "medium", "large"]
AREAS: dict[Size, tuple[float, float]] = {  # of objects in pixels, as COCO draws the lines; both ends belong to it
    "all": (0, 1e10),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1e10),
}


class Instance(NamedTuple):
    """An object of the truth or a detection.

    `rle`: compressed COCO RLE, {"size": [height, width], "counts": ...}. `bbox`: x, y, width, height in pixels.
    `area`: pixels. `crowd` is read of the truth alone, `score` (higher is surer) of detections alone.
    """

    category: int
    rle: Mapping[str, Any]
    bbox: tuple[float, float, float, float]
    area: float
    crowd: bool = False
    score: float = 1.0


def instance_of(category: int, rle: Mapping[str, Any], *, crowd: bool = False, score: float = 1.0) -> Instance:
    """The instance of a mask, with the box and the area of its pixels."""
    from pycocotools import mask as codec

    x, y, width, height = map(float, codec.toBbox(rle))
    return Instance(category, rle, (x, y, width, height), float(codec.area(rle)), crowd, score)


@dataclass(frozen=True, slots=True)
class Average:
    """COCO's numbers in [0, 1]: `ap` over IoU 0.5 to 0.95, `ap50`, `ap75`, and the recall with 1, 10, 100 detections.

    Of one category `n` is its true objects without crowds; of all, the categories that have any. NaN when n is 0.
    """

    ap: float
    ap50: float
    ap75: float
    ar1: float
    ar10: float
    ar100: float
    n: int


@dataclass(frozen=True, slots=True)
class InstanceResult:
    """The mean over the categories that occur in the truth, and each category by its id."""

    all: Average
    per_class: dict[int, Average]


class _Matched(NamedTuple):
    """What accumulation needs of one image and category: D detections, G objects, at T IoUs."""

    scores_D: NDArray[np.float64]
    hit_TD: NDArray[np.bool_]
    ignored_TD: NDArray[np.bool_]
    not_counted_G: NDArray[np.bool_]  # crowds, and objects of another size


class InstanceAP:
    """AP and AR of boxes or masks over a stream of images.

    Args:
        region: "bbox" compares boxes, "segm" masks.
        class_agnostic: all categories are taken for one (its id is 1).
        sizes: of the objects that are scored, each apart. As COCO has it, an object of another size is no miss, and a
            detection that finds it, or finds nothing and is itself of another size, no false alarm.
    """

    def __init__(self, region: Region, *, class_agnostic: bool = False, sizes: Sequence[Size] = ("all",)) -> None:
        self.region = region
        self.class_agnostic = class_agnostic
        self.sizes = tuple(sizes)
        self._matched: dict[Size, dict[int, list[_Matched]]] = {size: defaultdict(list) for size in self.sizes}

    def update(self, truth: Sequence[Instance], found: Sequence[Instance]) -> None:
        """Add one image: its objects and its detections, in any order. Masks must all have the image's size."""
        from pycocotools.cocoeval import COCOeval

        if not truth and not found:
            return
        if self.class_agnostic:
            truth = [instance._replace(category=1) for instance in truth]
            found = [instance._replace(category=1) for instance in found]
        categories = sorted({instance.category for instance in (*truth, *found)})
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(_coco(truth, categories), _coco(found, categories), self.region)
            _set_params(evaluation.params, self.sizes)
            evaluation.evaluate()
        # Of one image COCOeval lists the categories, and the sizes within each.
        for (category, size), image in zip(itertools.product(categories, self.sizes), evaluation.evalImgs, strict=True):
            self._matched[size][category].append(
                _Matched(
                    np.array(image["dtScores"], np.float64),
                    np.asarray(image["dtMatches"]) > 0,
                    np.asarray(image["dtIgnore"], bool),
                    np.asarray(image["gtIgnore"], bool),
                )
            )

    def result(self, size: Size = "all") -> InstanceResult:
        """The numbers of the objects of a size. KeyError for one that was not asked for."""
        matched = self._matched[size]
        per_class = {category: _accumulate(matched[category]) for category in sorted(matched)}
        return InstanceResult(_mean([one for one in per_class.values() if one.n]), per_class)


def match_masks(
    found: Sequence[Instance], truth: Sequence[Instance], *, least_iou: float = MATCH_IOU
) -> list[tuple[int, int]]:
    """Pairs (detection, object) of an image by their masks' IoU, at least `least_iou`, one to one.

    Greedy: the pair of the largest IoU first, of equal ones that of the first detection, then of the first object.
    Crowds have no partner, and classes do not matter.
    """
    from pycocotools import mask as codec

    objects = [number for number, instance in enumerate(truth) if not instance.crowd]
    if not found or not objects:
        return []
    rles = ([dict(one.rle) for one in found], [dict(truth[number].rle) for number in objects])
    iou_DG = np.asarray(codec.iou(*rles, [0] * len(objects)))
    near = np.flatnonzero(iou_DG >= least_iou)
    object_of: dict[int, int] = {}
    for place in near[np.argsort(-iou_DG.ravel()[near], kind="stable")].tolist():
        detection, column = divmod(place, len(objects))
        if detection not in object_of and objects[column] not in object_of.values():
            object_of[detection] = objects[column]
    return sorted(object_of.items())


def covered_shares(found: Sequence[Instance], region: Mapping[str, Any]) -> NDArray[np.float64]:
    """(D,) share of each mask's pixels that lie in `region`, an RLE of the image's size; 0 for an empty mask."""
    from pycocotools import mask as codec

    if not found:
        return np.zeros(0)
    # With a crowd, IoU is the share of the detection.
    shares: NDArray[np.float64] = np.asarray(codec.iou([dict(one.rle) for one in found], [dict(region)], [1]))[:, 0]
    return shares


def _coco(instances: Sequence[Instance], categories: Sequence[int]) -> Any:
    """pycocotools' COCO of one image. Ids start at 1, because its matching takes 0 for no match."""
    from pycocotools.coco import COCO

    height, width = instances[0].rle["size"] if instances else (0, 0)
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": instance.category,
            "segmentation": dict(instance.rle),
            "bbox": list(instance.bbox),
            "area": instance.area,
            "iscrowd": int(instance.crowd),
            "score": instance.score,
        }
        for number, instance in enumerate(instances, start=1)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "height": height, "width": width}],
        "categories": [{"id": category} for category in categories],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _set_params(params: Any, sizes: Sequence[Size]) -> None:
    params.areaRng, params.areaRngLbl = [list(AREAS[size]) for size in sizes], list(sizes)
    params.maxDets = list(MAX_DETECTIONS)


def _accumulate(images: Sequence[_Matched]) -> Average:
    """The numbers of one category and size over its images, in the order they came (which decides ties of scores)."""
    from pycocotools.cocoeval import COCOeval, Params

    params = Params("bbox")
    _set_params(params, ["all"])  # which size it is was settled when they were matched
    params.catIds, params.imgIds = [1], list(range(len(images)))
    evaluation = COCOeval(iouType="bbox")
    evaluation.params = evaluation._paramsEval = params  # as `evaluate` leaves them
    evaluation.evalImgs = [
        {"dtScores": m.scores_D, "dtMatches": m.hit_TD, "dtIgnore": m.ignored_TD, "gtIgnore": m.not_counted_G}
        for m in images
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    n = sum(int((~m.not_counted_G).sum()) for m in images)
    if not n:
        return _average([float("nan")] * 6, 0)
    precision_TRM = evaluation.eval["precision"][:, :, 0, 0, :]
    recall_TM = evaluation.eval["recall"][:, 0, 0, :]
    ap_T = precision_TRM[:, :, -1].mean(axis=1)
    return _average([ap_T.mean(), ap_T[0], ap_T[5], *recall_TM.mean(axis=0)], n)


def _mean(averages: Sequence[Average]) -> Average:
    if not averages:
        return _average([float("nan")] * 6, 0)
    numbers = np.array([(a.ap, a.ap50, a.ap75, a.ar1, a.ar10, a.ar100) for a in averages])
    return _average(numbers.mean(axis=0).tolist(), len(averages))


def _average(numbers: Sequence[float], n: int) -> Average:
    ap, ap50, ap75, ar1, ar10, ar100 = map(float, numbers)
    return Average(ap, ap50, ap75, ar1, ar10, ar100, n)
