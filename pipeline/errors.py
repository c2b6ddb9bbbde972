"""The errors that a user can mend. Each message names the key or file, the value and what to do next."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class Failure(Protocol):
    """A failed shard of a stage, as its receipt tells it."""

    @property
    def stage(self) -> str: ...

    @property
    def shard(self) -> int: ...

    @property
    def error(self) -> str | None: ...

    @property
    def last_line(self) -> str: ...


class ConfigError(ValueError):
    """A mistake in the configuration or its surroundings, found before any work."""


class LeaseHeld(RuntimeError):
    """Another run holds the run folder."""


class StageFailed(RuntimeError):
    """A stage could not be completed; `failures` are its failed shards."""

    def __init__(self, message: str, failures: Collection[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = list(failures)
