"""Files and objects: whole or not there, listed in byte order, read by range; the same on disk and on S3."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.store import places, storage


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder to write to, on disk or in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "run")
    return storage.join(request.getfixturevalue("s3_bucket"), "run")


def test_what_is_written_is_read_back_whole_and_by_range(folder: str) -> None:
    uri = storage.join(folder, "parts", "ü 例.bin")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, 3, 4) == b"3456"
    assert storage.read_bytes(uri, 0, 2) == b"01"
    assert storage.read_bytes(uri, 5, 0) == b""
    assert storage.file_size(uri) == 10
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"


def test_a_range_behind_the_end_is_an_error_and_not_a_shorter_answer(folder: str) -> None:
    uri = storage.join(folder, "short")
    storage.write_bytes(uri, b"0123456789")
    with pytest.raises(OSError, match="asked for 4 bytes at 8, got 2"):
        storage.read_bytes(uri, 8, 4)


def test_a_missing_file_is_filenotfound(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "nothing"))
    assert storage.file_size(storage.join(folder, "nothing")) is None
    assert not storage.exists(storage.join(folder, "nothing"))
    storage.remove(storage.join(folder, "nothing"))
    assert storage.list_folder(folder) == {}


def test_a_streamed_file_appears_whole_or_not_at_all(folder: str) -> None:
    uri = storage.join(folder, "index.parquet")
    with storage.open_output(uri) as stream:
        stream.write(b"one")
        assert not storage.exists(uri)
        stream.write(b"two")
    assert storage.read_bytes(uri) == b"onetwo"

    with pytest.raises(RuntimeError), storage.open_output(uri) as stream:
        stream.write(b"half")
        raise RuntimeError("killed")
    assert storage.list_folder(folder) == {"index.parquet": 6}
    assert storage.read_bytes(uri) == b"onetwo"


def test_a_read_file_can_be_sought_in(folder: str) -> None:
    uri = storage.join(folder, "data")
    storage.write_bytes(uri, bytes(range(256)) * 4)
    with storage.open_input(uri, block_size=0) as stream:
        stream.seek(300)
        assert stream.read(3) == bytes([44, 45, 46])
        stream.seek(0)
        assert stream.read(1) == b"\0"


def test_exclusive_create(folder: str) -> None:
    uri = storage.join(folder, "lease")
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_walk_is_in_the_byte_order_of_whole_paths(folder: str) -> None:
    names = ["b.jpg", "a/z.jpg", "a.jpg", "a-b.jpg", "a/b/c.jpg", "ü/x.jpg", "Z.jpg", "a0.jpg"]
    for name in names:
        storage.write_bytes(storage.join(folder, name), name.encode())
    found = list(storage.walk(folder))
    assert [file.path for file in found] == sorted(names, key=str.encode)
    assert [file.size for file in found] == [len(file.path.encode()) for file in found]


def test_walking_nothing_is_filenotfound(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        list(storage.walk(folder))


def test_folders_and_files_are_listed_apart(folder: str) -> None:
    for name in ("b/part-1", "b/part-0", "a/part-0", "file"):
        storage.write_bytes(storage.join(folder, name), b"12")
    assert list(storage.list_folder(folder)) == ["file"]
    assert list(storage.list_folder(storage.join(folder, "b"))) == ["part-0", "part-1"]
    assert storage.list_subfolders(folder) == ["a", "b"]
    assert storage.list_subfolders(storage.join(folder, "nothing")) == []


def test_a_folder_is_removed_with_all_it_holds(folder: str) -> None:
    for name in ("a/part-0", "a/deep/part-0", "ab"):
        storage.write_bytes(storage.join(folder, name), b"12")
    storage.remove_folder(storage.join(folder, "a"))
    storage.remove_folder(storage.join(folder, "nothing"))
    assert [info.path for info in storage.walk(folder)] == ["ab"]


def test_a_bucket_is_walked_page_by_page(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        storage.write_bytes(storage.join(s3_bucket, "data", f"{number}.jpg"), b"x")
    storage.write_bytes(storage.join(s3_bucket, "data/"), b"")  # the marker of an empty folder
    fs, _ = storage.filesystem(s3_bucket)
    pages = []

    def two_a_page(method: str, **request: object) -> dict[str, object]:
        pages.append(method)
        return type(fs).call_s3(fs, method, MaxKeys=2, **request)

    monkeypatch.setattr(fs, "call_s3", two_a_page)
    walk = storage.walk(storage.join(s3_bucket, "data"))
    assert next(walk).path == "0.jpg"
    assert len(pages) == 1
    assert [file.path for file in walk] == [f"{number}.jpg" for number in range(1, 7)]
    assert len(pages) == 4


def test_reading_an_object_is_one_request(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(s3_bucket, "photo.jpg")
    storage.write_bytes(uri, b"photo")
    fs, _ = storage.filesystem(uri)
    requests = []

    async def counted(method: str, *args: object, **kwargs: object) -> object:
        requests.append(method)
        return await type(fs)._call_s3(fs, method, *args, **kwargs)

    monkeypatch.setattr(fs, "_call_s3", counted)
    assert storage.read_bytes(uri) == b"photo"
    assert requests == ["get_object"]


def test_links_that_circle_or_lead_nowhere_do_not_stop_a_walk(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").write_bytes(b"abc")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "link.jpg").symlink_to("sub/a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    found = {file.path: file.size for file in storage.walk(str(tmp_path))}
    assert found == {"gone.jpg": 0, "link.jpg": 3, "self": 0, "sub/a.jpg": 3}


def test_names_may_be_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    place = str(tmp_path / ("é" * 125 + "x.jpg"))  # 255 bytes
    storage.write_bytes(place, b"one")
    assert storage.read_bytes(place) == b"one"
    assert storage.take_away(place) == b"one"


def test_a_name_that_is_not_utf8_has_a_uri_that_is(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 50%.jpg")
    Path(path).write_bytes(b"photo")
    uri = storage.local_uri(path)
    assert uri == f"file://{tmp_path}/caf%E9%2050%25.jpg"
    assert storage.read_bytes(uri) == b"photo"
    assert storage.file_size(uri) == 5
    assert not storage.is_remote(uri)


def test_other_local_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "50%25 ü.jpg"
    path.write_bytes(b"photo")
    assert storage.local_uri(str(path)) == str(path)
    assert storage.read_bytes(str(path)) == b"photo"
    assert not storage.is_remote(f"{tmp_path}/x://y")


def test_credentials_do_not_appear_in_messages() -> None:
    assert storage.redact("cannot read s3://key:secret@bucket/a.jpg") == "cannot read s3://***@bucket/a.jpg"
    assert storage.redact("s3://key:sec/ret@bucket/a.jpg") == "s3://***@bucket/a.jpg"
    assert storage.redact("s3://bucket/a@b.jpg") == "s3://bucket/a@b.jpg"
    signed = "https://host/a.jpg?X-Amz-Signature=abc123&part=1"
    assert storage.redact(signed) == "https://host/a.jpg?X-Amz-Signature=***&part=1"


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ValueError, match="nosuch://"):
        storage.read_bytes("nosuch://bucket/a.jpg")


@pytest.mark.parametrize("protocol", ["gs", "abfss"])
def test_listings_of_other_clouds_are_not_kept(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes wrote would not be seen."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(places.fsspec, "filesystem", lambda protocol, **options: asked.update(options))
    places._filesystem.__wrapped__(protocol, False, 0)
    assert asked == {"use_listings_cache": False, "skip_instance_cache": True}
