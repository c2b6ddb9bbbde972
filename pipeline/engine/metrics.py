"""What Prometheus can see of a run: counters and gauges that Ray exports on every node (`--metrics-export-port`).

They are counted in the driver, receipt by receipt, so that a shard counts once, however often it was tried inside Ray.
Ray puts `ray_` before a name and `_total` behind a counter's; `docker/grafana-dashboard.json` shows them.
"""

from __future__ import annotations

import string
import urllib.parse
from typing import Any

from pipeline.engine.receipts import Receipt

COUNTERS = {
    "u2label_images": ("Images by what became of them", ("run", "stage", "status")),
    "u2label_instances": ("Masks found", ("run", "stage")),
    "u2label_shards": ("Attempts at shards, ok or failed", ("run", "stage", "outcome")),
    "u2label_seconds": ("Seconds of all workers by phase", ("run", "stage", "phase")),
    "u2label_bytes": ("Bytes of parts written", ("run", "stage")),
}
GAUGES = {
    "u2label_shards_done": ("Shards whose part is there", ("run", "stage")),
    "u2label_shards_pending": ("Shards that are still to do", ("run", "stage")),
    "u2label_peak_memory_mb": ("Largest resident size of a worker so far", ("run", "stage")),
}


def exported_names() -> set[str]:
    """The names as Prometheus sees them."""
    return {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}


def in_ascii(text: str) -> str:
    """`text` with all but ASCII percent-encoded, since Ray refuses other values of tags."""
    return urllib.parse.quote(text, safe=string.printable, errors="surrogateescape")


class StageMetrics:
    """The counts of one stage while it runs. Needs a connection to Ray."""

    def __init__(self, run: str, stage: str, *, done: int, pending: int) -> None:
        from ray.util.metrics import Counter, Gauge

        self._where = {"run": in_ascii(run), "stage": stage}
        self._metrics: dict[str, Any] = {
            **{name: Counter(name, description=text, tag_keys=keys) for name, (text, keys) in COUNTERS.items()},
            **{name: Gauge(name, description=text, tag_keys=keys) for name, (text, keys) in GAUGES.items()},
        }
        self._done, self._pending, self._memory = done, pending, 0.0
        self._set_gauges()

    def add(self, receipt: Receipt) -> None:
        """Count one attempt at a shard."""
        for status, rows in receipt.rows.items():
            self._count("u2label_images", rows, status=status)
        for phase, seconds in receipt.seconds.items():
            self._count("u2label_seconds", seconds, phase=phase)
        self._count("u2label_instances", receipt.instances)
        self._count("u2label_bytes", receipt.bytes)
        self._count("u2label_shards", 1, outcome="ok" if receipt.ok else "failed")
        self._done += receipt.ok
        self._pending -= receipt.ok
        self._memory = max(self._memory, receipt.peak_memory_mb)
        self._set_gauges()

    def _count(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses to count nothing
            self._metrics[name].inc(value, {**self._where, **tags})

    def _set_gauges(self) -> None:
        values = {"done": self._done, "pending": self._pending}
        for what, shards in values.items():
            self._metrics[f"u2label_shards_{what}"].set(shards, self._where)
        self._metrics["u2label_peak_memory_mb"].set(self._memory, self._where)
