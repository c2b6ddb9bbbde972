"""The same run with source and run folder in a bucket."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import load_config
from pipeline.sources import open_index
from pipeline.stages import index_folder, resolve_stages
from pipeline.status import run_status
from tests.integration.conftest import SHARDS, Start, finish, rows


def test_a_bucket_gives_the_rows_of_a_folder(
    labelled: Path, config_file: Path, scenes: Path, s3_bucket: str, start_u2label: Start
) -> None:
    for photo in sorted(scenes.iterdir()):
        storage.write_bytes(f"{s3_bucket}/photos/{photo.name}", photo.read_bytes())
    places = [f"source.uri={s3_bucket}/photos", f"run.uri={s3_bucket}/run"]
    command = ["run", str(config_file), "--set", places[0], "--set", places[1]]
    finish(start_u2label(*command), 0)
    config = load_config(str(config_file), places)
    table = resolve_stages(config, open_index(index_folder(config)))
    for name in ("instances", "panoptic"):
        tables = [pq.read_table(pa.BufferReader(storage.read_bytes(part))) for part in table[name].parts()]
        found, expected = pa.concat_tables(tables).to_pylist(), rows(labelled, name)
        for row in (*found, *expected):
            row.pop("uri", None)
        assert found == expected
    keys = [info.path for info in storage.walk(f"{s3_bucket}/run")]
    assert not [key for key in keys if storage.TEMPORARY in key or key.endswith("lease.json")]
    storage.remove(table["instances"].part(2))
    assert [stage.done for stage in run_status(config).stages] == [SHARDS - 1, 1, SHARDS]
    assert "1 of 8 shards to do" in finish(start_u2label(*command, "--set", "workers.size=1"), 0)
    assert [stage.done for stage in run_status(config).stages] == [SHARDS, 1, SHARDS]
