"""A folder, tar shards or Parquet, on disk or on S3 -> records in order; what is not an image is counted or refused."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources.fetch import Fetcher
from pipeline.sources.scan import Ignored, detect_format, image_id, scan
from pipeline.sources.tars import HEADER_BLOCK
from pipeline.store import storage
from tests.pipeline.sources.image_sources import SHARD, contents, parquet, put, sparse_tar, tar
from workers.records import ImageRecord, Status

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


def test_a_sparse_member_of_a_tar_is_a_photo_with_its_holes(source: str) -> None:
    pieces, others = {0: b"head", 3000: b"tail"}, [("b.jpg", b"behind")]
    put(source, {"x.tar": sparse_tar("a.jpg", pieces, 5000, others), "y.tar": sparse_tar("c.jpg", {}, 700)})
    expected = b"head" + bytes(2996) + b"tail" + bytes(1996)
    assert contents(source) == {"x.tar/a.jpg": expected, "x.tar/b.jpg": b"behind", "y.tar/c.jpg": bytes(700)}


def test_a_sparse_member_that_is_cut_is_refused_and_one_that_claims_too_much_is_a_row(tmp_path: Path) -> None:
    whole = sparse_tar("a.jpg", {0: b"x" * 2000}, 4000)
    put(str(tmp_path), {"x.tar": whole[: whole.index(b"x" * 2000) + 1500]})
    with pytest.raises(ValueError, match=r"x\.tar is truncated or corrupt behind byte 0 of"):
        list(scan(str(tmp_path)))
    put(str(tmp_path), {"x.tar": sparse_tar("a.jpg", {0: b"x"}, 1 << 40)})
    (record,) = scan(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no sparse member of up to 1073741824 bytes") as caught:
        Fetcher().fetch(record)
    assert Fetcher.fetch_status(record, caught.value)[0] is Status.MISSING
    put(str(tmp_path), {"x.tar": SHARD})  # another tar in its place
    with pytest.raises(FileNotFoundError, match="no sparse member"):
        Fetcher().fetch(record)


# What is refused


def test_a_source_without_an_image_says_what_it_found(source: str) -> None:
    put(source, {"a.txt": b"", "b.txt": b"", ".c.jpg": b""})
    with pytest.raises(ValueError, match=r"source\.uri: no image in .*2 \.txt, 1 hidden.*source\.format"):
        next(scan(source))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_compressed_tars_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match=rf"source\.uri: .*{name} is compressed.*decompress it"):
        list(scan(str(tmp_path)))


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


@pytest.mark.parametrize("padding", [0, 3 << 20], ids=["two-tars", "far-behind"])
def test_data_behind_the_end_of_a_tar_is_refused(source: str, padding: int) -> None:
    first = SHARD + bytes(padding)
    put(source, {"all.tar": first + tar([("c.jpg", b"c")], tarfile.USTAR_FORMAT)})
    expected = rf"all\.tar is truncated or corrupt.* end marker, at byte {len(first)};.*`tar --concatenate`"
    with pytest.raises(ValueError, match=rf"source\.uri: .*{expected} or give them one by one"):
        list(scan(source))


@pytest.mark.parametrize("padding", [1, 512, 3 << 20])
def test_zeros_behind_the_end_of_a_tar_are_padding(tmp_path: Path, padding: int) -> None:
    (tmp_path / "x.tar").write_bytes(SHARD + bytes(padding))
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
    assert len(read) == members + 1  # the end marker and the padding come in one


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
