"""Actors must fit the nodes, not only the sum of them: Ray would wait for ever for a place that cannot exist."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from pipeline.config import Config
from pipeline.engine import cluster
from pipeline.engine.cluster import (
    SHORT_FOLDER,
    SOCKET,
    SOCKET_PATH,
    actors_now,
    await_resources,
    check_resources,
    connect,
)
from pipeline.errors import ConfigError

GIB = 2**30


def config(**workers: object) -> Config:
    return Config.model_validate({"source": {"uri": "/a"}, "run": {"uri": "/b"}, "workers": workers})


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of 2 CPUs and 4 GiB, one with a GPU and a custom resource, and a dead one that does not count."""
    resources = [{"CPU": 2, "memory": 4 * GIB}, {"CPU": 2, "memory": 4 * GIB, "GPU": 1, "fast": 1}]
    nodes = [{"Alive": True, "Resources": r} for r in resources] + [{"Alive": False, "Resources": {"CPU": 64}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)


@pytest.mark.usefixtures("two_nodes")
def test_what_fits_is_accepted() -> None:
    check_resources(config(size=4, cpus=1, memory_gb=2).workers)
    check_resources(config(size=1, cpus=2, memory_gb=4, device="cuda", gpus=1, kmeans_device="cuda").workers)
    check_resources(config(size={"min": 4, "max": 100}, cpus=1, memory_gb=2).workers)
    check_resources(config(size=2, cpus=1, memory_gb=2, resources={"fast": 0.5}).workers)


@pytest.mark.usefixtures("two_nodes")
def test_k_means_has_as_many_actors_as_fit_now_within_the_range() -> None:
    assert actors_now(config(size=2, memory_gb=1).workers) == 2
    assert [actors_now(config(size=size, memory_gb=1).workers) for size in ({"max": 3}, {"max": 9})] == [3, 4]
    assert actors_now(config(size={"min": 6, "max": 9}, memory_gb=1).workers) == 6
    assert actors_now(config(size={"max": 9}, memory_gb=1, kmeans_device="cuda").workers) == 1


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"size": 1, "cpus": 3}, r"workers.cpus asks for 3 CPUs in actors of 3, the cluster has 4, its largest node 2"),
        ({"size": 5, "cpus": 1, "memory_gb": 0.1}, r"asks for 5 CPUs"),
        ({"size": 1, "memory_gb": 6}, r"workers.memory_gb asks for 6 GiB of memory in actors of 6"),
        ({"size": 2, "device": "cuda", "gpus": 1}, r"workers.gpus asks for 2 GPUs"),
        ({"size": 3, "cpus": 1, "memory_gb": 2.5}, r"workers.size asks for 3 actors .* the 2 nodes hold 2"),
        ({"size": {"min": 5, "max": 9}, "memory_gb": 0.1}, r"workers.size.min x workers.cpus asks for 5 CPUs"),
        (
            {"resources": {"slow": 0.01}},
            r"asks for 'slow', which no node .*CPU, GPU, fast.*--resources='{\"slow\": 1}'",
        ),
        (
            {"size": 2, "memory_gb": 1, "resources": {"fast": 1}},
            r"workers.resources.fast asks for 2 fast in actors of 1",
        ),
        (
            {"size": 4, "memory_gb": 1, "resources": {"fast": 0.1}},
            r"4 actors .* and 0.1 fast, of which the 2 nodes hold 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(workers: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_resources(config(**workers).workers)


def test_a_run_waits_for_the_nodes_that_it_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = {"Alive": True, "Resources": {"CPU": 2, "memory": 4 * GIB, "card": 1}}
    nodes: list[dict[str, object]] = []
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(cluster.time, "sleep", lambda _: nodes.append(node))
    await_resources(config(size=3, cpus=2, memory_gb=1.5, resources={"card": 0.5}).workers, wait_s=1800)
    assert len(nodes) == 3
    assert asked == [[{"CPU": 2, "memory": 1.5 * GIB, "card": 0.5}] * 3] * 3 + [[]]
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("waiting for nodes, 1800 s at most: workers.resources asks for 'card', which no node")
    assert "asks for 6 CPUs in actors of 2, the cluster has 2" in said[1]
    assert said[-1] == "the nodes are there"


def test_nodes_that_do_not_come_are_waited_for_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, float]]] = []
    slept: list[float] = []
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1, "memory": 8 * GIB}}])
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(cluster.time, "monotonic", lambda: 5.0 * len(slept))
    monkeypatch.setattr(cluster.time, "sleep", slept.append)
    with pytest.raises(ConfigError, match=r"asks for 2 CPUs .*, its largest node 1; lower .*; waited 12 s for it$"):
        await_resources(config(size=1, cpus=2).workers, wait_s=12)
    assert slept == [5.0] * 3
    assert len(asked) == 2 and asked[-1] == []  # the same reason is told once, and nobody brings nodes for nothing
    with pytest.raises(ConfigError, match=r"with --address$"):
        await_resources(config(size=1, cpus=2).workers)
    assert len(asked) == 2


def test_a_run_that_is_interrupted_while_it_waits_wants_no_nodes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, float]]] = []

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(cluster.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        await_resources(config(size=1).workers, wait_s=60)
    assert len(asked) == 2 and asked[-1] == []


def test_k_means_on_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4, "memory": 8 * GIB}}])
    with pytest.raises(ConfigError, match=r"workers.kmeans_device is 'cuda'"):
        check_resources(config(kmeans_device="cuda").workers)


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "localhost:{port}", "ray://127.0.0.1:{port}", "auto"])
def test_an_address_where_nobody_listens_is_refused_in_one_line_and_ray_is_not_asked(
    address: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")  # what auto means
    with pytest.raises(ConfigError, match=r"--address: cannot join .*Connection refused; is it running") as refused:
        cluster._join(address.format(port=closed_port))
    assert "\n" not in str(refused.value)


def test_the_cluster_of_this_machine_that_auto_means_may_have_ended(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{closed_port}")
    with pytest.raises(ConfigError, match=r"'auto': .*Connection refused"):
        cluster._join("auto")


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "auto", "local"])
def test_ray_is_asked_where_somebody_listens_and_where_it_alone_knows(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where no cluster has left its address
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = address.format(port=server.getsockname()[1])
        cluster._join(given)
    assert asked == [given]


def test_a_temporary_folder_too_deep_for_sockets_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room = SOCKET_PATH - len(SOCKET)
    for folder, chosen in (
        ("/" + "l" * (room - 1), None),
        ("/" + "l" * room, SHORT_FOLDER),
        ("/" + "ü" * 20, SHORT_FOLDER),
    ):
        monkeypatch.setenv("RAY_TMPDIR", folder)
        assert cluster._session_folder() == chosen
        said = " ".join(capsys.readouterr().err.split())
        assert (said != "") == (chosen is not None)
    assert f"Ray keeps its session in {SHORT_FOLDER}" in said and "set RAY_TMPDIR" in said


def test_ray_that_cannot_start_says_where_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        assert options["_temp_dir"] == SHORT_FOLDER
        raise OSError("No space left on device")

    monkeypatch.setattr(ray, "init", full)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "l" * 90)
    message = (
        rf"cannot start Ray on this machine, in {SHORT_FOLDER}: No space left on device; set RAY_TMPDIR to a folder"
    )
    with pytest.raises(ConfigError, match=message), connect(config(size=1, memory_gb=0.1).workers, None):
        pass


@pytest.mark.parametrize("slow", [1, 3])
def test_a_ray_that_comes_up_too_slowly_is_started_again(
    slow: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was started of it is stopped, and nothing else."""
    for name in ("raylet", "other"):
        shutil.copy("/bin/sleep", tmp_path / name)
    started: list[psutil.Popen] = []
    others: list[psutil.Popen] = []
    begun: list[psutil.Popen] = []

    def init(**_: object) -> None:
        started.append(psutil.Popen([str(tmp_path / "raylet"), "60"]))
        others.append(psutil.Popen([str(tmp_path / "other"), "60"]))
        begun.append(started[-1])
        if len(started) <= slow:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    try:
        if slow < 3:
            cluster.start_ray(2)
            assert started.pop().is_running()
        else:
            with pytest.raises(ConfigError, match=r"^Ray did not come up on this machine, 3 times.*ray/session_latest"):
                cluster._start_local(config(size=1, memory_gb=0.1).workers)
        assert len(started) == slow
        assert not any(process.is_running() for process in started)
        assert capsys.readouterr().err.count("starting it again") == min(slow, 2)
        assert all(process.is_running() for process in others)
    finally:  # but not the raylet of other tests
        for process in {*begun, *others}:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_another_failure_of_ray_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        cluster.start_ray(2)


def test_the_temporary_folder_is_the_one_that_ray_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/scratch")
    for platform, folder in (("linux", "/scratch"), ("darwin", "/tmp")):
        monkeypatch.setattr(cluster.sys, "platform", platform)
        assert cluster._temporary_folder() == folder
    monkeypatch.setenv("RAY_TMPDIR", "/ray")
    assert cluster._temporary_folder() == "/ray"


@pytest.mark.parametrize("own", [None, "4"])
def test_a_local_ray_gets_one_heap_a_process_unless_told_otherwise(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", own or "")
    if own is None:
        monkeypatch.delenv("MALLOC_ARENA_MAX")
    told = []
    monkeypatch.setattr(ray, "init", lambda **_: told.append(os.environ["MALLOC_ARENA_MAX"]))
    cluster._start_local(config().workers)
    assert told == [own or "1"]
