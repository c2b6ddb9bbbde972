"""The whole evaluation: against the COCO evaluator, by hand, and against what is known of random labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluate.mapping import VoteThresholds
from pipeline.evaluate.panoptic import half_of
from pipeline.evaluate.score import evaluate_run, print_scores, score_labels
from pipeline.operations.demo.scenes import make_scene, write_scenes
from pipeline.sources.coco import CocoInstances, CocoPanoptic
from pipeline.stages.parts import PanopticParts, find_parts
from pipeline.store import storage
from tests.pipeline.label_files import categories, random_run, segment, unreadable_row, write_coco, write_part
from workers.masks import encode_panoptic_png, encode_rle
from workers.merge import merge_panoptic
from workers.records import PANOPTIC_SCHEMA, PREDICTIONS_SCHEMA

LISTED = categories(2, 2)
Labels = dict[str, tuple[Any, list[dict[str, Any]]]]


def evaluate(folder: Path, truth: Labels, predicted: Labels, listed: Any = LISTED, **options: Any) -> dict[str, Any]:
    true = CocoPanoptic(write_coco(folder, truth, LISTED, "truth"))
    return score_labels(CocoPanoptic(write_coco(folder, predicted, listed, "pred")), true, **options)


def test_equals_the_coco_evaluator_with_crowd_and_void(shared_dir: Path, tmp_path: Path) -> None:
    folder = shared_dir / "parity" / "panoptic-quality"
    expected = json.loads((folder / "expected.json").read_text())
    result = evaluate_run(
        str(folder / "pred.json"), str(folder / "gt.json"), output=str(tmp_path / "out"), mode="identity"
    )
    for group, suffix in (("All", ""), ("Things", "_things"), ("Stuff", "_stuff")):
        for key in ("PQ", "SQ", "RQ"):
            found = result["all_images"][f"{key}{suffix}"]
            assert found == pytest.approx(expected[group][key.lower()], abs=1e-6)
    for category, numbers in expected["per_class"].items():
        assert result["per_class"][category]["PQ"] == pytest.approx(numbers["pq"], abs=1e-6)
    assert result["other_half"] is None
    assert result["things_without_score"] == 35


@pytest.mark.parametrize("already", [False, True])
def test_categories_as_they_are_go_with_groups_of_stuff(tmp_path: Path, already: bool) -> None:
    """Of labels with the truth's categories, and of such as have the groups instead."""
    listed = [c | {"supercategory": "textile"} if not c["isthing"] else c for c in LISTED]
    grouped = [c | {"name": "textile"} if c["id"] == 3 else c for c in LISTED if c["id"] != 4]
    ids = [[1, 1, 2, 2, 3, 3]]
    truth = write_coco(tmp_path, {"a.jpg": (ids, [segment(1, 1), segment(2, 3), segment(3, 4)])}, listed, "truth")
    if already:
        found = write_coco(tmp_path, {"a.jpg": (ids, [segment(1, 1), segment(2, 3), segment(3, 3)])}, grouped, "pred")
    else:  # of the other kind of textile, which is as good
        found = write_coco(tmp_path, {"a.jpg": (ids, [segment(1, 1), segment(2, 4), segment(3, 3)])}, LISTED, "pred")
    scores = evaluate_run(found, truth, output=str(tmp_path), mode="identity", stuff_by_supercategory=True)
    assert scores["all_images"]["PQ"] == pytest.approx(1)
    other = write_coco(
        tmp_path, {"a.jpg": (ids, [segment(1, 1)])}, [c | {"name": f"{c['name']}!"} for c in LISTED], "x"
    )
    with pytest.raises(ConfigError, match=r"categories must agree"):
        evaluate_run(other, truth, output=str(tmp_path), mode="identity", stuff_by_supercategory=True)


def test_the_sample_of_coco_is_perfect_against_itself(shared_dir: Path) -> None:
    folder = shared_dir / "data/coco-panoptic-sample"
    sample = CocoPanoptic(str(folder / "panoptic_examples.json"))
    result = score_labels(sample, CocoPanoptic(str(folder / "panoptic_examples.json")))
    for key in ("PQ", "PQ_stuff_merged", "mIoU", "mIoU_things_as_one_published", "accuracy", "box_AP", "mask_AR100"):
        assert result["all_images"][key] == pytest.approx(1.0), key
    assert result["class_agnostic"]["mask_AP"] == pytest.approx(1.0)


def test_labels_by_other_names_are_perfect_and_the_mapping_is_found(tmp_path: Path) -> None:
    panoptic, _ = random_run(tmp_path, 12)
    truth = PanopticParts(find_parts(panoptic))
    things, stuff = {1: 3, 2: 1, 3: 4, 4: 2}, {5: 7, 6: 5, 7: 6}
    labels = {}
    for name in truth.names:
        image = truth.read(name)
        labels[name] = (image.ids, [segment(s.id, (things | stuff)[s.category], score=s.score) for s in image.segments])
    predicted = CocoPanoptic(write_coco(tmp_path, labels, categories(4, 3), "pred"))
    result = score_labels(predicted, truth)
    assert result["mapping"] == {str(new): old for old, new in sorted((things | stuff).items(), key=lambda i: i[1])}
    for key in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "box_AP", "mask_AP", "mIoU", "accuracy"):
        assert result["all_images"][key] == pytest.approx(1.0), key
        assert result["other_half"][key] == pytest.approx(1.0), key
    assert result["segments_without_class"] == 0


def test_the_numbers_by_hand(tmp_path: Path) -> None:
    truth = {"a.jpg": ([[1] * 10 + [2] * 10 + [3] * 20], [segment(1, 1), segment(2, 1), segment(3, 3)])}
    pixels = [[1] * 8 + [0] * 2 + [2] * 6 + [5] * 4 + [3] * 20]
    found = [segment(1, 1, score=0.9), segment(2, 1, score=0.8), segment(5, 2, score=0.7), segment(3, 3)]
    result = evaluate(tmp_path, truth, {"a.jpg": (pixels, found)}, mode="identity")
    numbers, by_class = result["all_images"], result["per_class"]
    # Things: 0.8 and 0.6 of two cats, a dog that is none; stuff exact; the second stuff occurs nowhere.
    assert by_class["1"]["PQ"] == pytest.approx(0.7)
    assert (numbers["PQ_things"], numbers["PQ_stuff"]) == (pytest.approx(0.35), 1.0)
    assert numbers["PQ"] == pytest.approx(1.7 / 3)
    # Half of the recall at IoU 0.5..0.6 is found at 0.65..0.8: 1 for three thresholds of ten, 51/101 for four.
    assert numbers["mask_AP"] == pytest.approx((3 * 1 + 4 * 51 / 101) / 10)
    assert (numbers["mask_AP50"], numbers["mask_AP75"]) == (pytest.approx(1.0), pytest.approx(51 / 101))
    assert (numbers["mask_AR1"], numbers["mask_AR100"]) == (pytest.approx(0.35), pytest.approx(0.5))
    assert numbers["accuracy"] == pytest.approx(34 / 40)
    assert numbers["accuracy_published"] == pytest.approx(34 / 38)
    assert numbers["mIoU"] == pytest.approx((14 / 20 + 1) / 2)
    assert numbers["accuracy_things_as_one"] == pytest.approx(38 / 40)
    assert by_class["4"]["IoU"] is None


def test_average_precision_of_predictions_is_of_all_that_was_detected(tmp_path: Path) -> None:
    """The visible segments have one of two things; the other was detected with a score too low to be shown."""
    ids = np.array([[1] * 10 + [2] * 10 + [3] * 20], np.int32)
    truth = {"a.jpg": (ids, [segment(1, 1), segment(2, 1), segment(3, 3)])}
    masks = [ids == 1, ids == 2]
    visible = {"id": 1, "category": 1, "is_thing": True, "area": 10, "bbox": [0.0, 0, 10, 1], "score": 0.9}
    row = {
        "image_id": "a.jpg",
        "uri": "",
        "height": 1,
        "width": 40,
        "status": "ok",
        "error": None,
        "panoptic": encode_panoptic_png(np.where(ids == 1, 1, 0)),
        "segments": [visible],
        "hidden_instances": 1,
        "rle": [encode_rle(mask) for mask in masks],
        "bbox": [[0, 0, 10, 1], [10, 0, 20, 1]],
        "area": [10, 10],
        "score": [0.9, 0.2],
        "category": [1, 1],
        "labels": None,
    }
    true = CocoPanoptic(write_coco(tmp_path, truth, LISTED, "truth"))
    found = {}
    for name, schema in (("panoptic", PANOPTIC_SCHEMA), ("predictions", PREDICTIONS_SCHEMA)):
        part = write_part(tmp_path / name / "part-00000.parquet", [row], LISTED, schema)
        found[name] = score_labels(PanopticParts([part]), true, mode="identity")["all_images"]
    half = 51 / 101  # recall 0.5 at COCO's 101 points
    assert (found["panoptic"]["mask_AP"], found["predictions"]["mask_AP"]) == (pytest.approx(half), pytest.approx(1.0))
    assert (found["panoptic"]["box_AR100"], found["predictions"]["box_AR100"]) == (0.5, 1.0)
    assert found["panoptic"]["PQ"] == found["predictions"]["PQ"]


def test_two_clusters_of_one_stuff_are_one_segment_or_two(tmp_path: Path) -> None:
    truth = {"a.jpg": ([[1] * 10], [segment(1, 3)])}
    predicted = {"a.jpg": ([[1] * 6 + [2] * 4], [segment(1, 3), segment(2, 4)])}
    result = evaluate(tmp_path, truth, predicted, leftover="argmax")
    assert result["mapping"] == {"3": 3, "4": 3}
    numbers = result["all_images"]
    assert (numbers["PQ_stuff_merged"], numbers["RQ_stuff_merged"]) == (1.0, 1.0)
    assert numbers["PQ_stuff"] == result["per_class"]["3"]["PQ"] == pytest.approx(0.6 / 1.5)
    assert numbers["mIoU"] == 1.0


def test_the_headline_is_segment_by_segment_and_what_is_merged_is_called_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A true stuff that comes in two pieces, of which the prediction makes one."""
    truth = {"a.jpg": ([[1] * 6 + [2] * 4], [segment(1, 3), segment(2, 3)])}
    result = evaluate(tmp_path, truth, {"a.jpg": ([[1] * 10], [segment(1, 3)])}, mode="identity")
    assert result["all_images"]["PQ"] == pytest.approx(0.6 / 1.5)
    assert result["all_images"]["PQ_merged"] == 1.0
    print_scores(result)
    lines = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line]
    shown = {name.strip(): value.strip() for name, value in lines}
    assert (shown["all"], shown["all, stuff merged"], shown["stuff, merged"]) == ("40.0%", "100.0%", "100.0%")


def test_a_truth_of_a_few_of_the_images_scores_these_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ([[1] * 10], [segment(1, 1, score=1.0)])
    result = evaluate(tmp_path, {"b.jpg": whole}, {"a.jpg": ([[1]], whole[1]), "b.jpg": whole, "c.jpg": whole})
    assert (result["images"], result["all_images"]["PQ"]) == (1, 1.0)
    assert result["predictions_without_truth"] == {"count": 2, "first": ["a.jpg", "c.jpg"]}
    print_scores(result)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("1 images;") and "2 predicted images have no truth, such as a.jpg: they are left out" in said


def test_a_cluster_without_a_class_is_void(tmp_path: Path) -> None:
    truth = {"a.jpg": ([[1] * 10], [segment(1, 3)])}
    predicted = {"a.jpg": ([[1] * 6 + [2] * 4], [segment(1, 3), segment(2, 4)])}
    result = evaluate(tmp_path, truth, predicted)
    assert (result["mapping"], result["segments_without_class"]) == ({"3": 3}, 1)
    assert result["all_images"]["PQ_stuff"] == pytest.approx(0.6)
    assert (result["all_images"]["accuracy"], result["all_images"]["accuracy_published"]) == (pytest.approx(0.6), 1.0)


def test_the_vote_removes_what_nobody_voted_for_and_maps_many_to_one(tmp_path: Path) -> None:
    ids = np.repeat([1, 2, 3], 100).reshape(1, 300)
    truth = {"a.jpg": (ids, [segment(1, 1), segment(2, 1), segment(3, 2)])}
    found = [segment(1, 1, score=0.9), segment(2, 2, score=0.9), segment(3, 3, score=0.5)]
    result = evaluate(tmp_path, truth, {"a.jpg": (ids, found)}, categories(3, 1), mode="vote")
    assert result["mapping"] == {"1": 1, "2": 1}
    assert result["per_class"]["1"]["PQ"] == 1.0
    assert (result["all_images"]["PQ_things"], result["all_images"]["mask_AP"]) == (0.5, pytest.approx(0.5))
    assert result["options"] == {"score": 0.6, "box_iou": 0.7, "stuff_iou": 0.15}
    lower = evaluate(
        tmp_path / "b",
        truth,
        {"a.jpg": (ids, found)},
        categories(3, 1),
        mode="vote",
        thresholds=VoteThresholds(score=0.5),
    )
    assert lower["mapping"] == {"1": 1, "2": 1, "3": 2}


def test_an_image_without_a_prediction_is_missed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = ([[1] * 10], [segment(1, 1, score=1.0)])
    result = evaluate(tmp_path, {"a.jpg": whole, "b.jpg": whole}, {"a.jpg": whole})
    assert result["images_without_prediction"] == {"count": 1, "first": ["b.jpg"]}
    assert result["all_images"]["PQ"] == pytest.approx(1 / 1.5)
    assert result["all_images"]["mask_AR100"] == pytest.approx(0.5)
    print_scores(result)
    assert "1 images have no prediction, such as b.jpg" in " ".join(capsys.readouterr().out.split())


def test_rows_that_could_not_be_read_are_missed_and_not_an_error(tmp_path: Path) -> None:
    row = unreadable_row("a.jpg") | {"status": "ok", "height": 1, "width": 2}
    of_segment = {"id": 1, "category": 1, "is_thing": True, "area": 2, "bbox": [0.0] * 4, "score": 0.5}
    row |= {"panoptic": encode_panoptic_png(np.array([[1, 1]])), "segments": [of_segment]}
    rows = [row, unreadable_row("b.jpg"), unreadable_row("not-in-the-truth.jpg")]
    predicted = PanopticParts([write_part(tmp_path / "p.parquet", rows, LISTED)])
    whole = ([[1, 1]], [segment(1, 1)])
    truth = CocoPanoptic(write_coco(tmp_path, {"a.jpg": whole, "b.jpg": whole}, LISTED))
    result = score_labels(predicted, truth)
    assert (result["images"], result["images_without_prediction"]["first"]) == (2, ["b.jpg"])


def named(half: int, count: int) -> list[str]:
    return [name for name in (f"{i}.jpg" for i in range(200)) if half_of(name) == half][:count]


def test_a_mapping_of_the_other_half_is_learnt_on_none_of_the_images_it_scores(tmp_path: Path) -> None:
    first, second = named(0, 2), named(1, 2)
    # The cluster 1 is cats in the first half and dogs in the second.
    truth = {name: ([[1] * 4], [segment(1, 1 if name in first else 2)]) for name in (*first, *second)}
    predicted = {name: ([[1] * 4], [segment(1, 1, score=0.9)]) for name in truth}
    result = evaluate(tmp_path, truth, predicted)
    assert [fold["PQ"] for fold in result["other_half"]["folds"]] == [0.0, 0.0]
    assert result["other_half"]["PQ"] == 0.0
    assert result["all_images"]["PQ"] == pytest.approx((2 / 3 + 0) / 2)  # two cats and two false ones; no dog
    assert result["class_agnostic"]["box_AP"] == pytest.approx(1.0)


def test_one_half_alone_has_no_other(tmp_path: Path) -> None:
    labels = {name: ([[1]], [segment(1, 1)]) for name in named(0, 2)}
    assert evaluate(tmp_path, labels, labels)["other_half"] is None


def test_misplaced_labels_of_scenes_have_the_scores_known_for_them(tmp_path: Path) -> None:
    write_scenes(str(tmp_path), 8, 2, (96, 128))
    labels = {}
    for index in range(8):
        scene, name = make_scene((2, index), (96, 128)), f"scene-{index:05d}.jpg"
        masks, semantic = np.roll(scene.masks, 2, axis=2), np.full((96, 128), scene.background, np.uint8)
        merged = merge_panoptic(
            masks, scene.kinds % 4 + 1, semantic, num_things=4, num_stuff=5, scores_n=np.linspace(0.9, 0.5, len(masks))
        )
        labels[name] = (merged.ids, [segment(s.id, s.category, score=s.score) for s in merged.segments])
    predicted = CocoPanoptic(write_coco(tmp_path, labels, categories(4, 5), "pred"))
    result = score_labels(predicted, CocoPanoptic(str(tmp_path / "truth.json")))
    # From a second, separate implementation over id maps.
    quality = {"PQ": 0.638126, "SQ": 0.703583, "RQ": 0.723810, "PQ_things": 0.410075, "PQ_stuff": 0.980203}
    for key, expected in quality.items():
        assert result["all_images"][key] == pytest.approx(expected, abs=1e-6), key
    for key, expected in {"AP": 0.605070, "AP50": 1.0, "AP75": 0.607355, "AR100": 0.631250}.items():
        assert result["class_agnostic"][f"mask_{key}"] == pytest.approx(expected, abs=1e-6), key


def test_whole_masks_of_the_instances_are_the_truth_when_given(tmp_path: Path) -> None:
    truth = {"a.jpg": ([[1, 1, 2, 0]], [segment(1, 1), segment(2, 2)])}
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 1, "width": 4}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": k, "segmentation": {"size": [1, 4], "counts": counts}}
            for k, counts in ((1, [0, 3, 1]), (2, [2, 1, 1]))
        ],
        "categories": [{"id": k, "name": f"thing {k}"} for k in (1, 2)],
    }
    (tmp_path / "instances.json").write_text(json.dumps(document))
    whole = CocoInstances(str(tmp_path / "instances.json"))
    predicted = {"a.jpg": ([[1, 1, 2, 0]], [segment(1, 1, score=0.9), segment(2, 2, score=0.9)])}
    result = evaluate(tmp_path, truth, predicted, instances=whole)
    assert result["all_images"]["PQ"] == 1.0
    assert result["per_class"]["1"]["mask_AP"] == pytest.approx(0.4)  # 2 of 3 pixels: IoU 0.67
    assert result["per_class"]["2"]["mask_AP"] == pytest.approx(1.0)


def test_the_result_is_written_where_it_is_asked_for(source: str, tmp_path: Path) -> None:
    panoptic, _ = random_run(tmp_path, 5)
    result = evaluate_run(panoptic, panoptic, output=source)
    written = json.loads(storage.read_bytes(storage.join(source, "panoptic.json")))
    assert written == {key: value for key, value in result.items() if key != "files"}
    assert result["files"] == [storage.join(source, "panoptic.json")]
    assert not any(isinstance(v, float) and math.isnan(v) for v in written["all_images"].values())


@pytest.mark.parametrize("mode", ["hungarian", "vote", "identity"])
def test_the_tables_show_every_mapping(tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    panoptic, _ = random_run(tmp_path, 9)
    result = evaluate_run(panoptic, panoptic, output=str(tmp_path / "out"), mode=mode)  # type: ignore[arg-type]
    print_scores(result)
    said = capsys.readouterr().out
    assert "9 images" in said
    assert "thing 4" in said
    assert "100.0%" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "guess"}, "mode: 'guess' is none of hungarian, vote, identity"),
        ({"leftover": "drop"}, "leftover: 'drop' is none of error, argmax"),
        ({"mode": "vote", "leftover": "argmax"}, "leftover: 'argmax' belongs to the mapping hungarian, not to vote"),
        ({"thresholds": VoteThresholds()}, "thresholds belong to the mapping vote, not to hungarian"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    whole = {"a.jpg": ([[1]], [segment(1, 1)])}
    with pytest.raises(ConfigError, match=message):
        evaluate(tmp_path, whole, whole, **options)


def test_a_prediction_without_categories_has_those_of_the_truth_or_is_refused(tmp_path: Path) -> None:
    whole = {"a.jpg": ([[1]], [segment(1, 1)])}
    assert evaluate(tmp_path / "a", whole, whole, [], mode="identity")["all_images"]["PQ"] == 1.0
    with pytest.raises(ConfigError, match=r"pred.json lists no categories"):
        evaluate(tmp_path / "b", whole, whole, [])
    foreign = {"a.jpg": ([[1]], [segment(1, 99)])}
    with pytest.raises(ConfigError, match=r"pred/a.png: .* categories \[99\]"):
        evaluate(tmp_path / "c", whole, foreign, [], mode="identity")


def test_a_truth_without_categories_is_refused(tmp_path: Path) -> None:
    truth = write_coco(tmp_path, {"a.jpg": ([[1]], [segment(1, 1)])}, [])
    with pytest.raises(ConfigError, match=r"truth.json lists no categories; the truth needs them"):
        evaluate_run(truth, truth, output=str(tmp_path / "out"))


def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    truth = write_coco(tmp_path, {"a.jpg": ([[1]], [segment(1, 1)])}, LISTED)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="--output: cannot write"):
        evaluate_run(truth, truth, output=str(tmp_path / "file"))
