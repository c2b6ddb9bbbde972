"""Which photos are taken: by patterns, as a sample, and none of what a run or an export has made."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from pipeline.config import load_config, parse_config
from pipeline.engine.stage import index_folder
from pipeline.errors import ConfigError
from pipeline.sources.choice import Choice, choice_of, folder_inside
from pipeline.sources.index import Index, build_index
from pipeline.sources.left_out import Ignored
from pipeline.sources.scan import detect_format
from pipeline.store import storage
from tests.pipeline.sources.image_sources import parquet, put, tar

FILES = ("a.jpg", "train/b.jpg", "train/x/c.png", "val/d.jpg", "val/d_mask.png", "drafts/train/e.jpg")


def indexed(tmp_path: Path, uri: str, choice: Choice, format: str = "auto") -> tuple[list[str], Ignored]:
    index = build_index(str(tmp_path / "index"), uri, format, shard_size=100, choice=choice)
    return names(index), index.ignored


def names(index: Index) -> list[str]:
    return [record.image_id for shard in range(index.shards) for record in index.records(shard)]


@pytest.mark.parametrize(
    ("include", "exclude", "taken"),
    [
        ((), (), "a.jpg drafts/train/e.jpg train/b.jpg train/x/c.png val/d.jpg val/d_mask.png"),
        (("*.jpg",), (), "a.jpg drafts/train/e.jpg train/b.jpg val/d.jpg"),
        (("/*.jpg",), (), "a.jpg"),
        (("train/",), (), "drafts/train/e.jpg train/b.jpg train/x/c.png"),
        (("/train/",), (), "train/b.jpg train/x/c.png"),
        (("train/*.jpg", "val/**"), (), "train/b.jpg val/d.jpg val/d_mask.png"),
        ((), ("*_mask.png", "drafts/"), "a.jpg train/b.jpg train/x/c.png val/d.jpg"),
        (("**/train/**",), ("x/",), "drafts/train/e.jpg train/b.jpg"),
    ],
)
def test_patterns_of_a_folder(tmp_path: Path, include: tuple[str, ...], exclude: tuple[str, ...], taken: str) -> None:
    photos = str(tmp_path / "photos")
    put(photos, dict.fromkeys(FILES, b"x"))
    found, ignored = indexed(tmp_path, photos, Choice(include, exclude))
    assert found == taken.split()
    assert ignored == Ignored(not_chosen=len(FILES) - len(found))


def test_patterns_reach_into_tars_and_name_parquet_files(tmp_path: Path) -> None:
    tars, tables = str(tmp_path / "tars"), str(tmp_path / "tables")
    put(tars, {"0.tar": tar([("a.jpg", b"x"), ("b.png", b"x")]), "1.tar": b"not whole"})
    assert indexed(tmp_path, tars, Choice(("*.jpg",), ("1.tar",))) == (["0.tar/a.jpg"], Ignored(not_chosen=2))
    put(tables, {"train-0.parquet": parquet({"image": [b"x", b"y"]}), "val-0.parquet": b"not whole"})
    found = indexed(tmp_path, tables, Choice(("train-*.parquet",)))
    assert found == (["train-0.parquet#0", "train-0.parquet#1"], Ignored(not_chosen=1))


def test_patterns_and_names_compare_in_nfc_and_names_keep_their_bytes(tmp_path: Path) -> None:
    name = unicodedata.normalize("NFD", "é.jpg")
    put(str(tmp_path / "photos"), {f"{name}": b"x", "e.jpg": b"x"})
    for form in ("NFC", "NFD"):
        found, _ = indexed(tmp_path, str(tmp_path / "photos"), Choice((unicodedata.normalize(form, "é.*"),)))
        assert found == [name]


def test_nothing_chosen_is_an_error_that_names_the_keys(tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), {"a.jpg": b"x"})
    with pytest.raises(ValueError, match=r"no image in .*1 not chosen by source\.include.*check .*source\.include"):
        indexed(tmp_path, str(tmp_path / "photos"), Choice(("*.png",)))


def test_a_sample_is_the_same_each_time_and_part_of_a_larger_one(tmp_path: Path) -> None:
    photos = str(tmp_path / "photos")
    put(photos, {f"{number:03d}.jpg": b"x" for number in range(200)})
    ten, ignored = indexed(tmp_path, photos, Choice(limit=10))
    assert ignored == Ignored(not_sampled=190)
    assert len(ten) == 10 and ten == sorted(ten)
    assert indexed(tmp_path, photos, Choice(limit=10))[0] == ten
    assert set(ten) < set(indexed(tmp_path, photos, Choice(limit=50))[0])
    assert indexed(tmp_path, photos, Choice(limit=10, seed=1))[0] != ten
    put(photos, {"999.jpg": b"x"})
    assert len(set(indexed(tmp_path, photos, Choice(limit=10))[0]) & set(ten)) >= 9
    assert len(indexed(tmp_path, photos, Choice(limit=1000))[0]) == 201


# The configuration


def config_of(*overrides: str, tmp_path: Path) -> Choice:
    file = tmp_path / "config.yaml"
    file.write_text("source: {uri: /photos}\nrun: {uri: /runs}\n")
    return choice_of(load_config(str(file), overrides))


def test_patterns_are_given_as_one_or_as_a_list(tmp_path: Path) -> None:
    one = config_of("source.include=*.jpg", "source.exclude=[a/, '*.png']", "source.limit=5", tmp_path=tmp_path)
    assert (one.include, one.exclude, one.limit) == (("*.jpg",), ("a/", "*.png"), 5)


@pytest.mark.parametrize("pattern", ["''", "'!a.jpg'", "'#a'", "[a, '']"])
def test_what_is_no_pattern_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"source\.include.*: is no pattern of a path, such as"):
        config_of(f"source.include={pattern}", tmp_path=tmp_path)


def test_the_index_of_a_config_without_new_keys_lies_where_it_lay() -> None:
    def folder(**keys: object) -> str:
        config = parse_config({"source": {"uri": "/photos", **keys}, "run": {"uri": "/runs"}}, origin="test")
        return index_folder(config).rpartition("/")[2]

    assert folder() == folder(include=[], limit=None) == "3590c07bac39"
    assert folder(anonymous=True) == "fc23eff0becc"
    said = [{"include": "a/"}, {"exclude": "a/"}, {"limit": 3}, {"limit": 3, "seed": 1}, {"label_maps": True}]
    assert len({folder(), *(folder(**keys) for keys in said)}) == 6


# What a run or an export has made


def test_a_run_and_an_export_inside_the_source_are_left_out(source: str, tmp_path: Path) -> None:
    run = {"index/0123456789ab/manifest.json": b"{}", "instances/0123456789ab/part-00000.parquet": b"x", "p.png": b"x"}
    put(source, {"a.jpg": b"x", "b/c.jpg": b"x", **{f"runs/one/{name}": data for name, data in run.items()}})
    put(source, {"coco/panoptic_train.json": b"{}", "coco/panoptic_train/a.png": b"x", "coco/photo.jpg": b"x"})
    put(source, {"coco/panoptic_stuff_train/a.png": b"x", "coco/instances_train.json": b"{}"})
    put(source, {"out/predict.json": b"{}", "out/panoptic.json": b"{}", "out/panoptic/a.png": b"x"})
    put(source, {"out/overlays/a.jpg": b"x", "yolo/u2label_train.json": b"{}", "yolo/images/a.jpg": b"x"})
    assert detect_format(source) == "folder"
    found, ignored = indexed(tmp_path, source, Choice())
    assert found == ["a.jpg", "b/c.jpg", "coco/photo.jpg"]
    own = {"coco/panoptic_train/": 1, "coco/panoptic_stuff_train/": 1, "out/panoptic/": 1, "out/overlays/": 1}
    assert ignored.own == {**own, "runs/one/": 2, "yolo/": 1}
    assert "2 in runs/one/ (of a run, an export or a COCO panoptic JSON)" in str(ignored)


def test_the_folder_of_this_run_is_left_out_before_it_holds_an_index(tmp_path: Path) -> None:
    put(str(tmp_path), {"a.jpg": b"x", "run/report.png": b"x", "runs/b.jpg": b"x"})
    own = folder_inside(str(tmp_path), str(tmp_path / "run"))
    assert own == ("run/",)
    index = build_index(str(tmp_path / "run" / "index"), str(tmp_path), choice=Choice(own=own))
    assert names(index) == ["a.jpg", "runs/b.jpg"]
    assert folder_inside(str(tmp_path / "run"), str(tmp_path)) == ()
    assert folder_inside("s3://b/photos", "s3://b/photos/") == ("",)


def test_a_run_folder_that_is_the_source_itself(tmp_path: Path) -> None:
    photos = str(tmp_path / "photos")
    put(photos, {"a.jpg": b"x", "train/b.jpg": b"x", "train/0123456789ab/losses.png": b"x", "index/c.jpg": b"x"})
    put(photos, {"instances/0123456789ab/part-00000.parquet": b"x"})
    index = build_index(storage.join(photos, "index", "0123456789ab"), photos, choice=Choice(own=("",)))
    assert names(index) == ["a.jpg", "index/c.jpg", "train/b.jpg"]
    assert index.ignored.own == {"instances/0123456789ab/": 1, "train/0123456789ab/": 1}
