"""Who is to blame when workers die: an image, its shard, or the node."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.exceptions import RayActorError

from pipeline.config import Config
from pipeline.engine.attempts import Attempt, Attempts, Ledger, start_ledger
from pipeline.engine.pool import run_shards
from pipeline.engine.receipts import Receipt
from pipeline.engine.shards import CRASHED, StageJob
from pipeline.engine.stage import index_folder
from pipeline.operations.demo.scenes import write_scenes
from pipeline.sources.index import build_index
from pipeline.stages.instances import InstanceShards
from pipeline.stages.table import resolve_stages
from workers.images import LoadedImage
from workers.phases import Phases
from workers.records import ImageRecord

IMAGES, SHARD_SIZE, POISON = 9, 3, "scene-00002.jpg"


def ledger(limit: int = 3, dead_nodes: tuple[str, ...] = ()) -> Ledger:
    return Ledger(limit, lambda node: node not in dead_nodes)


def test_an_attempt_that_ends_is_forgotten() -> None:
    book = ledger()
    for _ in range(5):
        assert book.begin(7, "n") == Attempt()
        book.end(7)


def test_an_image_that_kills_alone_as_often_as_is_allowed_is_named_and_the_shard_goes_on() -> None:
    book = ledger(limit=3)
    assert book.begin(0, "n") == Attempt(1)
    assert book.begin(0, "n") == Attempt(2, one_by_one=True)
    book.touch(0, "a")
    book.touch(0, "b")
    assert book.begin(0, "n") == Attempt(3, one_by_one=True)
    book.touch(0, "b")
    assert book.begin(0, "n") == Attempt(4, one_by_one=True, crashed=frozenset({"b"}))
    for number in (5, 6):  # a second image of the shard
        book.touch(0, "c")
        again = book.begin(0, "n")
        assert (again.number, again.given_up) == (number, None)
    assert again.crashed == {"b", "c"}


def test_deaths_without_one_image_to_blame_give_the_shard_up_for_this_run() -> None:
    book = ledger(limit=3)
    for image in ("a", "b", None):
        assert book.begin(0, "n").given_up is None
        book.touch(0, image)
    verdict = book.begin(0, "n")
    assert "killed its worker 3 times at a, b (after 0, 0, 0 s)" in (verdict.given_up or "")
    assert "workers.memory_gb" in (verdict.given_up or "")
    assert book.begin(0, "n") == Attempt()  # forgotten


def test_a_node_that_was_lost_is_not_the_fault_of_a_shard() -> None:
    book = ledger(limit=2, dead_nodes=("gone",))
    assert [book.begin(0, "gone") for _ in range(4)] == [Attempt(number) for number in (1, 2, 3, 4)]
    assert book.begin(0, "n") == Attempt(5)
    assert book.begin(0, "n") == Attempt(6, one_by_one=True)


def test_a_ledger_that_forgot_takes_what_it_is_told() -> None:
    book = ledger()
    book.touch(3, "a")
    book.end(3)
    assert book.begin(3, "n") == Attempt()


class PoisonedShards(InstanceShards):
    """Ends its process at one image of shard 0, at the end of shard 1 whatever it holds, and nowhere in shard 2."""

    def process(self, shard: int, phases: Phases) -> pa.Table:
        table = super().process(shard, phases)
        return os._exit(9) if shard == 1 else table

    def _load(self, record: ImageRecord) -> LoadedImage:
        if record.image_id == POISON:
            os._exit(9)
        return super()._load(record)


class Worker:
    """As little of an actor as can hang at its work, or die while it starts."""

    def __init__(self, ledger: Any, *, dies: bool = False) -> None:
        self.attempts = Attempts(ledger, hang_timeout_s=1.0)
        with self.attempts.attempt() as attempt:
            if attempt.given_up:
                raise RuntimeError(attempt.given_up)
            if dies:
                os._exit(9)

    def work(self, seconds: float) -> str:
        with self.attempts.attempt(0):
            ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # native code that keeps the interpreter's lock
        return self.attempts.node


def job(folder: Path, **workers: Any) -> StageJob:
    config = Config.model_validate(
        {
            "source": {"uri": str(folder / "images"), "shard_size": SHARD_SIZE},
            "run": {"uri": str(folder / "run")},
            "backbone": {"name": "patch-dct", "weights": "random:0"},
            "maskcut": {"image_size": 160, "max_masks": 2, "tau": 0.4},
            "embedding": {"crop_size": 32},
            "workers": {"memory_gb": 0.3, **workers},
        }
    )
    index = build_index(index_folder(config), config.source.uri, shard_size=SHARD_SIZE)
    table = resolve_stages(config, index)
    return StageJob(table["instances"], config, index_folder(config), table, {})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(str(folder), IMAGES, seed=4, size=(96, 96))
    return folder


@pytest.mark.usefixtures("ray_session")
def test_an_image_that_kills_its_worker_becomes_a_row_and_a_shard_that_does_fails_alone(scenes: Path) -> None:
    todo = job(scenes, attempts=2, size=2)
    healthy = InstanceShards(todo)
    assert all(healthy.run(shard).ok for shard in range(3))
    undisturbed = {row["image_id"]: row for part in todo.stage.parts() for row in pq.read_table(part).to_pylist()}
    for part in todo.stage.parts():
        Path(part).unlink()
    receipts = {receipt.shard: receipt for receipt in run_shards(PoisonedShards, todo, range(3), todo.config.workers)}
    assert [receipts[shard].ok for shard in range(3)] == [True, False, True]
    assert receipts[0].rows["crashed"] == 1
    assert (receipts[0].attempt, receipts[2].attempt) == (3, 1)
    assert "shard 1 killed its worker 2 times" in (receipts[1].error or "")
    assert not Path(todo.stage.part(1)).exists()
    rows = [row for shard in (0, 2) for row in pq.read_table(todo.stage.part(shard)).to_pylist()]
    assert len(rows) == 2 * SHARD_SIZE
    (crashed,) = (row for row in rows if row["image_id"] == POISON)
    assert (crashed["status"], crashed["error"], crashed["rle"]) == ("crashed", CRASHED, [])
    assert all(row == undisturbed[row["image_id"]] for row in rows if row != crashed)


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_hangs_in_native_code_is_ended() -> None:
    book = start_ledger(3)
    worker = ray.remote(Worker).remote(book)
    node = ray.get(worker.work.remote(0))
    assert node == ray.get_runtime_context().get_node_id()
    with pytest.raises(RayActorError):
        ray.get(worker.work.remote(3600))
    assert ray.get(book.begin.remote(0, node)) == Attempt(2, one_by_one=True)


@pytest.mark.usefixtures("ray_session")
def test_a_model_that_cannot_be_loaded_is_not_loaded_for_ever() -> None:
    worker = ray.remote(max_restarts=-1)(Worker).remote(start_ledger(2), dies=True)
    with pytest.raises(RayActorError, match="loading the model killed its worker 2 times"):
        ray.get(worker.work.remote(0))


def test_a_watch_that_is_not_needed_ends_nothing(scenes: Path) -> None:
    """Outside Ray there is neither a ledger nor a watch: `run` is the plain function of its shard."""
    actor = InstanceShards(job(scenes, hang_timeout_s=0.001))
    receipt = actor.run(0)
    assert (receipt.ok, receipt.attempt, receipt.node) == (True, 1, "")
    table = actor(batch={"shard": np.array([1])})["receipt"]
    assert Receipt.from_json(table[0]).shard == 1
