"""What a person sees while a stage runs: one bar on a terminal, plain lines otherwise. Writes to stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.receipts import Receipt

console = Console(stderr=True, highlight=False)


class StageProgress:
    """Counts shards, images, instances and failures of one stage. Use as a context manager."""

    def __init__(self, stage: str, pending: int, *, line_every_s: float = 10.0) -> None:
        self.stage, self.pending = stage, pending
        self.shards = self.images = self.instances = self.failed = 0
        self._started = time.monotonic()
        self._line_every_s = line_every_s
        self._said_at = 0.0
        self._bar = _bar() if console.is_terminal else None

    def __enter__(self) -> StageProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=self.pending, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.shards:
            console.print(self._line())

    def add(self, receipt: Receipt) -> None:
        self.shards += 1
        self.images += receipt.images
        self.instances += receipt.instances
        self.failed += not receipt.ok
        if self._bar is not None:
            self._bar.update(self._task, advance=1, rate=self._rate())
        elif time.monotonic() - self._said_at > self._line_every_s and self.shards < self.pending:
            self._said_at = time.monotonic()
            console.print(self._line())

    def _rate(self) -> str:
        rate = self.images / max(time.monotonic() - self._started, 1e-9)
        failures = f", {self.failed} failed" if self.failed else ""
        return f"{rate:.2f} images/s, {self.instances} instances{failures}"

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        left = seconds / self.shards * (self.pending - self.shards)
        return f"{self.stage}: {self.shards}/{self.pending} shards, {self._rate()}, {seconds:.0f} s, {left:.0f} s to go"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards, {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
