"""JSON documents of long lists, written without holding the lists."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from pipeline.store import storage


class JsonLists:
    """Lists of JSON objects in files on the local disk; see `json_lists`."""

    def __init__(self, files: Mapping[str, IO[bytes]]) -> None:
        self._files = files

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """Append an object to the list `name`. ValueError for a number that JSON does not have."""
        file = self._files[name]
        file.write((b",\n" if file.tell() else b"") + json.dumps(entry, allow_nan=False).encode())

    def write(
        self,
        uri: str,
        lists: Mapping[str, str],
        categories: Sequence[Mapping[str, Any]],
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a COCO document atomically: `lists` (key: the name of a list), `categories`, and further `info`."""
        about = {"description": "panoptic labels by u2label"} | dict(info or {})
        with storage.open_output(uri) as stream:
            stream.write(b'{"info": ' + json.dumps(about).encode() + b', "licenses": []')
            for key, name in lists.items():
                stream.write(f', "{key}": [\n'.encode())
                self._files[name].seek(0)
                shutil.copyfileobj(self._files[name], stream)
                stream.write(b"]")
            stream.write(b', "categories": ' + json.dumps(list(categories)).encode() + b"}\n")


@contextlib.contextmanager
def json_lists(*names: str) -> Iterator[JsonLists]:
    """Empty lists of these names; their files are deleted on leaving."""
    with contextlib.ExitStack() as stack:
        yield JsonLists({name: stack.enter_context(tempfile.TemporaryFile()) for name in names})
