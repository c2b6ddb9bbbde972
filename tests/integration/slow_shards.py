"""A driver of its own for tests of several nodes: shards of nothing but waiting, each attempt leaving a mark.

    python -m tests.integration.slow_shards ADDRESS CONFIG MARKS ACTOR...

Joins the Ray cluster, runs all shards of the config's first stage with one actor after the other, and prints their
receipts, one a line. A mark is an empty file `<shard>-<node>-<attempt>`. Shards wait for a second, and no more once
there is a mark `go`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pyarrow as pa
import ray

from pipeline.config import load_config
from pipeline.engine.cluster import connect
from pipeline.engine.pool import run_shards
from pipeline.engine.shards import ShardActor, StageJob
from pipeline.engine.stage import index_folder
from pipeline.sources.index import build_index
from pipeline.stages.table import resolve_stages
from workers.phases import Phases


class SlowShards(ShardActor):
    def setup(self) -> None:
        self.marks = Path(self.job.metadata["marks"])

    def process(self, shard: int, phases: Phases) -> pa.Table:
        node = ray.get_runtime_context().get_node_id()
        (self.marks / f"{shard}-{node}-{self.attempts.current.number}").touch()
        if not (self.marks / "go").exists():
            time.sleep(1)
        return pa.table({"image_id": [record.image_id for record in self.index.records(shard)], "status": ["ok"]})


class SlowDeviceShards(SlowShards):
    uses_device = True


def main(address: str, config_file: str, marks: str, *actors: str) -> None:
    config = load_config(config_file)
    index = build_index(index_folder(config), config.source.uri, shard_size=config.source.shard_size)
    table = resolve_stages(config, index)
    job = StageJob(table["instances"], config, index_folder(config), table, {"marks": marks})
    with connect(config.workers, address):
        for actor in actors:
            for receipt in run_shards(globals()[actor], job, range(index.shards), config.workers):
                print(receipt.to_json(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
