"""What of a truth is not scored: asked for or guessed, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluate.score import evaluate_run, print_scores
from pipeline.evaluate.void import Void
from pipeline.sources.coco import CocoPanoptic
from tests.pipeline.label_files import categories, random_run, segment, write_coco

WHITE = 0xFFFFFF
LISTED = [*categories(2, 0), {"id": 9, "name": "Un-labelled", "isthing": 0}]


def score(folder: Path, ids: list[int], segments: list[dict[str, Any]], void: list[str] | None) -> dict[str, Any]:
    """Of a photo of ten pixels in which six are found as the one thing of the truth, and four as another."""
    truth = write_coco(folder, {"a.jpg": ([ids], segments)}, LISTED, "truth")
    found = {"a.jpg": ([[1] * 6 + [2] * 4], [segment(1, 1, score=0.9), segment(2, 2, score=0.9)])}
    predicted = write_coco(folder, found, LISTED, "pred")
    return evaluate_run(predicted, truth, output=str(folder / "out"), mode="identity", void=void)


def test_a_category_that_is_called_so_and_white_without_a_segment_are_void(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [1] * 6 + [7] * 2 + [WHITE] * 2
    result = score(tmp_path, ids, [segment(1, 1), segment(7, 9)], None)
    assert result["all_images"]["PQ"] == 1.0
    assert [category["id"] for category in result["classes"]] == [1, 2]
    print_scores(result)
    said = " ".join(capsys.readouterr().out.split())
    void = "the values 0, 16777215 and the category 9 (Un-labelled), as guessed; --void says it otherwise"
    assert f"void of the truth, 40.0% of its pixels, is not scored: {void}" in said


def test_what_is_asked_for_takes_the_place_of_guesses(tmp_path: Path) -> None:
    ids, segments = [1] * 6 + [7] * 4, [segment(1, 1), segment(7, 9)]
    named = score(tmp_path / "name", ids, segments, ["Un-labelled"])
    assert named["all_images"]["PQ"] == score(tmp_path / "id", ids, segments, ["9"])["all_images"]["PQ"] == 1.0
    assert named["void"] == "the value 0 and the category 9 (Un-labelled)"
    nothing = score(tmp_path / "none", ids, segments, ["none"])
    assert nothing["all_images"]["PQ"] == pytest.approx(1 / 3)  # one of three classes, the void one among them
    assert nothing["void"] == "the value 0"


def test_a_value_without_a_segment_is_void_when_it_is_asked_for_and_refused_when_not(tmp_path: Path) -> None:
    ids, segments = [1] * 6 + [77] * 4, [segment(1, 1)]
    asked = score(tmp_path / "asked", ids, segments, ["77"])
    assert (asked["all_images"]["PQ"], asked["void_share"], asked["void"]) == (1.0, 0.4, "the values 0, 77")
    with pytest.raises(ConfigError, match=r"\[77\] in the picture but not in segments_info.*--void"):
        score(tmp_path / "not", ids, segments, None)


def test_an_id_that_a_segment_has_is_no_void(tmp_path: Path) -> None:
    result = score(tmp_path, [255] * 6 + [0] * 4, [segment(255, 1)], None)
    assert (result["per_class"]["1"]["PQ"], result["void_share"]) == (1.0, 0.4)
    assert result["void"].startswith("the value 0 and")


def test_what_is_no_category_is_refused(tmp_path: Path) -> None:
    truth = CocoPanoptic(write_coco(tmp_path, {"a.jpg": ([[1]], [segment(1, 1)])}, LISTED))
    with pytest.raises(ConfigError, match=r"--void: 'sky' is no category of .*truth.json, which has thing 1, thing 2"):
        Void(truth, ["sky"])
    parts, _ = random_run(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"--void: 255 is no category of .*panoptic, whose maps have no other values"):
        evaluate_run(parts, parts, output=str(tmp_path / "out"), void=["255"])
