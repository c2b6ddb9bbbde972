"""The store over a network that fails: what is asked again and what is not, whole uploads, what travels."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.lease import run_lease
from pipeline.sources.index import build_index
from pipeline.sources.scan import scan
from pipeline.store import s3, storage
from pipeline.store.retries import Retry
from tests.fault_proxy import (
    ACCESS_DENIED,
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
from tests.pipeline.sources.image_sources import parquet, put, tar

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
    from pipeline.engine.shards import read_columns

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


def test_an_answer_is_looked_through_for_an_error_unless_it_begins_as_a_listing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from botocore import handlers

    looked = []
    monkeypatch.setattr(handlers, "_handle_200_error", lambda response_dict, **_: looked.append(response_dict["body"]))
    looks = []
    events = SimpleNamespace(unregister=lambda *_: None, register_first=lambda name, look: looks.append(look))
    s3._read_listings_once(events)
    bodies = [b"<?xml?>\n<ListBucketResult>", b"<Error>", b"", b" " * 600 + b"<ListBucketResult>"]
    for body in bodies:
        looks[0](operation_model=SimpleNamespace(name="ListObjectsV2"), response_dict={"body": body})
    looks[0](operation_model=SimpleNamespace(name="CopyObject"), response_dict={"body": bodies[0]})
    assert looked == [*bodies[1:], bodies[0]]


def test_botocore_itself_does_not_look_through_a_listing(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore import handlers

    looked: list[int] = []
    monkeypatch.setattr(handlers, "_looks_like_special_case_error", lambda status, body: looked.append(len(body)))
    storage.write_bytes(f"{s3_bucket}/a/b.jpg", b"x")
    looked.clear()
    assert [file.path for file in storage.walk(f"{s3_bucket}/a")] == ["b.jpg"]
    assert not looked


def test_an_error_in_place_of_a_listing_is_no_empty_folder(proxy: FaultProxy, s3_bucket: str) -> None:
    """S3 may answer 200 and only then find that it cannot."""
    storage.write_bytes(f"{s3_bucket}/a/b.jpg", b"x")
    proxy.plan([Rule(Answer(200, "InternalError"), "GET", "list-type=2")])
    assert [file.path for file in storage.walk(f"{s3_bucket}/a")] == ["b.jpg"]
    assert proxy.count("GET", "list-type=2") == 2


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
    assert found == [(key, 9, 0, "") for key in keys]


def test_a_piece_that_fills_its_page_is_one_request(proxy: FaultProxy, s3_bucket: str) -> None:
    for number in range(4):
        storage.write_bytes(f"{s3_bucket}/run/part-{number}", b"x" * number)
    proxy.forget()
    found = storage.list_written(f"{s3_bucket}/run", cuts=["part-1"])
    assert {name: file.size for name, file in found.items()} == {f"part-{number}": number for number in range(4)}
    assert proxy.count("GET", "list-type=2") == 2
