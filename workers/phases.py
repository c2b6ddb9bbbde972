"""What a worker says of a shard beside its rows: seconds by named phase, and histograms of what decided them.

Every receipt carries both: they tell where the time of a shard went, and why its photos have no labels.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Phases:
    """Adds up wall seconds, and counts in bins, under each name; from any thread.

    device_s: seconds in which the thread that drives a device other than the CPU was at it. cpu_s: processor seconds of
    all other work on photos, from decoding to encoding (`workers.overlap`).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.histograms: dict[str, list[int]] = {}
        self.device_s = 0.0
        self.cpu_s = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] += time.perf_counter() - start

    def named(self, name: str, function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        """A call of the function, under this name whenever and wherever it is made."""

        def call() -> T:
            with self(name):
                return function(*arguments)

        return call

    @contextmanager
    def device(self) -> Iterator[None]:
        """A block of the thread that drives the device."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.device_s += time.perf_counter() - start

    @contextmanager
    def cpu(self) -> Iterator[None]:
        """A block of the CPU's own work, in any thread."""
        start = time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self.cpu_s += time.thread_time() - start

    def count(self, name: str, bins: Sequence[int]) -> None:
        """Add counts to the histogram of this name, which always has the same bins."""
        with self._lock:
            before = self.histograms.setdefault(name, [0] * len(bins))
            self.histograms[name] = [old + int(new) for old, new in zip(before, bins, strict=True)]
