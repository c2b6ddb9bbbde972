"""`register.py` beside exported labels: what detectron2's and Mask2Former's mappers find there."""

from __future__ import annotations

import enum
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.export.coco import export_coco
from tests.pipeline.export.labelled_runs import labelled_run, labels_of
from tests.pipeline.export.test_formats import module_of
from workers.masks import decode_panoptic_png, decode_rle

THINGS, STUFF = 4, 3


class BoxMode(enum.IntEnum):
    """As detectron2's, of which older versions take no plain numbers."""

    XYWH_ABS = 1


class Catalog:
    """In place of detectron2's two catalogues."""

    def __init__(self) -> None:
        self.loaders: dict[str, Callable[[], list[dict[str, Any]]]] = {}
        self.metadata: dict[str, dict[str, Any]] = {}

    def register(self, name: str, loader: Callable[[], list[dict[str, Any]]]) -> None:
        assert name not in self.loaders
        self.loaders[name] = loader

    def get(self, name: str) -> Any:
        return SimpleNamespace(set=lambda **found: self.metadata.update({name: found}))


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> Catalog:
    found, module = Catalog(), ModuleType("detectron2.data")
    module.DatasetCatalog = module.MetadataCatalog = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "detectron2", ModuleType("detectron2"))
    monkeypatch.setitem(sys.modules, "detectron2.data", module)
    structures = ModuleType("detectron2.structures")
    structures.BoxMode = BoxMode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "detectron2.structures", structures)
    return found


@pytest.fixture
def exported(tmp_path: Path) -> tuple[str, Any]:
    run = labelled_run(tmp_path, ["a.jpg", "a.png", "below/c.jpg", "d.jpg"])
    export_coco(run, run, output=str(tmp_path / "out"), shards=2)
    return run, module_of(tmp_path / "out" / "register.py")


def test_panoptic_fpn_finds_instances_and_stuff_by_themselves(exported: tuple[str, Any], catalog: Catalog) -> None:
    run, register = exported
    separated, _ = register.register()
    meta, dicts, parts = catalog.metadata[separated], catalog.loaders[separated](), labels_of(run)
    assert meta["stuff_classes"] == ["things", "stuff 1", "stuff 2", "stuff 3"]
    assert meta["thing_classes"] == ["thing 1", "thing 2", "thing 3", "thing 4"]
    assert meta["stuff_dataset_id_to_contiguous_id"] == {0: 0, 5: 1, 6: 2, 7: 3}
    assert len(dicts) == 4
    for found in dicts:
        with Image.open(found["file_name"]) as photo:
            assert (photo.height, photo.width) == (found["height"], found["width"])
        name = str(Path(found["file_name"]).relative_to(Path(run).parent / "photos"))
        image = parts.read(name)
        things = [s for s in image.segments if s.category <= THINGS]
        assert [one["category_id"] for one in found["annotations"]] == [s.category - 1 for s in things]
        for one, thing in zip(found["annotations"], things, strict=True):
            assert decode_rle(one["segmentation"]["counts"], *image.ids.shape)[image.ids == thing.id].all()
            assert one["bbox_mode"] is BoxMode.XYWH_ABS
        stuff = np.asarray(Image.open(found["sem_seg_file_name"]))
        assert {*np.unique(stuff)} - {0, 255} == {s.category - THINGS for s in image.segments if s.category > THINGS}


def test_mask2former_finds_segments_in_one_list_of_classes(exported: tuple[str, Any], catalog: Catalog) -> None:
    run, register = exported
    _, standard = register.register()
    meta, dicts, parts = catalog.metadata[standard], catalog.loaders[standard](), labels_of(run)
    assert len(meta["stuff_classes"]) == len(meta["stuff_colors"]) == THINGS + STUFF
    assert meta["stuff_dataset_id_to_contiguous_id"] == {i + 1: i for i in range(THINGS + STUFF)}
    for found in dicts:
        assert (
            not {"annotations", "sem_seg_file_name"} & found.keys()
        )  # its mapper refuses the one, and counts the other
        name = str(Path(found["file_name"]).relative_to(Path(run).parent / "photos"))
        image = parts.read(name)
        assert np.array_equal(decode_panoptic_png(Path(found["pan_seg_file_name"]).read_bytes()), image.ids)
        segments = [(s["id"], s["category_id"], s["isthing"], s["iscrowd"]) for s in found["segments_info"]]
        assert segments == [(s.id, s.category - 1, s.category <= THINGS, 0) for s in image.segments]


def test_photos_may_lie_elsewhere_now(
    exported: tuple[str, Any], catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, register = exported
    assert register.load(image_root="/photos", separated=True)[0]["file_name"] == "/photos/a.jpg"
    assert register.load(image_root="/photos", separated=False)[2]["file_name"] == "/photos/below/c.jpg"
    monkeypatch.chdir(tmp_path)
    assert register.load(image_root="mine/", separated=False)[0]["file_name"] == str(tmp_path / "mine" / "a.jpg")


def test_copies_are_found_where_the_export_was_moved_to(tmp_path: Path, catalog: Catalog) -> None:
    run = labelled_run(tmp_path, ["a.jpg", "a.png", "below/c.jpg"])
    export_coco(run, run, output=str(tmp_path / "out"), photos=True)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    shutil.rmtree(tmp_path / "photos")
    register = module_of(tmp_path / "moved" / "register.py")
    for separated in (True, False):
        assert all(Path(found["file_name"]).is_file() for found in register.load(separated=separated))


def test_configurations_get_the_numbers_of_classes_and_masks_as_run_lengths(exported: tuple[str, Any]) -> None:
    _, register = exported
    model = SimpleNamespace(ROI_HEADS=SimpleNamespace(), SEM_SEG_HEAD=SimpleNamespace())
    cfg = SimpleNamespace(MODEL=model, INPUT=SimpleNamespace(), DATASETS=SimpleNamespace())
    register.configure_detectron2(cfg)
    assert (model.ROI_HEADS.NUM_CLASSES, model.SEM_SEG_HEAD.NUM_CLASSES) == (THINGS, STUFF + 1)
    assert (cfg.INPUT.MASK_FORMAT, cfg.DATASETS.TRAIN) == ("bitmask", ("u2label_train_separated",))
    register.configure_mask2former(cfg)
    assert (model.SEM_SEG_HEAD.NUM_CLASSES, cfg.DATASETS.TRAIN) == (THINGS + STUFF, ("u2label_train",))


def test_a_set_that_is_not_there_is_named(exported: tuple[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no panoptic_val.json in"):
        exported[1].counts("val")
