"""Each format is opened by its own reader, and what is read scores as the parts do."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.export.cityscapes import export_cityscapes
from pipeline.export.coco import export_coco
from pipeline.export.hf import export_hf
from pipeline.export.labelstudio import export_labelstudio
from pipeline.export.summary import Exported
from pipeline.export.webdataset import export_webdataset
from pipeline.export.yolo import export_yolo, outline
from pipeline.sources.classes import Classes, look_up
from pipeline.sources.coco import Category, CocoInstances, CocoPanoptic, PanopticImage, PanopticSegment
from pipeline.store import storage
from tests.pipeline.export.labelled_runs import NAMES, labelled_run, labels_of, scores
from workers.masks import decode_panoptic_png, decode_rle
from workers.records import with_columns

EXPORTS = {
    "coco": export_coco,
    "yolo": export_yolo,
    "hf": export_hf,
    "webdataset": export_webdataset,
    "labelstudio": export_labelstudio,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return labelled_run(tmp_path_factory.mktemp("run"), turned={"a.jpg", "below/c.jpg"})


class Read:
    """Labels that a reader of a format gave, as `score_labels` takes them."""

    shown = "what was read"

    def __init__(self, categories: dict[int, Category], images: dict[str, PanopticImage]) -> None:
        self.categories, self.names, self._images = categories, list(images), images

    def read(self, name: str) -> PanopticImage:
        return self._images[name]


def image_of(name: str, ids: np.ndarray, segments: list[dict[str, Any]]) -> PanopticImage:
    found = tuple(
        PanopticSegment(s["id"], s.get("category_id", s.get("category")), score=s.get("score")) for s in segments
    )
    return PanopticImage(name, name, ids, found)


def assert_same(read: dict[str, PanopticImage], run: str) -> None:
    """The same labels, and so the same scores."""
    parts = labels_of(run)
    assert sorted(read) == sorted(parts.names)
    for name in parts.names:
        mine, theirs = parts.read(name), read[name]
        assert np.array_equal(mine.ids, theirs.ids)
        assert [(s.id, s.category) for s in mine.segments] == [(s.id, s.category) for s in theirs.segments]
    assert scores(Read(parts.categories, read), parts) == scores(parts, parts)


def test_hugging_face_datasets_reads_it(run: str, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    exported = export_hf(run, run, output=str(tmp_path / "out"), name="pseudo")
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="pseudo")
    read = {}
    for row in found:
        ids = np.array(row["panoptic"]).astype(np.int32) @ (1, 256, 65536)
        read[row["image_id"]] = image_of(row["image_id"], ids.astype(np.int32), row["segments"])
        assert (row["image"].height, row["image"].width) == (row["height"], row["width"]) == ids.shape
        for segment in row["segments"]:
            mask = ids == segment["id"]
            assert segment["area"] == mask.sum()
            if segment["is_thing"]:
                assert decode_rle(segment["rle"], *ids.shape)[mask].all()
    assert_same(read, run)
    names = found.features["segments"].feature["category"].names
    assert names == ["void", "thing 1", "thing 2", "thing 3", "thing 4", "stuff 1", "stuff 2", "stuff 3"]
    assert (exported.turned, exported.photos) == (2, 4)
    export_hf(run, run, output=str(tmp_path / "out"), name="val", photos=False)
    for name in ("pseudo", "val"):  # another set beside the first
        assert len(datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / name), split=name)) == len(
            found
        )
    with pytest.raises(ConfigError, match=r"--name: 'my-set' has a -.*use _"):
        export_hf(run, run, output=str(tmp_path / "other"), name="my-set")


def test_webdataset_reads_it(run: str, tmp_path: Path) -> None:
    import webdataset

    exported = export_webdataset(run, run, output=str(tmp_path / "out"))
    shards = sorted(str(path) for path in (tmp_path / "out" / "train").glob("*.tar"))
    assert len(shards) == 2
    read = {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        about = json.loads(sample["json"])
        ids = decode_panoptic_png(sample["panoptic.png"])
        read[about["image_id"]] = image_of(about["image_id"], ids, about["segments_info"])
        photo = next(sample[ending] for ending in ("jpg", "png") if ending in sample)
        with Image.open(io.BytesIO(photo)) as picture:
            assert (picture.height, picture.width) == ids.shape == (about["height"], about["width"])
            assert picture.getexif().get(0x0112, 1) == 1
    assert_same(read, run)
    index = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [shard["nsamples"] for shard in index["shards"]] == [3, 1]
    again = export_webdataset(run, run, output=str(tmp_path / "again"))
    assert [Path(one).read_bytes() for one in shards] == [
        path.read_bytes() for path in sorted((tmp_path / "again" / "train").glob("*.tar"))
    ]
    assert (again.images, exported.images) == (4, 4)


def test_label_studios_sdk_reads_it_and_no_photo_is_copied(run: str, tmp_path: Path) -> None:
    from label_studio_sdk.converter.brush import decode_rle as decode_brush
    from label_studio_sdk.label_interface import LabelInterface

    exported = export_labelstudio(run, output=str(tmp_path / "out"))
    interface = LabelInterface((tmp_path / "out" / "train.xml").read_text())
    interface.validate()
    tasks = [task for file in sorted((tmp_path / "out").glob("train_tasks/*")) for task in json.loads(file.read_text())]
    number = {category.name: i for i, category in labels_of(run).categories.items()}
    read = {}
    for task in tasks:
        assert interface.validate_prediction(task["predictions"][0], return_errors=True) == []
        name, segments, ids = task["data"]["image_id"], [], None
        for region in task["predictions"][0]["result"]:
            height, width = region["original_height"], region["original_width"]
            mask = decode_brush(region["value"]["rle"]).reshape(height, width, 4)[..., 3] > 0
            ids = np.zeros((height, width), np.int32) if ids is None else ids
            ids[mask] = int(region["id"].removeprefix("segment-"))
            segments.append({"id": int(ids[mask][0]), "category": number[region["value"]["brushlabels"][0]]})
        assert ids is not None
        read[name] = image_of(name, ids, segments)
    assert_same(read, run)
    photos = str(Path(run).parent / "photos").removeprefix("/")
    assert [task["data"]["image"] for task in tasks] == [f"/data/local-files/?d={photos}/{name}" for name in NAMES]
    assert exported.photos == 0
    assert not list((tmp_path / "out").rglob("*.jpg"))


def test_photos_of_a_bucket_are_named_by_their_uris_or_copied_into_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    run = labelled_run(tmp_path, bucket=s3_bucket)
    exported = export_labelstudio(run, run, output=f"{s3_bucket}/tasks")
    assert exported.photos == 0
    tasks = [
        task
        for part in range(2)
        for task in json.loads(storage.read_bytes(f"{s3_bucket}/tasks/train_tasks/part-0000{part}.json"))
    ]
    assert [task["data"]["image"] for task in tasks] == [f"{s3_bucket}/photos/{name}" for name in NAMES]
    coco = export_coco(run, run, output=str(tmp_path / "coco"))
    images = json.loads(Path(coco.files["panoptic_json"]).read_text())["images"]
    assert [image["coco_url"] for image in images] == [f"{s3_bucket}/photos/{name}" for name in NAMES]
    for format, index in (("webdataset", "train.json"), ("hf", "README.md"), ("yolo", "train.yaml")):
        exported = EXPORTS[format](run, run, output=f"{s3_bucket}/{format}")
        files = {file.path for file in storage.walk(f"{s3_bucket}/{format}")}
        assert exported.photos == 4
        assert {index, "u2label_train.json"} < files
        assert not any(file.startswith(".") for file in files)
    assert storage.read_bytes(f"{s3_bucket}/yolo/images/train/a.jpg") == (tmp_path / "photos" / "a.jpg").read_bytes()


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cityscapes_scripts_read_it(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cityscapesscripts.helpers import labels as own
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    out = tmp_path / "out"
    export_cityscapes(run, output=str(out), name="val")
    kept = [
        list(own.labels),
        *(dict(t) for t in (own.name2label, own.id2label, own.trainId2label, own.category2labels)),
    ]
    try:
        module_of(out / "labels_val.py").install()
        with contextlib.redirect_stdout(io.StringIO()):
            convert2panoptic(str(out / "gtFine"), str(tmp_path), False, ["val"])
    finally:
        own.labels[:] = kept[0]
        for table, was in zip(
            (own.name2label, own.id2label, own.trainId2label, own.category2labels), kept[1:], strict=True
        ):
            table.clear()
            table.update(was)
    converted = CocoPanoptic(str(tmp_path / "cityscapes_panoptic_val.json"))
    with (out / "photos_val.csv").open() as file:
        image_id = {row["key"]: row["image_id"] for row in csv.DictReader(file)}
    parts = labels_of(run)
    read = {}
    for name in converted.names:
        key = name.removesuffix("_gtFine_leftImg8bit.png")
        read[image_id[key]] = converted.read(name)
        with Image.open(out / "leftImg8bit" / "val" / "photos" / f"{key}_leftImg8bit.png") as photo:
            assert (photo.height, photo.width) == parts.read(image_id[key]).ids.shape
        ids = np.asarray(Image.open(out / "gtFine" / "val" / "photos" / f"{key}_gtFine_labelTrainIds.png"))
        assert np.array_equal(ids == 255, parts.read(image_id[key]).ids == 0)
    assert converted.categories.keys() == parts.categories.keys()
    assert scores(Read(parts.categories, read), parts) == scores(parts, parts)


def test_cityscapes_has_no_room_for_many_classes_and_lies_on_a_disk(tmp_path: Path) -> None:
    many = labelled_run(tmp_path, ["a.jpg"], things=65)
    with pytest.raises(ConfigError, match="65 classes of things and 3 of stuff; the format holds 64 of things"):
        export_cityscapes(many, output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="tools for Cityscapes read local folders"):
        export_cityscapes(many, output="s3://bucket/out")


def test_supervision_reads_yolo(run: str, tmp_path: Path) -> None:
    import supervision

    exported = export_yolo(run, output=str(tmp_path / "out"))
    found = supervision.DetectionDataset.from_yolo(
        images_directory_path=str(tmp_path / "out" / "images" / "train"),
        annotations_directory_path=str(tmp_path / "out" / "labels" / "train"),
        data_yaml_path=str(tmp_path / "out" / "train.yaml"),
        force_masks=True,
    )
    assert found.classes == ["thing 1", "thing 2", "thing 3", "thing 4"]
    assert exported.files.keys() == {"data", "labels", "images"}
    assert exported.stuff_left_out > 4
    assert (tmp_path / "out" / "labels" / "train" / "below" / "c.txt").is_file()
    parts = labels_of(run)
    checked = 0
    for path, _, detections in found:
        image = parts.read({"a.jpg": "a.jpg", "b.png": "b.png", "d_v2.jpg": "d.v2.jpg"}[Path(path).name])
        things = [s for s in image.segments if s.category <= 4]
        assert detections.class_id is not None and detections.class_id.tolist() == [s.category - 1 for s in things]
        for mask, segment in zip(detections.mask if things else (), things, strict=True):
            wanted = image.ids == segment.id
            assert not (wanted & ~mask).any()
            assert (mask & ~wanted).sum() <= 0.1 * wanted.sum() + 3  # lines between pieces
            checked += 1
    assert checked > 4


def test_a_polygon_has_every_pixel_of_a_mask_and_goes_around_its_holes() -> None:
    import cv2

    mask = np.zeros((40, 50), bool)
    mask[5:30, 5:30] = True
    mask[12:20, 12:20] = False
    mask[33:36, 40:45] = True
    mask[0, 49] = True
    filled = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [outline(mask, cv2)], 1) > 0
    assert filled[mask].all()
    assert not filled[14:18, 14:18].any()
    assert (filled & ~mask).sum() < 60
    dot = np.zeros((3, 3), bool)
    dot[1, 2] = True
    assert outline(dot, cv2).tolist() == [[2, 1]] * 3


def test_exports_know_merged_classes_names_and_noise(run: str, tmp_path: Path) -> None:
    kinds = {1: Category(1, "dog", True), 2: Category(2, "dog", False)}
    classes = Classes(kinds, {1: 1, 2: 1, 3: 2, 5: 2, 6: 2})
    exported = export_coco(run, run, output=str(tmp_path / "coco"), classes=classes)
    labels, instances = CocoPanoptic(exported.files["panoptic_json"]), CocoInstances(exported.files["instances_json"])
    assert [(c.name, c.is_thing) for c in labels.categories.values()] == [("dog", True), ("dog (2)", False)]
    before = labels_of(run)
    for name in before.names:
        mine, theirs = before.read(name), labels.read(name)
        wanted = look_up(mine.ids, {0: 0} | {s.id: classes.written.get(s.category, 0) for s in mine.segments})
        assert np.array_equal(wanted, look_up(theirs.ids, {0: 0} | {s.id: s.category for s in theirs.segments}))
        assert [one.category for one in instances.read(name)] == [1] * sum(s.category in (1, 2) for s in mine.segments)
    for format in ("yolo", "hf", "webdataset", "labelstudio"):
        assert EXPORTS[format](run, run, output=str(tmp_path / format), classes=classes).categories == {
            "things": 1,
            "stuff": 1,
        }
    assert "dog" in (tmp_path / "yolo" / "train.yaml").read_text()


@pytest.mark.parametrize(("photos", "folder"), [(None, "images_"), (False, "images")])
def test_a_folder_of_images_is_another_beside_copies(tmp_path: Path, photos: bool | None, folder: str) -> None:
    """Ultralytics looks for the labels of a photo where the last `images` of its path is `labels`."""
    run = labelled_run(tmp_path, ["images/a.jpg", "b.jpg"])
    export_yolo(run, run, output=str(tmp_path / "yolo"), photos=photos)
    assert (tmp_path / "yolo" / "labels" / "train" / folder / "a.txt").is_file()
    for photo in (tmp_path / "yolo").rglob("*.jpg"):
        assert Path("/labels/".join(str(photo).rsplit("/images/", 1))).with_suffix(".txt").is_file()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_photos_that_are_no_files_get_files_and_odd_names_safe_ones(tmp_path: Path, kind: str) -> None:
    run = labelled_run(tmp_path, ["a.jpg", "../up.jpg", "below//c.jpg", "d.png"], kind=kind)
    exported = export_coco(run, run, output=str(tmp_path / "coco"))
    assert (exported.images, exported.photos) == (4, 4)
    document = json.loads(Path(exported.files["panoptic_json"]).read_text())
    for image in document["images"]:
        with Image.open(Path(exported.files["image_root"]) / image["file_name"]) as photo:
            assert photo.size == (image["width"], image["height"])
    labels, parts = CocoPanoptic(exported.files["panoptic_json"]), labels_of(run)
    assert scores(labels, parts) == scores(parts, labels) == scores(parts, parts)
    for annotation in document["annotations"]:
        assert annotation["file_name"].count(".") == 1  # panopticapi's converters cut at the first dot
    for format in ("yolo", "hf", "webdataset", "labelstudio"):
        assert EXPORTS[format](run, run, output=str(tmp_path / format)).images == 4


def test_the_keys_of_a_manifest_are_in_every_format(tmp_path: Path) -> None:
    import datasets

    run = labelled_run(tmp_path)
    for part in Path(run).glob("panoptic/*/part-*.parquet"):
        table = pq.read_table(part)
        pq.write_table(
            with_columns(table, pa.table({"split": [f"of {n}" for n in table["image_id"].to_pylist()]})), part
        )
    export_webdataset(run, output=str(tmp_path / "tars"))
    with tarfile.open(tmp_path / "tars" / "train" / "train-000000.tar") as tar:
        assert json.load(tar.extractfile("a.json"))["keys"] == {"split": "of a.jpg"}  # type: ignore[arg-type]
    export_labelstudio(run, output=str(tmp_path / "tasks"))
    (task, *_) = json.loads((tmp_path / "tasks" / "train_tasks" / "part-00000.json").read_text())
    assert task["data"]["split"] == "of a.jpg"
    export_hf(run, output=str(tmp_path / "hf"))
    rows = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"), split="train")
    assert [json.loads(keys) for keys in rows["keys"]] == [{"split": f"of {name}"} for name in NAMES]


def test_photos_that_are_gone_or_others_are_left_out_and_said(tmp_path: Path) -> None:
    run = labelled_run(tmp_path)
    (tmp_path / "photos" / "a.jpg").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "b.png")
    exported = export_webdataset(run, run, output=str(tmp_path / "out"))
    assert (exported.images, exported.lost) == (2, 2)


def test_a_library_that_is_not_there_is_named_with_its_extra(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("datasets", "webdataset", "cv2", "label_studio_sdk.converter.brush"):
        monkeypatch.setitem(sys.modules, module, None)
    for format in ("yolo", "hf", "webdataset", "labelstudio"):
        with pytest.raises(ConfigError, match=rf"export {format}: .* is not there .*\[exports\]"):
            EXPORTS[format](run, output=str(tmp_path / format))
    assert not list(tmp_path.iterdir())


def test_parts_alone_have_no_photos(run: str, tmp_path: Path) -> None:
    parts = str(next(Path(run).glob("panoptic/*")))
    with pytest.raises(ConfigError, match="--photos: parts alone do not say where their photos lie; give the run"):
        export_yolo(parts, output=str(tmp_path / "out"))
    bare: Exported = export_webdataset(parts, output=str(tmp_path / "out"), photos=False)
    assert (bare.images, bare.photos) == (4, 0)
