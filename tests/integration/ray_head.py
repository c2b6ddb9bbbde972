"""A Ray head as `ray start --head` makes one, on loopback, in a process group and a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import RAY_ENVIRONMENT

START_S = 60
MARK = "U2LABEL_TEST_HEAD"  # in the environment of all that a head starts


@dataclass(frozen=True)
class Head:
    """A head that runs: its job server, where it exports metrics, and its processes."""

    address: str
    metrics_port: int
    process: subprocess.Popen[bytes]


@contextmanager
def ray_head(environment: Mapping[str, str], *, cpus: int = 4) -> Iterator[Head]:
    """A head whose processes see `environment`, until the end of the block. All its processes are killed then."""
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="ur-", dir="/tmp")  # short: sockets lie below it
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        dashboard, metrics, agent, client = stack.enter_context(_free_ports(4))
        options = {
            "port": 0,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "metrics-export-port": metrics,
            "ray-client-server-port": client,
            "include-dashboard": "true",
            "num-cpus": cpus,
            "object-store-memory": 150 * 2**20,
            "temp-dir": folder,
        }
        log = stack.enter_context(Path(folder, "head.log").open("wb"))
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            env=_environment({**environment, MARK: folder}),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stack.callback(_kill, process, folder)
        address = f"http://127.0.0.1:{dashboard}"
        _wait_for(address, process, Path(folder, "head.log"))
        yield Head(address, metrics, process)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Jobs find this Python, and nothing of this process's own place: their code is what is submitted."""
    environment = os.environ | RAY_ENVIRONMENT | dict(extra)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for name in ("RAY_ADDRESS", "PYTHONPATH"):
        environment.pop(name, None)
    return environment


@contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    yield ports


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with suppress(OSError):
            try:
                urllib.request.urlopen(f"{address}/api/jobs/", timeout=5)
            except urllib.error.HTTPError as error:
                if error.code in {401, 403}:  # it asks for a token, so it is there
                    return
            else:
                return
        time.sleep(0.2)


def _kill(process: subprocess.Popen[bytes], mark: str) -> None:
    """Every process that inherited the mark: drivers and workers have sessions of their own, and may be orphans."""
    for _ in range(2):  # one may have been starting another
        marked = [one for one in psutil.process_iter() if _environ(one).get(MARK) == mark]
        for one in marked:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(marked, timeout=30)
    process.wait(timeout=30)


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):  # it has ended, or is somebody else's
        return {}
