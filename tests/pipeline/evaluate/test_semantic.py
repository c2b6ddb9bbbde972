"""Class maps of hand-written parts against hand-written labels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.evaluate.class_maps import NO_CATEGORY, VOID, Prediction, panoptic_maps, predictions, semantic_maps
from pipeline.evaluate.confusion import MAX_ROWS, arrange, confusion_png
from pipeline.evaluate.labels import LabelFolder, open_labels
from pipeline.evaluate.semantic import count_pixels, evaluate_semantic, print_scores, summarise
from pipeline.stages import run as found_runs
from workers.masks import encode_panoptic_png
from workers.records import PANOPTIC_SCHEMA, SEMANTICS_SCHEMA, Status

NAMES = ["sky", "road", "car"]


def png(values: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.atleast_2d(np.array(values, np.uint8))).save(stream, format="PNG")
    return stream.getvalue()


def labels_at(folder: Path, truth: dict[str, Any], names: list[str] | None = None) -> LabelFolder:
    folder.mkdir()
    for name, values in truth.items():
        (folder / name).write_bytes(png(values))
    return open_labels(str(folder), names=names or NAMES)


def maps_of(predicted: dict[str, Any]) -> list[Prediction]:
    return [(name, None if v is None else np.atleast_2d(np.array(v, np.uint8))) for name, v in predicted.items()]


def stage_at(folder: Path, name: str, parts: list[pa.Table]) -> Stage:
    folder.mkdir()
    stage = Stage(name, "shard", "f" * 12, str(folder), len(parts))
    for shard, table in enumerate(parts):
        pq.write_table(table, stage.part(shard))
    return stage


def semantics_part(predicted: dict[str, Any]) -> pa.Table:
    rows = [
        {
            "image_id": name,
            "status": Status.UNDECODABLE if values is None else Status.OK,
            "error": None,
            "labels": None if values is None else png(values),
        }
        for name, values in predicted.items()
    ]
    return pa.Table.from_pylist(rows, schema=SEMANTICS_SCHEMA)


def run_of(folder: Path, *stages: Stage, classes: int = 3, k: int = 2) -> Any:
    """As much of a run as an evaluation looks at."""
    config = SimpleNamespace(
        clusters=SimpleNamespace(k=k), num_stuff=classes, semantics=SimpleNamespace(classes=classes)
    )
    done = {stage.name: set(range(stage.shards)) for stage in stages}
    return SimpleNamespace(uri=str(folder), config=config, stages={stage.name: stage for stage in stages}, done=done)


def test_semantics_parts_are_read_in_order_and_unreadable_images_have_no_map(tmp_path: Path) -> None:
    parts = [semantics_part({"a.jpg": [[0, 1]], "b.jpg": None}), semantics_part({"c.jpg": [[2, VOID]]})]
    maps = list(semantic_maps(stage_at(tmp_path / "s", "semantics", parts), [0, 1]))
    assert [(name, None if found is None else found.tolist()) for name, found in maps] == [
        ("a.jpg", [[0, 1]]),
        ("b.jpg", None),
        ("c.jpg", [[2, VOID]]),
    ]


def test_panoptic_parts_give_categories_less_one_and_void(tmp_path: Path) -> None:
    segment = {"is_thing": False, "area": 1, "bbox": [0.0] * 4, "score": None}
    row = {
        "image_id": "a.jpg",
        "uri": "",
        "status": "ok",
        "panoptic": encode_panoptic_png(np.array([[2, 1, 0]])),
        "segments": [{"id": 1, "category": 1} | segment, {"id": 2, "category": 305} | segment],
        "hidden_instances": 0,
    }
    bad = {"image_id": "b.jpg", "uri": "", "status": "empty", "segments": [], "hidden_instances": 0}
    stage = stage_at(tmp_path / "p", "panoptic", [pa.Table.from_pylist([row, bad], schema=PANOPTIC_SCHEMA)])
    (_, found), (_, missing) = panoptic_maps(stage, [0])
    assert found is not None
    assert found.tolist() == [[304, 0, NO_CATEGORY]]
    assert missing is None


def test_a_run_is_scored_by_its_semantics_and_without_them_by_its_panoptic_parts(tmp_path: Path) -> None:
    semantics = stage_at(tmp_path / "s", "semantics", [semantics_part({"a.jpg": [[0]]})])
    panoptic = stage_at(tmp_path / "p", "panoptic", [pa.Table.from_pylist([], schema=PANOPTIC_SCHEMA)])
    found = predictions(run_of(tmp_path, semantics, panoptic))
    assert (found.stage, found.clusters, found.first, found.void) == ("semantics", 3, 0, VOID)
    found = predictions(run_of(tmp_path, panoptic))
    assert (found.stage, found.clusters, found.first, found.void) == ("panoptic", 5, 1, NO_CATEGORY)
    with pytest.raises(ConfigError, match="neither a part of the stage semantics nor of panoptic is done"):
        predictions(run_of(tmp_path))


def test_scores_of_two_images_by_hand(tmp_path: Path) -> None:
    source = labels_at(tmp_path / "l", {"a.png": [[0, 0, 1, 255]], "b.png": [[1, 1, 0, 0]]})
    tally = count_pixels(maps_of({"a.jpg": [[2, 2, 0, 1]], "b.jpg": [[0, 1, 2, VOID]]}), source, 3, void=VOID)
    result = summarise(tally, source, ["c0", "c1", "c2"])
    best = result["one_to_one"]
    assert best["mapping"] == {"c0": "road", "c2": "sky"}
    assert best["strict"]["accuracy"] == pytest.approx(5 / 7)
    assert best["strict"]["iou"] == {"sky": pytest.approx(3 / 4), "road": pytest.approx(2 / 3), "car": None}
    assert best["strict"]["miou"] == pytest.approx(17 / 24)
    assert (best["published"]["accuracy"], best["published"]["miou"], best["published"]["pixels"]) == (1, 1, 5)
    assert result["many_to_one"]["strict"]["accuracy"] == pytest.approx(6 / 7)
    assert result["void_share"] == pytest.approx(1 / 7)
    assert (result["images"], result["clusters"], result["clusters_seen"]) == (2, 3, 3)
    assert result["counts"] == [[0, 2, 0], [0, 1, 0], [3, 0, 0], [1, 0, 0]]


def test_a_mapping_learnt_on_one_half_is_scored_on_the_other(tmp_path: Path) -> None:
    # Cluster 0 is sky in even images and road in odd ones: the mapping of either half fails on the other.
    truth = {"a.png": [[0, 0]], "b.png": [[1, 1]], "c.png": [[0, 0]], "d.png": [[1, 1]]}
    source = labels_at(tmp_path / "l", truth)
    tally = count_pixels(maps_of({f"{n}.jpg": [[0, 0]] for n in "abcd"}), source, 2, void=VOID)
    result = summarise(tally, source, ["0", "1"])
    assert result["one_to_one"]["strict"]["accuracy"] == pytest.approx(1 / 2)
    assert result["other_half"]["strict"]["accuracy"] == 0
    assert [fold["accuracy"] for fold in result["other_half"]["strict"]["folds"]] == [0, 0]


def test_halves_count_labelled_images_not_all_images(tmp_path: Path) -> None:
    source = labels_at(tmp_path / "l", {"b.png": [[0]], "d.png": [[1]]})
    tally = count_pixels(maps_of({f"{n}.jpg": [[0]] for n in "abcd"}), source, 1, void=VOID)
    assert [half.matrix.sum() for half in tally.halves] == [1, 1]
    assert (tally.without_label.count, tally.without_label.first) == (2, ["a.jpg", "c.jpg"])


def test_an_unreadable_image_with_a_label_counts_as_void(tmp_path: Path) -> None:
    source = labels_at(tmp_path / "l", {"a.png": [[0, 0]], "b.png": [[0, 1]]})
    tally = count_pixels(maps_of({"a.jpg": [[0, 0]], "b.jpg": None}), source, 1, void=VOID)
    result = summarise(tally, source, ["0"])
    assert result["images_without_prediction"] == {"count": 1, "first": ["b.jpg"]}
    assert result["one_to_one"]["strict"]["accuracy"] == pytest.approx(1 / 2)
    assert result["one_to_one"]["published"]["accuracy"] == 1


def test_classes_that_nobody_named_are_the_values_that_occur(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png([[7, 200, 255]]))
    source = open_labels(str(tmp_path))
    tally = count_pixels(maps_of({"a.jpg": [[1, 0, 0]]}), source, 2, void=VOID)
    result = summarise(tally, source, ["0", "1"])
    assert result["classes"] == ["7", "200"]
    assert result["one_to_one"]["mapping"] == {"0": "200", "1": "7"}
    assert result["other_half"] is None


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ({"a.png": [[0, 0]]}, {"a.jpg": [[0]]}, r"label 'a.png' is 2x1 pixels, the image 'a.jpg' is 1x1: .*nearest"),
        ({"a.png": [[0, 0]]}, {"a.jpg": [[0], [0]]}, r"1x2 \(the photo may carry a rotation"),
        (
            {"x.png": [[0]]},
            {"a.jpg": [[0]]},
            r"none of the 1 labels .* first image is 'a.jpg', the first label 'x.png'",
        ),
        ({"a.png": [[9]]}, {"a.jpg": [[0]]}, r"a\.png: the pixel value 9 is neither"),
        ({"a.png": [[255]]}, {"a.jpg": [[0]]}, r"nothing but ignored values \[255\]"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_refused(
    tmp_path: Path, truth: dict[str, Any], predicted: dict[str, Any], message: str
) -> None:
    source = labels_at(tmp_path / "l", truth)
    with pytest.raises(ConfigError, match=message):
        count_pixels(maps_of(predicted), source, 2, void=VOID)


def test_the_whole_evaluation_writes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        semantics_part({"a.jpg": [[0, 0, 1, 1]], "b.jpg": [[0, 1, 1, 3]]}),
        semantics_part({"c.jpg": None, "unlabelled.jpg": [[0]]}),
    ]
    run = run_of(tmp_path, stage_at(tmp_path / "s", "semantics", parts), classes=4)
    monkeypatch.setattr(found_runs, "open_run", lambda where, need: run)
    truth = {"a.png": [[1, 1, 0, 0]], "b.png": [[1, 0, 0, 2]], "c.png": [[0, 0]], "far.png": [[0]]}
    folder = labels_at(tmp_path / "l", truth).uri
    result = evaluate_semantic("run", folder, names=NAMES)
    assert result["one_to_one"]["mapping"] == {"0": "road", "1": "sky", "3": "car"}
    assert result["one_to_one"]["strict"]["accuracy"] == pytest.approx(8 / 10)
    assert result["files"] == [str(tmp_path / "evaluation" / name) for name in ("semantic.json", "semantic.png")]
    written = json.loads((tmp_path / "evaluation" / "semantic.json").read_bytes())
    assert written == {key: value for key, value in result.items() if key != "files"}
    with Image.open(tmp_path / "evaluation" / "semantic.png") as picture:
        assert picture.format == "PNG"
    print_scores(result)
    printed = capsys.readouterr().out
    for text in ("80.0%", "without a label, left out: 1, such as unlabelled.jpg", "such as far.png", "such as c.jpg"):
        assert text in printed


def test_rows_of_the_picture_are_mapped_clusters_then_the_rest_then_void() -> None:
    counts = np.array([[0, 4], [2, 1], [5, 0], [0, 0], [1, 1]])
    rows = arrange(counts, np.array([0, 3]), np.array([1, -1, 0, -1, -1]), list("abcde"))
    assert rows.labels == ["c", "a", "b", "e", "void"]
    assert rows.framed == [0, 1, -1, -1, -1]
    assert rows.counts.sum() == counts.sum() + 3


def test_very_many_clusters_share_a_row_of_the_picture() -> None:
    counts = np.ones((300, 2), np.int64)
    mapping = np.full(300, -1)
    mapping[:2] = [0, 1]
    rows = arrange(counts, np.zeros(2, np.int64), mapping, [str(k) for k in range(300)])
    assert len(rows.labels) == MAX_ROWS
    assert rows.labels[-1] == "237 more"
    assert rows.counts.sum() == 600


def test_cells_are_darker_the_larger_the_share_of_the_class() -> None:
    rows = arrange(np.array([[9, 0], [1, 10]]), np.zeros(2, np.int64), np.array([0, 1]), ["x", "y"])
    with Image.open(io.BytesIO(confusion_png(rows, ["sky", "road"], "title"))) as image:
        grey = np.asarray(image.convert("L")).astype(int)
    cells = grey[-(16 + 80) : -16]  # two rows of 40 pixels above the margin
    right = np.flatnonzero((cells < 120).mean(axis=0) > 0.4).max()  # the last dark column: the cell of road and y
    corner = (8, 8)
    values = [
        cells[y * 40 + corner[0], right - 39 - 40 * (1 - x) + corner[1]] for y, x in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert values[3] < values[0] < values[2] < values[1]
