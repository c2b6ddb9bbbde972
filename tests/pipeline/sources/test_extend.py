"""A listing against its index, and the index with the difference taken in."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.sources.choice import Choice
from pipeline.sources.extend import Difference, difference, extend_index
from pipeline.sources.index import Index, build_index, open_index
from pipeline.sources.index_files import batches, write_manifest, write_shards
from pipeline.store import storage
from tests.pipeline.sources.image_sources import parquet, put, tar
from workers.records import GONE, ImageRecord

ALL = Choice()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "index")


def names(index: Index) -> list[list[str]]:
    return [[record.image_id for record in index.records(shard)] for shard in range(index.shards)]


def all_records(index: Index) -> list[ImageRecord]:
    return [record for shard in range(index.shards) for record in index.records(shard)]


def changed_shards(before: Index, after: Index) -> list[int]:
    return [shard for shard in range(before.shards) if before.version(shard) != after.version(shard)]


def later(path: str) -> None:
    """As if the file had been written a second later: nothing of it but its time tells that its bytes are others."""
    if not storage.is_remote(path):
        found = Path(path).stat()
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))


def test_new_photos_come_in_shards_of_their_own(source: str, folder: str) -> None:
    put(source, {f"{number}.jpg": b"x" for number in range(5)})
    index = build_index(folder, source, shard_size=2)
    assert not difference(index, source, ALL).any
    put(source, {"a.jpg": b"y", "0a.jpg": b"y", "note.txt": b"y"})
    assert difference(index, source, ALL) == Difference(new=2)
    extended = extend_index(index, source, ALL)
    assert names(extended) == [["0.jpg", "1.jpg"], ["2.jpg", "3.jpg"], ["4.jpg"], ["0a.jpg", "a.jpg"]]
    assert [extended.size(shard) for shard in range(4)] == [2, 2, 1, 2]
    assert (extended.digest, extended.first_images, extended.images) == (index.digest, 5, 7)
    assert changed_shards(index, extended) == []
    assert extended == open_index(folder)
    assert not difference(extended, source, ALL).any
    assert list(storage.list_folder(folder)) == ["index-00000-1.parquet", "manifest.json"]


def test_what_is_left_out_is_still_said_after_an_extension(source: str, folder: str) -> None:
    put(source, {"a.jpg": b"x", "b.txt": b"", ".c": b""})
    index = build_index(folder, source)
    put(source, {"d.jpg": b"x", "e.md": b""})
    extended = extend_index(index, source, ALL)
    assert extended.ignored.reasons() == {".md": 1, ".txt": 1, "hidden": 1}
    tars = storage.join(source, "tars")
    put(tars, {"a.tar": tar([("0.jpg", b"x"), ("0.cls", b"1")]), "note.txt": b""})
    index = build_index(f"{folder}-tars", tars)
    put(tars, {"b.tar": tar([("0.jpg", b"x"), ("0.cls", b"1"), (".h", b"")])})
    assert extend_index(index, tars, ALL).ignored.reasons() == {".cls": 2, ".txt": 1, "hidden": 1}


def test_a_photo_of_the_same_size_under_the_same_name_is_seen(source: str, folder: str) -> None:
    put(source, {f"{number}.jpg": b"x" for number in range(6)})
    index = build_index(folder, source, shard_size=2)
    put(source, {"3.jpg": b"y"})
    later(f"{source}/3.jpg")
    assert difference(index, source, ALL) == Difference(changed=1)
    again = build_index(folder, source, shard_size=2)
    assert again.digest == index.digest and changed_shards(index, again) == [1]
    assert [again.changed_at(shard) > index.made for shard in range(3)] == [False, True, False]
    put(source, {"5.jpg": b"z"})
    later(f"{source}/5.jpg")
    assert changed_shards(again, extend_index(again, source, ALL)) == [2]


def test_photos_that_are_gone_stay_as_rows_or_are_dropped_and_may_come_back(tmp_path: Path, folder: str) -> None:
    source = tmp_path / "source"
    put(str(source), {f"{number}.jpg": b"x" for number in range(4)})
    index = build_index(folder, str(source), shard_size=2)
    (source / "2.jpg").unlink()
    assert difference(index, str(source), ALL) == Difference(gone=1)
    marked = extend_index(index, str(source), ALL)
    assert [record.version == GONE for record in marked.records(1)] == [True, False]
    with pytest.raises(FileNotFoundError, match="does not have it any more"):
        marked.fetcher().fetch(marked.records(1)[0])
    assert not difference(marked, str(source), ALL).any
    put(str(source), {"2.jpg": b"back"})
    assert difference(marked, str(source), ALL) == Difference(changed=1)
    back = extend_index(marked, str(source), ALL)
    assert back.fetcher().fetch(back.records(1)[0]) == b"back"
    (source / "2.jpg").unlink()
    (source / "3.jpg").unlink()
    pruned = extend_index(back, str(source), ALL, prune=True)
    assert names(pruned) == [["0.jpg", "1.jpg"], []] and pruned.images == 2
    assert changed_shards(back, pruned) == [1]


def test_tars_and_parquet_files_are_compared_as_files(source: str, folder: str) -> None:
    put(source, {f"{name}.tar": tar([(f"{number}.jpg", b"x") for number in range(3)]) for name in "ab"})
    index = build_index(folder, source, shard_size=2)
    put(source, {"b.tar": tar([("0.jpg", b"x"), ("2.jpg", b"z"), ("3.jpg", b"y")]), "c.tar": tar([("0.jpg", b"x")])})
    later(f"{source}/b.tar")
    assert str(difference(index, source, ALL)) == "1 new, 1 changed tars"
    extended = extend_index(index, source, ALL)
    assert names(extended)[3:] == [["b.tar/3.jpg", "c.tar/0.jpg"]]
    records = {record.image_id: record for record in all_records(extended)}
    assert {name for name, record in records.items() if record.version == GONE} == {"b.tar/1.jpg"}
    assert extended.fetcher().fetch(records["b.tar/2.jpg"]) == b"z"
    assert changed_shards(index, extended) == [1, 2]


def test_another_parquet_file_with_as_many_rows_changes_its_shards(source: str, folder: str) -> None:
    put(source, {"a.parquet": parquet({"image": [b"1", b"2"]}), "b.parquet": parquet({"image": [b"3", b"4"]})})
    index = build_index(folder, source, shard_size=2)
    put(source, {"b.parquet": parquet({"image": [b"5", b"6"]})})
    later(f"{source}/b.parquet")
    assert changed_shards(index, build_index(folder, source, shard_size=2)) == [1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"uri,image_id\nh/a.jpg?signed=1,a\n", b"uri,image_id\nh/a.jpg?signed=2,a\n"),  # the same photo
        (
            b"uri\nhttps://h/img?id=1\nhttps://h/img?id=2\n",
            b"uri\nhttps://h/img?id=2\nhttps://h/img?id=3\n",
        ),  # numbered anew
    ],
)
def test_a_name_of_the_index_at_another_place_of_a_manifest_is_refused(
    tmp_path: Path, folder: str, before: bytes, after: bytes
) -> None:
    manifest = str(tmp_path / "photos.csv")
    put(str(tmp_path), {"photos.csv": before})
    index = build_index(folder, manifest, shard_size=2, choice=Choice())
    put(str(tmp_path), {"photos.csv": after})
    with pytest.raises(ValueError, match=r"has a photo '(a|h/img~2)' at another place .* run with --prune, else give"):
        extend_index(index, manifest, Choice())
    assert open_index(folder) == index


def test_a_photo_that_moved_keeps_its_name_when_what_is_gone_is_dropped(tmp_path: Path, folder: str) -> None:
    manifest = str(tmp_path / "photos.csv")
    put(str(tmp_path), {"photos.csv": b"uri,image_id\nh/a.jpg?signed=1,a\nh/b.jpg,b\n"})
    index = build_index(folder, manifest, shard_size=2, choice=Choice())
    put(str(tmp_path), {"photos.csv": b"uri,image_id\nh/a.jpg?signed=2,a\nh/b.jpg,b\n"})
    extended = extend_index(index, manifest, Choice(), prune=True)
    found = {record.image_id: record.uri for shard in range(extended.shards) for record in extended.records(shard)}
    assert extended.images == 2 and found["a"].endswith("signed=2") and found["b"].endswith("h/b.jpg")


def test_keys_of_a_manifest_go_on(tmp_path: Path, folder: str) -> None:
    put(str(tmp_path), {f"{name}.jpg": b"x" for name in "abc"})
    listing = tmp_path / "list.csv"
    listing.write_text(f"uri,site\n{tmp_path}/a.jpg,north\n{tmp_path}/b.jpg,south\n")
    index = build_index(folder, str(listing), shard_size=2)
    listing.write_text(f"uri,site\n{tmp_path}/a.jpg,north\n{tmp_path}/c.jpg,east\n")
    assert difference(index, str(listing), ALL) == Difference(new=1, gone=1)
    extended = extend_index(index, str(listing), ALL)
    assert [extended.key_table(shard)["site"].to_pylist() for shard in range(2)] == [["north", "south"], ["east"]]
    listing.write_text(f"uri,place\n{tmp_path}/a.jpg,north\n")
    with pytest.raises(ValueError, match="key columns place now, and had site; run with --reindex"):
        extend_index(extended, str(listing), ALL)


def test_a_sample_has_no_new_photos_and_is_not_extended(source: str, folder: str) -> None:
    put(source, {f"{number}.jpg": b"x" for number in range(5)})
    some = replace(ALL, limit=3)
    index = build_index(folder, source, choice=some)
    assert not difference(index, source, some).any
    with pytest.raises(ValueError, match=r"source\.limit: a sample is not extended"):
        extend_index(index, source, some)


def test_an_index_of_before_knows_sizes_alone(tmp_path: Path, folder: str) -> None:
    source = str(tmp_path / "source")
    put(source, {f"{number}.jpg": b"x" for number in range(4)})
    index = build_index(folder, source, shard_size=2)
    write_shards(batches([replace(record, version="") for record in all_records(index)], 2), folder)
    write_manifest(replace(index, versions="", made=0.0))
    before = open_index(folder)
    later(f"{source}/1.jpg")
    assert not difference(before, source, ALL).any
    put(source, {"1.jpg": b"longer", "4.jpg": b"new"})
    assert difference(before, source, ALL) == Difference(new=1, changed=1)
    extended = extend_index(before, source, ALL)
    assert not difference(extended, source, ALL).any
    assert list(extended.changed) == ["0"]
    later(f"{source}/2.jpg")
    assert difference(extended, source, ALL) == Difference(changed=1)  # it knows more than sizes now


def test_the_old_index_stands_until_the_new_one_is_whole(tmp_path: Path, folder: str) -> None:
    source = str(tmp_path / "source")
    put(source, {"a.tar": tar([("0.jpg", b"x")])})
    index = build_index(folder, source)
    put(source, {"b.tar": tar([("0.jpg", b"x")])[:700]})
    with pytest.raises(ValueError, match=r"b\.tar is truncated"):
        extend_index(index, source, ALL)
    assert open_index(folder) == index
    assert names(open_index(folder)) == [["a.tar/0.jpg"]]
    storage.write_bytes(storage.join(folder, "index-00007-3.parquet"), b"of one that was killed")
    put(source, {"b.tar": tar([("0.jpg", b"x")])})
    extend_index(index, source, ALL)
    assert list(storage.list_folder(folder)) == ["index-00000-1.parquet", "manifest.json"]
