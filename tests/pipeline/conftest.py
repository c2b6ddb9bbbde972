"""An S3 server, and places on disk and in a bucket that tests run on alike."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage

KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}


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
    uri = f"s3://bucket-{uuid.uuid4().hex}"
    fs, path = storage.filesystem(uri)
    fs.mkdir(path)
    yield uri
    forget_filesystems()


@pytest.fixture(params=["disk", "s3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a test puts its images, on disk or in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "source")
    return storage.join(request.getfixturevalue("s3_bucket"), "source")


def forget_filesystems() -> None:
    """The next filesystem reads the AWS variables afresh."""
    import s3fs

    storage._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
