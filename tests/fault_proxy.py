"""An HTTP proxy on loopback that stands before a store and makes it fail where a test says so.

    with FaultProxy(moto_url, [Rule(SLOW_DOWN, method="PUT", key=r"part-\\d+", rate=0.3, times=None)], seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        ...
        proxy.outage(30)  # nobody answers for so long
    assert proxy.count("GET", "photos/") == 100

Which request a rule hits depends on the seed, the request's method and key and how often these two came before, and
not on the order of requests that are under way together. Bodies are held in memory. One answer, one connection to the
store; the client's connection is kept as it wishes.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import itertools
import random
import re
import socket
import socketserver
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

UPSTREAM_TIMEOUT_S = 60.0
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"})


@dataclass(frozen=True, slots=True)
class Answer:
    """The request is read and refused with an S3 error; the store does not see it."""

    status: int
    code: str


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection is reset in place of an answer; with `forwarded` after the store has done what was asked."""

    forwarded: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """Half of the answer's body comes (an answer without one ends in its first line), then the connection is closed, or
    reset. Content-Length announces the whole."""

    reset: bool = False


@dataclass(frozen=True, slots=True)
class Slow:
    """Half of the answer's body comes, the rest (of an answer without a body all of it) so many seconds later."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Outage:
    """As `FaultProxy.outage`, from this request on, which is lost itself."""

    seconds: float


Fault = Answer | Reset | Cut | Slow | Outage
SLOW_DOWN = Answer(503, "SlowDown")
INTERNAL_ERROR = Answer(500, "InternalError")
ACCESS_DENIED = Answer(403, "AccessDenied")
EXPIRED_TOKEN = Answer(400, "ExpiredToken")


@dataclass(frozen=True, slots=True)
class Rule:
    """Which requests a fault hits. The first rule that takes a request decides."""

    fault: Fault
    method: str = ""  # such as "PUT"; empty: any
    key: str = ""  # regular expression that is searched in `bucket/key?query`
    skip: int = 0  # requests that would match and pass first
    rate: float = 1.0  # share of the others that is hit
    times: int | None = 1  # hits at most; None: no end


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came, and what became of it."""

    method: str
    key: str  # bucket/key, decoded
    query: str
    headers: Mapping[str, str]  # names in lower case
    received: int  # bytes of the request's body
    sent: int = 0  # bytes of the answer's body, if the client took them all
    status: int | None = None  # None: there was no answer, or not yet
    fault: Fault | None = None
    time: float = 0.0  # monotonic seconds at which it came

    @property
    def place(self) -> str:
        return f"{self.key}?{self.query}" if self.query else self.key


@dataclass
class _Plan:
    rules: tuple[Rule, ...]
    seed: int
    seen: collections.Counter[Any] = field(default_factory=collections.Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            name = (request.method, request.place)
            self.seen[name] += 1
            for number, rule in enumerate(self.rules):
                if self._hits(number, rule, request, self.seen[name]):
                    return rule.fault
        return None

    def _hits(self, number: int, rule: Rule, request: Request, nth: int) -> bool:
        if rule.method not in ("", request.method) or not re.search(rule.key, request.place):
            return False
        self.seen["matched", number] += 1
        if self.seen["matched", number] <= rule.skip:
            return False
        if rule.times is not None and self.seen["hit", number] >= rule.times:
            return False
        draw = random.Random(f"{self.seed} {number} {request.method} {request.place} {nth}").random()
        self.seen["hit", number] += draw < rule.rate
        return draw < rule.rate


class FaultProxy:
    """A proxy before `upstream` (`http://host:port`). Its rules may be replaced while it runs: `proxy.plan(...)`."""

    def __init__(self, upstream: str, rules: Iterable[Rule] = (), *, seed: int = 0) -> None:
        self._upstream = urllib.parse.urlsplit(upstream).netloc
        self._requests: dict[int, Request] = {}
        self._numbers = itertools.count()
        self._open: set[socket.socket] = set()
        self._lock = threading.RLock()
        self._server: _Server | None = None
        self._down = 0
        self._back: list[threading.Timer] = []
        # Bound and never listening: it keeps the port ours during an outage, and connections are refused.
        self._place = _reusable_socket(("127.0.0.1", 0))
        self.plan(rules, seed=seed)

    @property
    def url(self) -> str:
        host, port = self._place.getsockname()
        return f"http://{host}:{port}"

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order they came. What a client has an answer to is there in full."""
        with self._lock:
            return list(self._requests.values())

    def plan(self, rules: Iterable[Rule] = (), *, seed: int = 0) -> None:
        """From now on these rules, counted afresh."""
        self._plan = _Plan(tuple(rules), seed)

    def forget(self) -> None:
        """Empty `requests`."""
        with self._lock:
            self._requests.clear()

    def matching(self, method: str = "", key: str = "") -> list[Request]:
        """The requests of a method whose `bucket/key?query` the regular expression `key` is found in."""
        return [r for r in self.requests if method in ("", r.method) and re.search(key, r.place)]

    def count(self, method: str = "", key: str = "") -> int:
        return len(self.matching(method, key))

    def faults(self) -> list[Request]:
        """The requests that a rule or an outage hit."""
        return [request for request in self.requests if request.fault is not None]

    def totals(self) -> dict[tuple[str, str], tuple[int, int, int]]:
        """(method, key) -> requests, bytes received, bytes sent."""
        found: dict[tuple[str, str], tuple[int, int, int]] = {}
        for request in self.requests:
            count, received, sent = found.get((request.method, request.key), (0, 0, 0))
            found[request.method, request.key] = (count + 1, received + request.received, sent + request.sent)
        return found

    def outage(self, seconds: float) -> None:
        """Reset all connections and refuse new ones, from now on for so long. Does not wait."""
        self._go_down()
        timer = threading.Timer(seconds, self._come_back)
        timer.daemon = True
        self._back.append(timer)
        timer.start()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """An outage for the time of the block."""
        self._go_down()
        try:
            yield
        finally:
            self._come_back()

    def __enter__(self) -> FaultProxy:
        self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for timer in self._back:
            timer.cancel()
        self._down += 1  # nothing may listen again
        self._stop()
        self._place.close()

    def _go_down(self) -> None:
        with self._lock:
            self._down += 1
        self._stop()

    def _come_back(self) -> None:
        with self._lock:
            self._down -= 1
            if self._down == 0:
                self._listen()

    def _listen(self) -> None:
        with self._lock:
            self._server = _Server(self._place.getsockname(), self)
            threading.Thread(target=self._server.serve, daemon=True, name="fault-proxy").start()

    def _stop(self) -> None:
        with self._lock:
            server, self._server = self._server, None
            for connection in self._open:
                with contextlib.suppress(OSError):  # it has just ended
                    connection.shutdown(socket.SHUT_RDWR)
            self._open.clear()
        if server is not None:
            server.socket.close()  # refused from here on, whatever the loop below still does
            server.shutdown()

    def _began(self, request: Request) -> int:
        with self._lock:
            number = next(self._numbers)
            self._requests[number] = request
        return number

    def _answers(self, number: int, status: int | None, sent: int) -> None:
        with self._lock:
            if number in self._requests:  # else forgotten
                self._requests[number] = replace(self._requests[number], status=status, sent=sent)


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        super().__init__(address, _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = _reusable_socket(address)
        self.server_activate()
        self.proxy = proxy

    def serve(self) -> None:
        with contextlib.suppress(ValueError):  # closed before it began
            self.serve_forever(poll_interval=0.02)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.proxy._lock:
            self.proxy._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.proxy._lock:
            self.proxy._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: a client that goes away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # reset, by the client or by us
            self.close_connection = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._do
        raise AttributeError(name)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def _do(self) -> None:
        body = self._read_body()
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        key = urllib.parse.unquote(path.lstrip("/"))
        request = Request(self.command, key, query, headers, len(body), time=time.monotonic())
        fault = self.server.proxy._plan.fault(request)
        self._number = self.server.proxy._began(replace(request, fault=fault))
        try:
            self._answer(body, fault)
        except (OSError, http.client.HTTPException):  # the store is away, or the client has gone
            self._abandon()

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return body

    def _answers(self, status: int | None, sent: int) -> None:
        """To be called before anything is sent, so that a client with an answer finds it noted."""
        self.server.proxy._answers(self._number, status, sent)

    def _answer(self, body: bytes, fault: Fault | None) -> None:
        match fault:
            case Answer(status, code):
                error = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} (injected)</Message></Error>"
                content = b"" if self.command == "HEAD" else error.encode()
                self._answers(status, len(content))
                self.wfile.write(_head(status, code, {"Content-Type": "application/xml"}, len(content)) + content)
            case Reset(forwarded=False):
                self._abandon()
            case Outage(seconds):
                self.server.proxy.outage(seconds)
            case _:
                status, reason, headers, content = self._forward(body)
                length = int(headers.get("Content-Length", 0)) if self.command == "HEAD" else len(content)
                self._send(status, _head(status, reason, headers, length), content, fault)

    def _send(self, status: int, head: bytes, content: bytes, fault: Fault | None) -> None:
        half = len(content) // 2
        match fault:
            case Reset():
                self._abandon()
            case Cut(reset):
                self._answers(status if content else None, half)
                self.wfile.write(head + content[:half] if content else head[:10])
                self._abandon(gently=not reset)
            case Slow(seconds):
                self._answers(status, len(content))
                self.wfile.write(head + content[:half] if content else b"")
                time.sleep(seconds)
                self.wfile.write(content[half:] or head)
            case _:
                self._answers(status, len(content))
                self.wfile.write(head + content)

    def _forward(self, body: bytes) -> tuple[int, str, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.proxy._upstream, timeout=UPSTREAM_TIMEOUT_S)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"connection", "expect", "transfer-encoding", "content-length"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.reason, dict(answer.headers.items()), answer.read()
        finally:
            connection.close()

    def _abandon(self, *, gently: bool = False) -> None:
        """End the client's connection with a FIN if `gently`, else with an RST."""
        self.close_connection = True
        if gently:
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # in truth once the request's file is closed too; an RST because of the option


def _head(status: int, reason: str, headers: Mapping[str, str], length: int) -> bytes:
    kept = [f"{name}: {value}" for name, value in headers.items() if name.lower() not in HOP_BY_HOP]
    lines = [f"HTTP/1.1 {status} {reason}", *kept, f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _reusable_socket(address: tuple[str, int]) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(address)
    return made
