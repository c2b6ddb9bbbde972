"""Files, folders, globs, tars and Parquet files, on disk and in a bucket -> photos in order, each once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StageFailed
from pipeline.predict.photos import find_photos, read_photo
from pipeline.sources.fetch import Fetcher
from pipeline.store import storage
from tests.pipeline.sources.image_sources import parquet, put, tar
from workers.decode import DecodeLimits
from workers.records import ImageRecord, Status

FILES = {"a/1.jpg": b"a1", "a/sub/3.PNG": b"a3", "b/1.jpg": b"b1", "b/notes.txt": b"-", "b/.2.jpg": b"-", "c.jpg": b"c"}


@pytest.fixture
def photos(source: str) -> str:
    put(source, FILES)
    return source


def found(*inputs: str, output: str = "/elsewhere") -> dict[str, bytes]:
    """image_id -> bytes."""
    records = list(find_photos(inputs, output=output))
    names = [record.image_id for record in records]
    assert len(set(names)) == len(names)
    return {record.image_id: Fetcher().fetch(record) for record in records}


def test_a_folder_in_byte_order(photos: str) -> None:
    assert list(found(photos).items()) == [
        ("a/1.jpg", b"a1"),
        ("a/sub/3.PNG", b"a3"),
        ("b/1.jpg", b"b1"),
        ("c.jpg", b"c"),
    ]
    assert found(photos + "/a/") == {"1.jpg": b"a1", "sub/3.PNG": b"a3"}


def test_globs(photos: str) -> None:
    assert found(f"{photos}/*.jpg") == {"c.jpg": b"c"}
    assert found(f"{photos}/*/1.jpg") == {"a/1.jpg": b"a1", "b/1.jpg": b"b1"}
    assert found(f"{photos}/b/*") == {"1.jpg": b"b1"}, "neither the text nor the hidden file"
    assert found(f"{photos}/a/**") == {"1.jpg": b"a1", "sub/3.PNG": b"a3"}
    assert found(f"{photos}/[ab]/?.jpg").keys() == {"a/1.jpg", "b/1.jpg"}


def test_files_of_one_name_in_different_folders_are_told_apart(photos: str) -> None:
    assert found(f"{photos}/a/1.jpg", f"{photos}/b/1.jpg") == {"a/1.jpg": b"a1", "b/1.jpg": b"b1"}
    assert found(f"{photos}/a", f"{photos}/b").keys() == {"a/1.jpg", "a/sub/3.PNG", "b/1.jpg"}
    assert found(f"{photos}/c.jpg", f"{photos}/b/*.jpg").keys() == {"c.jpg", "b/1.jpg"}


def test_what_a_shell_makes_of_a_glob_is_the_glob(photos: str) -> None:
    put(photos, {"b/2.jpg": b"b2"})
    assert found(f"{photos}/b/1.jpg", f"{photos}/b/2.jpg") == found(f"{photos}/b/*.jpg")


def test_a_photo_that_several_inputs_name_comes_once(photos: str) -> None:
    assert list(found(f"{photos}/b", photos, f"{photos}/b/*.jpg")) == ["b/1.jpg", "a/1.jpg", "a/sub/3.PNG", "c.jpg"]


def test_tars_and_parquet_files(source: str) -> None:
    put(source, {"x/1.tar": tar([("1.jpg", b"one")]), "y/2.tar": tar([("1.jpg", b"two")])})
    put(source, {"rows.parquet": parquet({"image": [b"r0", b"r1"]})})
    assert found(f"{source}/x") == {"1.tar/1.jpg": b"one"}
    assert found(f"{source}/*/*.tar") == {"x/1.tar/1.jpg": b"one", "y/2.tar/1.jpg": b"two"}
    assert found(f"{source}/rows.parquet") == {"rows.parquet#0": b"r0", "rows.parquet#1": b"r1"}


def test_a_file_that_is_named_is_a_photo_whatever_its_ending(source: str) -> None:
    put(source, {"IMG_1": b"photo", "odd[1].jpg": b"brackets"})
    assert found(f"{source}/IMG_1") == {"IMG_1": b"photo"}
    assert found(f"{source}/odd[1].jpg") == {"odd[1].jpg": b"brackets"}


def test_overlays_of_an_earlier_prediction_are_no_photos(photos: str) -> None:
    put(photos, {"out/overlays/c.jpg": b"drawn", "output.jpg": b"photo"})
    assert found(photos, output=f"{photos}/out").keys() == {"a/1.jpg", "a/sub/3.PNG", "b/1.jpg", "c.jpg", "output.jpg"}


def test_relative_paths_and_names_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    Path(os.fsdecode(b"p/\xff.jpg")).write_bytes(b"latin")
    Path("p/ü.jpg").write_bytes(b"utf8")
    assert found("p") == found("p/*.jpg") == found("p/../p") == {"%FF.jpg": b"latin", "ü.jpg": b"utf8"}


def refused(*inputs: str) -> str:
    with pytest.raises(ConfigError) as error:
        list(find_photos(inputs, output="/elsewhere"))
    return str(error.value)


def test_inputs_without_photos_are_refused_with_a_remedy(photos: str) -> None:
    assert refused().startswith("--input: none was given; give photos, folders, globs")
    assert f"--input: there is no '{photos}/nowhere'; give" in refused(f"{photos}/nowhere")
    assert f"--input: no photo matches '{photos}/*.gif'" in refused(f"{photos}/*.gif")
    put(photos, {"empty/notes.txt": b"-"})
    assert "--input: no image in" in refused(f"{photos}/empty")
    assert "found 1 .txt" in refused(f"{photos}/empty")


def test_all_inputs_are_looked_at_before_the_first_photo(photos: str) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        find_photos([photos, f"{photos}/nowhere"], output="/elsewhere")


def test_a_broken_tar_and_a_folder_of_both_kinds_are_refused(source: str) -> None:
    put(source, {"t/1.tar": tar([("1.jpg", b"x" * 3000)])[:1024], "mixed/1.jpg": b"1", "mixed/1.tar": tar([])})
    assert "1.tar is truncated or corrupt" in refused(f"{source}/t")
    assert "of such a folder give globs" in refused(f"{source}/mixed")


def test_inputs_on_different_stores_are_refused(tmp_path: Path, s3_bucket: str) -> None:
    put(str(tmp_path), {"1.jpg": b"1"})
    put(s3_bucket, {"1.jpg": b"1"})
    assert "different stores" in refused(str(tmp_path), s3_bucket)


# Loading

LIMITS = DecodeLimits(min_side=1)


def test_a_bad_photo_says_why(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(b"text")
    broken = read_photo(Fetcher(), ImageRecord("text.jpg", str(tmp_path / "text.jpg"), 0, 4), LIMITS)
    assert (broken.pixels, broken.status) == (None, Status.UNDECODABLE)
    gone = read_photo(Fetcher(), ImageRecord("gone.jpg", str(tmp_path / "gone.jpg"), 0, 4), LIMITS)
    assert gone.status == Status.MISSING and gone.error and "gone.jpg" in gone.error


def test_a_store_that_fails_is_not_the_photos_fault(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str, *_: object, **__: object) -> bytes:
        raise ConnectionResetError("the line is cut")

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(StageFailed, match="the line is cut; run the same again when the store answers"):
        read_photo(Fetcher(), ImageRecord("1.jpg", f"{s3_bucket}/1.jpg", 0, 4), LIMITS)
