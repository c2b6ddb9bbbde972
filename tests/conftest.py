"""Fixtures that every test may use."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# What the tests of a GPU do without is imported where it is used: they run where little is installed.
if TYPE_CHECKING:
    from tests.fault_proxy import FaultProxy

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # how often a training looks whether it has ended; 2 by itself
    "RAY_memory_usage_threshold": "0.98",
}


KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` does not even look at other tests: where it runs, what they import is not installed."""
    if config.option.markexpr != "gpu":
        return None
    ours = HERE / "gpu"
    return None if ours in (collection_path, *collection_path.parents) or collection_path in ours.parents else True


@pytest.fixture(scope="session", autouse=True)
def _heed_ctrl_c() -> None:
    """A shell lets its background jobs, such as a continuous integration's, ignore SIGINT, and they let theirs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _give_back_memory() -> Iterator[None]:
    """What glibc keeps of the networks of a module's tests, gigabytes in the end, goes back to the system."""
    yield
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference outputs and photos that may lie beside the checkout; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("no reference data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray with 4 logical CPUs for the whole test session; takes about 7 s to start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        import ray

        from pipeline.engine.cluster import start_ray

        start_ray(num_cpus=4)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket, reached as any bucket is: endpoint and keys from the standard AWS variables."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    forget_filesystems()
    name = f"bucket-{uuid.uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT")).close()
    yield f"s3://{name}"
    forget_filesystems()


@pytest.fixture
def proxy(s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The way to the store of `s3_bucket`, for this process and those it starts; it counts, and fails where told to."""
    from tests.fault_proxy import FaultProxy

    with FaultProxy(s3_endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        forget_filesystems()
        yield running


def forget_filesystems() -> None:
    """The next filesystem reads the AWS variables afresh."""
    from pipeline.store import places

    places._filesystem.cache_clear()
