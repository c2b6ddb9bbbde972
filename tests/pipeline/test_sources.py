"""A folder, tar shards or Parquet, on disk or on S3 -> records, an index in shards, and the bytes of each image."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.fetch import BATCH_ROWS, BATCHES_HELD, Fetcher, UnreadableRow
from pipeline.scan import HEADER_BLOCK
from pipeline.sources import (
    Ignored,
    Index,
    build_index,
    check_source,
    detect_format,
    image_id,
    open_index,
    scan,
    write_index,
)
from workers.records import ImageRecord, Status


@pytest.fixture(params=["disk", "s3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a test puts its images, on disk or in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "source")
    return storage.join(request.getfixturevalue("s3_bucket"), "source")


def put(folder: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)


def tar(members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def parquet(columns: dict[str, object], rows_per_group: int = 100) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, row_group_size=rows_per_group)
    return stream.getvalue()


def contents(uri: str, **options: str) -> dict[str, bytes]:
    """image_id -> bytes of every image of a source; that no id comes twice is checked on the way."""
    fetcher = Fetcher(options.get("image_column", "image"))
    found = [(record.image_id, fetcher.fetch(record)) for record in scan(uri, **options)]
    assert len(dict(found)) == len(found)
    return dict(found)


# The three formats, on disk and on S3


def test_a_folder_tree_in_byte_order(source: str) -> None:
    put(source, {"b/2.PNG": b"two", "b/1.jpg": b"one", "a ü 例.webp": b"three", "empty.tif": b"", "notes.txt": b"-"})
    put(source, {"b/._1.jpg": b"-", ".cache/x.jpg": b"-", "README": b"-"})
    ignored = Ignored()
    records = list(scan(source, ignored=ignored))
    assert records == [
        ImageRecord("a ü 例.webp", f"{source}/a ü 例.webp", 0, 5),
        ImageRecord("b/1.jpg", f"{source}/b/1.jpg", 0, 3),
        ImageRecord("b/2.PNG", f"{source}/b/2.PNG", 0, 3),
        ImageRecord("empty.tif", f"{source}/empty.tif", 0, 0),
    ]
    assert ignored == Ignored({"(none)": 1, ".txt": 1}, hidden=2)
    assert [Fetcher().fetch(record) for record in records] == [b"three", b"one", b"two", b""]


def test_tar_shards(source: str) -> None:
    long = "folder-" * 30 + "/photo.jpg"
    shard = tar([("./k1.jpg", b"one"), ("k1.cls", b"7"), ("ü/k2.png", b"two!" * 200), (long, b"long"), ("k3.jpg", b"")])
    put(source, {"train/00000.tar": shard, "train/00001.tar": tar([("k1.jpg", b"other")]), "train/sizes.json": b"{}"})
    ignored = Ignored()
    records = list(scan(source, ignored=ignored))
    assert [record.image_id for record in records] == [
        "train/00000.tar/k1.jpg",
        "train/00000.tar/ü/k2.png",
        f"train/00000.tar/{long}",
        "train/00000.tar/k3.jpg",
        "train/00001.tar/k1.jpg",
    ]
    assert (records[0].uri, records[0].offset, records[0].length) == (f"{source}/train/00000.tar", 512, 3)
    assert ignored == Ignored({".cls": 1, ".json": 1})
    assert [Fetcher().fetch(record) for record in records] == [b"one", b"two!" * 200, b"long", b"", b"other"]


@pytest.mark.parametrize("nested", [False, True], ids=["bytes", "hugging-face-struct"])
def test_parquet(source: str, nested: bool) -> None:
    values = [f"photo {row}".encode() * 20 for row in range(25)]
    images = [{"bytes": value, "path": "x.jpg"} for value in values] if nested else values
    table = parquet({"label": list(range(25)), "image": images}, rows_per_group=10)
    put(source, {"a/0.parquet": table, "a/1.parquet": parquet({"image": [*images[:1], None]})})
    records = list(scan(source))
    assert [records[0].image_id, records[24].image_id, records[26].image_id] == [
        "a/0.parquet#0",
        "a/0.parquet#24",
        "a/1.parquet#1",
    ]
    assert (records[24].uri, records[24].offset, records[24].length) == (f"{source}/a/0.parquet", 24, -1)
    assert list(contents(source).values()) == [*values, values[0], b""]


def test_a_single_file_is_a_source(source: str) -> None:
    put(source, {"x.tar": tar([("a.jpg", b"one")]), "y.parquet": parquet({"image": [b"two"]}), "z.jpg": b"three"})
    assert contents(storage.join(source, "x.tar")) == {"x.tar/a.jpg": b"one"}
    assert contents(storage.join(source, "y.parquet")) == {"y.parquet#0": b"two"}
    assert contents(storage.join(source, "z.jpg")) == {"z.jpg": b"three"}


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


# Formats


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (["a.jpg", "b.txt"], "folder"),
        (["0.tar", "0.json", "1.TAR"], "tar"),
        (["x/0.parquet", "_SUCCESS"], "parquet"),
        (["0.tar.gz"], "tar"),
        (["a.txt"], "folder"),
        ([".hidden.tar", "a.jpg"], "folder"),
    ],
)
def test_auto_goes_by_the_names(tmp_path: Path, names: list[str], format: str) -> None:
    put(str(tmp_path), dict.fromkeys(names, b""))
    assert detect_format(str(tmp_path)) == format


def test_a_mix_must_be_decided_by_the_user(tmp_path: Path) -> None:
    put(str(tmp_path), {"a.jpg": b"photo", "b.jpg": b"photo", "shard.tar": tar([("c.jpg", b"tar")])})
    with pytest.raises(ValueError, match=r"source\.format.*2 for folder, 1 for tar.*folder, tar or parquet"):
        detect_format(str(tmp_path))
    ignored = Ignored()
    assert [record.image_id for record in scan(str(tmp_path), "tar", ignored=ignored)] == ["shard.tar/c.jpg"]
    assert ignored == Ignored({".jpg": 2})


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source\.format: 'zip' is not one of auto, folder, tar, parquet"):
        next(scan(str(tmp_path), "zip"))


# Names


def test_names_that_are_not_utf8_have_ids_of_their_own(tmp_path: Path) -> None:
    names = [b"caf\xe9.jpg", b"caf%E9.jpg", b"caf%25E9.jpg", "café 50%.jpg".encode()]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    assert contents(str(tmp_path)) == {
        "caf%25E9.jpg": b"caf%E9.jpg",
        "caf%2525E9.jpg": b"caf%25E9.jpg",
        "caf%E9.jpg": b"caf\xe9.jpg",
        "café 50%.jpg": "café 50%.jpg".encode(),
    }


@given(st.lists(st.binary(max_size=6) | st.text("%25EF\xe9", max_size=8).map(str.encode), unique=True))
def test_image_ids_are_utf8_and_unique(names: list[bytes]) -> None:
    ids = [image_id(os.fsdecode(name)) for name in names]
    assert len(set(ids)) == len(names)
    assert "".join(ids).encode().decode() == "".join(ids)


def test_a_tar_may_hold_the_same_name_twice_and_names_that_escape(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("../a.jpg", b"2"), ("a.jpg", b"3"), ("./a.jpg", b"4"), ("/etc/b.jpg", b"5")]
    put(str(tmp_path), {"x.tar": tar(members)})
    assert contents(str(tmp_path)) == {
        "x.tar/a.jpg": b"1",
        "x.tar/../a.jpg": b"2",
        "x.tar/a.jpg~2": b"3",
        "x.tar/a.jpg~3": b"4",
        "x.tar//etc/b.jpg": b"5",
    }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect(tmp_path: Path, format: int) -> None:
    long = "d" * 90 + "/" + "f" * 80 + ".jpg"
    put(str(tmp_path), {"x.tar": tar([(long, b"long"), ("ü例.jpg", b"unicode")], format)})
    assert contents(str(tmp_path)) == {f"x.tar/{long}": b"long", "x.tar/ü例.jpg": b"unicode"}


def test_only_regular_members_are_taken_and_the_rest_is_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            archive.addfile(member)
        for name in ("a.jpg", "._a.jpg", "a.json"):
            archive.addfile(tarfile.TarInfo(name))
    ignored = Ignored()
    assert [record.image_id for record in scan(str(tmp_path), ignored=ignored)] == ["x.tar/a.jpg"]
    assert ignored == Ignored({".json": 1}, hidden=1, special=2)
    assert str(ignored) == "1 .json, 1 hidden, 2 links or devices"


def test_the_count_of_extensions_is_bounded() -> None:
    ignored = Ignored()
    for number in range(1000):
        ignored.count(f"log.{number}")
    assert len(ignored.extensions) == 101
    assert ignored.extensions["(other)"] == 900


# What is refused


def test_a_source_without_an_image_says_what_it_found(source: str) -> None:
    put(source, {"a.txt": b"", "b.txt": b"", ".c.jpg": b""})
    with pytest.raises(ValueError, match=r"source\.uri: no image in .*2 \.txt, 1 hidden.*source\.format"):
        next(scan(source))


def test_a_source_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(ValueError, match=r"source\.uri: there is no .*source"):
        check_source(source)


def test_a_bucket_that_is_not_there_is_named(s3_bucket: str) -> None:
    with pytest.raises(ValueError, match=r"source\.uri: .*s3://no-such-bucket/photos"):
        check_source("s3://no-such-bucket/photos")


def test_a_store_that_does_not_answer_is_named(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import EndpointConnectionError

    fs, _ = storage.filesystem(s3_bucket)

    def refused(*args: object, **kwargs: object) -> None:
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")

    monkeypatch.setattr(fs, "call_s3", refused)
    with pytest.raises(ValueError, match=r"source\.uri: cannot read s3://.*127\.0\.0\.1:9.*credentials"):
        check_source(s3_bucket)


def test_a_source_whose_first_images_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.jpg").symlink_to("gone")
    (tmp_path / "12.jpg").write_bytes(b"behind the first ten")
    with pytest.raises(ValueError, match=r"source\.uri: there is no"):
        check_source(str(tmp_path))
    (tmp_path / "03.jpg").unlink()
    (tmp_path / "03.jpg").write_bytes(b"photo")
    assert check_source(str(tmp_path)).image_id == "03.jpg"


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_compressed_tars_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match=rf"source\.uri: .*{name} is compressed.*decompress it"):
        list(scan(str(tmp_path)))


SHARD = tar([("a.jpg", b"a" * 600), ("b.jpg", b"b" * 600)], tarfile.USTAR_FORMAT)  # headers at 0 and 1536


@pytest.mark.parametrize(
    ("data", "at"),
    [
        (b"", 0),
        (b"no tar at all" * 100, 0),
        (SHARD[:300], 0),
        (SHARD[:900], 0),  # inside the first member
        (SHARD[:1700], 1112),  # inside the second header
        (SHARD[:2200], 1112),  # inside the second member
        (SHARD[:1536] + b"\xff" * 512 + SHARD[2048:], 1112),  # a broken header is not the end
        (SHARD[:1536] + b"x" + SHARD[1537:], 1112),
    ],
)
def test_a_broken_tar_is_refused_and_its_place_named(tmp_path: Path, data: bytes, at: int) -> None:
    (tmp_path / "good.tar").write_bytes(SHARD)
    (tmp_path / "zbad.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"source\.uri: .*zbad\.tar is truncated or corrupt behind byte {at} of"):
        list(scan(str(tmp_path)))


def test_a_tar_without_an_end_mark_is_whole(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(SHARD[: 1536 + 512 + 1024])
    assert contents(str(tmp_path)) == {"x.tar/a.jpg": b"a" * 600, "x.tar/b.jpg": b"b" * 600}


def test_the_image_column_is_checked(tmp_path: Path) -> None:
    put(str(tmp_path), {"x.parquet": parquet({"jpg": [b"x"], "label": [1], "meta": [{"path": "a"}]})})
    with pytest.raises(ValueError, match=r"source\.image_column: .*no column 'image', only jpg, label, meta"):
        list(scan(str(tmp_path)))
    for column in ("label", "meta"):
        with pytest.raises(ValueError, match=rf"source\.image_column: '{column}' .* must hold the bytes"):
            list(scan(str(tmp_path), image_column=column))
    assert contents(str(tmp_path), image_column="jpg") == {"x.parquet#0": b"x"}


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    put(str(tmp_path), {"x.parquet": parquet({"image": [b"x"]})[:-9]})
    with pytest.raises(ValueError, match=r"source\.uri: .*x\.parquet is not a whole Parquet file"):
        list(scan(str(tmp_path)))


# The index


def numbered(count: int) -> Iterable[ImageRecord]:
    return (ImageRecord(f"{number}.jpg", f"/data/{number}.jpg", 0, number) for number in range(count))


def test_an_index_of_more_than_a_thousand_shards_has_more_files(tmp_path: Path) -> None:
    shards, images, digest = write_index(numbered(5003), str(tmp_path), 2)
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


def test_shards_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source\.shard_size: 0"):
        write_index(numbered(3), str(tmp_path), 0)


# How much is read


def test_a_remote_tar_is_indexed_from_its_headers(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members, size = 12, 1 << 20
    put(s3_bucket, {"x.tar": tar([(f"{number}.jpg", bytes(size)) for number in range(members)])})
    fs, _ = storage.filesystem(s3_bucket)
    read = []

    async def counted(method: str, *args: object, **kwargs: object) -> object:
        if method == "get_object":
            first, last = str(kwargs["Range"]).removeprefix("bytes=").split("-")
            read.append(int(last) - int(first) + 1)
        return await type(fs)._call_s3(fs, method, *args, **kwargs)

    monkeypatch.setattr(fs, "_call_s3", counted)
    assert len(list(scan(s3_bucket))) == members
    assert sum(read) <= (members + 2) * (HEADER_BLOCK + 2 * tarfile.BLOCKSIZE) < members * size / 10


def test_rows_of_a_shard_read_each_row_group_once(tmp_path: Path) -> None:
    values = [os.urandom(20_000) for _ in range(400)]
    put(str(tmp_path), {"x.parquet": parquet({"image": values}, rows_per_group=150)})
    records = list(scan(str(tmp_path)))
    fetcher, entered = Fetcher(), []
    rows = fetcher._rows
    enter = rows._enter
    rows._enter = lambda group: (entered.append(group), enter(group))  # type: ignore[method-assign]
    with ThreadPoolExecutor(8) as pool:
        for first in range(0, 400, 64):  # as far as a worker fetches ahead
            assert list(pool.map(fetcher.fetch, records[first : first + 64])) == values[first : first + 64]
    assert entered == [0, 1, 2]
    assert sum(len(batch) for _, batch in rows._window) <= BATCHES_HELD * BATCH_ROWS < len(values)


def test_rows_may_be_read_in_any_order(tmp_path: Path) -> None:
    values = [f"{row}".encode() for row in range(300)]
    put(
        str(tmp_path),
        {"x.parquet": parquet({"image": values}, rows_per_group=90), "y.parquet": parquet({"image": [b"y"]})},
    )
    records = list(scan(str(tmp_path)))
    fetcher = Fetcher()
    for row in (299, 0, 300, 150, 149, 89, 90, 91, 300, 7, 269, 270, 30):
        assert fetcher.fetch(records[row]) == (b"y" if row == 300 else values[row])


# What cannot be fetched


def status_of(record: ImageRecord) -> tuple[Status, str]:
    with pytest.raises(OSError) as caught:
        Fetcher().fetch(record)
    return Fetcher.fetch_status(record, caught.value)


def test_an_image_that_has_gone_is_a_row(source: str) -> None:
    put(source, {"a.jpg": b"x"})
    record = next(scan(source))
    storage.remove(record.uri)
    status, message = status_of(record)
    assert status is Status.MISSING
    assert message.startswith(f"{source}/a.jpg: FileNotFoundError")


def test_a_tar_that_has_shrunk_gives_rows(source: str) -> None:
    put(source, {"x.tar": SHARD})
    first, second = scan(source)
    put(source, {"x.tar": SHARD[:700]})
    assert [status_of(record)[0] for record in (first, second)] == [Status.MISSING, Status.MISSING]


def test_a_corrupt_page_costs_its_row_group_and_no_other(tmp_path: Path) -> None:
    values = [os.urandom(3000) for _ in range(60)]
    data = bytearray(parquet({"image": values}, rows_per_group=20))
    start = data.index(values[20])
    data[start - 16 : start] = b"\xff" * 16  # the header of the second group's first page
    put(str(tmp_path), {"x.parquet": bytes(data)})
    records, fetcher, lost = list(scan(str(tmp_path))), Fetcher(), []
    for row, record in enumerate(records):
        try:
            assert fetcher.fetch(record) == values[row]
        except UnreadableRow as error:
            assert fetcher.fetch_status(record, error)[0] is Status.MISSING
            lost.append(row)
    assert lost == list(range(20, 40))


def test_an_outage_is_not_made_into_rows() -> None:
    record = ImageRecord("a.jpg", "s3://bucket/a.jpg", 0, 3)
    expired = PermissionError("The provided token has expired.")
    expired.__cause__ = _client_error("ExpiredToken")
    for outage in (expired, TimeoutError("timed out"), OSError(5, "Input/output error"), ConnectionResetError(104, "")):
        with pytest.raises(type(outage)):
            Fetcher.fetch_status(record, outage)
    denied = PermissionError("Access Denied")
    denied.__cause__ = _client_error("AccessDenied")
    assert Fetcher.fetch_status(record, denied)[0] is Status.MISSING


def test_credentials_do_not_get_into_rows() -> None:
    record = ImageRecord("a.jpg", "s3://key:secret@bucket/a.jpg", 0, 3)
    message = Fetcher.fetch_status(record, FileNotFoundError("https://h/a?X-Amz-Signature=abc"))[1]
    assert "secret" not in message
    assert "abc" not in message


def _client_error(code: str) -> Exception:
    from botocore.exceptions import ClientError

    return ClientError({"Error": {"Code": code}}, "GetObject")


# The reference data


def test_the_reference_tars(shared_dir: Path) -> None:
    tars = shared_dir / "data" / "tars"
    ignored = Ignored()
    records = list(scan(str(tars), ignored=ignored))
    assert (len(records), ignored) == (100, Ignored({".cls": 100}))
    assert records[0].image_id == "imagenet-000000.tar/n03042490_cliff_dwelling.jpg"
    with tarfile.open(tars / "imagenet-000003.tar") as archive:
        member = archive.extractfile(records[99].image_id.partition("/")[2])
        assert member is not None
        assert Fetcher().fetch(records[99]) == member.read()
