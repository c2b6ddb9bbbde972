"""Label maps beside photos are told from photos, whatever folder they lie in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.sources.choice import Choice
from pipeline.sources.index import build_index
from pipeline.sources.label_maps import looks_like_labels
from tests.pipeline.sources.image_sources import label_map, photo, png, put, tar

JPEG = b"the bytes of photos other than PNGs are not looked at"
MAP, PALETTE, DEEP = png(label_map()), png(label_map(), palette=True), png(label_map().astype(np.uint16) * 300)
RGB, GREY = png(photo()), png(photo(channels=1))


def taken(tmp_path: Path, uri: str, choice: Choice = Choice()) -> tuple[list[str], int]:  # noqa: B008
    index = build_index(str(tmp_path / "index"), uri, shard_size=100, choice=choice)
    return [record.image_id for record in index.records(0)], index.ignored.label_maps


@pytest.mark.parametrize(
    ("files", "maps"),
    [
        ({"images/1.bmp": JPEG, "images/2.bmp": JPEG, "png/semantic/1.png": PALETTE}, "png/semantic/1.png"),
        ({"annotations/1.png": MAP, "images/1.jpg": JPEG}, "annotations/1.png"),  # listed before the photo
        ({"1.jpg": JPEG, "1.png": MAP, "2.jpg": JPEG, "2.png": DEEP}, "1.png 2.png"),
        ({"image/1.png": RGB, "label/1.png": MAP}, "label/1.png"),
        ({"image/1.png": GREY, "label/1.png": PALETTE}, "label/1.png"),
        ({"1.png": RGB, "1_mask.png": MAP, "2.jpg": JPEG, "2.seg.png": MAP}, "1_mask.png 2.seg.png"),
        ({"é.jpg": JPEG, "labels/e\u0301.png": MAP}, "labels/e\u0301.png"),
        # not one of them
        ({"a/1.jpg": JPEG, "b/1.png": RGB, "c/1.png": GREY}, ""),
        ({"drawings/1.png": MAP, "photos/2.jpg": JPEG}, ""),  # a flat picture, but nobody's map
        ({"a/1.png": MAP, "b/1.png": MAP}, ""),  # maps of each other are none
        ({"a/1.jpg": JPEG, "b/1.png": b"not a PNG"}, ""),
        ({"a/1.jpg": JPEG, "b/1.gif": MAP}, ""),
    ],
)
def test_which_pictures_are_label_maps(tmp_path: Path, files: dict[str, bytes], maps: str) -> None:
    source = str(tmp_path / "photos")
    put(source, files)
    names, left = taken(tmp_path, source)
    assert sorted(set(files) - set(names)) == maps.split()
    assert left == len(maps.split())
    assert taken(tmp_path, source, Choice(label_maps=True)) == (sorted(files, key=str.encode), 0)


def test_label_maps_in_a_tar(source: str, tmp_path: Path) -> None:
    members = [("images/1.jpg", JPEG), ("k.jpg", JPEG), ("k.seg.png", MAP), ("labels/1.png", PALETTE), ("m.png", MAP)]
    put(source, {"0.tar": tar(members), "1.tar": tar([("1.png", MAP)])})
    names, left = taken(tmp_path, source)
    assert names == ["0.tar/images/1.jpg", "0.tar/k.jpg", "0.tar/m.png", "1.tar/1.png"]
    assert left == 2


def test_what_exclude_leaves_out_makes_no_map(tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), {"a/1.jpg": JPEG, "b/1.png": MAP})
    assert taken(tmp_path, str(tmp_path / "photos"), Choice(exclude=("a/",))) == (["b/1.png"], 0)


@pytest.mark.parametrize(
    ("data", "is_map"),
    [
        (MAP, True),
        (PALETTE, True),
        (DEEP, True),
        (png(np.random.default_rng(0).integers(0, 20, (40, 40)).astype(np.uint8)), True),  # few values
        (png(label_map() > 1), True),  # one bit
        (RGB, False),
        (GREY, False),
        (png(photo(channels=1), palette=True), False),
        (b"", False),
        (MAP[:60], False),
    ],
)
def test_what_a_label_map_looks_like(data: bytes, is_map: bool) -> None:
    assert looks_like_labels(data) is is_map
