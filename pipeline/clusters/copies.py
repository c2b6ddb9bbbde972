"""Masks that are copies of each other, over all parts of a run: a photo saved again or resized, the frames of a film.

The parts are read once, a few at a time, into a scratch file on local disk (the folder for temporary files, `TMPDIR`):
two bytes a value. It is mapped, so that memory is 50 bytes a mask and what the system has left to cache the file. All
is done in this process, so that the number of workers can change nothing, nor can the size of the shards as long as
photos keep their order.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.clusters.embeddings import read_photos
from pipeline.engine.shards import ahead
from pipeline.store import storage
from workers.copies import Weights, find_groups, weigh

READERS = 4  # threads that read parts, each with one in memory


class Place(NamedTuple):
    """Where a mask is: number of the part, row of it, and number of the mask in that row."""

    part: int
    row: int
    mask: int


@dataclass(frozen=True)
class Copies:
    """`groups` (N,) int64: for each mask, in the order of parts, photos and masks, the number of the first of its
    group; `photos` (P,) int64: how many masks each photo has; `parts`: how many photos each part has."""

    groups: NDArray[np.int64]
    photos: NDArray[np.int64]
    parts: tuple[int, ...]

    def weights(self) -> Weights:
        """What each mask counts, so that a group counts as one."""
        return weigh(self.groups)

    @functools.cached_property
    def photo_of(self) -> NDArray[np.int64]:
        """(N,) the number of each mask's photo."""
        return np.repeat(np.arange(len(self.photos)), self.photos)

    def across_photos(self) -> list[NDArray[np.int64]]:
        """The groups with masks of more than one photo, each the ascending numbers of its masks; the largest first, of
        equal ones the first."""
        copied = np.flatnonzero(np.bincount(self.groups, minlength=len(self.groups))[self.groups] > 1)
        order = copied[np.argsort(self.groups[copied], kind="stable")]
        found = np.split(order, np.flatnonzero(np.diff(self.groups[order])) + 1) if len(order) else []
        apart = [masks for masks in found if self.photo_of[masks[0]] != self.photo_of[masks[-1]]]
        return sorted(apart, key=lambda masks: (-len(masks), masks[0]))

    def place(self, mask: int) -> Place:
        photo = int(self.photo_of[mask])
        part = int(np.searchsorted(np.cumsum(self.parts), photo, side="right"))
        return Place(part, photo - sum(self.parts[:part]), mask - int(self.photos[:photo].sum()))


def find_copies(parts: Sequence[str], threshold: float) -> Copies:
    """The masks of instances parts (URIs) whose embeddings have a cosine of at least `threshold`, in groups.

    ValueError: a part that cannot be read or has embeddings of another width than the first, no room for the scratch
    file.
    """
    with tempfile.TemporaryFile(buffering=0) as scratch:  # so that closing it has nothing left to write
        dim, photos = _unpack(parts, scratch)
        counts = np.concatenate([np.zeros(0, np.int64), *photos])
        masks = int(counts.sum())
        if not masks:
            return Copies(np.zeros(0, np.int64), counts, tuple(map(len, photos)))
        mapped_ND = np.memmap(scratch, np.float16, "r", shape=(masks, dim))
        groups = find_groups(lambda numbers: mapped_ND[numbers], masks, dim, threshold)
    return Copies(groups, counts, tuple(map(len, photos)))


def _unpack(parts: Sequence[str], scratch: IO[bytes]) -> tuple[int, list[NDArray[np.int64]]]:
    """Writes the embeddings -> their width, and how many each photo of each part has."""
    dim, photos = 0, list[NDArray[np.int64]]()
    for part, (rows_ND, counts) in zip(parts, ahead(read_photos, parts, depth=READERS), strict=True):
        if photos and rows_ND.shape[1] != dim:
            raise ValueError(f"{storage.redact(part)}: embeddings of {rows_ND.shape[1]} values, {dim} before")
        dim = rows_ND.shape[1]
        photos.append(counts)
        try:
            _write(scratch, rows_ND.astype(np.float16).tobytes())
        except OSError as error:
            raise ValueError(
                f"no room for the embeddings of the masks in {tempfile.gettempdir()}: {error}; make room there, or set "
                "TMPDIR to a folder with more"
            ) from error
    return dim, photos


def _write(scratch: IO[bytes], data: bytes) -> None:
    """All of it: a file without a buffer may take a part."""
    while data:
        data = data[scratch.write(data) :]
