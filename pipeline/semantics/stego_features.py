"""The teacher features of all parts as one array on local disk, which the training of STEGO reads at random.

A part is compressed as a whole, so single photos cannot be read from it. Each machine therefore unpacks the chosen rows
once into a scratch file and maps it: memory is the page cache, whatever the number of photos. An item is one crop.

Shapes: N items, C channels, (h, w) patches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.engine.done import CONTENT
from pipeline.engine.shards import ahead
from pipeline.store import storage
from workers.semantics.stego import descriptor, read_features

log = logging.getLogger(__name__)

READ_AHEAD = 8 << 20  # bytes of a remote part in one request
READERS = 8  # parts surveyed at a time
ROWS = 16  # photos decoded at a time
SAMPLED, SAMPLED_ITEMS = 1 << 16, 1 << 10  # patches that stand for all, and the items that they are of


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Which rows of which parts the fit uses, and the (crops, C, h, w) that all of them have.

    Grows with the photos that have features and the parts that hold them, not with the source.
    """

    parts: tuple[str, ...]
    rows: tuple[NDArray[np.int32], ...]  # of each part, ascending, at least one
    shape: tuple[int, ...]
    content: str  # tells these parts from others of their names

    @property
    def images(self) -> int:
        return sum(len(rows) for rows in self.rows)

    @property
    def items(self) -> int:
        return self.images * self.shape[0]

    @property
    def digest(self) -> str:
        content = hashlib.sha256(json.dumps([self.parts, self.shape]).encode())
        for rows in self.rows:
            content.update(rows.astype("<i4").tobytes() + b"|")
        return content.hexdigest()[:16]


def survey_features(parts: Sequence[str], *, max_images: int | None, seed: int) -> FeatureSet:
    """The photos of the parts (URIs) that have features, or a random `max_images` of them; features are not read.

    ValueError for no such photo, a part that cannot be read, or features of unlike sizes.
    """
    surveyed = list(ahead(_survey_part, parts, depth=READERS))
    rows = [found for found, _, _ in surveyed]
    kinds = set().union(*(shapes for _, shapes, _ in surveyed))
    if not kinds:
        raise ValueError(f"the {len(parts)} feature parts hold no readable image, so there is nothing to fit to")
    if len(kinds) > 1:
        raise ValueError(f"features of unlike sizes {sorted(kinds)} (crops, channels, rows, columns); delete the parts")
    total = sum(len(part) for part in rows)
    if max_images is not None and total > max_images:
        chosen = np.zeros(total, bool)
        chosen[np.random.default_rng(seed).choice(total, max_images, replace=False)] = True
        ends = np.cumsum([len(part) for part in rows])[:-1]
        rows = [part[kept] for part, kept in zip(rows, np.split(chosen, ends), strict=True)]
    used = [(part, found) for part, found in zip(parts, rows, strict=True) if len(found)]
    content = hashlib.sha256(b"|".join(checksum for _, _, checksum in surveyed)).hexdigest()[:8]
    return FeatureSet(tuple(part for part, _ in used), tuple(found for _, found in used), next(iter(kinds)), content)


def _survey_part(part: str) -> tuple[NDArray[np.int32], set[tuple[int, ...]], bytes]:
    """Which rows of a part have features, ascending, of what shapes, and the checksum that its writer gave it."""
    with _opened(part, block_size=0) as file:
        shapes = file.read(columns=["shape"])["shape"].to_pylist()
        checksum = (file.metadata.metadata or {}).get(f"u2label.{CONTENT}".encode(), b"")
    rows = np.flatnonzero([shape is not None for shape in shapes]).astype(np.int32)
    return rows, {tuple(shape) for shape in shapes if shape is not None}, checksum


def _opened(part: str, *, block_size: int) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open_input(part, block_size=block_size))
    except (pa.ArrowInvalid, *storage.store_errors(part)) as error:
        raise ValueError(f"{storage.redact(part)}: cannot read features: {error}") from error


def open_features(features: FeatureSet, path: Path) -> NDArray[np.float16]:
    """The features (N, C, h, w) float16, mapped from the file `path`, which is made when it is not there.

    ValueError when the disk has no room for it, for values that are not finite, or sizes that do not agree.
    """
    if not path.exists():
        _unpack(features, path)
    mapped: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return mapped


def _unpack(features: FeatureSet, path: Path) -> None:
    crops, *shape = features.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 2 * features.images * int(np.prod(features.shape))
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ValueError(
            f"the features of {features.images} images need {size / 2**30:.1f} GiB in {path.parent}, which has "
            f"{free / 2**30:.1f} free; lower semantics.max_images or choose another scratch folder"
        )
    for litter in path.parent.glob(f"{storage.TEMPORARY}{path.name}-*"):  # of this very fit, killed as it unpacked
        litter.unlink(missing_ok=True)
    temporary = path.with_name(f"{storage.TEMPORARY}{path.name}-{uuid.uuid4().hex}")
    try:
        target = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=(features.items, *shape))
        for image, (name, feats) in enumerate(_images(features)):
            if not np.isfinite(feats).all():
                raise ValueError(f"{name}: the features are not all finite; do they fit in float16?")
            target[image * crops : (image + 1) * crops] = feats
        target.flush()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _images(features: FeatureSet) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Name and features of each chosen photo, in order."""
    for part, rows in zip(features.parts, features.rows, strict=True):
        wanted = set(rows.tolist())
        for number, row in enumerate(_part_rows(part)):
            if number in wanted:
                yield f"{storage.redact(part)}, {row['image_id']}", read_features(row)


def _part_rows(part: str) -> Iterator[dict[str, Any]]:
    with _opened(part, block_size=READ_AHEAD) as file:
        for batch in file.iter_batches(batch_size=ROWS, columns=["image_id", "shape", "features"]):
            yield from batch.to_pylist()


def descriptors(mapped_NChw: NDArray[np.float16]) -> NDArray[np.float32]:
    """(N, C) float32 unit mean features of all items (appendix A.3), a few at a time."""
    blocks = range(0, len(mapped_NChw), 256)
    return np.concatenate([descriptor(mapped_NChw[start : start + 256]) for start in blocks])


def some_patches(mapped_NChw: NDArray[np.float16], seed: int) -> NDArray[np.float32]:
    """(n, C) float32 features of about SAMPLED patches, drawn from at most SAMPLED_ITEMS items; of few, all."""
    rng = np.random.default_rng([seed, 2])
    chosen = np.sort(rng.permutation(len(mapped_NChw))[:SAMPLED_ITEMS])
    each, rows = -(-SAMPLED // len(chosen)), []
    for item in chosen:
        feats_NC = mapped_NChw[item].reshape(mapped_NChw.shape[1], -1).T
        rows.append(feats_NC[np.sort(rng.permutation(len(feats_NC))[:each])].astype(np.float32))
    return np.concatenate(rows)


def require_distinct(mapped_NChw: NDArray[np.float16], classes: int) -> None:
    """ValueError unless there are as many different patch features as classes; stops reading when there are."""
    seen: set[bytes] = set()
    for feats_Chw in mapped_NChw:
        seen.update(row.tobytes() for row in feats_Chw.reshape(len(feats_Chw), -1).T)
        if len(seen) >= classes:
            return
    raise ValueError(
        f"semantics.classes is {classes}, but the {len(mapped_NChw)} images (or crops) hold only {len(seen)} different "
        "patch features; lower semantics.classes, or give photos that are not constant"
    )
