"""A table of photos as a source: where they lie, what they are called, and keys that go along to every part."""

from __future__ import annotations

import datetime
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse_config
from pipeline.engine.missing import judge_missing
from pipeline.engine.shards import ShardActor, StageJob
from pipeline.engine.stage import Stage
from pipeline.sources.choice import Choice
from pipeline.sources.fetch import UNREACHED, Fetcher
from pipeline.sources.index import Index, build_index, check_source, open_index
from pipeline.sources.manifest import open_manifest
from pipeline.sources.scan import detect_format, scan
from pipeline.store import storage
from pipeline.store.retries import ONCE
from tests.pipeline.sources.image_sources import put
from workers.phases import Phases
from workers.records import ImageRecord, Status

CSV = b'\xef\xbb\xbfuri,patient,note\na.jpg,0012,"one, two"\nb/c.jpg,0013,\n'
JSON = (
    b'{"uri": "a.jpg", "age": 3, "weight": 1, "tags": ["x"], "ok": true}\n\n'
    b'{"uri": "b/c.jpg", "age": null, "weight": 2.5, "tags": "y", "ok": false, "status": "new"}\n'
)


def as_parquet(**columns: object) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def indexed(tmp_path: Path, uri: str, choice: Choice = Choice()) -> Index:  # noqa: B008
    return build_index(str(tmp_path / "index"), uri, shard_size=100, choice=choice)


def test_csv(source: str, tmp_path: Path) -> None:
    put(source, {"photos.csv": CSV, "a.jpg": b"one", "b/c.jpg": b"two"})
    index = indexed(tmp_path, f"{source}/photos.csv")
    assert (index.format, index.images, index.keys) == ("manifest", 2, ["patient", "note"])
    records = index.records(0)
    assert records == [
        ImageRecord("a.jpg", f"{source}/a.jpg", 0, 0),
        ImageRecord("b/c.jpg", f"{source}/b/c.jpg", 0, 0),
    ]
    assert [index.fetcher().fetch(record) for record in records] == [b"one", b"two"]
    assert index.key_table(0).to_pydict() == {"patient": ["0012", "0013"], "note": ["one, two", ""]}
    assert open_index(index.folder) == index
    assert check_source(f"{source}/photos.csv").image_id == "a.jpg"


def test_json_lines_keep_the_types_that_all_rows_share(tmp_path: Path) -> None:
    put(str(tmp_path), {"photos.jsonl": JSON})
    assert indexed(tmp_path, str(tmp_path / "photos.jsonl")).key_table(0).to_pydict() == {
        "age": [3, None],
        "weight": [1.0, 2.5],
        "tags": ['["x"]', "y"],
        "ok": [True, False],
        "key_status": [None, "new"],  # parts have a status of their own
    }


def test_parquet_with_a_column_of_places(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    table = as_parquet(url=["https://x.org/p/a.jpg?sig=1", "s3://b/c.jpg", "/d/../e.jpg"], day=[day, None, day])
    put(str(tmp_path), {"photos.parquet": table})
    uri = str(tmp_path / "photos.parquet")
    assert detect_format(uri, uri_column="url") == "manifest"
    with pytest.raises(ValueError, match=r"source\.image_column: .* has no column 'image', only url, day"):
        list(scan(uri))
    index = indexed(tmp_path, uri, Choice(uri_column="url"))
    found = [(record.image_id, record.uri) for record in index.records(0)]
    assert found == [
        ("x.org/p/a.jpg", "https://x.org/p/a.jpg?sig=1"),
        ("b/c.jpg", "s3://b/c.jpg"),
        ("d/e.jpg", "/e.jpg"),
    ]
    assert index.key_table(0)["day"].to_pylist() == [day, None, day]


def test_photos_and_places_in_one_table_are_photos(tmp_path: Path) -> None:
    put(
        str(tmp_path),
        {"x.parquet": as_parquet(image=[b"photo"], uri=["a.jpg"]), "y.parquet": as_parquet(img=["a.jpg"])},
    )
    assert detect_format(str(tmp_path / "x.parquet")) == "parquet"
    with pytest.raises(
        ValueError, match=r"'img' of .* is string; .*source\.format: manifest and source\.uri_column: img"
    ):
        list(scan(str(tmp_path / "y.parquet"), image_column="img"))


def test_names_are_unique_and_stay_below_a_folder(tmp_path: Path) -> None:
    put(str(tmp_path), {"m.csv": b"uri\n../x/a.jpg\nx/a.jpg\nhttp://h//a.jpg#f\nx/a.jpg\n"})
    names = [record.image_id for record in scan(str(tmp_path / "m.csv"))]
    assert names == ["x/a.jpg", "x/a.jpg~2", "h/a.jpg", "x/a.jpg~3"]
    put(str(tmp_path), {"n.csv": b"image_id,uri\nfirst,x/a.jpg\nsecond,x/a.jpg\n"})
    assert [record.image_id for record in scan(str(tmp_path / "n.csv"))] == ["first", "second"]
    assert open_manifest(str(tmp_path / "n.csv")).keys.names == []


def test_patterns_and_samples_choose_among_the_rows(tmp_path: Path) -> None:
    rows = "".join(f"{kind}/{number}.jpg,{kind}\n" for kind in ("train", "val") for number in range(9))
    put(str(tmp_path), {"m.csv": f"uri,kind\n{rows}".encode()})
    index = indexed(tmp_path, str(tmp_path / "m.csv"), Choice(include=("val/",), limit=4))
    assert index.key_table(0)["kind"].to_pylist() == ["val"] * 4
    assert (index.ignored.not_chosen, index.ignored.not_sampled) == (9, 5)


def test_an_image_id_of_0_is_one(tmp_path: Path) -> None:
    put(str(tmp_path), {"m.jsonl": b'{"uri": "x/a.jpg", "image_id": 0}\n{"uri": "x/b.jpg", "image_id": 1}\n'})
    assert [record.image_id for record in open_manifest(str(tmp_path / "m.jsonl")).records()] == ["0", "1"]


def test_keys_are_part_of_what_the_index_is(tmp_path: Path) -> None:
    digests = set()
    for value in (b"1", b"2"):
        put(str(tmp_path), {"m.csv": b"uri,split\na.jpg," + value})
        digests.add(indexed(tmp_path, str(tmp_path / "m.csv")).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "m.csv",
            b"url,x\na.jpg,1\n",
            r"source\.uri_column: the manifest .*m\.csv has no column 'uri'; its columns: url, x",
        ),
        ("m.csv", b"", r"source\.uri_column: .* has no column 'uri'; its columns: none"),
        ("m.csv", b"uri\n", r"source\.uri: no image in .*m\.csv"),
        ("m.csv", b"uri,x\na.jpg\n", r"source\.uri: the manifest .*: line 2 has not as many fields as the header"),
        ("m.csv", b'uri\n"a.jpg\n', r"source\.uri: the manifest .*: line 1: unexpected end of data"),
        ("m.csv", b"uri\n\xff\n", r"source\.uri: the manifest .*can't decode byte 0xff"),
        ("m.csv", b'uri,x\n"",1\n', r"source\.uri: row 1 of .* has no place of a photo in 'uri': ''"),
        ("m.csv", b"uri\nhttps://me:secret@h/a.jpg\n", r"row 1 of .*: https://\*\*\*@h/a\.jpg holds a user and a pass"),
        ("m.csv", b"uri,image_id\na,x\nb,x\n", r"row 2 of .*: the image_id 'x' comes twice"),
        ("m.csv", b"uri,height,key_height\na,1,2\n", r"two columns of .*m\.csv would both be the key 'key_height'"),
        ("m.jsonl", b'{"uri": "a"}\n{"uri"\n', r"source\.uri: the manifest .*: line 2 is not JSON"),
        ("m.jsonl", b"[1]\n", r"source\.uri: the manifest .*: line 1 must hold an object, got '\[1\]"),
        ("m.parquet", b"PAR1", r"source\.uri: .*m\.parquet"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    put(str(tmp_path / "source"), {name: content})
    with pytest.raises(ValueError, match=said):
        indexed(tmp_path, str(tmp_path / "source" / name))


def test_a_manifest_is_one_file(tmp_path: Path) -> None:
    put(str(tmp_path), {"m.csv": CSV})
    with pytest.raises(ValueError, match=r"a manifest is one file whose name ends in \.parquet, \.jsonl"):
        list(scan(str(tmp_path), "manifest"))


# From the web


@pytest.fixture
def web() -> Iterator[str]:
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = {"/a.jpg": 200, "/secret.jpg": 403}.get(self.path, 404)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"photo" if status == 200 else b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_photos_of_the_web_are_fetched_or_rows(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.fetch.BRIEF", ONCE)
    places = [f"{web}/a.jpg", f"{web}/gone.jpg", f"{web}/secret.jpg", "http://127.0.0.1:1/a.jpg"]
    put(str(tmp_path), {"m.csv": "\n".join(["uri", *places]).encode()})
    records, fetcher = list(scan(str(tmp_path / "m.csv"))), Fetcher()
    assert fetcher.fetch(records[0]) == b"photo"
    said = []
    for record in records[1:]:
        with pytest.raises(storage.store_errors(record.uri)) as caught:
            fetcher.fetch(record)
        status, message = fetcher.fetch_status(record, caught.value)
        assert status is Status.MISSING
        said.append(message)
    assert [UNREACHED in message for message in said] == [False, False, True]
    assert "FileNotFoundError" in said[0] and "403" in said[1]
    assert check_source(str(tmp_path / "m.csv")).image_id.endswith("a.jpg")


def test_a_shard_fails_when_no_server_is_reached(tmp_path: Path) -> None:
    put(str(tmp_path), {"m.csv": CSV})
    index = indexed(tmp_path, str(tmp_path / "m.csv"))
    error = f"http://h/a.jpg: {UNREACHED}: TimeoutError: "
    rows = pa.table({"image_id": ["a.jpg", "b.jpg"], "status": ["missing"] * 2, "error": [error] * 2})
    with pytest.raises(ConnectionError, match="none of the servers of 2 photos was reached"):
        judge_missing(rows, index, (), "auto")
    some = pa.table({"image_id": ["a.jpg", "b.jpg"], "status": ["missing", "ok"], "error": [error, None]})
    assert judge_missing(some, index, (), "auto") is some


# In the parts


class Places(ShardActor):
    """Writes where the photos lie."""

    def setup(self) -> None:
        pass

    def process(self, shard: int, phases: Phases) -> pa.Table:
        records = self.index.records(shard)
        return pa.table({"uri": [record.uri for record in records], "status": ["ok"] * len(records)})


def test_every_part_has_the_keys_and_no_secret(tmp_path: Path) -> None:
    signed = "https://x.org/a.jpg?X-Amz-Signature=abc"
    put(str(tmp_path), {"m.csv": f"uri,split,uri_text\n{signed},train,x\nb.jpg,val,y\n".encode()})
    index = build_index(str(tmp_path / "index"), str(tmp_path / "m.csv"), shard_size=1)
    assert index.records(0)[0].uri == signed
    config = parse_config({"source": {"uri": index.source}, "run": {"uri": str(tmp_path)}}, origin="test")
    schema = pa.schema([("uri", pa.string()), ("status", pa.string())])
    stage = Stage("places", "shard", "0" * 12, str(tmp_path / "places"), 2)
    actor = Places(StageJob(stage, config, index.folder, {}, {}, schema=schema))
    assert all(actor.run(shard).ok for shard in range(2))
    assert [pq.read_table(stage.part(shard)).to_pylist() for shard in range(2)] == [
        [{"uri": "https://x.org/a.jpg?X-Amz-Signature=***", "status": "ok", "split": "train", "uri_text": "x"}],
        [{"uri": str(tmp_path / "b.jpg"), "status": "ok", "split": "val", "uri_text": "y"}],
    ]
