"""What a library that writes through pyarrow gets to see of a store."""

from __future__ import annotations

import pickle
from pathlib import Path

from pipeline.store import storage
from pipeline.store.arrow_files import arrow_filesystem
from tests.conftest import KEYS
from tests.fault_proxy import SLOW_DOWN, FaultProxy, Rule


def test_another_process_makes_the_filesystem_for_itself(proxy: FaultProxy, s3_bucket: str) -> None:
    filesystem, path = arrow_filesystem(f"{s3_bucket}/run/ray")
    content = pickle.dumps(filesystem)
    assert not any(word.encode() in content for word in ("S3FileSystem", "fsspec", *KEYS.values()))
    sent = pickle.loads(content)
    proxy.plan([Rule(SLOW_DOWN, method="PUT")])
    with sent.open_output_stream(f"{path}/record.json") as stream:
        stream.write(b"{}")
    assert storage.read_bytes(f"{s3_bucket}/run/ray/record.json") == b"{}"
    assert len(proxy.faults()) == 1


def test_a_local_folder_is_left_to_the_library(tmp_path: Path) -> None:
    assert arrow_filesystem(str(tmp_path)) == (None, str(tmp_path))
