"""Decoded images on their way through a worker, and the loop that turns a shard of them into rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from workers.records import Status


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One image of a shard: `pixels` (H, W, 3) uint8 upright RGB, or None with the status and error that say why."""

    image_id: str
    pixels: np.ndarray | None
    status: Status = Status.OK
    error: str | None = None


def with_rows_left_out(sampled: pa.Table, image_ids: Sequence[str], rows: Sequence[int]) -> pa.Table:
    """A table of the photos `rows` of a shard -> of all its photos, the others `not_sampled`, with nothing in the other
    columns."""
    kept = set(rows)
    others = [row for row in range(len(image_ids)) if row not in kept]
    lists: dict[str, Any] = {
        field.name: [] for field in sampled.schema if pa.types.is_list(field.type) and not field.nullable
    }
    blank = [{"image_id": image_ids[row], "status": str(Status.NOT_SAMPLED), **lists} for row in others]
    whole = pa.concat_tables([sampled, pa.Table.from_pylist(blank, schema=sampled.schema)])
    return whole.take(np.argsort([*rows, *others]))


def table_of_images(
    images: Iterable[LoadedImage],
    batch_size: int,
    rows: Callable[[list[LoadedImage]], Iterable[dict[str, Any]]],
    schema: pa.Schema,
) -> pa.Table:
    """The images of a shard, in order -> one row each, `batch_size` images at a time.

    What one batch holds is freed before the next. RuntimeError, naming the images, for what is not their fault.
    """
    remaining, done = iter(images), []
    while batch := list(itertools.islice(remaining, batch_size)):
        try:
            done.append(pa.RecordBatch.from_pylist(list(rows(batch)), schema=schema))
        except Exception as error:
            names = ", ".join(image.image_id for image in batch)
            raise RuntimeError(f"{type(error).__name__} on {names}: {error}") from error
    return pa.Table.from_batches(done, schema=schema)
