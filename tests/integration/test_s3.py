"""The same run with source and run folder in a bucket, over a network that fails; and all that is done with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.checkpoint.files import Checkpoint, to_files
from pipeline.config import Config, load_config
from pipeline.engine.lease import run_lease
from pipeline.engine.receipts import read_receipts
from pipeline.engine.stage import Stage, index_folder
from pipeline.export.coco import export_coco
from pipeline.operations.status import run_status
from pipeline.predict.run import predict_photos
from pipeline.report.write import write_report
from pipeline.sources.index import open_index
from pipeline.stages.run import resolve_run
from pipeline.store import storage
from tests.conftest import forget_filesystems
from tests.fault_proxy import (
    ACCESS_DENIED,
    INTERNAL_ERROR,
    SLOW_DOWN,
    Answer,
    Cut,
    FaultProxy,
    Outage,
    Reset,
    Rule,
)
from tests.integration.conftest import SCENES, SHARDS, Start, finish, rows
from tests.tiny_panoptic import KEYWORDS, STUFF, THINGS, tiny_model

FAULTS = [
    Rule(Outage(2), method="PUT", key="instances/.*part-00003"),
    Rule(Reset(forwarded=True), method="PUT", key=r"lease\.json"),  # the answer to our own conditional create
    *(Rule(SLOW_DOWN, method=method, rate=0.1, times=None) for method in ("GET", "PUT")),
    Rule(INTERNAL_ERROR, rate=0.05, times=None),
    Rule(Cut(), method="GET", rate=0.05, times=None),
    Rule(Cut(reset=True), method="GET", key="photos", rate=0.05, times=None),
    Rule(Reset(forwarded=True), method="PUT", rate=0.1, times=None),
    Rule(Reset(), rate=0.03, times=None),
]
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAHUSH",
    "AWS_SECRET_ACCESS_KEY": "hush-hush-key",
    "AWS_SESSION_TOKEN": "hush-hush-token",
}


@pytest.mark.slow
def test_a_bucket_behind_a_bad_network_gives_the_rows_of_a_folder(
    labelled: Path,
    config_file: Path,
    scenes: Path,
    s3_bucket: str,
    proxy: FaultProxy,
    start_u2label: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Faults at seeded points of a run are not noticed, a store that refuses is; no secret anywhere."""
    put_folder(scenes, f"{s3_bucket}/photos")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    forget_filesystems()
    places = [f"source.uri={s3_bucket}/photos", f"run.uri={s3_bucket}/run"]
    command = ["run", str(config_file), "--set", places[0], "--set", places[1]]
    proxy.plan([Rule(ACCESS_DENIED, method="PUT", key="panoptic/.*part-00002"), *FAULTS], seed=4)
    said = finish(start_u2label(*command), 1)
    assert "AccessDenied" in said
    config = load_config(str(config_file), places)
    assert [(stage.done, stage.failed) for stage in run_status(config).stages] == [(SHARDS, []), (1, []), (7, [2])]
    assert {type(request.fault) for request in proxy.faults()} == {Outage, Answer, Cut, Reset}
    assert len(proxy.faults()) > 30

    said += finish(start_u2label(*command), 0)
    assert "1 of 8 shards to do" in said
    proxy.plan()
    table = resolve_run(config, open_index(index_folder(config))).stages
    for name in ("instances", "panoptic"):
        assert bucket_rows(table[name]) == local_rows(labelled, name)
    assert_whole(config, table)
    for name, data in contents(f"{s3_bucket}/run").items():
        assert not [secret for secret in SECRETS.values() if secret.encode() in data], name
    assert not [secret for secret in SECRETS.values() if secret in said]


def assert_whole(config: Config, table: dict[str, Stage]) -> None:
    """All is done, every receipt's last word is ok, and nothing is left lying about."""
    assert [stage.done for stage in run_status(config).stages] == [SHARDS, 1, SHARDS]
    for name in ("instances", "panoptic"):
        receipts = read_receipts(config.run.uri, name, table[name].fingerprint)
        assert [(receipt.shard, receipt.ok) for receipt in receipts] == [(shard, True) for shard in range(SHARDS)]
    with run_lease(config.run.uri):  # free, or of a run that is over and was refused when it gave the lease back
        pass
    keys = [info.path for info in storage.walk(config.run.uri)]
    assert not [key for key in keys if storage.TEMPORARY in key or key.endswith("lease.json")]
    fs, bucket = storage.filesystem(config.run.uri.removesuffix("/run"))
    assert "Uploads" not in fs.call_s3("list_multipart_uploads", Bucket=bucket)


def test_a_run_in_a_bucket_is_exported_reported_and_predicted_from(
    labelled: Path, scenes: Path, s3_bucket: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    put_folder(labelled, f"{s3_bucket}/run")
    put_folder(scenes, f"{s3_bucket}/photos")
    for name, data in tiny_checkpoint().items():
        storage.write_bytes(f"{s3_bucket}/model/{name}", data)
    proxy.plan([rule for rule in FAULTS if not isinstance(rule.fault, Outage)], seed=2)

    exported = export_coco(f"{s3_bucket}/run", f"{s3_bucket}/run", output=f"{s3_bucket}/coco")
    local = export_coco(str(labelled), str(labelled), output=str(tmp_path / "coco"))
    assert (exported.images, exported.segments) == (local.images, local.segments)
    assert contents(f"{s3_bucket}/coco") == contents(str(tmp_path / "coco"))

    assert write_report(f"{s3_bucket}/run", None) == f"{s3_bucket}/run/report.html"
    assert storage.read_bytes(f"{s3_bucket}/run/report.html").count(b"scene-000") >= SCENES

    inputs = f"{s3_bucket}/photos/scene-0000[0-3].jpg"
    found = predict_photos(f"{s3_bucket}/model", inputs, f"{s3_bucket}/out", short=96)
    assert (found.photos, found.failed) == (4, [])
    for name, data in contents(f"{s3_bucket}/model").items():
        storage.write_bytes(str(tmp_path / "model" / name), data)
    predict_photos(str(tmp_path / "model"), f"{scenes}/scene-0000[0-3].jpg", str(tmp_path / "out"), short=96)
    there, here = contents(f"{s3_bucket}/out"), contents(str(tmp_path / "out"))
    assert there.pop("predict.json") != here.pop("predict.json")  # it names weights and photos
    assert there == here
    assert len(proxy.faults()) > 10


def tiny_checkpoint() -> dict[str, bytes]:
    model = tiny_model()
    config: dict[str, Any] = {"num_things": THINGS, "num_stuff": STUFF, "model": KEYWORDS}
    return to_files(Checkpoint(dict(model.state_dict()), config))


def put_folder(folder: Path, uri: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def contents(uri: str) -> dict[str, bytes]:
    return {info.path: storage.read_bytes(f"{uri}/{info.path}") for info in storage.walk(uri)}


def bucket_rows(stage: Stage) -> list[dict[str, Any]]:
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(part))) for part in stage.parts()]
    return without_uri(pa.concat_tables(tables).to_pylist())


def local_rows(run: Path, stage: str) -> list[dict[str, Any]]:
    return without_uri(rows(run, stage))


def without_uri(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "uri"} for row in found]
