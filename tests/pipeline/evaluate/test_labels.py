"""Folders of human labels: what pixel values mean, which label belongs to which image, and what is refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.evaluate.labels import (
    COCO_STUFF_27,
    COCO_STUFF_GROUPS,
    IGNORED,
    class_table,
    decode_label,
    open_labels,
    read_names,
)


def png(values: object, mode: str | None = None, palette: list[int] | None = None) -> bytes:
    image = Image.fromarray(np.array(values, np.uint8))
    if palette is not None:
        image.putpalette(palette)
    stream = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(stream, format="PNG")
    return stream.getvalue()


def grey_png(rows: list[bytes], width: int, depth: int) -> bytes:
    """A grey PNG of less than 8 bits a pixel, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def test_values_become_classes_and_ignored_values_none(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.png": png([[0, 1, 2], [11, 255, 2]])})
    labels = open_labels(folder, names=["sky", "road", "car"], ignore=(11, 255))
    assert labels.table.names == ("sky", "road", "car")
    assert labels.read("a.png").tolist() == [[0, 1, 2], [IGNORED, IGNORED, 2]]


def test_without_names_every_value_is_a_class(tmp_path: Path) -> None:
    labels = open_labels(write(tmp_path, {"a.png": png([[0, 7, 254, 255]])}))
    assert [labels.table.names[c] for c in labels.read("a.png")[0, :3]] == ["0", "7", "254"]
    assert not labels.table.named


def test_values_of_one_name_are_one_class_and_an_ignored_value_has_none() -> None:
    table = class_table({4: "road", 0: "sky", 9: "road", 11: "unlabelled"}, ignore=(11,))
    assert table.names == ("road", "sky")
    assert table.lookup[[4, 9, 0, 11]].tolist() == [0, 0, 1, IGNORED]


def test_a_palette_png_is_read_as_indices_whatever_its_colours() -> None:
    values = [[3, 0], [1, 200]]
    assert decode_label(png(values, palette=[255, 0, 0] * 256)).tolist() == values


def test_greys_of_few_bits_are_not_stretched_to_255() -> None:
    assert decode_label(grey_png([b"\x0f\x37"], 4, 4)).tolist() == [[0, 15, 3, 7]]
    assert decode_label(grey_png([b"\x1b"], 4, 2)).tolist() == [[0, 1, 2, 3]]
    assert decode_label(png([[0, 255]], mode="1")).tolist() == [[0, 1]]


def test_sixteen_bits_are_read_when_the_values_fit_eight() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.array([[3, 255]], np.uint16)).save(stream, format="PNG")
    assert decode_label(stream.getvalue()).tolist() == [[3, 255]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(np.zeros((2, 2, 3))), r"a\.png: is a picture of colours \(RGB\)"),
        (b"", r"a\.png: is not a readable PNG"),
        (png(np.zeros((90, 90)))[:60], r"a\.png: is not a readable PNG"),
        (png([[0, 5]]), r"a\.png: the pixel value 5 is neither one of the 2 classes nor ignored: .*--ignore \[255\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    labels = open_labels(write(tmp_path, {"a.png": data}), names=["sky", "road"])
    with pytest.raises(ConfigError, match=message):
        labels.read("a.png")


def test_values_above_255_and_other_bad_pngs_are_refused(shared_dir: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.array([[0, 7000]], np.uint16)).save(stream, format="PNG")
    with pytest.raises(ValueError, match="pixel value 7000 is above 255"):
        decode_label(stream.getvalue())
    with pytest.raises(ValueError, match="not a readable PNG"):
        decode_label((shared_dir / "data" / "bad-inputs" / "bomb_header.png").read_bytes())


def test_a_label_belongs_to_the_image_of_its_path_or_else_of_its_name(tmp_path: Path) -> None:
    blank = png([[0]])
    labels = open_labels(
        write(tmp_path, dict.fromkeys(("a/1.png", "b/1.png", "2.png", "frame.03.PNG", "x/none.png"), blank))
    )
    assert labels.claim("a/1.jpg") == "a/1.png"
    assert labels.claim("b/1.jpeg") == "b/1.png"
    assert labels.claim("street.tar/deep/2.jpg") == "2.png"
    assert labels.claim("frame.03.jpg") == "frame.03.PNG"
    assert labels.claim("3.jpg") is None
    assert labels.unclaimed() == ["x/none.png"]


def test_a_label_that_could_be_of_several_images_is_refused(tmp_path: Path) -> None:
    blank = png([[0]])
    labels = open_labels(write(tmp_path, dict.fromkeys(("a/1.png", "b/1.png", "2.png"), blank)))
    with pytest.raises(ConfigError, match=r"image 'c/1.jpg' could have any of 2 labels of its name \(a/1.png, b/1.png"):
        labels.claim("c/1.jpg")
    labels.claim("a/2.jpg")
    with pytest.raises(ConfigError, match=r"label '2.png' fits both images 'a/2.jpg' and 'b/2.jpg'"):
        labels.claim("b/2.jpg")


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot list .*nowhere"):
        open_labels(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no PNG below"):
        open_labels(write(tmp_path, {"a.jpg": b"x"}))


def test_names_come_from_a_list_a_file_or_the_coco_table(tmp_path: Path) -> None:
    assert read_names("sky, road,car") == ["sky", "road", "car"]
    write(tmp_path, {"n.yaml": b"[sky, road]", "n.json": json.dumps({"3": "sky", "4": "road"}).encode()})
    assert read_names(str(tmp_path / "n.yaml")) == ["sky", "road"]
    assert read_names(str(tmp_path / "n.json")) == {3: "sky", 4: "road"}
    assert len(read_names(COCO_STUFF_27)) == 182


@pytest.mark.parametrize(
    ("text", "message"), [("{sky: 0}", "not a list of names"), ("[", "not a list of names"), ("3", "must hold a list")]
)
def test_name_files_of_another_form_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, {"n.yaml": text.encode()})
    with pytest.raises(ConfigError, match=rf"n\.yaml.*{message}|{message}"):
        read_names(str(tmp_path / "n.yaml"))
    with pytest.raises(ConfigError, match="cannot read"):
        read_names(str(tmp_path / "missing.yaml"))


def test_names_outside_a_byte_or_all_ignored_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.\.255, got \[300\]"):
        class_table({300: "sky"})
    with pytest.raises(ConfigError, match="leaves no class"):
        class_table(["sky"], ignore=(0,))


def test_coco_stuff_has_27_groups_that_hold_every_value_once() -> None:
    values = sorted(value for group in COCO_STUFF_GROUPS.values() for value in group)
    assert values == list(range(182))
    table = class_table(read_names(COCO_STUFF_27))
    assert len(table.names) == 27
    # label ids 1 person, 3 car, 52 banana, 122 fruit, 131 mat, 169 tree, 182 wood, one more than their values
    groups = [table.names[table.lookup[label - 1]] for label in (1, 3, 52, 122, 131, 169, 182)]
    assert groups == ["person", "vehicle", "food", "food-stuff", "textile", "plant", "solid"]
    assert table.lookup[255] == IGNORED


def test_coco_stuff_groups_are_the_supercategories_of_coco_itself(shared_dir: Path) -> None:
    file = shared_dir / "data" / "coco-panoptic-sample" / "panoptic_coco_categories.json"
    categories = [entry for entry in json.loads(file.read_text()) if entry["id"] <= 182]  # above: merged ones
    group_of = {value: name for name, values in COCO_STUFF_GROUPS.items() for value in values}
    assert len(categories) == 116
    assert {c["name"]: group_of[c["id"] - 1] for c in categories} == {c["name"]: c["supercategory"] for c in categories}
