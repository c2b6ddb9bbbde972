"""The folder of an export: its own, and whole or not there, on disk and in a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.export.folder import Folder
from pipeline.store import storage


def write(output: str, name: str, *files: str, format: str = "coco") -> None:
    folder = Folder(output, format, name, [f"maps_{name}", f"{name}.json"], {"shared.py": b"shared"})
    with folder.writing():
        for file in files:
            storage.write_bytes(folder.uri(f"maps_{name}", file), file.encode())
        storage.write_bytes(folder.uri(f"{name}.json"), b"index")
        folder.finish({"images": len(files)})


def listed(output: str) -> list[str]:
    return [file.path for file in storage.walk(output)]


def test_a_smaller_export_leaves_nothing_of_the_larger_one(source: str) -> None:
    write(source, "train", "a.png", "b/c.png")
    write(source, "val", "d.png")
    write(source, "train", "e.png")
    assert listed(source) == [
        "maps_train/e.png",
        "maps_val/d.png",
        "shared.py",
        "train.json",
        "u2label_train.json",
        "u2label_val.json",
        "val.json",
    ]
    record = json.loads(storage.read_bytes(f"{source}/u2label_train.json"))
    assert (record["complete"], record["images"], record["format"]) == (True, 1, "coco")


def test_a_folder_with_other_files_is_refused_and_stays(source: str) -> None:
    storage.write_bytes(f"{source}/mine.txt", b"mine")
    with pytest.raises(ConfigError, match=r"holds other files \(mine.txt\); give a new or an empty folder"):
        write(source, "train", "a.png")
    assert listed(source) == ["mine.txt"]


def test_an_export_in_another_format_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path), "train", "a.png")
    with pytest.raises(ConfigError, match="holds an export as coco; give another folder"):
        write(str(tmp_path), "val", "a.png", format="yolo")


def test_one_that_fails_leaves_the_earlier_one(source: str) -> None:
    write(source, "train", "a.png")
    before = {file: storage.read_bytes(f"{source}/{file}") for file in listed(source)}
    folder = Folder(source, "coco", "train", ["maps_train", "train.json"])
    with pytest.raises(KeyboardInterrupt), folder.writing():
        storage.write_bytes(folder.uri("maps_train", "b.png"), b"half")
        raise KeyboardInterrupt
    assert {file: storage.read_bytes(f"{source}/{file}") for file in listed(source)} == before


def test_what_a_killed_one_leaves_is_hidden_and_cleared_up(source: str) -> None:
    storage.write_bytes(f"{source}/.u2label_train/maps_train/half.png", b"half")
    write(source, "train", "a.png")
    assert listed(source) == ["maps_train/a.png", "shared.py", "train.json", "u2label_train.json"]


def test_one_that_was_killed_while_files_took_their_places_has_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: str, target: str) -> None:
        if source.endswith(".json"):
            raise KeyboardInterrupt
        move(source, target)

    from pipeline.export import folder as module

    move = module._move
    write(str(tmp_path), "train", "old.png")
    monkeypatch.setattr(module, "_move", killed)
    with pytest.raises(KeyboardInterrupt):
        write(str(tmp_path), "train", "a.png")
    assert listed(str(tmp_path)) == ["maps_train/a.png", "shared.py", "u2label_train.json"]
    assert json.loads((tmp_path / "u2label_train.json").read_text())["complete"] is False
    monkeypatch.undo()
    write(str(tmp_path), "train", "b.png")
    assert "train.json" in listed(str(tmp_path)) and "maps_train/a.png" not in listed(str(tmp_path))


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x", "a/b"])
def test_a_name_that_is_no_word_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        write(str(tmp_path), name)


@pytest.mark.parametrize("entry", ["../photos", "/etc", "a//b", "."])
def test_a_record_that_leads_out_of_the_folder_deletes_nothing(tmp_path: Path, entry: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "out").mkdir()
    record = {"format": "coco", "entries": [entry], "shared": []}
    (tmp_path / "out" / "u2label_train.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="is not the record of an export"):
        write(str(tmp_path / "out"), "train", "a.png")
    assert (tmp_path / "photos").is_dir()


def test_a_set_whose_export_was_killed_is_none_of_the_folder(tmp_path: Path) -> None:
    for name, complete in (("killed", False), ("other", True)):
        record = {"format": "hf", "complete": complete, "entries": [name], "shared": []}
        (tmp_path / f"u2label_{name}.json").write_text(json.dumps(record))
    assert Folder(str(tmp_path), "hf", "train", ["train"]).sets == ["other", "train"]
