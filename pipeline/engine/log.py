"""What a command says while it works, on stderr: lines for people, or one JSON object a line (`--log-format json`).
And the consoles, of that and of the tables on stdout."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console

WIDTH = 140  # of a table that goes to a file or to the log of a job, where no terminal tells its own


def _width(stream: TextIO) -> int | None:
    return None if stream.isatty() or "COLUMNS" in os.environ else WIDTH


def stdout_console() -> Console:
    """For what a command has found."""
    return Console(highlight=False, width=_width(sys.stdout))


console = Console(stderr=True, highlight=False, width=_width(sys.stderr))


class LinesForPeople(logging.Handler):
    """The messages as they are. Those of single shards are left to the progress bar and the table of failures."""

    def emit(self, record: logging.LogRecord) -> None:
        if "shard" not in getattr(record, "fields", {}):
            console.print(record.getMessage(), markup=False, soft_wrap=True)


class JsonLines(logging.Handler):
    """One object a message: `time` (UTC), `level`, `message`, and `stage`, `shard` and more where they are known."""

    def emit(self, record: logging.LogRecord) -> None:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {"time": time, "level": record.levelname.lower(), **getattr(record, "fields", {})}
        print(json.dumps(entry | {"message": record.getMessage()}, ensure_ascii=False), file=sys.stderr, flush=True)


_logger = logging.getLogger("pipeline")  # of all our modules
_logger.setLevel(logging.INFO)


def say(message: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log a message; `stage`, `shard` and whatever else is plain data become keys of the JSON object."""
    _logger.log(level, "%s", message, extra={"fields": fields})


def write_for_people() -> None:
    _logger.handlers = [LinesForPeople()]


def write_json_lines() -> None:
    _logger.handlers = [JsonLines()]


def writes_json() -> bool:
    return any(isinstance(handler, JsonLines) for handler in _logger.handlers)


def shows_bars() -> bool:
    """Whether a moving bar can be seen: on a terminal, and not among JSON."""
    return console.is_terminal and not writes_json()


write_for_people()
