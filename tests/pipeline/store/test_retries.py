"""When a store is asked again, how often and how soon."""

from __future__ import annotations

import errno

import aiohttp
import pytest
from botocore import exceptions as boto
from botocore.exceptions import ClientError

from pipeline.store.retries import BRIEF, PATIENT, Retry, is_transient, status_and_code


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def failing(times: int, error: Exception) -> tuple[list[int], object]:
    calls: list[int] = []

    def function() -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error
        return "done"

    return calls, function


def refusal(status: int, code: str) -> OSError:
    """As s3fs raises it."""
    error = OSError(errno.EIO, code)
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.__cause__ = ClientError(answer, "GetObject")
    return error


def test_pauses_double_and_are_drawn_from_their_upper_half() -> None:
    clock = Clock()
    calls, function = failing(8, TimeoutError())
    assert Retry().call(function, "x", (OSError,), sleep=clock.sleep, clock=clock) == "done"  # type: ignore[arg-type]
    assert len(calls) == 9
    for pause, most in zip(clock.pauses, [0.25, 0.5, 1, 2, 4, 8, 10, 10], strict=True):
        assert most / 2 <= pause <= most
    assert len({Retry().pause(7) for _ in range(20)}) > 10


def test_the_default_outlasts_half_a_minute_and_ends() -> None:
    least = sum(min(10, 0.25 * 2**n) / 2 for n in range(PATIENT.attempts - 1))
    assert 45 < least < 2 * least < PATIENT.seconds
    assert sum(min(10, 0.25 * 2**n) for n in range(BRIEF.attempts - 1)) < 2


def test_the_last_error_is_raised_after_so_many_attempts() -> None:
    clock = Clock()
    calls, function = failing(99, TimeoutError("no answer"))
    with pytest.raises(TimeoutError, match="no answer") as caught:
        Retry(attempts=4).call(function, "s3://b/k", (OSError,), sleep=clock.sleep, clock=clock)  # type: ignore[arg-type]
    assert len(calls) == 4
    assert caught.value.__notes__ == ["s3://b/k: given up after 4 attempts"]


def test_no_attempt_begins_when_the_time_is_over() -> None:
    clock = Clock()
    _, function = failing(99, TimeoutError())
    with pytest.raises(TimeoutError):
        Retry(attempts=99, seconds=60).call(function, "x", (OSError,), sleep=clock.sleep, clock=clock)  # type: ignore[arg-type]
    assert 45 < clock.now <= 60


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("k"), PermissionError("k"), refusal(403, "AccessDenied"), refusal(404, "NoSuchKey"), KeyError()],
    ids=str,
)
def test_what_will_not_pass_is_asked_once(error: Exception) -> None:
    calls, function = failing(1, error)
    with pytest.raises(type(error)):
        Retry().call(function, "x", (OSError,), sleep=lambda seconds: pytest.fail("waits"))  # type: ignore[arg-type]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("status", "code", "transient"),
    [
        (500, "InternalError", True),
        (502, "502", True),
        (503, "SlowDown", True),
        (503, "ServiceUnavailable", True),
        (0, "503", True),
        (429, "TooManyRequests", True),
        (400, "RequestTimeout", True),
        (400, "IncompleteBody", True),
        (409, "ConditionalRequestConflict", True),
        (501, "NotImplemented", False),
        (400, "ExpiredToken", False),  # see pipeline.store.s3
        (400, "400", False),
        (403, "AccessDenied", False),
        (403, "RequestTimeTooSkewed", False),
        (403, "SignatureDoesNotMatch", False),
        (404, "NoSuchBucket", False),
        (412, "PreconditionFailed", False),
        (416, "InvalidRange", False),
    ],
)
def test_answers_of_a_store(status: int, code: str, transient: bool) -> None:
    error = refusal(status, code)
    assert is_transient(error) is transient
    assert is_transient(error.__cause__) is transient  # type: ignore[arg-type]
    assert status_and_code(error) == (status or int(code), code)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (boto.EndpointConnectionError(endpoint_url="http://x"), True),
        (boto.ConnectTimeoutError(endpoint_url="http://x"), True),
        (boto.ReadTimeoutError(endpoint_url="http://x"), True),
        (boto.ConnectionClosedError(endpoint_url="http://x"), True),
        (boto.ResponseStreamingError(error="reset"), True),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), True),
        (boto.SSLError(endpoint_url="http://x", error="EOF occurred in violation of protocol"), True),
        (boto.SSLError(endpoint_url="http://x", error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), False),
        (aiohttp.ClientPayloadError("not all data"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (ConnectionResetError(104, "reset"), True),
        (OSError(errno.ENETUNREACH, "unreachable"), True),
        (TimeoutError(), True),
        (boto.NoCredentialsError(), False),
        (boto.ParamValidationError(report="bad bucket"), False),
        (OSError("asked for 4 bytes at 8, got 2"), False),
        (OSError(errno.ENOSPC, "disk full"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_without_an_answer(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient
    assert status_and_code(error) == (0, "")


def test_other_stores_say_their_status_themselves() -> None:
    error = OSError("quota")
    error.code = 429  # type: ignore[attr-defined]  # as gcsfs' HttpError
    assert is_transient(error)
    error.code = 403  # type: ignore[attr-defined]
    assert not is_transient(error)
