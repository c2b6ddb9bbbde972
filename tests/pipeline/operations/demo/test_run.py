"""Scores of labels against the truth of generated scenes: perfect, imperfect and absent labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.operations.demo.run import print_scores, score_scenes
from pipeline.operations.demo.scenes import BACKGROUND_KINDS, OBJECT_KINDS, make_scene, write_scenes
from tests.pipeline.label_files import categories, write_part
from workers.masks import encode_panoptic_png
from workers.merge import merge_panoptic
from workers.records import Status

COUNT, SEED, SIZE = 24, 2, (96, 128)
K, S = 20, 8
RENAMED = np.random.default_rng(0).permutation(K) + 1  # pseudo-class of each kind: a name means nothing


@pytest.fixture(scope="module")
def truth_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("scenes"))
    write_scenes(folder, COUNT, SEED, SIZE)
    return folder


def rows(*, stuff: bool = True, one_class: bool = False, shift: int = 0, split: bool = False) -> list[dict[str, Any]]:
    """Labels made from the truth: renamed, all of one class, without stuff, moved by some pixels, or with two names
    for each kind."""
    labelled = []
    for index in range(COUNT):
        scene = make_scene((SEED, index), SIZE)
        masks = np.roll(scene.masks, shift, axis=2)
        classes = np.full(len(masks), 3) if one_class else RENAMED[scene.kinds + 6 * (split and index % 2)]
        semantic = np.full(SIZE, scene.background + 2, dtype=np.uint8) if stuff else None
        merged = merge_panoptic(
            masks, classes, semantic, num_things=K, num_stuff=S, scores_n=np.full(len(masks), 0.9), max_cover=1.0
        )
        common = {"height": SIZE[0], "width": SIZE[1], "status": Status.OK, "error": None, "uri": ""}
        labels = {"panoptic": encode_panoptic_png(merged.ids), "segments": [asdict(s) for s in merged.segments]}
        labelled.append({"image_id": f"scene-{index:05d}.jpg", **common, **labels, "hidden_instances": 0})
    return labelled


def score(truth: str, folder: Path, labelled: Sequence[dict[str, Any]]) -> dict[str, float]:
    return score_scenes(truth, [write_part(folder / "part-00000.parquet", labelled, categories(K, S))])


def test_perfect_labels_score_one_whatever_their_classes_are_called(truth_folder: str, tmp_path: Path) -> None:
    scores = score(truth_folder, tmp_path, rows())
    for name in ("AP", "AP50", "AR100", "PQ", "SQ_things", "RQ_things", "PQ_things", "PQ_stuff"):
        assert scores[name] == pytest.approx(1.0), name
    assert (scores["images"], scores["unmapped_segments"]) == (COUNT, 0)
    assert scores["PQ_without_stuff"] == pytest.approx(len(OBJECT_KINDS) / (len(OBJECT_KINDS) + len(BACKGROUND_KINDS)))


def test_without_stuff_its_quality_is_zero_and_all_says_so(truth_folder: str, tmp_path: Path) -> None:
    scores = score(truth_folder, tmp_path, rows(stuff=False))
    assert (scores["PQ_things"], scores["PQ_stuff"]) == (pytest.approx(1.0), 0.0)
    assert scores["PQ"] == scores["PQ_without_stuff"] == pytest.approx(6 / 11)
    assert scores["AP"] == pytest.approx(1.0)


def test_one_pseudo_class_matches_one_kind_at_most(truth_folder: str, tmp_path: Path) -> None:
    scores = score(truth_folder, tmp_path, rows(one_class=True))
    assert scores["AP"] == pytest.approx(1.0)
    assert 0 < scores["PQ_things"] < 1 / len(OBJECT_KINDS)


def test_misplaced_masks_lose_precision(truth_folder: str, tmp_path: Path) -> None:
    scores = score(truth_folder, tmp_path, rows(shift=2))
    assert 0.1 < scores["AP"] < scores["AP50"]
    assert scores["PQ_things"] < scores["RQ_things"] <= 1
    assert scores["SQ_things"] < 0.95


def test_left_over_pseudo_classes_are_void_and_counted(truth_folder: str, tmp_path: Path) -> None:
    scores = score(truth_folder, tmp_path, rows(stuff=False, split=True))
    assert 0 < scores["unmapped_segments"] < scores["segments"]
    assert scores["RQ_things"] < 1
    assert scores["SQ_things"] == pytest.approx(1.0)


def test_images_without_a_row_count_as_missed(truth_folder: str, tmp_path: Path) -> None:
    scores = score(truth_folder, tmp_path, rows()[::2])
    assert scores["images"] == COUNT
    assert 0.2 < scores["AR100"] < 0.8
    with pytest.raises(ConfigError, match="nothing holds no labelled image"):
        score(truth_folder, tmp_path / "nothing", [])


def test_a_foreign_or_repeated_image_is_refused(truth_folder: str, tmp_path: Path) -> None:
    row = rows()[0]
    with pytest.raises(ConfigError, match=r"other"):
        score(truth_folder, tmp_path, [row | {"image_id": "other.jpg"}])
    with pytest.raises(ConfigError, match=r"'scene-00000\.jpg' is in .* twice"):
        score(truth_folder, tmp_path, [row, row])


def test_the_table_shows_them_in_percent(truth_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, model = score(truth_folder, tmp_path, rows(stuff=False)), score(truth_folder, tmp_path / "model", rows())
    print_scores(labels)
    assert capsys.readouterr().out.count("54.5 %") == 2
    print_scores(labels, model)
    shown = capsys.readouterr().out
    assert f"{COUNT} scenes" in shown and "model trained on them" in shown
    assert (shown.count("54.5 %"), shown.count("100.0 %")) == (3, 14)
