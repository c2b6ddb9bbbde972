"""The proxy passes requests on as they are, and fails where its plan says so."""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.fault_proxy import INTERNAL_ERROR, SLOW_DOWN, Cut, FaultProxy, Outage, Reset, Rule, Slow

BODY = bytes(range(256)) * 4


class Store(BaseHTTPRequestHandler):
    """Answers GET with BODY and PUT with nothing, and keeps what was put."""

    protocol_version = "HTTP/1.1"
    put: list[tuple[str, bytes, str]]

    def do_GET(self) -> None:
        self._answer(BODY)

    def do_HEAD(self) -> None:
        self._answer(BODY, send=False)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).put.append((self.path, data, self.headers["Host"]))
        self._answer(b"")

    def _answer(self, body: bytes, send: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"x"')
        self.end_headers()
        self.wfile.write(body if send else b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[tuple[str, list[tuple[str, bytes, str]]]]:
    handler = type("FreshStore", (Store,), {"put": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.put
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(store: tuple[str, list[tuple[str, bytes, str]]]) -> Iterator[FaultProxy]:
    with FaultProxy(store[0]) as running:
        yield running


def connect(proxy: FaultProxy, timeout: float = 10) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urllib.parse.urlsplit(proxy.url).netloc, timeout=timeout)


def ask(proxy: FaultProxy, method: str = "GET", path: str = "/bucket/a.jpg", body: bytes | None = None) -> tuple:
    connection = connect(proxy)
    try:
        connection.request(method, path, body=body, headers={"X-Test": "yes"})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers["ETag"]
    finally:
        connection.close()


def test_it_passes_on_what_comes_and_counts_it(proxy: FaultProxy, store: tuple) -> None:
    assert ask(proxy) == (200, BODY, '"x"')
    assert ask(proxy, "PUT", "/bucket/%C3%BC%20b?partNumber=1", b"12345") == (200, b"", '"x"')
    assert ask(proxy, "HEAD") == (200, b"", '"x"')
    host = urllib.parse.urlsplit(proxy.url).netloc
    assert store[1] == [("/bucket/%C3%BC%20b?partNumber=1", b"12345", host)]
    assert proxy.totals() == {
        ("GET", "bucket/a.jpg"): (1, 0, 1024),
        ("PUT", "bucket/ü b"): (1, 5, 0),
        ("HEAD", "bucket/a.jpg"): (1, 0, 0),
    }
    assert [request.headers["x-test"] for request in proxy.requests] == ["yes"] * 3
    assert proxy.count("PUT", "partNumber=1") == 1
    assert proxy.faults() == []
    proxy.forget()
    assert proxy.requests == []


def test_a_body_in_chunks_is_passed_on_whole(proxy: FaultProxy, store: tuple) -> None:
    connection = connect(proxy)
    connection.request("PUT", "/bucket/a", body=iter([b"one", b"two" * 100]), encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    assert [data for _, data, _ in store[1]] == [b"one" + b"two" * 100]


def test_a_connection_serves_several_requests(proxy: FaultProxy) -> None:
    connection = connect(proxy)
    for _ in range(3):
        connection.request("GET", "/bucket/a.jpg")
        assert connection.getresponse().read() == BODY
    connection.close()
    assert proxy.count("GET") == 3


def test_an_injected_answer_never_reaches_the_store(proxy: FaultProxy, store: tuple) -> None:
    proxy.plan([Rule(SLOW_DOWN, method="PUT", key=r"part-\d+", skip=1, times=2)])
    found = [ask(proxy, "PUT", "/bucket/part-1", b"x")[0] for _ in range(4)]
    assert found == [200, 503, 503, 200]
    assert len(store[1]) == 2
    assert [request.status for request in proxy.faults()] == [503, 503]
    proxy.plan([Rule(INTERNAL_ERROR)])
    assert b"<Code>InternalError</Code>" in ask(proxy)[1]
    assert ask(proxy)[1] == BODY


def test_resets_before_and_after_the_store_has_the_request(proxy: FaultProxy, store: tuple) -> None:
    proxy.plan([Rule(Reset(), key="one"), Rule(Reset(forwarded=True), key="two")])
    for name in ("one", "two"):
        with pytest.raises(ConnectionResetError):
            ask(proxy, "PUT", f"/bucket/{name}", b"x")
    assert [path for path, _, _ in store[1]] == ["/bucket/two"]
    assert [request.status for request in proxy.requests] == [None, None]


@pytest.mark.parametrize(
    ("reset", "error"), [(False, http.client.IncompleteRead), (True, ConnectionResetError)], ids=["cut", "reset"]
)
def test_a_body_that_ends_early(proxy: FaultProxy, reset: bool, error: type[Exception]) -> None:
    proxy.plan([Rule(Cut(reset=reset))])
    with pytest.raises(error):
        ask(proxy)
    assert proxy.requests[0].sent == 512
    assert ask(proxy)[1] == BODY


def test_an_answer_without_a_body_is_cut_in_its_first_line(proxy: FaultProxy, store: tuple) -> None:
    proxy.plan([Rule(Cut())])
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(proxy, "PUT", "/bucket/a", b"x")
    assert len(store[1]) == 1


def test_a_slow_body_outlasts_the_readers_patience(proxy: FaultProxy) -> None:
    proxy.plan([Rule(Slow(1.0))])
    connection = connect(proxy, timeout=0.2)
    connection.request("GET", "/bucket/a.jpg")
    with pytest.raises(TimeoutError):
        connection.getresponse().read()
    connection.close()
    proxy.plan([Rule(Slow(0.1), times=None)])
    assert ask(proxy)[1] == BODY
    assert ask(proxy, "PUT", "/bucket/a", b"x")[0] == 200


def test_an_outage_refuses_connections_and_ends(proxy: FaultProxy) -> None:
    connection = connect(proxy)
    connection.request("GET", "/bucket/a.jpg")
    connection.getresponse().read()
    address = socket.getaddrinfo(*urllib.parse.urlsplit(proxy.url).netloc.split(":"))[0][4]
    with proxy.down():
        with pytest.raises((http.client.HTTPException, OSError)):  # the open connection has gone too
            connection.request("GET", "/bucket/a.jpg")
            connection.getresponse()
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
    assert ask(proxy)[1] == BODY
    proxy.outage(0.2)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    assert ask_until_it_answers(proxy) == BODY


def test_a_rule_begins_an_outage(proxy: FaultProxy, store: tuple) -> None:
    proxy.plan([Rule(Outage(0.2), method="PUT", skip=1)])
    assert ask(proxy, "PUT", "/bucket/a", b"1")[0] == 200
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(proxy, "PUT", "/bucket/a", b"2")
    assert ask_until_it_answers(proxy) == BODY
    assert [data for _, data, _ in store[1]] == [b"1"]
    assert [request.fault for request in proxy.faults()] == [Outage(0.2)]


def ask_until_it_answers(proxy: FaultProxy) -> bytes:
    deadline = time.monotonic() + 10
    while True:
        try:
            return ask(proxy)[1]
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_seed_decides_which_requests_are_hit_in_whatever_order_they_come(proxy: FaultProxy) -> None:
    paths = [f"/bucket/{number}" for number in range(40)]

    def hit(order: list[str], seed: int) -> set[str]:
        proxy.forget()
        proxy.plan([Rule(SLOW_DOWN, rate=0.3, times=None)], seed=seed)
        for path in order:
            ask(proxy, "GET", path)
        return {request.key for request in proxy.faults()}

    first = hit(paths, 1)
    assert 4 <= len(first) <= 20
    assert hit(paths[::-1], 1) == first
    assert hit(paths, 2) != first
