"""Several nodes: stages spread over them, use those that join, survive those that vanish, and go where they belong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.cluster_utils import Cluster

from pipeline.engine.attempts import Leaving
from pipeline.engine.receipts import Receipt
from pipeline.stages.instances import InstanceShards
from pipeline.stages.panoptic import PanopticShards
from pipeline.stages.stego import StegoShards
from tests.conftest import RAY_ENVIRONMENT
from tests.integration.conftest import DEADLINE_S, Start, finish, write_config
from tests.integration.conftest import SHARDS as SCENE_SHARDS

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 150  # enough for the time that Ray Data takes to see a new node, half a minute at most


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of 1 CPU, one of which has the custom resource `card`. This process does not
    join it: drivers are processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        nodes.add_node(num_cpus=1, resources={"card": 1})
        yield nodes
        nodes.shutdown()


def node_id(cluster: Cluster, **resources: float) -> str:
    """The id of the one living node that has these resources."""
    nodes = [node for node in cluster.global_state.node_table() if node["Alive"]]
    (found,) = (node["NodeID"] for node in nodes if resources.items() <= node["Resources"].items())
    return str(found)


def marks(folder: Path) -> dict[str, set[int]]:
    """The shards that were begun on each node."""
    begun = defaultdict(set)
    for mark in folder.glob("*-*"):
        shard, node, _ = mark.name.split("-")
        begun[node].add(int(shard))
    return begun


def wait_for(ready: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert process.poll() is None, process.communicate()[0][-2000:]
        assert time.monotonic() < deadline, "nothing came in time"
        time.sleep(0.02)


@pytest.fixture
def slow_run(tmp_path: Path, cluster: Cluster) -> Iterator[Start]:
    """Start `slow_shards` with some actors on so many photos; its marks go to `tmp_path / "marks"`."""
    started: list[subprocess.Popen[str]] = []

    def start(*actors: str, shards: int, workers: dict[str, Any]) -> subprocess.Popen[str]:
        (tmp_path / "photos").mkdir()
        (tmp_path / "marks").mkdir()
        for number in range(shards):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / f"{number:03d}.png")
        workers = {"memory_gb": 0.1, **workers}
        config = write_config(tmp_path / "photos", tmp_path, shard_size=1, workers=workers)
        command = (cluster.address, str(config), str(tmp_path / "marks"), *actors)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.slow_shards", *command],
            env=os.environ | RAY_ENVIRONMENT,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def receipts_of(process: subprocess.Popen[str]) -> list[Receipt]:
    return [Receipt.from_json(line) for line in finish(process, 0).splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_node_that_joins_is_used_and_one_that_vanishes_costs_its_shards_in_flight(
    cluster: Cluster, tmp_path: Path, slow_run: Start
) -> None:
    begun = tmp_path / "marks"
    process = slow_run("SlowShards", shards=SHARDS, workers={"size": {"min": 2, "max": 3}})
    wait_for(lambda: len(marks(begun)) == 2, process)
    doomed = cluster.add_node(num_cpus=1, resources={"doomed": 1})
    vanished = node_id(cluster, doomed=1)
    wait_for(lambda: len(marks(begun)[vanished]) >= 2, process)
    cluster.remove_node(doomed, allow_graceful=False)
    (begun / "go").touch()
    receipts = receipts_of(process)
    assert sorted(receipt.shard for receipt in receipts) == list(range(SHARDS))
    assert all(receipt.ok for receipt in receipts)
    assert {receipt.node for receipt in receipts} == set(marks(begun))
    assert len(marks(begun)) == 3
    again = {receipt.shard for receipt in receipts if receipt.attempt > 1 or receipt.second}
    assert len(again) <= 1  # the one actor of the node
    assert again <= marks(begun)[vanished]
    assert (
        len(again) <= len(list(begun.glob("*-*"))) - SHARDS <= 2 * len(again)
    )  # by its worker's successor, or a second
    names = [f"{number:03d}.png" for number in range(SHARDS)]
    parts = sorted((tmp_path / "run" / "instances").glob("*/part-*.parquet"))
    assert [name for part in parts for name in pq.read_table(part)["image_id"].to_pylist()] == names
    assert not list((tmp_path / "run").rglob(".tmp-*"))


@pytest.mark.slow
def test_nothing_is_begun_on_a_node_that_got_notice_to_go(cluster: Cluster, tmp_path: Path, slow_run: Start) -> None:
    begun = tmp_path / "marks"
    spot = cluster.add_node(num_cpus=2, resources={"spot": 1})
    leaving = node_id(cluster, spot=1)
    process = slow_run("SlowShards", shards=24, workers={"size": 3})
    wait_for(lambda: len(marks(begun)[leaving]) >= 1, process)
    command = ["drain-node", "--address", cluster.address, "--node-id", leaving, "--reason-message", "spot"]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "600"]
    subprocess.run([Path(sys.executable).with_name("ray"), *command, *reason], check=True, capture_output=True)
    time.sleep(Leaving.EVERY_S + 2)  # the ledger asks, and what is under way ends
    before = marks(begun)[leaving]
    receipts = receipts_of(process)
    cluster.remove_node(spot)
    assert marks(begun)[leaving] == before
    assert len(before) < 12
    assert sorted(receipt.shard for receipt in receipts) == list(range(24))
    assert all(receipt.ok and receipt.attempt == 1 for receipt in receipts), "to leave is no death"


@pytest.mark.slow
def test_stages_with_a_device_go_to_the_nodes_with_the_resource_and_others_anywhere(
    cluster: Cluster, slow_run: Start
) -> None:
    workers = {"size": 2, "cpus": 0.5, "resources": {"card": 0.5}}
    receipts = receipts_of(slow_run("SlowDeviceShards", "SlowShards", shards=8, workers=workers))
    with_device, without = ({receipt.node for receipt in some} for some in (receipts[:8], receipts[8:]))
    assert with_device == {node_id(cluster, card=1)}
    assert without - with_device
    assert [actor.uses_device for actor in (InstanceShards, StegoShards, PanopticShards)] == [True, True, False]


@pytest.mark.slow
def test_a_run_waits_for_a_node_that_was_asked_for(cluster: Cluster, tmp_path: Path, scenes: Path) -> None:
    config = write_config(scenes, tmp_path, workers={"size": 1, "cpus": 1, "memory_gb": 0.6, "resources": {"late": 1}})
    command = ["run", str(config), "--stages", "instances", "--address", cluster.address, "--wait-for-resources", "2m"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *command],
        env=os.environ | RAY_ENVIRONMENT,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "waiting for nodes" in line:
            break
    node = cluster.add_node(num_cpus=1, resources={"late": 1})
    try:
        said += finish(process, 0).splitlines(keepends=True)
    finally:
        cluster.remove_node(node)
    assert "workers.resources asks for 'late', which no node" in "".join(said)
    assert "the nodes are there\n" in said
    assert len(list((tmp_path / "run" / "instances").glob("*/part-*.parquet"))) == SCENE_SHARDS
