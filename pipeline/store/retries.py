"""When a store is asked again: after a 5xx, a throttled request, a timeout, a connection or a body that was cut short.

This is the one layer that decides. botocore would repeat requests but no body, s3fs repeats both, several times over
and without jitter, and the attempts of layers multiply: `pipeline.store.s3` tells both to try once. (aiohttp alone asks
by itself, at once and once, when the connection of a GET or a PUT is dropped.)
"""

from __future__ import annotations

import errno
import itertools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
_told: list[Callable[[], None]] = []  # before every pause

# Codes that come with a 4xx and yet speak of the store's load, of a clash of two writers or of a lost connection.
TRANSIENT_CODES = frozenset(
    {
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestTimeout",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)
TRANSIENT_STATUS = frozenset({408, 425, 429})
PERMANENT_STATUS = frozenset({501, 505})  # not implemented, HTTP version
TRANSIENT_ERRNO = frozenset({errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH})
SAID_FROM_S = 1.0  # pauses from here on are told of


@dataclass(frozen=True, slots=True)
class Retry:
    """How long to go on. The pauses double from `first_pause_s` to `longest_pause_s`; each is drawn from its upper
    half. The defaults outlast an outage of 45 s for certain, and give up after two minutes."""

    attempts: int = 15
    seconds: float = 120.0  # no attempt begins later than so long after the first
    first_pause_s: float = 0.25
    longest_pause_s: float = 10.0

    def call(
        self,
        function: Callable[[], T],
        what: str,
        errors: tuple[type[Exception], ...],
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> T:
        """`function()`, again and again while it raises one of `errors` that may pass; then the last of them.

        `what` is asked for, without credentials, for the log.
        """
        end = clock() + self.seconds
        for attempt in itertools.count(1):
            try:
                return function()
            except errors as error:
                pause = self.pause(attempt)
                if not is_transient(error) or attempt >= self.attempts or clock() + pause > end:
                    if attempt > 1:
                        error.add_note(f"{what}: given up after {attempt} attempts")
                    raise
                say = log.warning if pause >= SAID_FROM_S else log.debug
                for tell in _told:
                    tell()
                say("%s: %s, attempt %d; again in %.1f s", what, type(error).__name__, attempt, pause)
            sleep(pause)
        raise AssertionError("unreachable")

    def pause(self, attempt: int) -> float:
        """Seconds after so many attempts, drawn anew each time: clients that failed together do not return together."""
        most = min(self.longest_pause_s, self.first_pause_s * 2.0 ** (attempt - 1))
        return random.uniform(most / 2, most)


def on_pause(tell: Callable[[], None]) -> None:
    """Call this before every pause of this process, from whatever thread waits: it is not hanging."""
    _told.append(tell)


PATIENT = Retry()
BRIEF = Retry(attempts=4)  # 2 s: where somebody waits for an answer, or the next turn comes anyway
ONCE = Retry(attempts=1)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later. Never for a 403, a 404 or another mistake of the client."""
    from aiohttp import ClientConnectionError, ClientPayloadError
    from botocore import exceptions as boto  # type: ignore[import-untyped]
    from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

    status, code = status_and_code(error)
    if status or code:
        return (
            code in TRANSIENT_CODES or status in TRANSIENT_STATUS or (status >= 500 and status not in PERMANENT_STATUS)
        )
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    dropped = (
        *(TimeoutError, ConnectionError, ClientConnectionError, ClientPayloadError),
        *(boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError),
        ResponseParserError,  # an overloaded store may send half of an error
    )
    return isinstance(error, dropped) or getattr(error, "errno", None) in TRANSIENT_ERRNO


def status_and_code(error: BaseException) -> tuple[int, str]:
    """The HTTP status of a store's answer and its own error code, such as (403, "AccessDenied"); 0 and "" where none
    is known. s3fs raises an OSError from botocore's error; other stores' errors have a status themselves."""
    response: dict[str, Any] | None = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") or (code if code.isdecimal() else 0)
        return int(status), code
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int) and status >= 100:
            return status, ""
    return 0, ""
