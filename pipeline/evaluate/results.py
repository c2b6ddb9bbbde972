"""What every evaluation's result is made of: names that were left out, numbers as JSON has them, its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import ConfigError
from pipeline.store import storage

LISTED = 5  # names given of those that were left out


@dataclass(slots=True)
class Names:
    """How many there are, and the first few of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        found = cls()
        for name in names:
            found.add(name)
        return found

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(name)


def number(value: float) -> float | None:
    """NaN as None, which JSON has a word for."""
    return None if math.isnan(value) else float(value)


def plain(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """The same of each value."""
    return {key: number(value) for key, value in numbers.items()}


def mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def write_json(folder: str, name: str, result: Mapping[str, Any]) -> str:
    """Write a result; returns the file's name for people. ConfigError as `write_file`."""
    return write_file(folder, name, json.dumps(result, indent=1, allow_nan=False).encode())


def write_file(folder: str, name: str, data: bytes) -> str:
    """Write a file of the results; returns its name for people. ConfigError when the folder cannot be written to."""
    uri = storage.join(folder, name)
    try:
        storage.write_bytes(uri, data)
    except storage.store_errors(uri) as error:
        raise ConfigError(f"--output: cannot write {storage.redact(uri)!r}: {error}") from error
    return storage.redact(uri)
