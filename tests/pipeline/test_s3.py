"""The store over a network that fails: what is asked again and what is not, whole uploads, who asks, what travels."""

from __future__ import annotations

import io
import pickle
import random
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import s3, storage
from pipeline.fetch import Fetcher
from pipeline.lease import run_lease
from pipeline.predict.photos import find_photos
from pipeline.retries import Retry
from pipeline.scan import scan
from pipeline.sources import build_index, check_source
from tests.conftest import KEYS, forget_filesystems
from tests.fault_proxy import (
    ACCESS_DENIED,
    EXPIRED_TOKEN,
    INTERNAL_ERROR,
    SLOW_DOWN,
    Answer,
    Cut,
    Fault,
    FaultProxy,
    Outage,
    Reset,
    Rule,
    Slow,
)
from tests.pipeline.image_sources import parquet, put, tar

QUICK = Retry(attempts=3, first_pause_s=0.01)
FIVE_MIB = 5 << 20  # the least that S3 takes as a part of an upload
PASSING = [SLOW_DOWN, INTERNAL_ERROR, Reset(), Reset(forwarded=True), Cut(), Cut(reset=True), Outage(0.3)]


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_a_fault_that_passes_is_not_noticed(proxy: FaultProxy, s3_bucket: str, fault: Fault) -> None:
    uri = f"{s3_bucket}/photo.jpg"
    proxy.plan([Rule(fault, method="PUT"), Rule(fault, method="GET")])
    storage.write_bytes(uri, b"photo" * 1000)
    assert storage.read_bytes(uri) == b"photo" * 1000
    assert storage.read_bytes(uri, 5, 10) == b"photophoto"
    assert len(proxy.faults()) == 2
    assert proxy.count("PUT") == 2
    assert proxy.count("GET") == 3


@pytest.mark.parametrize("fault", [SLOW_DOWN, Answer(504, "GatewayTimeout"), Cut(), Reset()], ids=str)
def test_one_layer_alone_asks_again(proxy: FaultProxy, s3_bucket: str, fault: Fault) -> None:
    storage.write_bytes(f"{s3_bucket}/a", b"photo")
    proxy.plan([Rule(fault, times=None)])
    with pytest.raises(storage.store_errors(s3_bucket)):
        storage.read_bytes(f"{s3_bucket}/a", retry=QUICK)
    again = 2 if isinstance(fault, Reset) else 1  # aiohttp asks once more by itself on a dropped connection
    assert proxy.count("GET") == QUICK.attempts * again


@pytest.mark.parametrize("fault", [ACCESS_DENIED, Answer(404, "NoSuchKey"), Answer(400, "InvalidArgument")], ids=str)
def test_a_refusal_is_final(proxy: FaultProxy, s3_bucket: str, fault: Fault) -> None:
    proxy.plan([Rule(fault, times=None)])
    with pytest.raises(OSError):
        storage.read_bytes(f"{s3_bucket}/a")
    with pytest.raises(OSError):
        storage.write_bytes(f"{s3_bucket}/a", b"x")
    assert (proxy.count("GET"), proxy.count("PUT")) == (1, 1)


def test_a_stalled_body_is_asked_for_again(proxy: FaultProxy, s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/a", b"photo" * 1000)
    fs, _ = storage.filesystem(s3_bucket)
    fs.read_timeout = 0.3
    fs.connect(refresh=True)
    proxy.plan([Rule(Slow(1.5), method="GET")])
    assert storage.read_bytes(f"{s3_bucket}/a") == b"photo" * 1000
    assert proxy.count("GET") == 2


def test_a_listing_goes_on_at_the_page_that_failed(
    proxy: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(7):
        storage.write_bytes(f"{s3_bucket}/data/{number}.jpg", b"x")
    fs, _ = storage.filesystem(s3_bucket)
    monkeypatch.setattr(fs, "call_s3", lambda name, **request: type(fs).call_s3(fs, name, MaxKeys=2, **request))
    for fault in (SLOW_DOWN, Cut()):
        proxy.forget()
        proxy.plan([Rule(fault, key="list-type=2", skip=2)])
        assert [file.path for file in storage.walk(f"{s3_bucket}/data")] == [f"{number}.jpg" for number in range(7)]
        assert proxy.count("GET", "list-type=2") == 4 + 1
    assert list(storage.list_folder(f"{s3_bucket}/data")) == [f"{number}.jpg" for number in range(7)]


def test_files_that_are_sought_in_survive_faults_too(proxy: FaultProxy, s3_bucket: str) -> None:
    values = [random.Random(row).randbytes(2000) for row in range(200)]
    storage.write_bytes(f"{s3_bucket}/x.parquet", parquet({"image": values}, rows_per_group=50))
    rules = [Rule(fault, method="GET", skip=n) for n, fault in enumerate([SLOW_DOWN, Cut(), Cut(reset=True)])]
    proxy.plan([Rule(INTERNAL_ERROR, method="HEAD"), *rules])
    with storage.open_input(f"{s3_bucket}/x.parquet", block_size=0) as stream, pq.ParquetFile(stream) as file:
        groups = [file.read_row_group(group)["image"].to_pylist() for group in range(4)]
    assert [value for group in groups for value in group] == values
    assert len(proxy.faults()) == 4


# Leases


def test_a_create_whose_answer_was_lost_is_ours(proxy: FaultProxy, s3_bucket: str) -> None:
    proxy.plan([Rule(Reset(forwarded=True), method="PUT")])
    assert storage.create_bytes(f"{s3_bucket}/lease", b"mine")
    assert proxy.count("PUT") == 2
    proxy.plan([Rule(Reset(forwarded=True), method="PUT")])
    assert not storage.create_bytes(f"{s3_bucket}/lease", b"another")
    assert storage.read_bytes(f"{s3_bucket}/lease") == b"mine"


def test_taking_away_what_another_was_faster_to_take_is_nothing(s3_bucket: str) -> None:
    assert storage.take_away(f"{s3_bucket}/lease") is None


def test_a_lease_is_renewed_as_soon_as_the_store_is_back(proxy: FaultProxy, s3_bucket: str) -> None:
    with run_lease(s3_bucket, lifetime_s=4):
        proxy.forget()
        proxy.plan([Rule(SLOW_DOWN, method="GET", times=5), Rule(Reset(), method="PUT", times=2)])
        wait_until(lambda: any(request.status == 200 for request in proxy.matching("PUT", "lease.json")))
        times = [request.time for request in proxy.requests]
        assert len(proxy.faults()) == 7
        assert times[-1] - times[0] < 3  # before it would have expired
        proxy.plan([Rule(SLOW_DOWN, times=None)])
    proxy.plan()
    assert list(storage.list_folder(s3_bucket)) == ["lease.json"]  # it could not be given back: it expires


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Large objects


@pytest.mark.parametrize("streamed", [False, True], ids=["bytes", "streamed"])
def test_a_large_object_comes_in_parts_and_each_is_asked_for_again(
    proxy: FaultProxy, s3_bucket: str, streamed: bool
) -> None:
    uri, data = f"{s3_bucket}/model", bytes(range(256)) * (11 * 4096)  # 11 MiB
    lost = Reset(forwarded=True)
    proxy.plan([Rule(SLOW_DOWN, key="partNumber=2"), Rule(lost, method="POST", key="uploadId"), Rule(lost, key="=3")])
    put_large(uri, data, streamed)
    assert storage.read_bytes(uri) == data
    assert [proxy.count("PUT", f"partNumber={number}") for number in (1, 2, 3)] == [1, 2, 2]
    assert proxy.count("POST", "uploadId") == 2
    assert pending_uploads(s3_bucket) == []


@pytest.mark.parametrize("streamed", [False, True], ids=["bytes", "streamed"])
def test_an_upload_that_fails_leaves_nothing(proxy: FaultProxy, s3_bucket: str, streamed: bool) -> None:
    uri = f"{s3_bucket}/model"
    for key in ("partNumber=2", "uploadId=[^&]*$"):
        proxy.plan([Rule(ACCESS_DENIED, key=key, times=1)])
        with pytest.raises(PermissionError):
            put_large(uri, bytes(11 << 20), streamed)
        assert not storage.exists(uri)
        assert pending_uploads(s3_bucket) == []
    proxy.plan([Rule(ACCESS_DENIED, method="PUT")])
    with pytest.raises(PermissionError):
        put_large(uri, b"small", streamed)
    assert storage.list_folder(s3_bucket) == {}


def test_uploads_of_killed_writers_are_litter(proxy: FaultProxy, s3_bucket: str) -> None:
    fs, path = storage.filesystem(s3_bucket)
    for key in ("run/part", "run/coco/part", "other/part"):
        fs.call_s3("create_multipart_upload", Bucket=path, Key=key)
    storage.write_bytes(f"{s3_bucket}/run/{storage.TEMPORARY}probe", b"x")
    storage.write_bytes(f"{s3_bucket}/run/part", b"x")
    storage.remove_litter(f"{s3_bucket}/run")
    assert pending_uploads(s3_bucket) == ["other/part", "run/coco/part"]
    assert storage.list_folder(f"{s3_bucket}/run") == {"part": 1}
    proxy.plan([Rule(ACCESS_DENIED, key="uploads")])
    storage.remove_litter(f"{s3_bucket}/other")  # not every user may list uploads
    assert pending_uploads(s3_bucket) == ["other/part", "run/coco/part"]


def put_large(uri: str, data: bytes, streamed: bool) -> None:
    if not streamed:
        storage.write_bytes(uri, data, part_bytes=FIVE_MIB)
        return
    with storage.open_output(uri, part_bytes=FIVE_MIB) as stream:
        stream.write(data)


def pending_uploads(bucket: str) -> list[str]:
    fs, path = storage.filesystem(bucket)
    return sorted(upload["Key"] for upload in fs.call_s3("list_multipart_uploads", Bucket=path).get("Uploads", ()))


# Who asks


def test_credentials_that_expire_are_read_anew(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_filesystems()
    write_profile(keys, "first")
    put(s3_bucket, {"a.jpg": b"photo", "x.parquet": parquet({"image": [b"y" * 9000] * 9})})
    with storage.open_input(f"{s3_bucket}/x.parquet", block_size=0) as stream:
        write_profile(keys, "second")
        proxy.forget()
        proxy.plan([Rule(EXPIRED_TOKEN)])
        assert storage.read_bytes(f"{s3_bucket}/a.jpg") == b"photo"
        assert pq.read_table(stream).num_rows == 9  # opened before, read with what is valid now
    assert [key_of(request.headers) for request in proxy.requests[:3]] == ["first", "second", "second"]

    proxy.plan([Rule(EXPIRED_TOKEN)])
    forget_filesystems()
    assert storage.exists(f"{s3_bucket}/a.jpg")  # the very first request of a process may meet it too

    proxy.forget()
    proxy.plan([Rule(EXPIRED_TOKEN, times=None)])
    with pytest.raises(PermissionError, match="ExpiredToken"):
        storage.read_bytes(f"{s3_bucket}/a.jpg")
    assert proxy.count() == 2


def test_a_public_bucket_is_read_unsigned_beside_a_signed_run_folder(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path
) -> None:
    put(s3_bucket, {"photos/x.tar": tar([("a.jpg", b"a" * 600)]), "photos/y.parquet": parquet({"image": [b"b"]})})
    publish(s3_bucket, "photos/x.tar", "photos/y.parquet")
    for kind, image in (("tar", b"a" * 600), ("parquet", b"b")):
        proxy.forget()
        folder = f"{s3_bucket}/run/index-{kind}"
        check_source(f"{s3_bucket}/photos", kind, anonymous=True)
        index = build_index(folder, f"{s3_bucket}/photos", kind, anonymous=True)
        (record,) = pickle.loads(pickle.dumps(index)).records(0)
        assert index.fetcher().fetch(record) == image
        assert proxy.count("GET", "photos/") > 2
        for request in proxy.requests:
            of_source = "photos" in request.place
            assert ("authorization" in request.headers) is not of_source, request.place


def test_photos_to_predict_in_a_public_bucket_are_read_without_credentials(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_bucket, {"a/1.jpg": b"one", "b/x.tar": tar([("2.jpg", b"two")])})
    publish(s3_bucket, "a/1.jpg", "b/x.tar")
    without_keys(monkeypatch, tmp_path)
    proxy.forget()
    inputs = [f"{s3_bucket}/a/*.jpg", f"{s3_bucket}/a/1.jpg", f"{s3_bucket}/b"]
    found = find_photos(inputs, output=str(tmp_path), anonymous=True)
    fetcher = Fetcher(anonymous=True)
    assert [(record.image_id, fetcher.fetch(record)) for record in found] == [
        ("a/1.jpg", b"one"),
        ("b/x.tar/2.jpg", b"two"),
    ]
    assert proxy.requests and not any("authorization" in request.headers for request in proxy.requests)


def test_without_credentials_the_key_for_public_buckets_is_named(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_bucket, {"a.jpg": b"photo"})
    publish(s3_bucket, "a.jpg")
    without_keys(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"source\.uri: cannot read s3://.*source\.anonymous: true"):
        check_source(s3_bucket)
    assert check_source(s3_bucket, anonymous=True).image_id == "a.jpg"


def test_a_profile_gives_keys_and_endpoint(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_keys(monkeypatch, tmp_path)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    config = tmp_path / "config"
    config.write_text(
        f"[profile lab]\nendpoint_url = {proxy.url}\nregion = eu-west-3\n"
        "aws_access_key_id = of-profile\naws_secret_access_key = secret\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage.write_bytes(f"{s3_bucket}/a", b"1")
    (request,) = proxy.requests
    assert key_of(request.headers) == "of-profile"
    assert "/eu-west-3/s3/" in request.headers["authorization"]


@pytest.mark.parametrize(
    ("uri", "package"), [("gs://bucket/a", "gcsfs"), ("az://bucket/a", "adlfs"), ("abfs://bucket/a", "adlfs")]
)
def test_other_stores_name_the_package_they_need(uri: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    forget_filesystems()
    with pytest.raises(ValueError, match=rf"{uri}: cannot open .*pip install {package}"):
        storage.read_bytes(uri)


def test_errors_of_other_stores_are_their_packages_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class AzureError(Exception):
        pass

    monkeypatch.setattr(storage, "_errors_of", storage._errors_of.__wrapped__)
    monkeypatch.setitem(sys.modules, "azure.core.exceptions", SimpleNamespace(AzureError=AzureError))
    assert storage.store_errors("az://bucket/a") == (OSError, AzureError)
    monkeypatch.setitem(sys.modules, "azure.core.exceptions", None)  # not installed
    assert storage.store_errors("az://bucket/a") == (OSError,)
    assert storage.store_errors("/a") == (OSError,)


def test_keys_inside_a_url_are_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match=r"s3://\*\*\*@bucket/a: holds credentials; .*AWS_PROFILE"):
        storage.read_bytes("s3://key:secret@bucket/a")


def test_what_crosses_to_other_processes_holds_no_filesystem(s3_bucket: str) -> None:
    put(s3_bucket, {"photos/a.jpg": b"photo"})
    index = build_index(f"{s3_bucket}/index", f"{s3_bucket}/photos")
    index.fetcher().fetch(index.records(0)[0])
    content = pickle.dumps(index)
    assert index.folder.encode() in content
    for word in ("fsspec", "s3fs", "botocore", KEYS["AWS_SECRET_ACCESS_KEY"]):
        assert word.encode() not in content
    assert pickle.loads(content).records(0) == index.records(0)


def publish(bucket: str, *keys: str) -> None:
    """Let everybody read these objects."""
    fs, path = storage.filesystem(bucket)
    for key in keys:
        fs.call_s3("put_object_acl", Bucket=path, Key=key, ACL="public-read")


def write_profile(path: Path, key: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")


def without_keys(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_filesystems()


def key_of(headers: object) -> str:
    return headers["authorization"].split("Credential=")[1].split("/")[0]  # type: ignore[index]


# What travels


def test_of_a_tar_only_headers_and_members_travel(proxy: FaultProxy, s3_bucket: str) -> None:
    members = [(f"{n}.jpg", bytes([n]) * 300_000) for n in range(8)]
    put(s3_bucket, {"x.tar": tar(members)})
    proxy.forget()
    records = list(scan(f"{s3_bucket}/x.tar"))
    indexed = sum(request.sent for request in proxy.matching("GET", "x.tar"))
    assert indexed < 8 * (70 << 10)
    proxy.forget()
    index = build_index(f"{s3_bucket}/index", f"{s3_bucket}/x.tar")
    proxy.forget()
    assert index.fetcher().fetch(records[3]) == members[3][1]
    (request,) = proxy.requests
    assert (request.method, request.sent) == ("GET", 300_000)
    assert request.headers["range"] == f"bytes={records[3].offset}-{records[3].offset + 299_999}"


def test_of_a_part_only_the_columns_that_are_asked_for_travel(proxy: FaultProxy, s3_bucket: str) -> None:
    from pipeline.shards import read_columns

    stream = io.BytesIO()
    pq.write_table(pa.table({"small": [1, 2], "large": [bytes(range(256)) * 4000] * 2}), stream, compression=None)
    storage.write_bytes(f"{s3_bucket}/part", stream.getvalue())
    proxy.forget()
    assert read_columns(f"{s3_bucket}/part", ["small"])["small"].to_pylist() == [1, 2]
    assert sum(request.sent for request in proxy.requests) < 100_000 < len(stream.getvalue())


def test_a_listing_that_is_not_in_byte_order_is_refused() -> None:
    page = {"Contents": [{"Key": "b", "Size": 1}, {"Key": "a", "Size": 1}]}
    with pytest.raises(OSError, match="byte order"):
        list(s3.list_keys(lambda method, **request: page, "bucket", "", below=True))


def test_a_folder_is_removed_page_by_page_and_nothing_beside_it(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run/a/0", "run/a/1", "run/a/b/2", "run/a/3", "run/a/4", "run/ab", "run/b/0"):
        storage.write_bytes(f"{s3_bucket}/{name}", b"x")
    fs, _ = storage.filesystem(s3_bucket)

    def two_a_page(method: str, **request: object) -> object:
        pages = {"MaxKeys": 2} if method == "list_objects_v2" else {}
        return type(fs).call_s3(fs, method, **pages, **request)

    monkeypatch.setattr(fs, "call_s3", two_a_page)
    storage.remove_folder(f"{s3_bucket}/run/a")
    storage.remove_folder(f"{s3_bucket}/run/nothing")
    assert [file.path for file in storage.walk(f"{s3_bucket}/run")] == ["ab", "b/0"]


def test_an_object_that_must_not_be_deleted_is_named() -> None:
    answers = {
        "list_objects_v2": {"Contents": [{"Key": "run/a", "Size": 1}]},
        "delete_objects": {"Errors": [{"Key": "run/a", "Code": "AccessDenied", "Message": "Access Denied"}]},
    }
    with pytest.raises(OSError, match="cannot delete s3://bucket/run/a: Access Denied"):
        s3.remove_all(lambda method, **request: answers[method], "bucket", "run/")


@pytest.mark.parametrize(
    "text", ["2026-11-21T15:00:00.000Z", "2026-11-21T16:00:00+01:00", "Sat, 21 Nov 2026 15:00:00 GMT", 1795273200]
)
def test_times_of_answers_are_read_as_botocore_does(text: object) -> None:
    assert s3.parse_time(text) == datetime(2026, 11, 21, 15, tzinfo=UTC)


def test_listings_are_parsed_with_it(s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/a", b"x")
    fs, path = storage.filesystem(f"{s3_bucket}/a")
    fs.info(path)
    assert fs.session.get_component("response_parser_factory")._defaults == {"timestamp_parser": s3.parse_time}


@given(
    st.lists(st.integers(0, 120_000), unique=True, max_size=60),
    st.lists(st.integers(0, 120_000), max_size=5),
    st.integers(1, 9),
)
def test_a_folder_in_pieces_is_the_folder(shards: list[int], cuts: list[int], page_size: int) -> None:
    """Also where the numbers have five digits and six, whose byte order is not that of the numbers."""
    keys = sorted([f"run/part-{shard:05d}.parquet" for shard in shards] + ["run/artifact.json", "run/z"])

    def ask(method: str, **request: str) -> dict[str, object]:
        rest = [key for key in keys if key > request.get("ContinuationToken", request.get("StartAfter", ""))]
        page = rest[:page_size]
        more = {"IsTruncated": True, "NextContinuationToken": page[-1]} if len(rest) > page_size else {}
        return {"Contents": [{"Key": key, "Size": 9} for key in page], **more}

    found = list(s3.list_in_pieces(ask, "bucket", "run/", [f"run/part-{cut:05d}.parquet" for cut in cuts]))
    assert found == [(key, 9) for key in keys]


def test_a_piece_that_fills_its_page_is_one_request(proxy: FaultProxy, s3_bucket: str) -> None:
    for number in range(4):
        storage.write_bytes(f"{s3_bucket}/run/part-{number}", b"x" * number)
    proxy.forget()
    found = storage.list_folder(f"{s3_bucket}/run", cuts=["part-1"])
    assert found == {f"part-{number}": number for number in range(4)}
    assert proxy.count("GET", "list-type=2") == 2
