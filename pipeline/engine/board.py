"""The course of a fit as TensorBoard event files, in the artifact's folder `tensorboard`.

A fit that goes on writes its past again, so the files never hold a step twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.store import storage

FOLDER = "tensorboard"


class Board:
    """Writes on local disk; `publish` brings the files of a remote artifact to their place."""

    def __init__(self, out: str, record: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._target = storage.join(out, FOLDER)
        for name in storage.list_folder(self._target):
            storage.remove(storage.join(self._target, name))
        self._staging = tempfile.TemporaryDirectory() if storage.is_remote(out) else None
        local = storage.filesystem(self._target)[1] if self._staging is None else self._staging.name
        self._folder = Path(local)
        self._writer: Any = SummaryWriter(str(self._folder))
        for entry in record["history"]:
            self.add_losses(entry)
        for counts in record.get("histograms", ()):
            self.add_histogram(counts)

    def add_losses(self, entry: Mapping[str, float]) -> None:
        for name, value in entry.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(entry["step"]))

    def add_histogram(self, counts: dict[str, Any]) -> None:
        for name, bins in counts.items():
            if name == "step":
                continue
            edges = np.linspace(-1, 1, len(bins) + 1)
            centres = (edges[1:] + edges[:-1]) / 2
            self._writer.add_histogram_raw(
                f"cosine/{name}",
                min=-1,
                max=1,
                num=sum(bins),
                sum=float(centres @ bins),
                sum_squares=float(centres**2 @ bins),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=bins,
                global_step=counts["step"],
            )

    def publish(self) -> None:
        self._writer.flush()
        for file in self._folder.iterdir() if self._staging else ():
            storage.write_bytes(storage.join(self._target, file.name), file.read_bytes())

    def close(self) -> None:
        self._writer.close()
        if self._staging is not None:
            self._staging.cleanup()
