"""The errors that a user can mend. Each message names the key or file, the value and what to do next."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.receipts import Receipt


class ConfigError(ValueError):
    """A mistake in the configuration or its surroundings, found before any work."""


class LeaseHeld(RuntimeError):
    """Another run holds the run folder."""


class StageFailed(RuntimeError):
    """A stage could not be completed; `failures` are the receipts of its failed shards."""

    def __init__(self, message: str, failures: Collection[Receipt] = ()) -> None:
        super().__init__(message)
        self.failures = list(failures)
