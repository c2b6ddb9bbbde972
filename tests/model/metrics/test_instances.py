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

from model.metrics.instances import (
    AREAS,
    Average,
    Instance,
    InstanceAP,
    Region,
    covered_shares,
    instance_of,
    match_masks,
)

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


def all_at_once(images: Images, region: Region, *, class_agnostic: bool = False) -> list[float]:
    """The numbers of pycocotools over the whole set: AP, AP50, AP75, AP by size, AR1, AR10, AR100, AR by size."""
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
        evaluation.params.useCats = not class_agnostic
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def numbers(average: Average) -> list[float]:
    return [average.ap, average.ap50, average.ap75, average.ar1, average.ar10, average.ar100]


@pytest.mark.parametrize("region", ["bbox", "segm"])
def test_a_stream_of_images_scores_as_cocoeval_on_all_of_them(region: Region) -> None:
    images = random_images(40)
    stream = InstanceAP(region)
    for truth, found in images:
        stream.update(truth, found)
    total, expected = stream.result().all, all_at_once(images, region)
    assert numbers(total) == pytest.approx([expected[k] for k in (0, 1, 2, 6, 7, 8)], abs=1e-12)
    assert 0.05 < total.ap < total.ap50 < 0.95
    assert total.n == 3


def test_each_size_of_objects_scores_as_cocoeval_with_classes_ignored() -> None:
    rng = np.random.default_rng(9)
    images: Images = [
        # Areas that straddle COCO's lines, and scores that all differ: ties are broken by the order of the categories.
        tuple([one._replace(area=one.area**1.7, score=rng.random()) for one in side] for side in pair)  # type: ignore[misc]
        for pair in random_images(40)
    ]
    stream = InstanceAP("segm", class_agnostic=True, sizes=tuple(AREAS))
    for truth, found in images:
        stream.update(truth, found)
    expected = all_at_once(images, "segm", class_agnostic=True)
    assert numbers(stream.result().all) == pytest.approx([expected[k] for k in (0, 1, 2, 6, 7, 8)], abs=1e-12)
    sizes = [stream.result(size).all for size in ("small", "medium", "large")]
    assert [one.ap for one in sizes] == pytest.approx(expected[3:6], abs=1e-12)
    assert [one.ar100 for one in sizes] == pytest.approx(expected[9:], abs=1e-12)
    assert len({round(value, 3) for value in (expected[0], *expected[3:6])}) == 4
    counts = [stream.result(size).per_class[1].n for size in AREAS]
    assert counts[0] == sum(counts[1:]) == sum(not one.crowd for truth, _ in images for one in truth)
    with pytest.raises(KeyError):
        InstanceAP("segm").result("small")


def test_average_precision_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    truth = [[rectangle(1, 0, 0, 10, 10), rectangle(1, 20, 20, 10, 10)], [rectangle(1, 5, 5, 20, 20)]]
    # One of three found, with IoU 81/100: right at the thresholds .50 to .80, seven of ten; recall 1/3 is 34 of 101.
    stream = InstanceAP("segm")
    for objects, found in zip(truth, ([rectangle(1, 0, 0, 9, 9)], []), strict=True):
        stream.update(objects, found)
    one_found = [0.7 * 34 / 101, 34 / 101, 34 / 101, 0.7 / 3, 0.7 / 3, 0.7 / 3]
    assert numbers(stream.result().all) == pytest.approx(one_found)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("wrong", "expected"), [(0.1, 1.0), (0.9, 0.5)])
def test_average_precision_depends_on_the_order_of_scores(wrong: float, expected: float) -> None:
    stream = InstanceAP("segm")
    right = rectangle(1, 0, 0, 10, 10, score=0.5)
    stream.update([right], [right, rectangle(1, 25, 25, 10, 10, score=wrong)])
    assert stream.result().all.ap50 == pytest.approx(expected)


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


def test_masks_match_one_to_one_the_best_iou_first() -> None:
    truth = [rectangle(7, 0, 0, 10, 10), rectangle(8, 0, 0, 10, 16), rectangle(9, 20, 20, 10, 10)]
    nested = [rectangle(1, 0, 0, 10, 12), rectangle(1, 0, 0, 10, 11), rectangle(1, 20, 20, 10, 4)]
    # The second has 10/11 of the first object, so that the first is left the second one with 12/16, not 10/12 of the
    # first; the third covers 4/10.
    assert match_masks(nested, truth) == [(0, 1), (1, 0)]
    assert match_masks(nested, truth[:1]) == [(1, 0)]
    assert match_masks(nested[:1] * 2, truth[:1]) == [(0, 0)]  # twice the same mask: the first
    assert match_masks(nested, truth, least_iou=0.4) == [(0, 1), (1, 0), (2, 2)]


def test_a_match_needs_half_of_the_union_and_no_crowd() -> None:
    half = [rectangle(1, 0, 0, 10, 5)]
    assert match_masks(half, [rectangle(1, 0, 0, 10, 10)]) == [(0, 0)]
    assert match_masks(half, [rectangle(1, 0, 0, 10, 11)]) == []
    assert match_masks(half, [rectangle(1, 0, 0, 10, 5, crowd=True), rectangle(1, 0, 0, 10, 6)]) == [(0, 1)]
    assert match_masks(half, [rectangle(1, 0, 0, 10, 5, crowd=True)]) == match_masks([], half) == []


def test_the_share_of_a_mask_in_a_region() -> None:
    found = [rectangle(1, 0, 0, 10, 10), rectangle(1, 0, 5, 5, 10), rectangle(1, 30, 0, 5, 5), rectangle(1, 0, 0, 0, 0)]
    assert covered_shares(found, rectangle(1, 0, 0, 20, 8).rle).tolist() == [0.8, 0.3, 0.0, 0.0]
    assert covered_shares(found, rectangle(1, 0, 0, 0, 0).rle).tolist() == [0.0] * 4
    assert covered_shares([], found[0].rle).shape == (0,)
