"""The section "Stuff" of the report: runs of each method with class maps made by hand."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.engine.receipts import Receipt, ReceiptLog
from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.report import maps
from tests.pipeline.report.test_fits import stego_record
from tests.pipeline.report.tiny_runs import (
    NAMES,
    Page,
    config_of,
    make_run,
    plan_run,
    report_of,
    run_stage,
    scene,
    squeezed,
    table_of,
)
from workers.overlay import HATCHING, category_color, css
from workers.records import SEMANTICS_SCHEMA, segments_schema
from workers.semantics.datus import encode_segments

HEIGHT, WIDTH = 72, 96  # of the scenes
CLASSES = 4
K = 3  # things; stuff class c is category K + 1 + c
VOID = 255
EVIL = "<b>sky</b>"


def class_maps() -> list[np.ndarray]:
    """Of three images: half 0 and half 2; 0 alone; half 2 and half void. Classes 1 and 3 never occur."""
    halves = np.repeat(np.array([[0] * 48 + [2] * 48], np.uint8), HEIGHT, axis=0)
    return [halves, np.zeros((HEIGHT, WIDTH), np.uint8), np.where(halves == 0, 2, VOID).astype(np.uint8)]


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def write_table(stage: Stage, shard: int, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    Path(stage.part(shard)).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), stage.part(shard))


def write_maps(stage: Stage) -> None:
    rows = [{"image_id": f"{i}<i>.jpg", "status": "ok", "labels": png(m)} for i, m in enumerate(class_maps())]
    write_table(stage, 0, rows, SEMANTICS_SCHEMA)
    broken = {"image_id": "broken.jpg", "status": "undecodable", "error": "it is <u>no</u> photo", "labels": None}
    write_table(stage, 1, [broken], SEMANTICS_SCHEMA)


def write_segments(stage: Stage) -> None:
    """Three photos of 2 x 4 patches: two segments and two patches of noise, one segment, one segment."""
    found = [np.array([[0, 0, 1, -1], [0, 0, 1, -1]]), np.zeros((2, 4), int), np.zeros((2, 4), int)]
    rows = [
        {"image_id": str(i), "status": "ok", "segments": encode_segments(s), "embedding": []}
        for i, s in enumerate(found)
    ]
    write_table(stage, 0, rows, segments_schema(3))
    write_table(stage, 1, [{"image_id": "broken.jpg", "status": "undecodable", "embedding": []}], segments_schema(3))


def write_artifact(stage: Stage, record: dict[str, Any]) -> None:
    Path(stage.folder).mkdir(parents=True, exist_ok=True)
    (Path(stage.folder) / "artifact.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good photos and a broken one, in two shards, and a run of them without stuff."""
    root = tmp_path_factory.mktemp("stuff")
    (root / "photos").mkdir()
    for number in range(3):
        (root / "photos" / f"{number}<i>.jpg").write_bytes(scene(number))
    (root / "photos" / "broken.jpg").write_bytes(b"it is no photo")
    make_run(config_of(root / "photos", root / "run"))
    return root


def run_with_stuff(photos: Path, folder: Path, done: tuple[str, ...], **semantics: Any) -> Path:
    """A copy of the run, now with stuff, of which the stages `done` are made by hand, and `panoptic` for real."""
    run = Path(shutil.copytree(photos / "run", folder / "run"))
    config = config_of(photos / "photos", run, semantics={"classes": CLASSES, **semantics})
    table = plan_run(config)
    makers = {
        "semantics": write_maps,
        "segments": write_segments,
        "semantics_fit": lambda stage: write_artifact(stage, fit_record(config.semantics.method)),
        "refine_fit": lambda stage: write_artifact(
            stage, {"settings": {"steps": 400}, "photos": 3, "loss": [2.0, 1.5]}
        ),
        "panoptic": lambda stage: run_stage(stage, config, table, NAMES | {K + 1: EVIL}),
    }
    for name in done:
        makers[name](table[name])
    return run


def fit_record(method: str) -> dict[str, Any]:
    if method == "stego":
        return stego_record()
    record: dict[str, Any] = {"sizes": [2, 0, 1, 1], "iterations": 2, "inertia": [9.0, 5.0, 4.0]}
    return record | ({"clusters": 8, "components": 16} if method == "kmeans" else {})


@pytest.fixture
def stego(photos: Path, tmp_path: Path) -> Path:
    return run_with_stuff(photos, tmp_path, ("semantics_fit", "semantics", "panoptic"), method="stego")


def stuff_text(page: Page) -> str:
    return squeezed(page.text).split(" Stuff ", 1)[1].split(" Clusters ", 1)[0]


def pixels_of(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True))) as image:
        return np.asarray(image.convert("RGB"))


def test_shares_of_classes_are_of_the_pixels_that_were_counted(stego: Path) -> None:
    page = report_of(stego)
    text = stuff_text(page)
    assert "class maps of 3 images, of 4 in the source." in text
    assert "2 of 4 classes occur, and 16.7 % is void" in text
    assert f"{EVIL} 50.0 % stuff 3 33.3 % void 16.7 %" in text
    assert "2 classes never occur in these images: stuff 2, stuff 4." in text
    widths = [style for style in page.values("span", "style") if css(category_color(K + 1)) in style]
    assert widths == [f"width: 50.000%; background: {css(category_color(K + 1))}"]
    assert "STEGO with 4 stuff classes" in page.text
    assert not {"b", "u", "script"} & set(page.tags)


def test_the_panoptic_labels_have_their_pixels_by_kind(stego: Path) -> None:
    panoptic = table_of(stego)["panoptic"]
    log = ReceiptLog(str(stego), "panoptic", panoptic.fingerprint)
    for shard, pixels in enumerate(({"thing": 100, "stuff": 300, "void": 0}, {"thing": 0, "stuff": 0, "void": 100})):
        log.append(Receipt("panoptic", panoptic.fingerprint, shard, True, 1.0, rows={"ok": 1}, pixels=pixels))
    log.flush()
    assert "Pixels of the panoptic labels thing 20.0 % stuff 60.0 % void 20.0 %" in stuff_text(report_of(stego))


def test_class_maps_stand_beside_photos_and_panoptic_labels(stego: Path) -> None:
    page = report_of(stego)
    alts = page.values("img", "alt")
    place = alts.index("0<i>.jpg: class map")
    assert alts[place - 1 : place + 2] == ["0<i>.jpg", "0<i>.jpg: class map", "0<i>.jpg: panoptic labels"]
    drawn = pixels_of(page.values("img", "src")[place])
    first, third = category_color(K + 1), category_color(K + 3)
    middle = drawn.shape[1] // 2
    assert (drawn[:, : middle - 2] == first).all()
    assert (drawn[:, middle + 2 :] == third).all()
    half_void = pixels_of(page.values("img", "src")[alts.index("2<i>.jpg: class map")])
    assert {tuple(color) for color in half_void[:, middle + 2 :].reshape(-1, 3).tolist()} == set(HATCHING)
    assert f"0<i>.jpg {EVIL} 50.0 % stuff 3 50.0 %" in stuff_text(page)
    assert "2<i>.jpg stuff 3 50.0 % void 50.0 %" in stuff_text(page)
    assert "undecodable: it is <u>no</u> photo broken.jpg" in stuff_text(page)


def test_before_the_panoptic_stage_two_pictures_stand_beside_each_other(stego: Path) -> None:
    shutil.rmtree(stego / "panoptic")
    page = report_of(stego)
    alts = page.values("img", "alt")
    assert sum(alt.endswith(": class map") for alt in alts) == 3
    assert not any(alt.endswith(": panoptic labels") for alt in alts)
    assert "stuff 1 50.0 % stuff 3 33.3 %" in stuff_text(page)
    assert "Pixels of the panoptic labels" not in stuff_text(page)


def test_the_fit_of_stego_has_histograms_and_losses(stego: Path) -> None:
    page = report_of(stego)
    text = stuff_text(page)
    assert "60 steps on the patch features of 36 images." in text
    assert "at step 60; the dashed outline is step 1." in text
    assert "the negatives should gather near 0" in text
    assert "shift 0.66" in text and "0.00 to 0.04: 60.00 %" in text
    assert page.values("svg", "aria-label").count("Correspondence loss") == 1
    assert page.values("polyline", "class") == ["faint"] * 3
    assert "Loss of the cluster probe" in text and "Classes that a batch uses" in text
    assert "DatUS" not in page.text


def test_the_fit_of_datus_has_segments_noise_and_inertia(photos: Path, tmp_path: Path) -> None:
    run = run_with_stuff(photos, tmp_path, ("segments", "semantics_fit", "semantics"), method="datus")
    text = stuff_text(report_of(run))
    assert "1.3 segments a photo and 8.3 % of the patches noise" in text
    assert "in 3 photos, evenly spaced" in text
    assert "Spherical k-means of 4 segments: 4 classes, 2 iterations; 1 without a segment." in text
    assert "inertia, iteration 3: 4" in text and "Segments of each class" in text
    assert "STEGO" not in text and "smooths the maps" not in text


def test_the_fit_of_patches_has_clusters_and_inertia(photos: Path, tmp_path: Path) -> None:
    text = stuff_text(report_of(run_with_stuff(photos, tmp_path, ("semantics_fit", "semantics"), method="kmeans")))
    assert "Spherical k-means of 4 patches in 16 conditioned components" in text
    assert "8 clusters after 2 iterations, merged to 4 classes by average linkage" in text
    assert "inertia, iteration 3: 4" in text and "Patches of each class" in text
    assert "DatUS" not in text and "STEGO" not in text


def test_refinement_has_its_loss(photos: Path, tmp_path: Path) -> None:
    done = ("segments", "semantics_fit", "refine_fit", "semantics")
    run = run_with_stuff(photos, tmp_path, done, method="datus", refine="deeplabv3")
    page = report_of(run)
    assert "DeepLabV3, 400 steps on the first class maps of 3 photos." in stuff_text(page)
    assert "loss, checkpoint 2: 1.5" in stuff_text(page)
    assert "refined by DeepLabV3" in page.text


@pytest.mark.parametrize("method", ["stego", "datus", "kmeans"])
def test_what_is_not_done_yet_is_said(photos: Path, tmp_path: Path, method: str) -> None:
    refine = {"refine": "deeplabv3"} if method == "datus" else {}
    run = run_with_stuff(photos, tmp_path, (), method=method, **refine)
    page = report_of(run)
    text = stuff_text(page)
    assert "The stage semantics is not done yet" in text
    assert "The stage semantics_fit is not done yet." in text
    assert ("The stage refine_fit is not done yet." in text) == (method == "datus")
    assert "never occur" not in text and not any(alt.endswith(": class map") for alt in page.values("img", "alt"))
    assert "semantics" in squeezed(page.text).split("Not complete:")[1].split("This page")[0]


def test_a_fit_without_class_maps_is_shown(photos: Path, tmp_path: Path) -> None:
    text = stuff_text(report_of(run_with_stuff(photos, tmp_path, ("semantics_fit",), method="stego")))
    assert "The stage semantics is not done yet" in text
    assert "Correspondence loss" in text and "semantics_fit is not done" not in text


def test_a_run_without_stuff_has_no_such_section(photos: Path) -> None:
    page = report_of(photos / "run")
    assert "stuff" not in page.values("section", "id")
    assert "clusters" in page.values("section", "id")


def test_all_void_is_said(stego: Path) -> None:
    stage = table_of(stego)["semantics"]
    void = {"image_id": "0", "status": "ok", "labels": png(np.full((HEIGHT, WIDTH), VOID, np.uint8))}
    write_table(stage, 0, [void] * 3, SEMANTICS_SCHEMA)
    text = stuff_text(report_of(stego))
    assert "0 of 4 classes occur, and 100.0 % is void" in text
    assert "4 classes never occur" in text


def test_no_readable_image_is_said(stego: Path) -> None:
    stage = table_of(stego)["semantics"]
    write_table(stage, 0, [{"image_id": "0", "status": "empty", "labels": None}] * 3, SEMANTICS_SCHEMA)
    assert "None of the images that were looked at has a class map." in stuff_text(report_of(stego))


def test_photos_that_changed_or_are_gone_become_tiles(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}<i>.jpg").write_bytes(scene(number))
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"")
    make_run(config_of(tmp_path / "photos", tmp_path / "run"))
    run = run_with_stuff(tmp_path, tmp_path / "copy", ("semantics",), method="stego")
    (tmp_path / "photos" / "0<i>.jpg").unlink()
    Image.new("RGB", (50, 40)).save(tmp_path / "photos" / "1<i>.jpg")
    page = report_of(run)
    assert "FileNotFoundError" in stuff_text(page)
    assert "ValueError: the photo is 50x40, its labels are 96x72" in stuff_text(page)
    assert [alt for alt in page.values("img", "alt") if "class map" in alt] == ["2<i>.jpg: class map"]


def test_a_sample_is_called_one(stego: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = table_of(stego)["semantics"]
    zeros = {"image_id": "broken.jpg", "status": "ok", "labels": png(class_maps()[1])}
    write_table(stage, 1, [zeros], SEMANTICS_SCHEMA)
    monkeypatch.setattr(maps, "SAMPLED_PARTS", 1)  # the last part of two
    text = stuff_text(report_of(stego))
    assert "class maps of 1 image, of 4 in the source, evenly spaced over 1 of 2 parts." in text
    assert f"{EVIL} 100.0 % void 0.0 %" in text
    assert "1 of 4 classes occur, and no pixel is void" in text


def test_a_map_with_classes_that_the_run_does_not_have_is_refused(stego: Path) -> None:
    stage = table_of(stego)["semantics"]
    strange = {"image_id": "0", "status": "ok", "labels": png(np.full((HEIGHT, WIDTH), 9, np.uint8))}
    write_table(stage, 0, [strange] * 3, SEMANTICS_SCHEMA)
    with pytest.raises(ConfigError, match=r"a map has class 9, but semantics\.classes is 4; delete the folder"):
        report_of(stego)


def test_no_photos_means_no_maps(stego: Path) -> None:
    page = report_of(stego, max_photos=0)
    assert not any("class map" in alt for alt in page.values("img", "alt"))
    assert "50.0 %" in stuff_text(page)
