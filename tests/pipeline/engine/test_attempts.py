"""Who is to blame when workers die: an image, its shard, or the node."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.exceptions import RayActorError, RpcError

from pipeline.config import Config
from pipeline.engine.attempts import Attempt, Attempts, HangLimit, Leaving, Ledger, Second, start_ledger
from pipeline.engine.pool import run_shards
from pipeline.engine.receipts import Receipt
from pipeline.engine.shards import CRASHED, StageJob
from pipeline.engine.stage import index_folder
from pipeline.operations.demo.scenes import write_scenes
from pipeline.sources.index import build_index
from pipeline.stages.instances import InstanceShards
from pipeline.stages.table import resolve_stages
from pipeline.store.retries import Retry
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


def test_nothing_begins_on_a_node_that_leaves_and_nobody_is_blamed() -> None:
    book = Ledger(2, lambda node: True, node_leaves=lambda node: node == "spot")
    assert [book.begin(0, "spot") for _ in range(3)] == [Attempt(leave=True)] * 3
    assert book.begin(0, "n") == Attempt(1)


def test_a_head_that_is_away_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = Leaving()
    monkeypatch.setattr(leaving, "ask", lambda: {"spot"})
    assert (leaving("spot"), leaving("n")) == (True, False)

    def away() -> set[str]:
        raise RpcError("no head")

    monkeypatch.setattr(leaving, "ask", away)
    monkeypatch.setattr(leaving, "EVERY_S", -1.0)
    assert (leaving("spot"), leaving("n")) == (True, False), "as it was last told"


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

    def retry(self, times: int) -> bool:
        """A store that fails so often, with pauses of 0.25 to 0.5 s."""
        answers = iter([TimeoutError] * times)

        def ask() -> bool:
            for error in answers:
                raise error
            return True

        with self.attempts.attempt(0):
            return Retry(first_pause_s=0.5, longest_pause_s=0.5).call(ask, "it", (TimeoutError,))


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


class OneSlowShards(InstanceShards):
    """The worker that takes shard 0 would need an hour for it; the others wait until it has begun."""

    def process(self, shard: int, phases: Phases) -> pa.Table:
        mark = Path(self.job.metadata["mark"])
        if shard == 0 and not mark.exists():
            mark.touch()
            time.sleep(3600)
        while not mark.exists():
            time.sleep(0.05)
        return super().process(shard, phases)


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_is_late_is_done_by_a_worker_that_has_none(scenes: Path, tmp_path: Path) -> None:
    todo = job(scenes, size=2)
    todo = replace(todo, metadata={"mark": str(tmp_path / "mark")})
    for part in todo.stage.parts():
        Path(part).unlink(missing_ok=True)
    receipts = {receipt.shard: receipt for receipt in run_shards(OneSlowShards, todo, range(3), todo.config.workers)}
    assert {shard: (receipt.ok, receipt.second) for shard, receipt in receipts.items()} == {
        0: (True, True),
        1: (True, False),
        2: (True, False),
    }
    assert all(Path(part).exists() for part in todo.stage.parts())


def late_ledger(monkeypatch: pytest.MonkeyPatch) -> tuple[Ledger, list[float]]:
    """Of shards 0 to 3, with a clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return Ledger(3, lambda _: True, range(4)), now


def test_only_shards_that_take_longer_than_others_are_done_twice_and_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book, now = late_ledger(monkeypatch)
    for shard in (0, 1, 2):
        book.begin(shard, "n")
    now[0] = 10
    book.end(0)
    assert book.second() == Second(later=True), "shard 3 is not begun"
    book.begin(3, "n")
    assert book.second() == Second(later=True), "10 s are usual"
    now[0] = 16
    assert book.second() == Second(1), "the first of those that began first"
    assert book.second() == Second(2)
    assert book.second() == Second(later=True), "shard 3 is not late"
    assert not book.is_done(1)
    book.done(1)
    book.done(3)
    assert (book.is_done(1), book.is_done(3)) == (True, False)
    book.end(1)
    book.end(3)
    assert book.second() == Second(), "shard 2 has its second"


def test_a_shard_that_killed_a_worker_is_not_given_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    book, now = late_ledger(monkeypatch)
    for shard in range(4):
        book.begin(shard, "n")
    now[0] = 1
    for shard in (1, 2, 3):
        book.end(shard)
    book.begin(0, "n")
    now[0] = 1000
    assert book.second() == Second()


def test_who_has_written_first_is_not_written_over(scenes: Path) -> None:
    actor = InstanceShards(job(scenes))
    actor.run(0)
    before = Path(actor.job.stage.part(0)).stat().st_mtime_ns
    actor.attempts.is_done = lambda _: True  # type: ignore[method-assign]
    assert len(actor(batch={"shard": np.array([0])})["receipt"]) == 0
    assert Path(actor.job.stage.part(0)).stat().st_mtime_ns == before


def test_how_long_a_worker_may_be_silent() -> None:
    now = [0.0]
    watch = HangLimit(3600, 8, clock=lambda: now[0])
    watch.begin()
    for _ in range(15):
        now[0] += 3
        watch.count()
    assert watch.limit_s(one_by_one=False) == 3600, "not known yet"
    now[0] += 1000  # between two shards
    watch.begin()
    now[0] += 3
    watch.count()
    assert watch.limit_s(one_by_one=False) == 10 * 8 * 3
    assert watch.limit_s(one_by_one=True) == 3600
    for _ in range(1000):
        watch.count()
    assert watch.limit_s(one_by_one=False) == 120
    now[0] += 10_160  # all photos of a shard were taken in at once, and then it took its time
    watch.end()
    assert watch.limit_s(one_by_one=False) == 10 * 8 * (10_160 + 48) / 1016
    assert HangLimit(60, 8).limit_s(one_by_one=False) == 60
    assert HangLimit(None, 1).limit_s(one_by_one=False) is None


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_asks_a_store_again_does_not_hang() -> None:
    worker = ray.remote(Worker).remote(start_ledger(3))
    assert ray.get(worker.retry.remote(8)), "each pause is shorter than the limit of a second, all together are not"
