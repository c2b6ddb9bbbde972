"""Receipts: what a worker says of one shard. They feed progress, `status`, `plan` and the report, and decide nothing:
whether a shard is done is told by its part alone."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.engine.log import say
from pipeline.store import storage
from workers.records import Status

N = TypeVar("N", int, float)
FOLDER = "receipts"  # of the run folder
NAME = re.compile(r"(?P<stage>[a-z_]+(?:_\d+)?)-(?P<fingerprint>[0-9a-f]{12})-\d+\.jsonl")
MAX_RECEIPTS = 1000  # a file
READERS = 8  # files read at a time


@dataclass(frozen=True, slots=True)
class Receipt:
    """One attempt at one shard. `seconds` by phase, `rows` by status, `bytes` of the part written."""

    stage: str
    fingerprint: str
    shard: int
    ok: bool
    wall_s: float
    rows: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    instances: int = 0
    bytes: int = 0
    pixels: dict[str, int] = field(default_factory=dict)  # of things, of stuff, void
    error: str | None = None  # traceback of a failed shard
    host: str = ""
    peak_memory_mb: float = 0.0  # largest resident size of the worker so far
    node: str = ""  # Ray's id of the node; several may share a host
    attempt: int = 1  # 2 and more: workers or nodes were lost before
    histograms: dict[str, list[int]] = field(default_factory=dict)  # these three: see `workers.phases`
    device_s: float = 0.0
    cpu_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(line: str) -> Receipt:
        """ValueError when the line is no receipt. Fields of a later version are left out."""
        try:
            return _reader().validate_json(line)
        except ValidationError as error:
            raise ValueError(f"no receipt: {line[:80]!r}") from error

    @property
    def images(self) -> int:
        """Images that the stage looked at."""
        return sum(self.rows.values()) - self.rows.get(Status.NOT_SAMPLED, 0)

    @property
    def last_line(self) -> str:
        """Of the error: the exception itself, without its traceback."""
        return (self.error or "").strip().rsplit("\n", 1)[-1]


@functools.cache
def _reader() -> TypeAdapter[Receipt]:
    return TypeAdapter(Receipt)


class ReceiptLog:
    """Appends receipts to `<run>/receipts/<stage>-<fingerprint>-<start>.jsonl`, written again now and then; a file
    holds up to 1000. A store that is away costs receipts, not the run."""

    def __init__(self, run_uri: str, stage: str, fingerprint: str, *, every_s: float = 15.0) -> None:
        self._prefix = storage.join(run_uri, FOLDER, f"{stage}-{fingerprint}")
        self._every_s = every_s
        self._written_at = 0.0
        self._begin()

    def _begin(self) -> None:
        self._uri = f"{self._prefix}-{time.time_ns()}.jsonl"
        self._lines: list[str] = []

    def append(self, receipt: Receipt) -> None:
        self._lines.append(receipt.to_json())
        full = len(self._lines) >= MAX_RECEIPTS
        if full or time.monotonic() - self._written_at > self._every_s:
            self.flush()
        if full:
            self._begin()

    def flush(self) -> None:
        if self._lines:
            with contextlib.suppress(*storage.store_errors(self._uri)):
                storage.write_bytes(self._uri, ("\n".join(self._lines) + "\n").encode())
                self._written_at = time.monotonic()


def list_receipts(run_uri: str) -> list[str]:
    """The names of all files of receipts of a run."""
    names = storage.list_folder(storage.join(run_uri, FOLDER))
    return [name for name in names if NAME.fullmatch(name)]


def read_receipts(
    run_uri: str, stage: str, fingerprint: str | None = None, *, listed: Sequence[str] | None = None
) -> list[Receipt]:
    """The newest receipt of every shard of a stage, by shard; without a fingerprint, those of its last run alone.

    `listed` is what `list_receipts` has found, for those who ask for many stages.
    """
    prefix = f"{stage}-{fingerprint}-" if fingerprint else f"{stage}-"
    names = [name for name in (list_receipts(run_uri) if listed is None else listed) if name.startswith(prefix)]
    names.sort(key=lambda name: int(name.removesuffix(".jsonl").rsplit("-", 1)[1]))  # by start time
    uris = [storage.join(run_uri, FOLDER, name) for name in (names if fingerprint else names[-1:])]
    newest: dict[int, Receipt] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for uri, data in zip(uris, pool.map(storage.read_bytes, uris), strict=True):
            for line in data.decode(errors="replace").splitlines():
                try:
                    receipt = Receipt.from_json(line)
                except ValueError as error:  # somebody else wrote there; parts alone say what is done
                    if fingerprint:
                        say(f"{storage.redact(uri)}: {error}; left out", level=logging.WARNING)
                    continue
                newest[receipt.shard] = receipt
    return [newest[shard] for shard in sorted(newest)]


def add_histograms(receipts: Iterable[Receipt], name: str) -> list[int]:
    """The sum of a histogram over all receipts that have it; empty when none has."""
    found = [receipt.histograms[name] for receipt in receipts if name in receipt.histograms]
    return [sum(bins) for bins in zip(*found, strict=True)]


def add_up(counts: Iterable[Mapping[str, N]]) -> dict[str, N]:
    """The sum of each entry over all mappings, largest first."""
    totals: dict[str, N] = {}
    for mapping in counts:
        for name, value in mapping.items():
            totals[name] = totals[name] + value if name in totals else value
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
