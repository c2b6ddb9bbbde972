"""What a person sees while a stage runs: one bar on a terminal, plain lines otherwise. Writes to stderr."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.engine import log
from pipeline.engine.log import say
from pipeline.engine.receipts import Receipt


class StageProgress:
    """Counts shards, images, instances and failures of one stage. Use as a context manager."""

    def __init__(self, stage: str, pending: int, *, line_every_s: float = 10.0) -> None:
        self.stage, self.pending = stage, pending
        self.shards = self.images = self.instances = self.failed = 0
        self._started = time.monotonic()
        self._line_every_s = line_every_s
        self._said_at = 0.0
        self._bar = _bar("shards") if log.shows_bars() else None

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
            say(self._line(), stage=self.stage)

    def add(self, receipt: Receipt) -> None:
        self.shards += 1
        self.images += receipt.images
        self.instances += receipt.instances
        self.failed += not receipt.ok
        self._log(receipt)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, rate=self._rate())
        elif time.monotonic() - self._said_at > self._line_every_s and self.shards < self.pending:
            self._said_at = time.monotonic()
            say(self._line(), stage=self.stage)

    def _log(self, receipt: Receipt) -> None:
        fields: dict[str, Any] = {
            "stage": self.stage,
            "shard": receipt.shard,
            "host": receipt.host,
            "seconds": receipt.wall_s,
        }
        if receipt.ok:
            say("shard done", rows=receipt.rows, instances=receipt.instances, **fields)
        else:
            say(f"shard failed: {receipt.last_line}", level=logging.ERROR, **fields)

    def _rate(self) -> str:
        rate = self.images / max(time.monotonic() - self._started, 1e-9)
        failures = f", {self.failed} failed" if self.failed else ""
        return f"{rate:.2f} images/s, {self.instances} instances{failures}"

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        left = seconds / self.shards * (self.pending - self.shards)
        return f"{self.stage}: {self.shards}/{self.pending} shards, {self._rate()}, {seconds:.0f} s, {left:.0f} s to go"


class FitProgress:
    """The steps of one fit and its loss. Use as a context manager; `update` may be called from another thread."""

    def __init__(self, stage: str, steps: int, *, line_every_s: float = 10.0) -> None:
        self.stage, self.steps = stage, steps
        self._started = self._said_at = time.monotonic()
        self._line_every_s = line_every_s
        self._first: tuple[int, float] | None = None  # the step seen first, and when: a fit may go on from half way
        self._bar = _bar("steps") if log.shows_bars() else None

    def __enter__(self) -> FitProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=self.steps, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float) -> None:
        """`step` steps are done, the loss of the last of them was `loss`."""
        now = time.monotonic()
        if self._first is None or step < self._first[0]:  # seen for the first time, or back at a checkpoint
            self._first = (step, now)
            if self._bar is not None:
                self._bar.reset(self._task, completed=step, rate=f"loss {loss:.4g}")
                return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=f"loss {loss:.4g}")
        elif now - self._said_at > self._line_every_s and step < self.steps:
            self._said_at = now
            say(self._line(step, loss, now), stage=self.stage, step=step, loss=loss)

    def _line(self, step: int, loss: float, now: float) -> str:
        assert self._first is not None
        done, seconds = step - self._first[0], now - self._first[1]
        left = f", {seconds / done * (self.steps - step):.0f} s to go" if done else ""
        return f"{self.stage}: step {step}/{self.steps}, loss {loss:.4g}, {now - self._started:.0f} s{left}"


def _bar(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + ", {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=log.console,
    )
