"""The index of a source in shards, and the look at the source before any work."""

from __future__ import annotations

import hashlib
import json
import pickle
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.index import Ignored, Index, build_index, check_source, open_index, scan, write_index
from pipeline.sources.index_files import _line
from pipeline.store import storage
from tests.fault_proxy import FaultProxy
from tests.pipeline.sources.image_sources import SHARD, put, tar
from workers.records import ImageRecord


def test_an_index_gives_back_what_was_scanned(source: str, tmp_path: Path) -> None:
    put(source, {f"{number:02d}.tar": tar([(f"{k}.jpg", b"x" * k) for k in range(5)]) for number in range(5)})
    index = build_index(str(tmp_path / "index"), source, shard_size=10)
    assert (index.shards, index.images, index.shard_size, index.format) == (3, 25, 10, "tar")
    assert [len(index.records(shard)) for shard in range(3)] == [10, 10, 5]
    assert [record for shard in range(3) for record in index.records(shard)] == list(scan(source))
    assert check_source(source) == index.records(0)[0]


def test_an_index_lives_in_a_bucket(s3_bucket: str) -> None:
    put(storage.join(s3_bucket, "photos"), {f"{number}.jpg": b"x" for number in range(5)})
    folder = storage.join(s3_bucket, "run", "index")
    assert build_index(folder, storage.join(s3_bucket, "photos"), shard_size=2) == open_index(folder)
    assert list(storage.list_folder(folder)) == ["index-00000.parquet", "manifest.json"]
    assert [record.image_id for record in open_index(folder).records(1)] == ["2.jpg", "3.jpg"]


def numbered(count: int) -> Iterable[ImageRecord]:
    return (ImageRecord(f"{number}.jpg", f"/data/{number}.jpg", 0, number) for number in range(count))


def test_an_index_of_more_than_a_thousand_shards_has_more_files(tmp_path: Path) -> None:
    shards, images, digest, *_ = write_index(numbered(5003), str(tmp_path), 2)
    assert (shards, images) == (2502, 5003)
    assert list(storage.list_folder(str(tmp_path))) == [f"index-{file:05d}.parquet" for file in range(3)]
    index = Index(str(tmp_path), shards, images, 2, "folder", "image", digest, "/data", Ignored())
    names = [[record.image_id for record in index.records(shard)] for shard in (0, 999, 1000, 2501, 1)]
    assert names == [
        ["0.jpg", "1.jpg"],
        ["1998.jpg", "1999.jpg"],
        ["2000.jpg", "2001.jpg"],
        ["5002.jpg"],
        ["2.jpg", "3.jpg"],
    ]
    assert pq.read_table(tmp_path / "index-00001.parquet")["shard"].to_pylist()[:3] == [1000, 1000, 1001]
    with pytest.raises(IndexError, match="shard 2502 of an index of 2502"):
        index.records(2502)


def test_the_digest_is_that_of_the_records_and_not_of_the_shards(tmp_path: Path) -> None:
    expected = "".join(f'["{number}.jpg","/data/{number}.jpg",0,{number}]\n' for number in range(10))
    digests = {write_index(numbered(10), str(tmp_path), size)[2] for size in (1, 3, 10, 100)}
    assert digests == {hashlib.sha256(expected.encode()).hexdigest()}
    assert write_index(numbered(9), str(tmp_path), 3)[2] not in digests


def test_the_digest_is_made_of_json_whatever_the_names_and_keys(tmp_path: Path) -> None:
    names = ['a "b"],[.jpg', "back\\slash.jpg", "tab\t, newline\n, \x7f.jpg", "é e\u0301 \u2028 😀.jpg", ""]
    keys = ['x,"y"', None, 1.5, date(2024, 1, 2), True]
    records = [
        ImageRecord(name, f"s3://bucket/{name}", 3, -1, (key, number))
        for number, (name, key) in enumerate(zip(names, keys, strict=True))
    ]
    lines = [json.dumps([r.image_id, r.uri, 3, -1, *r.keys], separators=(",", ":"), default=str) for r in records]
    schema = pa.schema([("number", pa.int64())])
    kept = [replace(record, keys=(record.keys[1],)) for record in records]
    assert [_line(record) for record in records] == [f"{line}\n" for line in lines]
    expected = "".join(_line(record) for record in kept)
    assert write_index(kept, str(tmp_path), 2, schema)[2] == hashlib.sha256(expected.encode()).hexdigest()


def test_an_index_goes_to_another_process(tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), {"a.jpg": b"x"})
    index = build_index(str(tmp_path / "index"), str(tmp_path / "photos"))
    records = index.records(0)
    copy = pickle.loads(pickle.dumps(index))
    assert copy == index
    assert copy.records(0) == records


def test_there_is_no_index_until_all_of_it_is_written(tmp_path: Path) -> None:
    source, folder = str(tmp_path / "source"), str(tmp_path / "index")
    put(source, {"a.tar": SHARD, "b.tar": SHARD[:900]})
    with pytest.raises(FileNotFoundError):
        open_index(folder)
    with pytest.raises(ValueError, match=r"b\.tar"):
        build_index(folder, source, shard_size=1)
    with pytest.raises(FileNotFoundError):
        open_index(folder)
    put(source, {"b.tar": SHARD})
    assert build_index(folder, source, shard_size=1) == open_index(folder)
    assert open_index(folder).images == 4


def test_the_manifest_tells_what_was_left_out(tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), {"a.jpg": b"x", "b.txt": b"", "c.md": b"", ".d": b""})
    index = build_index(str(tmp_path / "index"), str(tmp_path / "photos"))
    assert index.ignored == Ignored({".md": 1, ".txt": 1}, hidden=1)
    assert index.source == str(tmp_path / "photos")


def test_memory_does_not_grow_with_the_keys_of_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, _ = storage.filesystem("s3://bucket")
    peaks = []
    for keys in (1_000, 2_000, 20_000):  # the first imports what it needs
        monkeypatch.setattr(fs, "call_s3", Listing(keys))
        tracemalloc.start()
        index = build_index(str(tmp_path / str(keys)), "s3://bucket/photos", shard_size=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (index.images, index.shards) == (keys, keys // 100)
        assert index.records(keys // 100 - 1)[-1].image_id == f"{keys - 1:07d}.jpg"
    assert peaks[2] < 1.2 * peaks[1] < 2e6


class Listing:
    """A bucket of so many photos, by `list_objects_v2`; all that `fs.call_s3` is asked for."""

    def __init__(self, keys: int) -> None:
        self._keys = keys

    def __call__(
        self, method: str, *, Bucket: str, Prefix: str, ContinuationToken: str = "0", **by_folders: str
    ) -> dict[str, Any]:
        assert method == "list_objects_v2"
        if by_folders:
            return {"IsTruncated": False}
        start = int(ContinuationToken)
        end = min(self._keys, start + 1000)
        contents = [{"Key": f"{Prefix}{number:07d}.jpg", "Size": 120_000} for number in range(start, end)]
        return {"Contents": contents, "IsTruncated": end < self._keys, "NextContinuationToken": str(end)}


def test_shards_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source\.shard_size: 0"):
        write_index(numbered(3), str(tmp_path), 0)


# Before any work


def test_a_source_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(ValueError, match=r"source\.uri: there is no .*source"):
        check_source(source)


def test_a_bucket_that_is_not_there_is_named(s3_bucket: str) -> None:
    with pytest.raises(ValueError, match=r"source\.uri: .*s3://no-such-bucket/photos"):
        check_source("s3://no-such-bucket/photos")


def test_a_store_that_does_not_answer_is_named_and_not_waited_for(proxy: FaultProxy, s3_bucket: str) -> None:
    with proxy.down(), pytest.raises(ValueError, match=rf"source\.uri: cannot read s3://.*{proxy.url}.*credentials"):
        check_source(s3_bucket)


def test_a_source_whose_first_images_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.jpg").symlink_to("gone")
    (tmp_path / "12.jpg").write_bytes(b"behind the first ten")
    with pytest.raises(ValueError, match=r"source\.uri: the first images of .* cannot be read: .*00\.jpg"):
        check_source(str(tmp_path))
    (tmp_path / "03.jpg").unlink()
    (tmp_path / "03.jpg").write_bytes(b"photo")
    assert check_source(str(tmp_path)).image_id == "03.jpg"
