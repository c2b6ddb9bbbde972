"""Exported labels: read back they are the same, pycocotools opens them, and they score as the parts do."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from model.metrics.instances import Instance
from pipeline.errors import ConfigError
from pipeline.evaluate.score import score_labels
from pipeline.export.coco import export_coco, stuff_png
from pipeline.export.summary import print_export
from pipeline.sources.coco import CocoInstances, CocoPanoptic, PanopticImage, PanopticSegment
from pipeline.stages.parts import PanopticParts, find_parts
from pipeline.store import storage
from tests.pipeline.export.labelled_runs import labelled_run
from tests.pipeline.label_files import (
    categories,
    random_rows,
    random_run,
    unreadable_row,
    write_instances,
    write_part,
)
from workers.masks import decode_rle, encode_panoptic_png, encode_rle
from workers.records import with_columns

SQUARE = np.zeros((4, 4), bool)
SQUARE[:3, :3] = True


def stuff_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(storage.read_bytes(uri))))


def test_labels_come_back_as_they_were_on_disk_and_in_a_bucket(source: str, tmp_path: Path) -> None:
    panoptic, _ = random_run(tmp_path, 7)
    exported = export_coco(panoptic, output=source, name="demo")
    assert (exported.images, exported.unreadable, exported.whole_masks) == (7, 1, False)
    before, after = PanopticParts(find_parts(panoptic)), CocoPanoptic(storage.join(source, "panoptic_demo.json"))
    assert {i: c._replace(supercategory="") for i, c in after.categories.items()} == before.categories
    assert list(after.names) == list(before.names)
    for name in before.names:
        mine, theirs = before.read(name), after.read(name)
        assert np.array_equal(mine.ids, theirs.ids)
        assert mine.segments == theirs.segments


def test_area_and_box_are_of_the_pixels_and_ids_of_images_their_places(tmp_path: Path) -> None:
    panoptic, _ = random_run(tmp_path, 4)
    export_coco(panoptic, output=str(tmp_path / "out"))
    document = json.loads((tmp_path / "out" / "panoptic_train.json").read_text())
    assert [image["id"] for image in document["images"]] == [1, 3, 4, 5]  # the second could not be read
    labels = CocoPanoptic(str(tmp_path / "out" / "panoptic_train.json"))
    for annotation in document["annotations"]:
        ids = labels.read(annotation["file_name"].replace(".png", ".jpg")).ids
        for segment in annotation["segments_info"]:
            rows, columns = np.nonzero(ids == segment["id"])
            assert segment["area"] == len(rows)
            width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
            assert segment["bbox"] == [columns.min(), rows.min(), width, height]
            assert segment["iscrowd"] == 0


def test_the_keys_of_a_manifest_are_fields_of_the_images(tmp_path: Path) -> None:
    row, _ = random_rows(np.random.default_rng(0), "a.jpg", 4, 3)
    part = write_part(tmp_path / "p" / "part-00000.parquet", [row], categories(4, 3))
    keys = pa.table({"split": ["train"], "day": [datetime.date(2024, 2, 29)], "key_uri": pa.array([None], pa.string())})
    pq.write_table(with_columns(pq.read_table(part), keys), part)
    export_coco([part], output=str(tmp_path / "out"))
    (image,) = json.loads((tmp_path / "out" / "panoptic_train.json").read_text())["images"]
    size = {"height": row["height"], "width": row["width"]}
    assert image == {"id": 1, "file_name": "a.jpg", **size, "split": "train", "day": "2024-02-29", "key_uri": None}


def test_pycocotools_opens_it_without_a_warning(tmp_path: Path) -> None:
    panoptic, instances = random_run(tmp_path, 7)
    exported = export_coco(panoptic, instances, output=str(tmp_path / "out"))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("error")
        coco = COCO(exported.files["instances_json"])
    assert sorted(coco.anns) == list(range(1, exported.instances + 1))
    assert coco.getCatIds() == [1, 2, 3, 4]
    for annotation in coco.anns.values():
        mask, image = coco.annToMask(annotation), coco.imgs[annotation["image_id"]]
        assert mask.shape == (image["height"], image["width"])
        assert (mask.sum(), annotation["iscrowd"]) == (annotation["area"], 0)
        x, y, width, height = annotation["bbox"]
        assert mask[y : y + height, x : x + width].sum() == annotation["area"]
    assert not coco.getAnnIds(catIds=[5])


def test_pycocotools_and_panopticapi_find_their_keys_in_panoptic_json(tmp_path: Path) -> None:
    panoptic, _ = random_run(tmp_path, 4)
    exported = export_coco(panoptic, output=str(tmp_path / "out"))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(exported.files["panoptic_json"])
    assert sorted(coco.anns) == sorted(coco.imgs) == [1, 3, 4, 5]
    assert [entry["supercategory"] for entry in coco.loadCats([1, 5])] == ["thing 1", "stuff 1"]
    colors = {tuple(entry["color"]) for entry in coco.cats.values()}  # its converters tell segments by them
    assert len(colors) == 7 and (0, 0, 0) not in colors
    assert coco.dataset["licenses"] == []
    instances = json.loads(Path(exported.files["instances_json"]).read_text())["categories"]
    assert all(entry.keys() == {"id", "name", "supercategory", "color"} for entry in instances)


def test_shards_are_whole_sets_over_the_same_folders(tmp_path: Path) -> None:
    panoptic, instances = random_run(tmp_path, 8)
    one = export_coco(panoptic, instances, output=str(tmp_path / "one"))
    export_coco(panoptic, instances, output=str(tmp_path / "many"), shards=2)
    whole = json.loads(Path(one.files["panoptic_json"]).read_text())
    found = [json.loads((tmp_path / "many" / f"panoptic_train-0000{i}-of-00002.json").read_text()) for i in range(2)]
    assert [image for shard in found for image in shard["images"]] == whole["images"]
    assert [labels for shard in found for labels in shard["annotations"]] == whole["annotations"]
    assert all(shard["categories"] == whole["categories"] for shard in found)
    numbers = []
    for path in sorted((tmp_path / "many").glob("instances_train-*.json")):
        numbers += [entry["id"] for entry in json.loads(path.read_text())["annotations"]]
        CocoPanoptic(str(path).replace("instances_", "panoptic_"), str(tmp_path / "many" / "panoptic_train"))
    assert numbers == list(range(1, one.instances + 1))
    with pytest.raises(ConfigError, match="--shards: 4 must be from 1 to the number of parts, which is 3"):
        export_coco(panoptic, output=str(tmp_path / "out"), shards=4)


def test_photos_that_exif_data_turns_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = labelled_run(tmp_path, turned={"a.jpg"})
    (tmp_path / "photos" / "b.png").unlink()
    exported = export_coco(run, run, output=str(tmp_path / "out"))
    assert (exported.turned, exported.unchecked, exported.images) == (1, 1, 4)
    images = json.loads(Path(exported.files["panoptic_json"]).read_text())["images"]
    assert [image.get("exif_orientation") for image in images] == [6, None, None, None]
    assert images[0]["coco_url"] == str(tmp_path / "photos" / "a.jpg")
    print_export(exported)
    said = capsys.readouterr().out
    assert "1 photos have a rotation in their EXIF data; labels are of the upright photo" in said
    assert "1 photos could not be looked at" in said


def test_instances_are_whole_masks_when_their_parts_are_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [random_rows(rng, f"{i}.jpg", 4, 3) for i in range(8)]
    panoptic, instances = zip(*rows, strict=True)
    parts = [write_part(tmp_path / "p" / "part-00000.parquet", panoptic, categories(4, 3))]
    whole = [write_instances(tmp_path / "i" / "part-00000.parquet", instances)]
    exported = export_coco(parts, whole, output=str(tmp_path / "out"))
    assert exported.hidden == sum(row["hidden_instances"] for row in panoptic) > 0
    found = CocoInstances(exported.files["instances_json"])
    larger = 0
    for row, of in rows:
        size = (row["height"], row["width"])
        masks = {decode_rle(counts, *size).tobytes() for counts in of["rle"]}
        read = found.read(row["image_id"])
        visible = [segment for segment in row["segments"] if segment["is_thing"]]
        assert [one.category for one in read] == [segment["category"] for segment in visible]
        assert all(decode_rle(one.rle["counts"], *size).tobytes() in masks for one in read)
        larger += sum(one.area > segment["area"] for one, segment in zip(read, visible, strict=True))
    assert larger > 3


def test_visible_masks_are_those_of_the_map(tmp_path: Path) -> None:
    panoptic, _ = random_run(tmp_path, 5)
    exported = export_coco(panoptic, output=str(tmp_path / "out"))
    labels, found = CocoPanoptic(exported.files["panoptic_json"]), CocoInstances(exported.files["instances_json"])
    for name in labels.names:
        image = labels.read(name)
        masks = [(s.category, encode_rle(image.ids == s.id)) for s in image.segments if s.category <= 4]
        assert [(one.category, one.rle["counts"]) for one in found.read(name)] == masks


def test_the_stuff_picture_has_0_for_things_classes_from_1_and_255_for_void() -> None:
    segments = (PanopticSegment(3, 2), PanopticSegment(1, 11), PanopticSegment(70000, 13))
    image = PanopticImage("a.jpg", "a", np.array([[3, 1, 0, 70000]], np.int32), segments)
    with Image.open(io.BytesIO(stuff_png(image, things=10))) as picture:
        assert picture.mode == "L"
        assert np.asarray(picture).tolist() == [[0, 1, 255, 3]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 6), st.data())
def test_every_pixel_of_the_stuff_picture_follows_from_its_segment(
    pixels: list[int], things: int, data: st.DataObject
) -> None:
    ids = np.array([pixels], np.int32) * 1000
    drawn = sorted(set(pixels) - {0})
    category = {n * 1000: data.draw(st.integers(1, things + 254)) for n in drawn}
    segments = tuple(PanopticSegment(number, category[number]) for number in category)
    with Image.open(io.BytesIO(stuff_png(PanopticImage("a", "a", ids, segments), things))) as picture:
        found = np.asarray(picture)[0].tolist()
    assert found == [255 if i == 0 else max(0, category[i] - things) for i in ids[0].tolist()]


def test_the_stuff_folder_and_no_stuff_folder(tmp_path: Path) -> None:
    panoptic, _ = random_run(tmp_path, 3)
    exported = export_coco(panoptic, output=str(tmp_path / "out"), name="x")
    names = sorted(path.name for path in (tmp_path / "out" / "panoptic_stuff_x").iterdir())
    assert names == ["photo-000.png", "photo-001.png", "photo-002.png"]
    labels = CocoPanoptic(exported.files["panoptic_json"])
    ids, stuff = labels.read("photo-000.jpg").ids, stuff_of(f"{exported.files['sem_seg_root']}/photo-000.png")
    assert np.array_equal(ids == 0, stuff == 255)
    exported = export_coco(panoptic, output=str(tmp_path / "bare"), stuff=False)
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == [
        "instances_train.json",
        "panoptic_train",
        "panoptic_train.json",
        "register.py",
        "u2label_train.json",
    ]
    assert "sem_seg_root" not in exported.files


def test_the_export_scores_as_the_parts_do(tmp_path: Path) -> None:
    predicted, _ = random_run(tmp_path / "a", 9, seed=1)
    truth, _ = random_run(tmp_path / "b", 9, seed=1)
    exported = export_coco(predicted, output=str(tmp_path / "out"))
    scores = [
        score_labels(source, PanopticParts(find_parts(truth)))
        for source in (PanopticParts(find_parts(predicted)), CocoPanoptic(exported.files["panoptic_json"]))
    ]
    for result in scores:
        result.pop("predictions")
    assert scores[0] == scores[1]
    assert scores[0]["all_images"]["PQ"] > 0.9


def test_the_sample_of_coco_goes_through_parts_and_back(shared_dir: Path, tmp_path: Path) -> None:
    sample = CocoPanoptic(str(shared_dir / "data/coco-panoptic-sample/panoptic_examples.json"))
    kinds = sorted(sample.categories.values(), key=lambda c: not c.is_thing)
    number = {category.id: k for k, category in enumerate(kinds, start=1)}
    listed = [{"id": number[c.id], "name": c.name, "isthing": int(c.is_thing)} for c in kinds]
    rows = []
    for name in sample.names:
        image = sample.read(name)
        base = {"is_thing": True, "area": 1, "bbox": [0.0] * 4, "score": None}
        row = unreadable_row(name) | {"status": "ok", "panoptic": encode_panoptic_png(image.ids)}
        row |= {"segments": [base | {"id": s.id, "category": number[s.category]} for s in image.segments]}
        rows.append(row | {"height": image.ids.shape[0], "width": image.ids.shape[1]})
    part = write_part(tmp_path / "part-00000.parquet", rows, listed)
    exported = export_coco([part], output=str(tmp_path / "out"))
    back = CocoPanoptic(exported.files["panoptic_json"])
    for name in sample.names:
        mine, theirs = sample.read(name), back.read(name)
        assert np.array_equal(mine.ids, theirs.ids)
        assert [(s.id, number[s.category]) for s in mine.segments] == [(s.id, s.category) for s in theirs.segments]
        areas = {s["id"]: (s["area"], s["bbox"]) for s in sample.annotation(name)["segments_info"]}
        assert {s["id"]: (s["area"], s["bbox"]) for s in back.annotation(name)["segments_info"]} == areas


def one_image(tmp_path: Path, *names: str, listed: list[dict[str, Any]] | None = None) -> str:
    rows = [random_rows(np.random.default_rng(3), name, 4, 3)[0] for name in names]
    return write_part(tmp_path / "part-00000.parquet", rows, listed or categories(4, 3))


def test_what_detectron2_will_not_find_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = export_coco([one_image(tmp_path, "x/a.jpg", "b.png", "c.v2.jpg")], output=str(tmp_path / "out"))
    assert (exported.not_jpg, exported.in_subfolders, exported.dotted) == (1, 1, 1)
    assert (tmp_path / "out" / "panoptic_stuff_train" / "x" / "a.png").is_file()
    print_export(exported)
    said = " ".join(capsys.readouterr().out.split())
    assert "3 images" in said
    assert "1 images have names with dots" in said
    assert "1 images do not end in .jpg" in said
    assert "1 images lie in subfolders" in said


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("x.tar/../../../esc/a.jpg", "x.tar/_/_/_/esc/a"),
        ("/esc/a.jpg", "esc/a"),
        ("below//./a.jpg", "below/a"),
        ("n" * 250 + ".jpg", None),
    ],
)
def test_a_name_that_is_no_path_below_a_folder_gets_another(tmp_path: Path, name: str, files: str | None) -> None:
    out = tmp_path / "deep" / "out"
    exported = export_coco([one_image(tmp_path, name, "b.jpg")], output=str(out))
    assert (exported.images, exported.renamed) == (2, 1)
    assert list(exported.examples) == [name]
    assert files is None or exported.examples[name] == files
    pngs = [path.relative_to(out / "panoptic_train").as_posix() for path in (out / "panoptic_train").rglob("*.png")]
    assert sorted(pngs) == sorted(["b.png", f"{exported.examples[name]}.png"])
    assert {path.parent for path in tmp_path.rglob("*.png")} <= {p for p in out.rglob("*") if p.is_dir()}
    labels = CocoPanoptic(exported.files["panoptic_json"])
    assert all(labels.read(one).segments is not None for one in labels.names)


def test_images_whose_pngs_would_be_one_get_a_suffix(tmp_path: Path) -> None:
    exported = export_coco([one_image(tmp_path, "IMG.JPG", "IMG.jpeg", "img.png")], output=str(tmp_path / "out"))
    labels = CocoPanoptic(exported.files["panoptic_json"])
    assert list(labels.names) == ["IMG.JPG", "IMG.jpeg", "img.png"]
    pngs = [labels.annotation(name)["file_name"] for name in labels.names]
    assert pngs == ["IMG.png", "IMG.jpeg.png", "img.png.png"]
    assert exported.examples == {"IMG.jpeg": "IMG.jpeg", "img.png": "img.png"}
    assert score_labels(labels, labels, mode="identity")["all_images"]["PQ"] == 1.0


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([*categories(4, 2), {"id": 9, "name": "far", "isthing": 0}], r"needs things 1..4 and then stuff"),
        ([{"id": 0, "name": "zero", "isthing": 1}, *categories(4, 3)], r"needs things 1..5 and then stuff"),
        (categories(4, 255), "255 classes of stuff; a stuff PNG holds 254"),
    ],
)
def test_categories_that_loaders_would_not_understand_are_refused(
    tmp_path: Path, listed: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_coco([one_image(tmp_path, "a.jpg", listed=listed)], output=str(tmp_path / "out"))


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    panoptic, instances = random_run(tmp_path / "a", 5)
    other, _ = random_run(tmp_path / "b", 5, seed=9)
    with pytest.raises(ConfigError, match=r"do not lie on the|by its row of instances"):
        export_coco(other, instances, output=str(tmp_path / "out"))
    rows = [random_rows(np.random.default_rng(0), f"other-{i}.jpg", 4, 3)[1] for i in range(3)]
    stranger = write_instances(tmp_path / "s" / "part-00000.parquet", rows)
    with pytest.raises(ConfigError, match="hold different images"):
        export_coco(find_parts(panoptic)[:1], [stranger], output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"part-00001.parquet has no instances part of its name"):
        export_coco(panoptic, [stranger], output=str(tmp_path / "out"))


def test_nothing_readable_is_nothing_to_export(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part-00000.parquet", [unreadable_row("a.jpg")], categories(1, 1))
    with pytest.raises(ConfigError, match="nothing to export"):
        export_coco([part], output=str(tmp_path / "out"))


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="--output: cannot write to"):
        export_coco([one_image(tmp_path, "a.jpg")], output=str(tmp_path / "file"))


def test_an_image_without_instances_is_exported_all_the_same(tmp_path: Path) -> None:
    row = unreadable_row("void.jpg") | {"status": "no_masks", "height": 4, "width": 4}
    row |= {"panoptic": encode_panoptic_png(np.zeros((4, 4), int))}
    exported = export_coco(
        [write_part(tmp_path / "part-00000.parquet", [row], categories(1, 1))], output=str(tmp_path / "out")
    )
    assert (exported.images, exported.instances) == (1, 0)
    found: list[Instance] = CocoInstances(str(tmp_path / "out" / "instances_train.json")).read("void.jpg")
    assert found == []
