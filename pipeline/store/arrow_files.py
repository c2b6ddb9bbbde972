"""A run folder for libraries that write through `pyarrow.fs` themselves, as Ray Train does its records."""

from __future__ import annotations

from typing import Any

import fsspec
from pyarrow.fs import FSSpecHandler, PyFileSystem

from pipeline.store import s3, storage

ATTEMPTS = 10  # at a request, by botocore: nothing of ours stands between the library and the store


def arrow_filesystem(uri: str) -> tuple[PyFileSystem | None, str]:
    """The filesystem of a URI and the path in it; None and the URI itself where that is local.

    pyarrow's own client knows no endpoint of an AWS profile; this one finds endpoint and credentials as
    `pipeline.store.storage` does, in each process that it is sent to: it is pickled as its protocol alone.
    """
    if not storage.is_remote(uri):
        return None, uri
    return PyFileSystem(_Handler(uri.partition("://")[0])), storage.filesystem(uri)[1]


class _Handler(FSSpecHandler):
    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        super().__init__(s3.connect(attempts=ATTEMPTS) if protocol in storage.S3 else fsspec.filesystem(protocol))

    def __reduce__(self) -> tuple[type[Any], tuple[str]]:
        return _Handler, (self._protocol,)
