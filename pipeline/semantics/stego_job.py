"""What a fit of STEGO is, and what it keeps in its artifact folder while it runs: neighbours and checkpoint."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.stego_terms import COCOSTUFF27_VITS, LossTerms
from pipeline.semantics.stego_features import FeatureSet
from pipeline.store import storage

CHECKPOINT = "checkpoint.pt"
NEIGHBOURS = "neighbours.npz"


@dataclass(frozen=True, slots=True)
class StegoSettings:
    """What defines the weights, apart from the features. ValueError for values out of range."""

    classes: int = 27
    dim: int = 70  # of the code
    dropout: float = 0.1  # share of channels
    terms: LossTerms = COCOSTUFF27_VITS
    auto_shifts: tuple[str, ...] = ()  # of intra, inter, negative: found from the features, not those of `terms`
    conditioned: bool = False  # the features are: the head starts near the identity, clusters of the code are merged
    overclustering: int = 1  # clusters of the code for each class, before the merge
    pointwise: bool = True
    zero_clamp: bool = True
    stabilise: bool = False
    neighbours: int = 7  # a positive is one of so many nearest
    points: int = 11  # squared: points looked up in an image
    negatives: int = 5  # permutations of the batch
    batch_size: int = 16  # items; the paper has 32
    steps: int = 5000
    head_rate: float = 5e-4  # learning rates of Adam
    probe_rate: float = 5e-3
    seed: int = 0
    max_images: int | None = None  # fit to a random so many
    log_every: int = 50  # steps
    histogram_every: int = 500  # steps

    def __post_init__(self) -> None:
        least = {"classes": 1, "dim": 1, "neighbours": 1, "points": 1, "negatives": 1, "batch_size": 2, "steps": 1}
        least |= {"seed": 0, "log_every": 1, "histogram_every": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"semantics.{name} must be at least {bound}, got {getattr(self, name)}")
        if self.classes > 255:
            raise ValueError(f"semantics.classes must be at most 255, got {self.classes}")
        if self.max_images is not None and self.max_images < 2:
            raise ValueError(f"semantics.max_images must be at least 2, got {self.max_images}")


@dataclass(frozen=True, slots=True)
class TrainJob:
    """All that a process needs: small, picklable, the same for all."""

    features: FeatureSet
    settings: StegoSettings
    out: str
    scratch: str  # a folder on a disk of the machine
    identity: str  # of the fit; a checkpoint of another is refused
    checkpoint_every: int  # steps

    @property
    def features_file(self) -> Path:
        """Its own, so that a fit that ends takes nothing from another on the same machine, and none of other parts."""
        return Path(self.scratch) / f"stego-features-{self.identity}-{self.features.content}.npy"


def write_neighbours(job: TrainJob, neighbours_NK: NDArray[np.int32]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, neighbours=neighbours_NK, identity=np.array(job.identity))
    storage.write_bytes(storage.join(job.out, NEIGHBOURS), buffer.getvalue())


def read_neighbours(job: TrainJob) -> NDArray[np.int32] | None:
    """(N, K) int32 as they were written for this fit; None when there are none, or of another fit."""
    uri = storage.join(job.out, NEIGHBOURS)
    if not storage.exists(uri):
        return None
    with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as saved:
        return saved["neighbours"] if str(saved["identity"]) == job.identity else None


def read_checkpoint(job: TrainJob) -> dict[str, Any] | None:
    """The state in the checkpoint, on CPU; None when there is none. ValueError when it is of another fit."""
    uri = storage.join(job.out, CHECKPOINT)
    if not storage.exists(uri):
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(storage.read_bytes(uri)), map_location="cpu", weights_only=True)
    if state["identity"] != job.identity:
        raise ValueError(f"{storage.redact(uri)} is of a fit with other settings or features; delete it and run again")
    return state


def write_checkpoint(job: TrainJob, state: dict[str, Any]) -> None:
    stream = io.BytesIO()
    torch.save({"identity": job.identity, **state}, stream)
    storage.write_bytes(storage.join(job.out, CHECKPOINT), stream.getvalue())
