"""A store that speaks as much of S3 as a run needs, in a process of its own, and answers after a given time.

For figures of ours: moto's server takes 0.15 s for a listing of a thousand names. Objects are held in memory, or only
have names, which a function makes.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import multiprocessing
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.sax.saxutils import escape

PAGE = 1000
SOME_DAY = datetime(2026, 1, 1, tzinfo=UTC)  # that names without an object are of
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
XML = '<?xml version="1.0" encoding="UTF-8"?><{0} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{1}</{0}>'
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code></Error>'
FOLDER = "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>"


class Names(Sequence[str]):
    """As `name(i)` says, in order, of which none is held."""

    def __init__(self, count: int, name: Callable[[int], str]) -> None:
        self._count, self._name = count, name

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        return self._name(place)


class Classes(Names):
    """Photos in folders of as many each."""

    def __init__(self, folders: int, each: int) -> None:
        super().__init__(folders * each, lambda i: f"class{i // each:06d}/{i % each:06d}.jpg")


def list_page(
    names: Sequence[str], *, prefix: str = "", delimiter: str = "", after: str = ""
) -> tuple[list[str], list[str], str]:
    """Keys, folders, and what the next page begins behind; empty at the end."""
    keys, folders = list[str](), list[str]()
    place = max(bisect.bisect_left(names, prefix), bisect.bisect_right(names, after) if after else 0)
    while place < len(names) and (name := names[place]).startswith(prefix):
        if len(keys) + len(folders) == PAGE:
            return keys, folders, names[place - 1]
        inside = name.find(delimiter, len(prefix)) if delimiter else -1
        if inside < 0:
            keys.append(name)
            place += 1
        else:
            folders.append(name[: inside + 1])
            place = bisect.bisect_left(names, name[:inside] + chr(ord(delimiter) + 1))
    return keys, folders, ""


class Store:
    """What the server holds: objects, beside names that have none."""

    def __init__(self, names: Sequence[str] | None, wait_s: float) -> None:
        self.fixed, self.wait_s = names, wait_s
        self.objects: dict[str, bytes] = {}
        self.written: dict[str, datetime] = {}
        self.order: list[str] = []
        self.lock = threading.Lock()

    @property
    def names(self) -> Sequence[str]:
        return self.order if self.fixed is None else self.fixed

    def put(self, key: str, data: bytes) -> None:
        with self.lock:
            if key not in self.objects:
                bisect.insort(self.order, key)
            self.objects[key], self.written[key] = data, datetime.now(UTC)

    def remove(self, key: str) -> None:
        with self.lock:
            if self.objects.pop(key, None) is not None:
                del self.order[bisect.bisect_left(self.order, key)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY

    def do_GET(self) -> None:
        key, query = self._asked()
        if not key:
            self._list(query)
            return
        data = self.store.objects.get(key)
        if data is None:
            self._answer(404, ERROR.format("NoSuchKey").encode())
            return
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._answer(200, data, ETag=_etag(data))
            return
        start = int(span[1]) if span[1] else max(0, len(data) - int(span[2]))
        end = min(int(span[2]) + 1 if span[1] and span[2] else len(data), len(data))
        told = f"bytes {start}-{end - 1}/{len(data)}"
        self._answer(206, data[start:end], **{"Content-Range": told, "ETag": _etag(data)})

    def do_HEAD(self) -> None:
        key, _ = self._asked()
        data = self.store.objects.get(key)
        if data is None:
            self._answer(200 if not key else 404, b"")
        else:
            self._answer(
                200, data, ETag=_etag(data), **{"Last-Modified": format_datetime(self.store.written[key], usegmt=True)}
            )

    def do_PUT(self) -> None:
        key, _ = self._asked()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") or "aws-chunked" in self.headers.get("Content-Encoding", ""):
            self._answer(501, ERROR.format("NotImplemented").encode())  # a body in chunks, as none of ours is
            return
        if key and self.headers.get("If-None-Match") == "*" and key in self.store.objects:
            self._answer(412, ERROR.format("PreconditionFailed").encode())
            return
        if key:
            self.store.put(key, data)
        self._answer(200, b"", ETag=_etag(data))

    def do_POST(self) -> None:
        self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        for key in re.findall("<Key>(.*?)</Key>", body):
            self.store.remove(key)
        self._answer(200, XML.format("DeleteResult", "").encode())

    def do_DELETE(self) -> None:
        self.store.remove(self._asked()[0])
        self._answer(204, b"")

    def _asked(self) -> tuple[str, dict[str, str]]:
        time.sleep(self.store.wait_s)
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        return urllib.parse.unquote(url.path).lstrip("/").partition("/")[2], query

    def _list(self, query: dict[str, str]) -> None:
        after = query.get("continuation-token") or query.get("start-after", "")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        with self.store.lock:
            keys, folders, more = list_page(self.store.names, prefix=prefix, delimiter=delimiter, after=after)
        found = [f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>"]
        found += [f"<NextContinuationToken>{escape(more)}</NextContinuationToken>"] if more else []
        found += [self._entry(key) for key in keys]
        found += [FOLDER.format(escape(folder)) for folder in folders]
        self._answer(200, XML.format("ListBucketResult", "".join(found)).encode())

    def _entry(self, key: str) -> str:
        data = self.store.objects.get(key)
        tag, size = ("0" * 32, 100_000) if data is None else (_etag(data).strip('"'), len(data))
        written = self.store.written.get(key, SOME_DAY).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        return (
            f"<Contents><Key>{escape(key)}</Key><LastModified>{written}</LastModified><ETag>&quot;{tag}&quot;</ETag><Size>{size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _serve(classes: tuple[int, int] | None, wait_s: float, port: Any) -> None:
    Handler.store = Store(Classes(*classes) if classes else None, wait_s)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.request_queue_size = 128
    port.put(server.server_address[1])
    server.serve_forever()


@contextlib.contextmanager
def serving(classes: tuple[int, int] | None = None, wait_s: float = 0.0) -> Iterator[None]:
    """The store of this process and those it starts, as the AWS variables say. `classes`: so many folders of so many
    photos each, that may be listed; None: what is put there."""
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    server = context.Process(target=_serve, args=(classes, wait_s, port), daemon=True)
    server.start()
    os.environ |= KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port.get()}"}
    try:
        yield
    finally:
        server.kill()
