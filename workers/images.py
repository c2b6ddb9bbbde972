"""Decoded images on their way through a worker, and the loop that turns a shard of them into rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from workers.overlap import Flow, InTurn, Job
from workers.phases import Phases
from workers.records import Status

Row = dict[str, Any]


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
    rows: Callable[[list[LoadedImage]], Iterable[Row]],
    phases: Phases,
    schema: pa.Schema,
) -> pa.Table:
    """The images of a shard, in order -> one row each, `batch_size` images at a time.

    What one batch holds is freed before the next. RuntimeError, naming the images, for what is not their fault.
    """

    def job(batch: list[LoadedImage]) -> Job[list[Row]]:
        yield from ()
        return list(rows(batch))

    return table_of_jobs(images, batch_size, job, phases, schema)


def table_of_jobs(
    images: Iterable[LoadedImage],
    batch_size: int,
    job: Callable[[list[LoadedImage]], Job[list[Row]]],
    phases: Phases,
    schema: pa.Schema,
    flow: Flow | None = None,
) -> pa.Table:
    """As `table_of_images`, of batches with a share for the CPU: what `flow` has under way is held at a time."""

    def named(batch: list[LoadedImage]) -> Job[pa.RecordBatch]:
        try:
            return pa.RecordBatch.from_pylist((yield from job(batch)), schema=schema)
        except Exception as error:
            names = ", ".join(image.image_id for image in batch)
            raise RuntimeError(f"{type(error).__name__} on {names}: {error}") from error

    remaining = iter(images)
    batches = iter(lambda: list(itertools.islice(remaining, batch_size)), [])
    return pa.Table.from_batches((flow or InTurn()).run(map(named, batches), phases), schema=schema)
