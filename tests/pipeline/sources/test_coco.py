"""COCO panoptic and instances files: what is read of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as codec

from pipeline.errors import ConfigError
from pipeline.sources.coco import Category, CocoInstances, CocoPanoptic, PanopticSegment, open_coco
from pipeline.sources.names import ImageNames
from tests.pipeline.label_files import categories, segment, write_coco

LISTED = categories(2, 1)


def read_back(uri: str) -> dict[str, Any]:
    return json.loads(Path(uri).read_text())


def test_maps_segments_and_categories_are_read(tmp_path: Path) -> None:
    segments = [segment(70000, 1, score=0.5), segment(2, 1, iscrowd=1), segment(3, 3)]
    labels = CocoPanoptic(write_coco(tmp_path, {"a.jpg": ([[70000, 2, 3, 0]], segments)}, LISTED))
    assert labels.names == ["a.jpg"]
    assert labels.categories[3] == Category(3, "stuff 1", False)
    image = labels.read("a.jpg")
    assert image.ids.tolist() == [[70000, 2, 3, 0]]
    assert image.segments == (
        PanopticSegment(70000, 1, False, 0.5),
        PanopticSegment(2, 1, True, None),
        PanopticSegment(3, 3, False, None),
    )
    assert labels.annotation("a.jpg")["segments_info"] == segments


def test_the_sample_of_coco_is_read(shared_dir: Path) -> None:
    labels = CocoPanoptic(str(shared_dir / "data/coco-panoptic-sample/panoptic_examples.json"))
    assert (len(labels.categories), len(labels.names)) == (133, 2)
    image = labels.read("000000142238.jpg")
    assert image.ids.shape == (427, 640)
    areas = {s["id"]: s["area"] for s in labels.annotation("000000142238.jpg")["segments_info"]}
    assert {s.id: int((image.ids == s.id).sum()) for s in image.segments} == areas


def test_the_sample_in_detection_format_holds_the_same_masks(shared_dir: Path) -> None:
    folder = shared_dir / "data/coco-panoptic-sample"
    labels = CocoPanoptic(str(folder / "panoptic_examples.json"))
    instances = CocoInstances(str(folder / "panoptic_coco_detection_format.json"))
    for name in labels.names:
        image = labels.read(name)
        areas = sorted((s.category, float((image.ids == s.id).sum())) for s in image.segments)
        assert sorted((one.category, one.area) for one in instances.read(name)) == areas


def test_results_without_images_go_by_the_names_of_their_pngs(tmp_path: Path) -> None:
    uri = write_coco(tmp_path, {"a.jpg": ([[1]], [segment(1, 9)])}, LISTED)
    Path(uri).write_text(json.dumps({"annotations": read_back(uri)["annotations"]}))
    labels = CocoPanoptic(uri)
    assert (labels.names, labels.categories) == (["a.png"], {})
    assert labels.read("a.png").segments[0].category == 9


Break = Callable[[dict[str, Any], Path], None]


def break_ids(number: int) -> Break:
    return lambda document, folder: document["annotations"][0]["segments_info"][0].update(id=number)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_ids(5), r"a.png: .*'a.jpg': \[5\] in segments_info but without a pixel; \[1\] in the picture but not"),
        (break_ids(2), r"\[2\] listed twice"),
        (lambda d, f: d["annotations"][0]["segments_info"][0].update(category_id=7), r"categories \[7\].* 3 listed"),
        (lambda d, f: d["annotations"][0]["segments_info"][0].pop("category_id"), r"lacks 'category_id'"),
        (lambda d, f: d["annotations"][0].pop("segments_info"), r"lacks 'segments_info'"),
        (lambda d, f: d["annotations"].append(d["annotations"][0]), r"'a.jpg' has two annotations"),
        (lambda d, f: d["annotations"].clear(), r"truth.json has no annotations"),
        (lambda d, f: d.pop("annotations"), r"is not COCO panoptic JSON: it lacks the lists annotations"),
        (lambda d, f: d["images"][0].update(height=2), r"is 2x1 pixels, but 2x2 by .*truth.json"),
        (lambda d, f: d["images"][0].pop("file_name"), r"lacks file_name"),
        (lambda d, f: d["images"].clear() or d["images"].append({"id": 9, "file_name": "z"}), r"does not list it"),
        (lambda d, f: d["categories"][0].pop("isthing"), r"needs an integer id and isthing"),
        (lambda d, f: d["categories"].append({"id": 1, "isthing": 0}), r"category 1 is listed both"),
        (
            lambda d, f: d["annotations"][0].update(file_name="../a.png"),
            r"truth.json: .*'../a.png' leads out of its folder",
        ),
        (lambda d, f: d["images"][0].update(file_name="/etc/a.jpg"), r"'/etc/a.jpg' leads out of its folder"),
        (lambda d, f: (f / "truth" / "a.png").unlink(), r"cannot read '.*truth/a.png', which .*truth.json names"),
        (lambda d, f: (f / "truth" / "a.png").write_bytes(b"no picture"), r"a.png: not a panoptic PNG"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, damage: Break, message: str) -> None:
    uri = write_coco(tmp_path, {"a.jpg": ([[1, 2]], [segment(1, 1), segment(2, 3)])}, LISTED)
    document = read_back(uri)
    damage(document, tmp_path)
    Path(uri).write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        CocoPanoptic(uri).read("a.jpg")


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing.json"):
        CocoPanoptic(str(tmp_path / "nothing.json"))
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ConfigError, match=r"text.json is not JSON"):
        CocoPanoptic(str(tmp_path / "text.json"))


def instances_file(folder: Path, **annotation: Any) -> str:
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 6}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1} | annotation],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "instances.json").write_text(json.dumps(document))
    return str(folder / "instances.json")


def test_polygons_and_run_lengths_are_one_mask(tmp_path: Path) -> None:
    mask = np.zeros((4, 6), np.uint8, order="F")
    mask[1:3, 2:5] = 1
    packed = codec.encode(mask)["counts"].decode()
    runs = [9, 2, 2, 2, 2, 2, 5]
    for shape in (
        [[2, 1, 5, 1, 5, 3, 2, 3]],
        {"size": [4, 6], "counts": runs},
        {"size": [4, 6], "counts": packed},
    ):
        (found,) = CocoInstances(instances_file(tmp_path, segmentation=shape)).read("a.jpg")
        assert np.array_equal(codec.decode(dict(found.rle)), mask)
        assert (found.bbox, found.area, found.crowd) == ((2.0, 1.0, 3.0, 2.0), 6.0, False)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({}, "annotation 1 has no mask"),
        ({"segmentation": [[1, 2]]}, "annotation 1 has no mask"),
        ({"segmentation": {"size": [6, 4], "counts": [24]}}, r"mask of \[6, 4\], its image is \[4, 6\]"),
        ({"image_id": 5}, "annotation 1 is of the image 5"),
        ({"category_id": 5}, "and the category 5"),
    ],
)
def test_bad_instances_are_refused_by_name(tmp_path: Path, annotation: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CocoInstances(instances_file(tmp_path, **annotation)).read("a.jpg")


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    uri = instances_file(tmp_path, segmentation=[[2, 1, 5, 1, 5, 3, 2, 3]])
    document = read_back(uri)
    document["images"].append({**document["images"][0], "id": 2})
    Path(uri).write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"instances.json: 2 of the images are called 'a.jpg'"):
        CocoInstances(uri)


def test_the_kind_of_labels_is_told_by_their_content(tmp_path: Path) -> None:
    panoptic = open_coco(write_coco(tmp_path, {"a.jpg": ([[1]], [segment(1, 1)])}, LISTED))
    assert isinstance(panoptic, CocoPanoptic)
    assert panoptic.read("a.jpg").ids.tolist() == [[1]]
    uri = instances_file(tmp_path, segmentation=[[2, 1, 5, 1, 5, 3, 2, 3]])
    assert isinstance(open_coco(uri), CocoInstances)
    with pytest.raises(ConfigError, match=r"a folder of PNGs \('x'\) belongs to COCO panoptic JSON"):
        open_coco(uri, "x")
    Path(uri).write_text(json.dumps({**read_back(uri), "annotations": []}))
    assert open_coco(uri).names == ["a.jpg"]  # a photo without an object is labelled too
    for content in ("[]", '{"images": []}', '{"annotations": null}'):
        Path(uri).write_text(content)
        with pytest.raises(ConfigError, match=r"instances.json is neither COCO panoptic nor instances JSON"):
            open_coco(uri)


def test_an_image_belongs_to_one_name_alone() -> None:
    names = ImageNames(["x/a.jpg", "b.jpg"], "the truth")
    assert [names.claim(name, "the run") for name in ("x/a.png", "b.jpg", "x/a.png", "c.jpg")] == [
        "x/a.jpg",
        "b.jpg",
        "x/a.jpg",
        None,
    ]
    assert names.claimed == {"x/a.jpg": "x/a.png", "b.jpg": "b.jpg"}
    with pytest.raises(ConfigError, match=r"the run: 'x/a.png' and 'y/a.png' could both be the image 'x/a.jpg' of the"):
        names.claim("y/a.png", "the run")


def test_an_image_is_found_by_its_path_or_else_by_its_name() -> None:
    names = ImageNames(["x/a.jpg", "y/a.jpg", "x/b.jpg"], "the truth")
    assert names.find("x/a.png") == "x/a.jpg"
    assert names.find("elsewhere/b.png") == "x/b.jpg"
    assert names.find("c.jpg") is None
    with pytest.raises(ConfigError, match=r"'a.jpg' could be any of 2 of the truth \(x/a.jpg, y/a.jpg\)"):
        names.find("a.jpg")
