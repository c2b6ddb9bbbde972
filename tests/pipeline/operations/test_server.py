"""Jobs that have ended, their logs, and job servers that are not there."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobStatus

from pipeline.errors import ConfigError, StageFailed
from pipeline.operations import server
from pipeline.operations.server import Job, _Log, connect_to_head, exit_code, follow, how_to, wait

JOB = Job("raysubmit_1", "http://head:8265")


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),  # it never started: its environment could not be made
        (JobStatus.STOPPED, None, 130),
        (JobStatus.STOPPED, 130, 130),
    ],
)
def test_exit_codes(status: JobStatus, driver: int | None, code: int) -> None:
    assert exit_code(SimpleNamespace(status=status, driver_exit_code=driver)) == code  # type: ignore[arg-type]


async def chunks(text: str, size: int) -> AsyncIterator[str]:
    for start in range(0, len(text), size):
        yield text[start : start + size]


@given(st.text(), st.lists(st.tuples(st.integers(0, 50), st.integers(1, 7)), max_size=4))
def test_every_character_is_written_once_however_often_the_connection_breaks(
    text: str, connections: list[tuple[int, int]]
) -> None:
    written: list[str] = []
    log = _Log(written.append)
    for length, size in connections:
        asyncio.run(log.tail(chunks(text[:length], size)))
    log.add(text, 0)
    assert "".join(written) == text


class BrokenClient:
    """A job server whose log breaks off once, and that does not answer once."""

    def __init__(self) -> None:
        self.tails = self.looks = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.tails += 1
        yield "one\n"
        if self.tails == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield "two\n"

    def get_job_info(self, job: str) -> Any:
        self.looks += 1
        if self.looks == 1:
            raise ConnectionError("no answer")
        return SimpleNamespace(status=JobStatus.SUCCEEDED if self.tails == 2 else JobStatus.RUNNING)

    def get_job_logs(self, job: str) -> str:
        return "one\ntwo\nthree\n"


def test_following_survives_a_broken_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_S", 0.0)
    written: list[str] = []
    ended = follow(BrokenClient(), JOB, written.append)  # type: ignore[arg-type]
    assert ended.status == JobStatus.SUCCEEDED
    assert written == ["one\n", "two\n", "three\n"]


def test_a_head_that_stays_away_ends_the_wait_but_not_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(job: str) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(server, "AWAY_S", 0.0)
    monkeypatch.setattr(server, "POLL_S", 0.0)
    with pytest.raises(StageFailed, match="raysubmit_1 may go on without it"):
        wait(SimpleNamespace(get_job_info=away), JOB)  # type: ignore[arg-type]


def test_the_commands_for_a_job_can_be_pasted() -> None:
    assert how_to(JOB) == (
        "follow it by: ray job logs --follow --address http://head:8265 raysubmit_1\n"
        "stop it by: ray job stop --address http://head:8265 raysubmit_1"
    )


@pytest.fixture
def refusing_head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Something that answers every request with the status of the test's parameter."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(request.param)

        def log_message(self, *arguments: object) -> None:
            pass

    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as refusing:
        thread = threading.Thread(target=refusing.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{refusing.server_port}"
        refusing.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("refusing_head", "message"),
    [
        (401, "wants its token: set RAY_AUTH_MODE=token"),
        (403, "wants its token"),
        (404, "refused"),
        (500, "500 Server"),
    ],
    indirect=["refusing_head"],
)
def test_a_head_that_refuses(refusing_head: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        connect_to_head(refusing_head)


def test_credentials_do_not_belong_into_the_address() -> None:
    with pytest.raises(ConfigError, match="holds credentials") as refused:
        connect_to_head("http://me:secret@head:8265")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head:8265", "http://"])
def test_an_address_that_is_no_job_server(address: str) -> None:
    with pytest.raises(ConfigError, match="write http://HEAD:8265"):
        connect_to_head(address)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="is the head running with a dashboard"):
            connect_to_head(f"http://127.0.0.1:{unused.getsockname()[1]}")


def test_a_variable_that_would_win_over_the_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    with pytest.raises(ConfigError, match="RAY_ADDRESS is set to 'http://other:8265'"):
        connect_to_head("http://head:8265")
