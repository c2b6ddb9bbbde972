"""AP and AR of a stream of images against COCOeval on all of them at once, and small cases by hand."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.metrics.instances import Instance, InstanceAP, Region, instance_of

SIZE = (40, 50)
Images = list[tuple[list[Instance], list[Instance]]]


def rectangle(
    category: int, x: int, y: int, width: int, height: int, *, score: float = 1.0, crowd: bool = False
) -> Instance:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    return instance_of(category, codec.encode(mask), crowd=crowd, score=score)


def random_images(count: int) -> Images:
    """Objects of three categories, a tenth of them crowds, and detections that are moved, doubled or invented."""
    rng = np.random.default_rng(5)
    images: Images = []
    for _ in range(count):
        truth, found = [], []
        for _ in range(rng.integers(0, 5)):
            x, y, width, height = (int(v) for v in (*rng.integers(0, 20, 2), *rng.integers(4, 20, 2)))
            truth.append(rectangle(int(rng.integers(1, 4)), x, y, width, height, crowd=bool(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 4)):
                dx, dy = rng.integers(0, 3, 2)
                category = truth[-1].category if rng.random() < 0.8 else int(rng.integers(1, 5))
                score = float(rng.choice([0.2, 0.4, 0.6, 0.8]))  # equal scores are common
                found.append(rectangle(category, x + int(dx), y + int(dy), width, height, score=score))
        images.append((truth, found))
    return images


def all_at_once(images: Images, region: Region) -> list[float]:
    """AP, AP50, AP75, AR1, AR10, AR100 of pycocotools over the whole set."""
    sides: list[list[dict]] = [[], []]
    for image_id, pair in enumerate(images):
        for side, instances in zip(sides, pair, strict=True):
            side += [
                {
                    "id": len(side) + 1 + k,
                    "image_id": image_id,
                    "category_id": i.category,
                    "segmentation": i.rle,
                    "bbox": list(i.bbox),
                    "area": i.area,
                    "iscrowd": int(i.crowd),
                    "score": i.score,
                }
                for k, i in enumerate(instances)
            ]
    with contextlib.redirect_stdout(io.StringIO()):
        cocos = []
        for side in sides:
            coco = COCO()
            coco.dataset = {
                "images": [{"id": k, "height": SIZE[0], "width": SIZE[1]} for k in range(len(images))],
                "categories": [{"id": c} for c in range(1, 5)],
                "annotations": side,
            }
            coco.createIndex()
            cocos.append(coco)
        evaluation = COCOeval(*cocos, region)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(evaluation.stats[k]) for k in (0, 1, 2, 6, 7, 8)]


@pytest.mark.parametrize("region", ["bbox", "segm"])
def test_a_stream_of_images_scores_as_cocoeval_on_all_of_them(region: Region) -> None:
    images = random_images(40)
    stream = InstanceAP(region)
    for truth, found in images:
        stream.update(truth, found)
    total = stream.result().all
    numbers = [total.ap, total.ap50, total.ap75, total.ar1, total.ar10, total.ar100]
    assert numbers == pytest.approx(all_at_once(images, region), abs=1e-12)
    assert 0.05 < total.ap < total.ap50 < 0.95
    assert total.n == 3


def test_one_class_for_all_forgives_a_wrong_category() -> None:
    truth, found = [rectangle(1, 0, 0, 10, 10)], [rectangle(2, 0, 0, 10, 10)]
    for class_agnostic, expected in ((False, 0.0), (True, 1.0)):
        stream = InstanceAP("segm", class_agnostic=class_agnostic)
        stream.update(truth, found)
        assert stream.result().all.ap == pytest.approx(expected)


def test_box_and_mask_differ_where_the_shape_does() -> None:
    triangle = np.tril(np.ones((20, 20), np.uint8))
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[:20, :20] = triangle
    found = [instance_of(1, codec.encode(mask))]
    assert found[0].bbox == (0.0, 0.0, 20.0, 20.0)
    assert found[0].area == 210
    scores = {}
    for region in ("bbox", "segm"):
        stream = InstanceAP(region)
        stream.update([rectangle(1, 0, 0, 20, 20)], found)
        scores[region] = stream.result().all
    assert scores["bbox"].ap == pytest.approx(1.0)
    assert scores["segm"].ap == pytest.approx(0.1)  # IoU 0.525 is above one of the ten thresholds
    assert scores["segm"].ap50 == pytest.approx(1.0)


def test_a_category_without_an_object_has_no_average() -> None:
    stream = InstanceAP("bbox")
    stream.update([rectangle(1, 0, 0, 10, 10), rectangle(2, 20, 0, 5, 5, crowd=True)], [rectangle(3, 0, 0, 9, 9)])
    result = stream.result()
    assert (result.all.n, result.all.ap) == (1, 0.0)
    assert result.per_class[1].n == 1
    assert math.isnan(result.per_class[2].ap)
    assert math.isnan(result.per_class[3].ap)


def test_nothing_at_all_is_not_a_number() -> None:
    stream = InstanceAP("bbox")
    stream.update([], [])
    assert math.isnan(stream.result().all.ap)
    assert stream.result().per_class == {}


def test_only_the_surest_hundred_detections_count() -> None:
    stream = InstanceAP("bbox")
    wrong = [rectangle(1, 30, 30, 5, 5, score=0.9)] * 100
    stream.update([rectangle(1, 0, 0, 10, 10)], [*wrong, rectangle(1, 0, 0, 10, 10, score=0.1)])
    assert stream.result().all.ar100 == 0.0
