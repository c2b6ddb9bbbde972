"""Scores of labels against the truth of generated scenes: perfect, imperfect and absent labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.demo.scenes import BACKGROUND_KINDS, OBJECT_KINDS, make_scene, write_scenes
from pipeline.demo.scores import PanopticRow, score_labels
from workers.merge import merge_panoptic

COUNT, SEED, SIZE = 24, 2, (96, 128)
K, S = 20, 8
RENAMED = np.random.default_rng(0).permutation(K) + 1  # pseudo-class of each kind: a name means nothing


@pytest.fixture(scope="module")
def truth_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("scenes"))
    write_scenes(folder, COUNT, SEED, SIZE)
    return folder


def rows(*, stuff: bool = True, one_class: bool = False, shift: int = 0) -> Iterator[PanopticRow]:
    """Labels made from the truth: renamed, all of one class, without stuff, or moved by some pixels."""
    for index in range(COUNT):
        scene = make_scene((SEED, index), SIZE)
        masks = np.roll(scene.masks, shift, axis=2)
        classes = np.full(len(masks), 3) if one_class else RENAMED[scene.kinds]
        semantic = np.full(SIZE, scene.background + 2, dtype=np.uint8) if stuff else None
        merged = merge_panoptic(
            masks, classes, semantic, num_things=K, num_stuff=S, scores_n=np.full(len(masks), 0.9), max_cover=1.0
        )
        yield f"scene-{index:05d}.jpg", merged.ids, merged.segments, [s.score for s in merged.segments]


def test_perfect_labels_score_one_whatever_their_classes_are_called(truth_folder: str) -> None:
    scores = score_labels(truth_folder, rows())
    for name in ("AP", "AP50", "AP75", "AR100", "PQ", "SQ", "RQ", "PQ_things", "PQ_stuff"):
        assert scores[name] == pytest.approx(1.0), name
    assert (scores["images"], scores["unmapped_segments"]) == (COUNT, 0)


def test_rows_of_a_panoptic_part_score_as_the_merge_does(truth_folder: str) -> None:
    as_dicts = (
        (image_id, ids, [{"id": s.id, "category": s.category, "is_thing": s.is_thing} for s in segments], scores)
        for image_id, ids, segments, scores in rows()
    )
    assert score_labels(truth_folder, as_dicts) == score_labels(truth_folder, rows())


def test_without_stuff_its_quality_is_zero_and_all_says_so(truth_folder: str) -> None:
    scores = score_labels(truth_folder, rows(stuff=False))
    assert (scores["PQ_things"], scores["PQ_stuff"]) == (pytest.approx(1.0), 0.0)
    kinds, backgrounds = len(OBJECT_KINDS), len(BACKGROUND_KINDS)
    assert scores["PQ"] == pytest.approx(kinds / (kinds + backgrounds))
    assert scores["AP"] == pytest.approx(1.0)


def test_one_pseudo_class_matches_one_kind_at_most(truth_folder: str) -> None:
    scores = score_labels(truth_folder, rows(one_class=True))
    assert scores["AP"] == pytest.approx(1.0)
    assert 0 < scores["PQ_things"] < 1 / len(OBJECT_KINDS)


def test_misplaced_masks_lose_precision(truth_folder: str) -> None:
    scores = score_labels(truth_folder, rows(shift=2))
    assert 0.1 < scores["AP"] < scores["AP50"]
    assert scores["PQ_things"] < scores["RQ_things"] <= 1
    assert scores["SQ_things"] < 0.95


def test_left_over_pseudo_classes_are_void_and_counted(truth_folder: str) -> None:
    def split_by_image() -> Iterator[PanopticRow]:
        for index, (image_id, ids, segments, scores) in enumerate(rows(stuff=False)):
            labels = [{"id": s.id, "category": s.category + 100 * (index % 2), "is_thing": True} for s in segments]
            yield image_id, ids, labels, scores

    scores = score_labels(truth_folder, split_by_image())
    assert 0 < scores["unmapped_segments"] < scores["segments"]
    assert scores["RQ_things"] < 1
    assert scores["SQ_things"] == pytest.approx(1.0)


def test_images_without_a_row_count_as_missed(truth_folder: str) -> None:
    half = [row for i, row in enumerate(rows()) if i % 2]
    scores = score_labels(truth_folder, half)
    assert scores["images"] == COUNT
    assert 0.2 < scores["AR100"] < 0.8
    nothing = score_labels(truth_folder, [])
    assert (nothing["PQ"], nothing["AP50"], nothing["AR100"]) == (0.0, 0.0, 0.0)


def test_a_foreign_or_repeated_image_is_refused(truth_folder: str) -> None:
    row = next(rows())
    with pytest.raises(ValueError, match=r"'other\.jpg' is not in .*truth\.json"):
        score_labels(truth_folder, [("other.jpg", *row[1:])])
    with pytest.raises(ValueError, match=r"'scene-00000\.jpg' comes twice"):
        score_labels(truth_folder, [row, row])
