"""What the driver of a k-means knows while it runs, and the checkpoint that a stopped fit goes on from."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.clusters.artifact import CHECKPOINT, KMeansSettings
from pipeline.store import storage
from workers.copies import UNIT, Weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows: `ends` of the actors' ranges of row numbers, and the sum of squared norms.
    `weights`: what each counts; None: one."""

    ends: np.ndarray
    dim: int
    step: float
    squared_norm: float
    weights: Weights | None

    @property
    def count(self) -> int:
        return int(self.ends[-1])

    @property
    def unit(self) -> int:
        """How often a row that has no copy counts in sums and counts."""
        return 1 if self.weights is None else UNIT

    @property
    def different(self) -> int:
        return self.count if self.weights is None else self.weights.groups

    def numbers_of(self, different: np.ndarray) -> np.ndarray:
        """The numbers of rows that are counted without copies."""
        return different if self.weights is None else np.flatnonzero(self.weights.first)[different]


@dataclass(frozen=True, slots=True)
class State:
    """All that the next iteration needs: the centroids after `len(repaired)` updates, and those before the last."""

    centroids: np.ndarray
    previous: np.ndarray | None
    seed_rows: np.ndarray
    inertia: tuple[float, ...] = ()
    repaired: tuple[int, ...] = ()
    converged: bool = False

    @property
    def version(self) -> int:
        return len(self.repaired)


def _identity(settings: KMeansSettings, rows: Rows) -> dict[str, Any]:
    weights = {} if rows.weights is None else {"weights": rows.weights.digest}
    return {**asdict(settings), "rows": rows.count, "dim": rows.dim, "step": rows.step, **weights}


def save_checkpoint(out: str, settings: KMeansSettings, rows: Rows, state: State) -> None:
    """Write `checkpoint.npz` into the artifact folder; `state` is after an iteration."""
    record = {
        "identity": _identity(settings, rows),
        "inertia": state.inertia,
        "repaired": state.repaired,
        "converged": state.converged,
    }
    assert state.previous is not None
    buffer = io.BytesIO()
    np.savez(
        buffer,
        centroids=state.centroids,
        previous=state.previous,
        seed_rows=state.seed_rows,
        record=np.array(json.dumps(record)),
    )
    storage.write_bytes(storage.join(out, CHECKPOINT), buffer.getvalue())


def load_checkpoint(out: str, settings: KMeansSettings, rows: Rows) -> State | None:
    """The state in the artifact folder; None where there is none. ValueError: it is of another fit."""
    uri = storage.join(out, CHECKPOINT)
    if not storage.exists(uri):
        return None
    with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as saved:
        record = json.loads(str(saved["record"]))
        if record["identity"] != json.loads(json.dumps(_identity(settings, rows))):
            raise ValueError(f"{storage.redact(uri)} is of a fit with other settings or rows; delete it and run again")
        log.info("k-means goes on after iteration %d", len(record["repaired"]))
        return State(
            saved["centroids"],
            saved["previous"],
            saved["seed_rows"],
            tuple(record["inertia"]),
            tuple(record["repaired"]),
            record["converged"],
        )
