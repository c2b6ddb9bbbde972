"""Truth and prediction side by side: names, sizes, halves, true objects and supercategories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluate.instances import InstanceScores, TrueInstances, visible_instances
from pipeline.evaluate.panoptic import LabelPairs, StuffBySupercategory, half_of, open_labels
from pipeline.sources.coco import CocoInstances, CocoPanoptic
from tests.pipeline.label_files import categories, random_run, segment, write_coco

LISTED = categories(2, 2)
# U2Seg's 15 supercategories of COCO's 53 kinds of stuff, in the order in which it counts them.
SUPERCATEGORIES = {
    "textile": {92, 93, 109, 141, 168, 200},
    "building": {95, 128, 151, 166, 197},
    "raw-material": {100, 195},
    "furniture-stuff": {107, 112, 130, 133, 156, 161, 188, 189},
    "floor": {118, 190},
    "plant": {119, 184, 193},
    "food-stuff": {122, 196},
    "ground": {125, 144, 145, 147, 149, 154, 159, 191, 194},
    "structural": {138, 185},
    "water": {148, 155, 178},
    "wall": {171, 175, 176, 177, 199},
    "window": {180, 181},
    "ceiling": {186},
    "sky": {187},
    "solid": {192, 198},
}


def coco(folder: Path, name: str, *images: str, ids: Any = ((1,),)) -> CocoPanoptic:
    labels = {image: (ids, [segment(1, 1)]) for image in images}
    return CocoPanoptic(write_coco(folder, labels, LISTED, name))


def test_images_are_matched_by_path_or_name_and_those_without_a_prediction_come_last(tmp_path: Path) -> None:
    truth = coco(tmp_path, "truth", "a.jpg", "b.jpg", "c.jpg")
    pairs = LabelPairs(truth, coco(tmp_path, "pred", "train/c.png", "a.jpg"))
    found = list(pairs)
    assert [(pair.truth.name, pair.predicted.name) for pair in found] == [
        ("c.jpg", "train/c.png"),
        ("a.jpg", "a.jpg"),
        ("b.jpg", "b.jpg"),
    ]
    assert (len(pairs), pairs.missing) == (3, ["b.jpg"])
    assert found[0].overlaps == {(1, 1): 1}
    assert (found[2].overlaps, found[2].predicted.segments) == ({(1, 0): 1}, ())


def test_predictions_of_other_images_are_left_out(tmp_path: Path) -> None:
    truth = coco(tmp_path, "truth", "x/a.jpg", "x/b.jpg")
    pairs = LabelPairs(truth, coco(tmp_path, "pred", "y/a.jpg", "z.jpg", "b.jpg", "x/a.jpg"))
    assert pairs.unknown == ["y/a.jpg", "z.jpg"]  # the true a.jpg is that of its whole path
    assert [(pair.truth.name, pair.predicted.name) for pair in pairs] == [("x/b.jpg", "b.jpg"), ("x/a.jpg", "x/a.jpg")]


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (["z.jpg"], r"pred.json: the image 'z.jpg' is none of the 2 images of .*truth.json, such as 'x/a.jpg'"),
        (["a.jpg", "y/a.jpg"], r"pred.json: 'a.jpg' and 'y/a.jpg' could both be the image 'x/a.jpg' of .*truth.json"),
    ],
)
def test_names_none_of_which_fits_or_two_of_one_image_are_refused(
    tmp_path: Path, predicted: Sequence[str], message: str
) -> None:
    truth = coco(tmp_path, "truth", "x/a.jpg", "x/b.jpg")
    with pytest.raises(ConfigError, match=message):
        LabelPairs(truth, coco(tmp_path, "pred", *predicted))


def test_another_size_is_refused_and_a_turned_one_explained(tmp_path: Path) -> None:
    truth = coco(tmp_path, "truth", "a.jpg", ids=((1, 1),))
    pairs = LabelPairs(truth, coco(tmp_path, "pred", "a.jpg", ids=((1,), (1,))))
    with pytest.raises(ConfigError, match=r"pred/a.png is 1x2 pixels, but 2x1 by .*truth/a.png \(one of them may"):
        list(pairs)


def test_the_half_of_an_image_is_that_of_its_name_without_ending() -> None:
    assert [half_of(f"{i}.jpg") for i in range(8)] == [half_of(f"{i}.png") for i in range(8)]
    assert 400 < sum(half_of(f"photo-{i:04d}.jpg") for i in range(1000)) < 600


def test_inputs_are_told_apart(tmp_path: Path) -> None:
    panoptic, _ = random_run(tmp_path, 2)
    assert list(open_labels(panoptic).names) == ["photo-000.jpg", "photo-001.jpg"]
    uri = write_coco(tmp_path, {"a.jpg": ([[1]], [segment(1, 1)])}, LISTED)
    assert list(open_labels(uri).names) == ["a.jpg"]
    (tmp_path / "truth").rename(tmp_path / "elsewhere")
    assert open_labels(uri, str(tmp_path / "elsewhere")).read("a.jpg").ids.tolist() == [[1]]
    with pytest.raises(ConfigError, match=r"a folder of PNGs .* belongs to a COCO panoptic JSON"):
        open_labels(panoptic, str(tmp_path / "elsewhere"))


def instances_json(folder: Path, name: str = "a.jpg", category: int = 1, size: tuple[int, int] = (1, 4)) -> str:
    document = {
        "images": [{"id": 5, "file_name": name, "height": size[0], "width": size[1]}],
        "annotations": [
            {
                "id": 1,
                "image_id": 5,
                "category_id": category,
                "segmentation": {"size": list(size), "counts": [0, 3, 1]},
            }
        ],
        "categories": [{"id": category, "name": "cat"}],
    }
    (folder / "instances.json").write_text(json.dumps(document))
    return str(folder / "instances.json")


def test_true_objects_are_visible_things_or_those_of_the_instances(tmp_path: Path) -> None:
    labels = {"a.jpg": ([[1, 1, 2, 3]], [segment(1, 1), segment(2, 2, iscrowd=1), segment(3, 3)])}
    truth = CocoPanoptic(write_coco(tmp_path, labels, LISTED))
    image = truth.read("a.jpg")
    visible = TrueInstances(truth, None).of(image)
    assert [(one.category, one.area, one.crowd) for one in visible] == [(1, 2.0, False), (2, 1.0, True)]
    whole = TrueInstances(truth, CocoInstances(instances_json(tmp_path))).of(image)
    assert [(one.category, one.area) for one in whole] == [(1, 3.0)]


def test_instances_that_do_not_fit_the_truth_are_refused(tmp_path: Path) -> None:
    truth = CocoPanoptic(write_coco(tmp_path, {"a.jpg": ([[1, 1, 1, 1]], [segment(1, 1)])}, LISTED))
    image = truth.read("a.jpg")
    with pytest.raises(ConfigError, match=r"instances.json: the categories \[3\] are no things of .*truth.json"):
        TrueInstances(truth, CocoInstances(instances_json(tmp_path, category=3)))
    with pytest.raises(ConfigError, match=r"instances.json does not list the image 'a.jpg'"):
        TrueInstances(truth, CocoInstances(instances_json(tmp_path, name="b.jpg"))).of(image)
    with pytest.raises(ConfigError, match=r"is 4x1 pixels, but 2x2 by .*instances.json"):
        TrueInstances(truth, CocoInstances(instances_json(tmp_path, size=(2, 2)))).of(image)


def test_detections_without_a_class_are_left_out_unless_classes_do_not_matter(tmp_path: Path) -> None:
    truth = CocoPanoptic(write_coco(tmp_path, {"a.jpg": (np.ones((5, 5)).astype(int), [segment(1, 1)])}, LISTED))
    image = truth.read("a.jpg")
    objects = visible_instances(image, {1, 2})
    for class_agnostic, class_of, expected in ((False, {1: 1}, 1.0), (False, {}, 0.0), (True, {}, 1.0)):
        scores = InstanceScores(class_agnostic=class_agnostic)
        scores.add(objects, objects, class_of)
        assert scores.numbers()["box_AP"] == scores.numbers()["mask_AP"] == pytest.approx(expected)
        assert scores.per_class()[1]["mask_AR1"] == pytest.approx(expected)


def test_the_supercategories_of_coco_are_those_that_u2seg_scores(shared_dir: Path) -> None:
    sample = CocoPanoptic(str(shared_dir / "data/coco-panoptic-sample/panoptic_examples.json"))
    grouped = StuffBySupercategory(sample)
    stuff = [category for category in grouped.categories.values() if not category.is_thing]
    assert [category.name for category in stuff] == list(SUPERCATEGORIES)
    assert [category.id for category in stuff] == [min(ids) for ids in SUPERCATEGORIES.values()]
    group = {i: min(ids) for ids in SUPERCATEGORIES.values() for i in ids}
    for name in sample.names:
        fine, coarse = sample.read(name), grouped.read(name)
        assert [s.category for s in coarse.segments] == [group.get(s.category, s.category) for s in fine.segments]


def test_stuff_without_a_supercategory_cannot_be_grouped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the stuff 3 \(stuff 1\) has no supercategory"):
        StuffBySupercategory(coco(tmp_path, "truth", "a.jpg"))
