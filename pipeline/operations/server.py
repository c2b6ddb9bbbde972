"""The job server of a Ray cluster: the connection to it, and a job that was submitted, its log and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, StageFailed
from pipeline.store import storage

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CONNECT_S = 10.0
AWAY_S = 60.0  # how long a head that does not answer is asked again
SILENCE_S = 60.0  # of a log, after which the job is looked at
POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """A job that was submitted."""

    submission_id: str
    address: str

    def commands(self) -> dict[str, str]:
        """What follows its log and what stops it."""
        where = shlex.join(["--address", self.address, self.submission_id])
        return {"follow": f"ray job logs --follow {where}", "stop": f"ray job stop {where}"}


def connect_to_head(address: str) -> JobSubmissionClient:
    """A client of the job server. ConfigError when there is none, or when it wants another token."""
    url = urllib.parse.urlsplit(address)
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise ConfigError(f"--address: {address!r} is no job server; write http://HEAD:8265, the head's dashboard")
    if storage.redact(address) != address:
        raise ConfigError(f"--address: {storage.redact(address)} holds credentials; a head takes RAY_AUTH_TOKEN alone")
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray lets them win over the argument
        if os.environ.get(variable, address) != address:
            raise ConfigError(f"--address: {variable} is set to {os.environ[variable]!r}, not to {address!r}; unset it")
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    with head_errors(address):
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname, port), timeout=CONNECT_S).close()  # Ray's client would wait for ever
        return JobSubmissionClient(address)


@contextlib.contextmanager
def head_errors(address: str) -> Iterator[None]:
    """What the job server refuses or cannot do, as ConfigError."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ConfigError(
            f"--address: {address} wants its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            f"RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token) to that of the cluster ({str(error).splitlines()[0]})"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"--address: no job server answers at {address}: {error}; is the head running with a dashboard "
            "(ray start --head --dashboard-host 0.0.0.0, of ray[default]), and is the port open from here?"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"--address: the job server at {address} refused: {storage.redact(str(error))}") from error


def wait(client: JobSubmissionClient, job: Job) -> JobDetails:
    """The job when it has ended. StageFailed when its head goes away."""
    while not (details := _look(client, job)).status.is_terminal():
        time.sleep(POLL_S)
    return details


def follow(client: JobSubmissionClient, job: Job, write: Callable[[str], None]) -> JobDetails:
    """`wait`, with the job's log given to `write` as it grows. A connection that breaks is taken up again."""
    from aiohttp import ClientError

    log = _Log(write)
    while True:
        with contextlib.suppress(RuntimeError, OSError, ClientError):  # _look tells whether the head is still there
            asyncio.run(log.tail(client.tail_job_logs(job.submission_id)))
        details = _look(client, job)
        if details.status.is_terminal():
            log.add(client.get_job_logs(job.submission_id), 0)
            return details
        time.sleep(POLL_S)


class _Log:
    """A log of which each connection tells all from the start; every character is written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._seen = write, 0

    async def tail(self, chunks: AsyncIterator[str]) -> None:
        """Write what is new until the log ends or is silent for a while."""
        position = 0
        with contextlib.suppress(StopAsyncIteration, TimeoutError):
            while True:
                text = await asyncio.wait_for(anext(chunks), SILENCE_S)
                self.add(text, position)
                position += len(text)

    def add(self, text: str, position: int) -> None:
        """`text` begins at the character `position` of the log."""
        new = text[max(0, self._seen - position) :]
        if new:
            self._write(new)
            self._seen = position + len(text)


def _look(client: JobSubmissionClient, job: Job) -> JobDetails:
    last = time.monotonic() + AWAY_S
    while True:
        try:
            return client.get_job_info(job.submission_id)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > last:
                raise StageFailed(
                    f"the job server at {job.address} does not answer any more: {storage.redact(str(error))}; the job "
                    f"{job.submission_id} may go on without it, and submitting it again does what it has left"
                ) from error
            time.sleep(POLL_S)


def exit_code(details: JobDetails) -> int:
    """That of the command, as if it had run here: 128 and the signal's number of one that was killed."""
    from ray.job_submission import JobStatus

    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 130
    code = details.driver_exit_code
    return 1 if not code else code if code > 0 else 128 - code


def describe(job: Job, ended: JobDetails | None = None) -> dict[str, Any]:
    """The job as plain data; of one that has ended, how."""
    described: dict[str, Any] = {"submission_id": job.submission_id, "address": job.address, **job.commands()}
    if ended is not None:
        described |= {"status": ended.status.value, "exit_code": exit_code(ended), "message": ended.message}
    return described


def how_to(job: Job) -> str:
    """The commands that follow and stop a job, a line each."""
    return "\n".join(f"{what} it by: {command}" for what, command in job.commands().items())


def print_job(job: Job) -> None:
    print(f"submitted {job.submission_id}\n{how_to(job)}")


def print_end(job: Job, ended: JobDetails) -> None:
    said = "" if exit_code(ended) == 0 else f": {ended.message}"
    print(f"{job.submission_id} {ended.status.value.lower()}{said}")
