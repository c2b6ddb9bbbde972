"""The bytes of each image, and what becomes of an image whose bytes cannot be had."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.sources.fetch import BATCH_ROWS, BATCHES_HELD, Fetcher, ParquetRows, UnreadableRow
from pipeline.sources.index import check_source
from pipeline.sources.scan import scan
from pipeline.store import storage
from tests.pipeline.sources.image_sources import SHARD, contents, parquet, put
from workers.records import ImageRecord, Status


def test_rows_of_a_shard_read_each_row_group_once(tmp_path: Path) -> None:
    values = [os.urandom(20_000) for _ in range(400)]
    put(str(tmp_path), {"x.parquet": parquet({"image": values}, rows_per_group=150)})
    records = list(scan(str(tmp_path)))
    rows, entered = ParquetRows(records[0].uri, "image"), []
    enter = rows._enter
    rows._enter = lambda group: (entered.append(group), enter(group))  # type: ignore[method-assign]
    with ThreadPoolExecutor(8) as pool:
        for first in range(0, 400, 64):  # as far as a worker fetches ahead
            found = list(pool.map(rows.read, range(first, min(400, first + 64))))
            assert found == values[first : first + 64]
    assert entered == [0, 1, 2]
    assert sum(len(batch) for _, batch in rows._window) <= BATCHES_HELD * BATCH_ROWS < len(values)


def test_a_store_that_fails_once_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flaky(io.FileIO):
        failing = False

        def read(self, size: int = -1) -> bytes:
            if Flaky.failing:
                raise TimeoutError("no answer")
            return super().read(size)

    values = [os.urandom(3000) for _ in range(60)]
    put(str(tmp_path), {"x.parquet": parquet({"image": values}, rows_per_group=20)})
    records = list(scan(str(tmp_path)))
    monkeypatch.setattr(storage, "open_input", lambda uri, block_size, anonymous: Flaky(uri))
    fetcher = Fetcher()
    assert fetcher.fetch(records[0]) == values[0]
    Flaky.failing = True
    with pytest.raises(TimeoutError, match="no answer"):
        fetcher.fetch(records[30])
    Flaky.failing = False
    assert [fetcher.fetch(record) for record in records] == values


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


@pytest.mark.parametrize("path", ["a.jpg", "photos/a.jpg", "absolute"])
@pytest.mark.parametrize("some", [True, False], ids=["bytes-in-some-rows", "bytes-in-none"])
def test_a_row_without_bytes_is_the_file_that_its_path_names(tmp_path: Path, path: str, some: bool) -> None:
    put(str(tmp_path), {"data/a.jpg": b"beside", "photos/a.jpg": b"above"})
    named = f"{tmp_path}/photos/a.jpg" if path == "absolute" else path
    values = [{"bytes": None, "path": named}, {"bytes": b"own" if some else None, "path": "data/a.jpg"}]
    put(str(tmp_path), {"data/x.parquet": parquet({"image": values})})
    found = list(contents(f"{tmp_path}/data/x.parquet").values())
    assert found == [b"beside" if path == "a.jpg" else b"above", b"own" if some else b"beside"]


def test_a_path_in_a_bucket_is_found_there(s3_bucket: str) -> None:
    put(s3_bucket, {"data/x.parquet": parquet({"image": [{"bytes": None, "path": "img/a.jpg"}]}), "img/a.jpg": b"x"})
    assert contents(f"{s3_bucket}/data") == {"x.parquet#0": b"x"}


@pytest.mark.parametrize("path", ["gone.jpg", "../secret.jpg"])
def test_paths_that_lead_nowhere_are_refused_at_the_start_and_rows_later(tmp_path: Path, path: str) -> None:
    put(str(tmp_path / "in"), {"x.parquet": parquet({"image": [{"bytes": None, "path": path}] * 2})})
    put(str(tmp_path), {"secret.jpg": b"x"})
    with pytest.raises(ValueError, match=rf"the first .*row 0 has no bytes, and there is no '{path}' beside"):
        check_source(str(tmp_path / "in"))
    (record, _) = scan(str(tmp_path / "in"))
    assert status_of(record)[0] is Status.MISSING


def test_a_row_without_bytes_and_path_is_empty(tmp_path: Path) -> None:
    values = [{"bytes": None, "path": None}, {"bytes": b"x", "path": None}]
    put(str(tmp_path), {"x.parquet": parquet({"image": values})})
    assert list(contents(str(tmp_path)).values()) == [b"", b"x"]


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
