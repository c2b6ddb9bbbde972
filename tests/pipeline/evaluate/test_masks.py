"""Masks of tiny runs against hand-written objects: numbers by hand and by pycocotools, and what is left out."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from pipeline.command.cli import app
from pipeline.errors import ConfigError
from pipeline.evaluate.mask_scores import evaluate_masks, print_scores
from pipeline.store import storage
from tests.pipeline.evaluate.mask_runs import SIZE, Mask, make_run, row_of, write_centroids, write_rows, write_truth
from tests.pipeline.label_files import categories, segment, unreadable_row, write_coco, write_part
from workers.masks import encode_panoptic_png
from workers.records import PREDICTIONS_SCHEMA, instances_schema

SQUARE = Mask(0, 0, 10, 10)
SIZES = ("small", "medium", "large")


def evaluate(folder: Path, truth: str, **options: Any) -> dict[str, Any]:
    return evaluate_masks(str(folder / "run"), truth, **options)


def test_scores_by_hand(tmp_path: Path) -> None:
    make_run(tmp_path, {"a.jpg": [Mask(0, 0, 9, 9)], "b.jpg": [], "c.jpg": [Mask(50, 50, 40, 40)]})
    truth = {"a.jpg": [SQUARE, Mask(20, 20, 10, 10)], "b.jpg": [Mask(5, 5, 20, 20)], "c.jpg": [Mask(50, 50, 40, 40)]}
    found = evaluate(tmp_path, write_truth(tmp_path, truth))
    # Of four objects one is found wholly and one with IoU 81/100, which is right at .50 to .80, seven of the ten
    # thresholds: recall 2/4 is 51 of 101 points. At the others the first of two equally sure masks is wrong, and recall
    # 1/4, 26 points, has a precision of one half.
    scores = found["scores"]
    assert scores["all"]["AP50"] == pytest.approx(51 / 101)
    assert scores["all"]["AP"] == pytest.approx((7 * 51 + 3 * 26 / 2) / 1010)
    assert scores["all"]["AR1"] == scores["all"]["AR100"] == pytest.approx((7 * 2 + 3) / 40)
    assert scores["small"] == pytest.approx(
        {"objects": 3, "AP": 0.7 * 34 / 101, "AP50": 34 / 101, "AP75": 34 / 101}
        | dict.fromkeys(("AR1", "AR10", "AR100"), 0.7 / 3)
    )
    assert scores["medium"]["AP"] == pytest.approx(1.0)
    assert scores["large"] == {"objects": 0} | dict.fromkeys(("AP", "AP50", "AP75", "AR1", "AR10", "AR100"))
    assert (found["images"], found["masks"], found["share_without_mask"]) == (3, 2, pytest.approx(1 / 3))
    assert found["images_without_mask"] == {"count": 1, "first": ["b.jpg"]}
    assert found["masks_per_image"] == {"mean": pytest.approx(2 / 3), "median": 1.0, "max": 1}
    assert found["objects_per_image"] == {"mean": pytest.approx(4 / 3), "median": 1.0, "max": 2}
    assert found["mostly_stuff"] is None


def random_masks(rng: np.random.Generator, near: list[Mask]) -> list[Mask]:
    """Masks around objects, twice or nested, and anywhere; scores as Parquet keeps them, all different."""
    masks = [Mask(*(int(v) for v in (*rng.integers(0, 60, 2), *rng.integers(4, 60, 2)))) for _ in range(4)]
    for one in near:
        masks.append(one._replace(width=one.width + int(rng.integers(0, 9)), x=one.x + int(rng.integers(0, 3))))
        masks.append(one._replace(height=max(1, one.height - int(rng.integers(0, 9)))))
    return [mask._replace(score=float(np.float32(rng.random())), crowd=False) for mask in masks]


def direct(truth: str, found: dict[str, list[Mask]]) -> np.ndarray:
    """The twelve numbers of pycocotools, classes ignored."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        ids = {image["file_name"]: image["id"] for image in coco.dataset["images"]}
        results = [
            {"image_id": ids[name], "category_id": 1, "segmentation": {"size": SIZE, "counts": rle}, "score": score}
            for name, masks in found.items()
            for rle, score in zip(*(row_of(name, masks)[key] for key in ("rle", "score")), strict=True)
        ]
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.params.useCats = 0
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_scores_are_those_of_pycocotools_on_crowds_overlaps_and_more_than_a_hundred_masks(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    objects = {
        f"{k}.jpg": [
            mask._replace(category=int(rng.integers(1, 4)), crowd=bool(rng.random() < 0.2))
            for mask in random_masks(rng, [])
        ]
        + [Mask(0, 0, 100, 110)]
        for k in range(8)
    }
    found = {name: random_masks(rng, listed) for name, listed in objects.items()}
    found["3.jpg"] = random_masks(rng, objects["3.jpg"] * 10)
    make_run(tmp_path, found)
    truth = write_truth(tmp_path, objects)
    result = evaluate(tmp_path, truth)
    scores, expected = result["scores"], direct(truth, found)
    keys = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")
    assert [scores["all"][key] for key in keys] == pytest.approx(expected[[0, 1, 2, 6, 7, 8]], abs=1e-12)
    assert [scores[size]["AP"] for size in SIZES] == pytest.approx(expected[3:6], abs=1e-12)
    assert [scores[size]["AR100"] for size in SIZES] == pytest.approx(expected[9:], abs=1e-12)
    assert 0.05 < expected[0] < 0.95
    assert result["crowds"] == 3
    assert (result["images_with_more_than_100_masks"], result["masks_per_image"]["max"]) == (1, 104)


def test_a_mask_in_a_crowd_is_no_false_alarm_and_no_match(tmp_path: Path) -> None:
    crowd = Mask(40, 40, 60, 60, crowd=True, category=2)
    make_run(tmp_path, {"a.jpg": [SQUARE, Mask(40, 40, 60, 59, score=0.9)]})
    scores = {}
    for name, objects in {"crowd": [SQUARE, crowd], "nothing": [SQUARE]}.items():
        found = evaluate(tmp_path, write_truth(tmp_path, {"a.jpg": objects}))
        scores[name] = found["scores"]["all"]["AP50"]
        assert (found["scores"]["all"]["objects"], found["clusters"]["matched"]) == (1, 1)
        assert found["objects_per_image"]["max"] == 1
    assert scores == pytest.approx({"crowd": 1.0, "nothing": 0.5})


def test_nested_masks_of_one_object_are_one_match_the_closest(tmp_path: Path) -> None:
    inner, outer = Mask(0, 0, 10, 12, embedding=(1, 0)), Mask(0, 0, 10, 18, score=0.9, embedding=(0, 1))
    make_run(tmp_path, {"a.jpg": [inner, outer], "b.jpg": [inner, outer]})
    whole = Mask(0, 0, 10, 20, category=2)
    found = evaluate(tmp_path, write_truth(tmp_path, {"a.jpg": [SQUARE], "b.jpg": [SQUARE, whole]}))
    # Photo a has one object, and the inner mask is nearer to it; in b, each level has its own.
    assert (found["clusters"]["matched"], found["clusters"]["seen"], found["clusters"]["purity"]) == (3, 2, 1.0)
    assert found["scores"]["all"]["AR100"] > 0.5


def test_purity_of_the_nearest_centroids_beside_chance(tmp_path: Path) -> None:
    places = [(0, 0), (30, 0), (60, 0), (0, 40), (30, 40), (60, 40)]
    objects = [Mask(x, y, 20, 20, category=c) for (x, y), c in zip(places, (1, 1, 2, 3, 3, 3), strict=True)]
    # Of different lengths, so that only a spherical assignment puts the third into the second cluster.
    vectors = [(1, 0), (1, 0.1), (0.1, 0.2), (0.2, 1), (0, 1), (0, 1)]
    masks = [one._replace(embedding=vector) for one, vector in zip(objects, vectors, strict=True)]
    wrong = Mask(90, 90, 20, 20, embedding=(1, 0))
    for spherical, purity in ((True, 5 / 6), (False, 1.0)):
        folder = tmp_path / str(spherical)
        table = make_run(folder, {"a.jpg": [*masks, wrong]}, fitted=False, clusters={"k": 3, "spherical": spherical})
        write_centroids(table["clusters"], np.array([[1, 0], [0, 1], [-0.1, 0.0]], np.float32))
        found = evaluate(folder, write_truth(folder, {"a.jpg": objects}))["clusters"]
        assert (found["of"], found["matched"], found["seen"]) == (3, 6, 2 if spherical else 3)
        assert (found["classes"], found["purity"]) == (3, pytest.approx(purity))
        assert 0.5 <= found["purity_by_chance"] < found["purity"]
        assert found["nmi_by_chance"] < found["nmi"]


def test_photos_are_matched_by_path_or_by_name(tmp_path: Path) -> None:
    make_run(tmp_path, {"x/a.jpg": [SQUARE], "y/a.jpg": [], "z/b.jpg": [SQUARE]})
    by_path = evaluate(tmp_path, write_truth(tmp_path, {"x/a.png": [SQUARE], "y/a.png": [SQUARE], "b.png": [SQUARE]}))
    assert (by_path["images"], by_path["scores"]["all"]["AR100"]) == (3, pytest.approx(2 / 3))
    with pytest.raises(ConfigError, match=r"instances.*: 'x/a.jpg' and 'y/a.jpg' could both be the image 'a.jpg' of"):
        evaluate(tmp_path, write_truth(tmp_path, {"a.jpg": [SQUARE]}))
    with pytest.raises(ConfigError, match=r"'z/b.jpg' could be any of 2 of .*truth.json \(1/b.jpg, 2/b.jpg\)"):
        evaluate(tmp_path, write_truth(tmp_path, {"1/b.jpg": [SQUARE], "2/b.jpg": [SQUARE]}))


def test_what_only_one_side_has_is_left_out_and_said_and_unreadable_photos_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"a.jpg": [SQUARE], "bad.jpg": None, "c.jpg": [SQUARE], "late.jpg": [SQUARE], "later.jpg": [SQUARE]}
    table = make_run(tmp_path, run)
    Path(table["instances"].part(1)).unlink()  # late.jpg, later.jpg
    names = ("a.jpg", "bad.jpg", "late.jpg", "far.jpg")
    found = evaluate(tmp_path, write_truth(tmp_path, {name: [SQUARE] for name in names}))
    assert (found["images"], found["masks"], found["share_without_mask"]) == (2, 1, 0.0)
    assert found["scores"]["all"]["AR100"] == pytest.approx(0.5)  # the unreadable one is missed
    assert found["images_unreadable"] == {"count": 1, "first": ["bad.jpg"]}
    assert found["images_without_truth"] == {"count": 1, "first": ["c.jpg"]}
    assert found["truth_without_image"] == {"count": 2, "first": ["late.jpg", "far.jpg"]}
    print_scores(found)
    printed = capsys.readouterr().out
    for text in ("such as bad.jpg", "left out: 1, such as c.jpg", "2, such as late.jpg", "only 1 of 2 parts are done"):
        assert text in printed


def test_without_a_photo_in_common_there_is_nothing_to_score(tmp_path: Path) -> None:
    make_run(tmp_path, {"a.jpg": [SQUARE]})
    with pytest.raises(ConfigError, match=r"none of the 1 photos .*first of the truth is 'z.jpg'.* of the run 'a.jpg'"):
        evaluate(tmp_path, write_truth(tmp_path, {"z.jpg": [SQUARE]}))
    assert not (tmp_path / "run" / "evaluation").exists()


def test_a_run_without_a_part_and_one_without_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = write_truth(tmp_path, {"a.jpg": [SQUARE], "b.jpg": []})
    table = make_run(tmp_path, {"a.jpg": [], "b.jpg": []})
    found = evaluate(tmp_path, truth)
    assert (found["scores"]["all"]["AP"], found["share_without_mask"]) == (0.0, 1.0)
    assert found["clusters"] == {
        "of": 2,
        "matched": 0,
        "seen": 0,
        "classes": 0,
        **dict.fromkeys(("purity", "purity_by_chance", "nmi", "nmi_by_chance")),
    }
    print_scores(found)
    assert "–" in capsys.readouterr().out
    Path(table["instances"].part(0)).unlink()
    with pytest.raises(ConfigError, match=r"nothing is done yet in .*: no part of the stage instances"):
        evaluate(tmp_path, truth)


def test_clusters_that_are_not_fitted_yet_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, {"a.jpg": [SQUARE]}, fitted=False)
    found = evaluate(tmp_path, write_truth(tmp_path, {"a.jpg": [SQUARE]}))
    assert found["clusters"] is None
    print_scores(found)
    printed = capsys.readouterr().out
    assert "the clusters are not fitted yet" in printed
    assert "purity" not in printed


def test_labels_of_another_size_are_refused(tmp_path: Path) -> None:
    table = make_run(tmp_path, {"a.jpg": [SQUARE]})
    turned = row_of("a.jpg", []) | {"height": SIZE[1], "width": SIZE[0]}
    write_rows(table["instances"], 0, [turned], instances_schema(2))
    with pytest.raises(ConfigError, match=r"'a.jpg' is 130x120 pixels, but 120x130 by the run's 'a.jpg' \(one"):
        evaluate(tmp_path, write_truth(tmp_path, {"a.jpg": [SQUARE]}))


def panoptic_truth(folder: Path) -> str:
    """Stuff on the left 60 columns (of id 3, below it void), a thing, and a crowd on the right."""
    ids = np.zeros(SIZE, int)
    ids[:100, :60], ids[:40, 60:100], ids[60:, 60:] = 3, 1, 2
    segments = [segment(1, 1), segment(2, 2, iscrowd=1), segment(3, 3)]
    return write_coco(folder, {"a.jpg": (ids, segments)}, categories(2, 1))


def test_masks_on_stuff_of_a_panoptic_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thing, crowd = Mask(60, 0, 40, 40, score=0.95), Mask(70, 70, 20, 20, score=0.94)
    enough, less = Mask(52, 0, 10, 10, score=0.93), Mask(53, 0, 10, 10, score=0.92)  # 80 % and 70 % on stuff
    void = Mask(0, 100, 50, 20, score=0.91)
    many = [Mask(k, k, 20, 20, score=0.1 + k / 100) for k in range(9)]
    make_run(tmp_path, {"a.jpg": [*many, thing, crowd, enough, less, void, Mask(0, 0, 0, 0, score=0.01)]})
    found = evaluate(tmp_path, panoptic_truth(tmp_path))
    assert found["mostly_stuff"] == {
        "all": {"masks": 15, "share": pytest.approx(10 / 15)},
        "surest": {"masks": 10, "share": pytest.approx(6 / 10)},
    }
    assert (found["scores"]["all"]["objects"], found["crowds"]) == (1, 1)
    assert found["scores"]["all"]["AP"] == pytest.approx(1.0)
    print_scores(found)
    assert "the 10 surest of a photo" in capsys.readouterr().out


def test_pngs_may_lie_elsewhere_and_things_must_be_told_from_stuff(tmp_path: Path) -> None:
    make_run(tmp_path, {"a.jpg": [SQUARE]})
    truth = panoptic_truth(tmp_path)
    (tmp_path / "truth").rename(tmp_path / "elsewhere")
    assert evaluate(tmp_path, truth, truth_pngs=str(tmp_path / "elsewhere"))["images"] == 1
    with pytest.raises(ConfigError, match=r"cannot read '.*truth/a.png'"):
        evaluate(tmp_path, truth)
    document = json.loads(Path(truth).read_text())
    Path(truth).write_text(json.dumps({**document, "categories": []}))
    with pytest.raises(ConfigError, match="lists no categories, so that nothing says which are things"):
        evaluate(tmp_path, truth)


def labels_row(name: str, ids: np.ndarray, *things: tuple[int, int, float]) -> dict[str, Any]:
    """A row of labels, whose (id, category, score) are things but for those of category 3."""
    segments = [
        {"id": k, "category": c, "is_thing": c < 3, "area": int((ids == k).sum()), "bbox": [0.0] * 4, "score": score}
        for k, c, score in things
    ]
    size = {"height": SIZE[0], "width": SIZE[1]}
    base = {"image_id": name, "uri": "", "status": "ok", "error": None, "hidden_instances": 0, **size}
    return base | {"panoptic": encode_panoptic_png(ids), "segments": segments}


def test_the_things_of_labels_are_masks_too_and_their_categories_are_clusters(tmp_path: Path) -> None:
    table = make_run(tmp_path, {"a.jpg": [], "b.jpg": []}, train={"steps": 1}, predictions={"enabled": True})
    ids = np.where(SQUARE.pixels(), 1, 0) + np.where(Mask(30, 30, 20, 20).pixels(), 2, 0)
    ids[100:] = 3
    row = labels_row("a.jpg", ids, (1, 1, 0.5), (2, 2, 0.9), (3, 3, 0.0))
    part = Path(table["panoptic"].part(0))
    write_part(part, [row, unreadable_row("b.jpg")], categories(2, 1))
    truth = write_truth(tmp_path, {"a.jpg": [SQUARE], "b.jpg": []})
    found = evaluate(tmp_path, truth, stage="panoptic")
    assert (found["stage"], found["masks"], found["images_unreadable"]["count"]) == ("panoptic", 2, 1)
    assert found["scores"]["all"]["AP50"] == pytest.approx(0.5)  # the surer one is wrong
    assert {key: found["clusters"][key] for key in ("of", "matched", "seen")} == {"of": 2, "matched": 1, "seen": 1}
    # A model's predictions list all that it detected, which may overlap.
    seen = row_of("a.jpg", [SQUARE, SQUARE._replace(width=5, score=0.4), SQUARE._replace(height=12, score=0.3)])
    detections = {key: seen[key] for key in ("rle", "bbox", "area", "score")} | {"category": [2, 1, 2], "labels": None}
    empty = {key: [] for key in ("rle", "bbox", "area", "score", "category")} | {"labels": None}
    rows = [row | detections, unreadable_row("b.jpg") | empty]
    write_part(Path(table["predictions"].part(0)), rows, categories(2, 1), PREDICTIONS_SCHEMA)
    found = evaluate(tmp_path, truth, stage="predictions")
    assert (found["masks"], found["scores"]["all"]["AP"]) == (3, pytest.approx(1.0))
    assert found["clusters"]["seen"] == 1


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("nonsense", r"has no stage 'nonsense' with a part a shard; it has instances, features, semantics, panoptic"),
        ("clusters", r"has no stage 'clusters' with a part a shard"),
        ("panoptic", r"no part of the stage panoptic"),
        ("semantics", r"--stage: semantics has no masks; give one of instances, panoptic"),
    ],
)
def test_a_stage_without_masks_is_refused(tmp_path: Path, stage: str, message: str) -> None:
    table = make_run(tmp_path, {"a.jpg": [SQUARE]}, semantics={"method": "stego"})
    Path(table["semantics"].folder).mkdir(parents=True)
    Path(table["semantics"].part(0)).write_bytes(b"a part, as far as its end tells: PAR1")
    with pytest.raises(ConfigError, match=message):
        evaluate(tmp_path, write_truth(tmp_path, {"a.jpg": [SQUARE]}), stage=stage)


def test_the_command_prints_tables_or_json_and_writes_the_result(tmp_path: Path) -> None:
    make_run(tmp_path, {"a.jpg": [SQUARE]})
    truth = write_truth(tmp_path, {"a.jpg": [SQUARE]})
    command = ["evaluate", "masks", str(tmp_path / "run"), truth]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    written = tmp_path / "run" / "evaluation" / "masks.json"
    for text in ("AR100", "purity", "by chance", "true objects", str(written)):
        assert text in shown.output.replace("\n", "")
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(json.loads((tmp_path / "run" / "latest.json").read_bytes())["config"]))
    command[2] = str(config)  # the config file stands for the run folder
    answered = CliRunner().invoke(app, [*command, "--json", "--output", str(tmp_path / "out")])
    document = json.loads(answered.stdout)
    assert document.pop("files") == [str(tmp_path / "out" / "masks.json")]
    assert document == json.loads(written.read_bytes()) == json.loads((tmp_path / "out" / "masks.json").read_bytes())
    for wrong in ([str(tmp_path / "gone"), truth], [str(tmp_path / "run"), "gone.json"]):
        refused = CliRunner().invoke(app, ["evaluate", "masks", *wrong, "--json"])
        assert refused.exit_code == json.loads(refused.stdout)["exit_code"] == 2


def test_a_run_in_a_bucket_scores_as_the_same_run_in_a_folder(tmp_path: Path, s3_bucket: str) -> None:
    make_run(tmp_path, {"a.jpg": [SQUARE], "b.jpg": None, "c.jpg": [SQUARE, Mask(50, 50, 30, 30)]})
    truth = write_truth(tmp_path, {name: [SQUARE] for name in ("a.jpg", "b.jpg", "c.jpg")})
    local = evaluate(tmp_path, truth)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3_bucket}/run/{path.relative_to(tmp_path / 'run')}", path.read_bytes())
    storage.write_bytes(f"{s3_bucket}/truth.json", Path(truth).read_bytes())
    remote = evaluate_masks(f"{s3_bucket}/run", f"{s3_bucket}/truth.json")
    assert remote["files"] == [f"{s3_bucket}/run/evaluation/masks.json"]
    assert json.loads(storage.read_bytes(remote["files"][0])) == {k: v for k, v in remote.items() if k != "files"}
    where = ("run", "truth", "files")
    assert {k: v for k, v in remote.items() if k not in where} == {k: v for k, v in local.items() if k not in where}
