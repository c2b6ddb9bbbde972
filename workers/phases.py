"""What a worker says of a shard beside its rows: seconds by named phase, and histograms of what decided them.

Every receipt carries both: they tell where the time of a shard went, and why its photos have no labels.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Phases:
    """Adds up wall seconds, and counts in bins, under each name. Not for use from several threads at once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.histograms: dict[str, list[int]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def count(self, name: str, bins: Sequence[int]) -> None:
        """Add counts to the histogram of this name, which always has the same bins."""
        before = self.histograms.setdefault(name, [0] * len(bins))
        self.histograms[name] = [old + int(new) for old, new in zip(before, bins, strict=True)]
