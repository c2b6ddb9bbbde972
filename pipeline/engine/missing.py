"""Photos that were listed and cannot be had: asked again, and then rows or a failed shard.

A row `missing` stands for good, so it must be true. What a store refuses for a moment (a role that is not known
everywhere yet, a listing that runs ahead of the objects) is asked again; what it says of everything is said of the
source and not of photos; and `source.on_missing` says what becomes of the rest.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Collection
from typing import Literal

import pyarrow as pa

from pipeline.sources.fetch import UNREACHED, WEB, RangeRefused
from pipeline.sources.index import Index
from pipeline.store import storage
from workers.images import LoadedImage
from workers.records import GONE, ImageRecord, Status

OnMissing = Literal["auto", "fail", "row"]

PAUSES_S = (0.5, 1.0, 2.0)  # each is drawn from its upper half
HOPELESS = 20  # photos of a worker that were asked for again in vain, from which on none is
REFUSED = "PermissionError"


class AskAgain:
    """Asks a store again for a photo that it refused or did not find. Safe to use from many threads."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep
        self._lock = threading.Lock()
        self._in_vain = 0

    def __call__(self, load: Callable[[], LoadedImage], record: ImageRecord) -> LoadedImage:
        """What `load` gives, at last; without another try where the answer is known to be final. RangeRefused when that
        is what it raises to the end."""
        far = storage.is_remote(record.uri) and not record.uri.startswith(WEB)
        pauses = PAUSES_S if far and record.version != GONE and self._in_vain < HOPELESS else ()
        for pause in pauses:
            with contextlib.suppress(RangeRefused):
                image = load()
                if image.status != Status.MISSING:
                    return image
            self._sleep(random.uniform(pause / 2, pause))
        image = load()
        if pauses and image.status == Status.MISSING:
            with self._lock:
                self._in_vain += 1
        return image


def judge_missing(table: pa.Table, index: Index, gone: Collection[str], on_missing: OnMissing) -> pa.Table:
    """The table of a shard, unless photos are missing for a reason that is not theirs, or `on_missing` wants a failed
    shard. Photos that an extension of the index has noted as `gone` (image_ids) are rows always.

    PermissionError: each of several photos was refused, or one and `auto` or `fail`. ConnectionError: no web server of
    several was reached. FileNotFoundError: there is nothing at all at the source, or a photo is missing and `fail`.
    """
    rows = zip(*(table[name].to_pylist() for name in ("image_id", "status", "error")), strict=True)
    errors = [error for name, status, error in rows if status == Status.MISSING.value and name not in gone]
    if not errors:
        return table
    if 1 < len(errors) == len(table):
        _unless_the_same_of_all(errors)
    if not index.source_answers():
        raise FileNotFoundError(
            f"nothing is at {index.source}, as seen from {socket.gethostname()}: mount or restore the source there and "
            f"run again ({errors[0]})"
        )
    refused = [error for error in errors if REFUSED in error]
    if refused and on_missing != "row":
        raise PermissionError(f"{_counted(refused, table)} refused, the first by {refused[0]}; {_remedy('refused')}")
    if on_missing == "fail":
        raise FileNotFoundError(f"{_counted(errors, table)} not there, the first by {errors[0]}; {_remedy('gone')}")
    return table


def _unless_the_same_of_all(errors: list[str]) -> None:
    if all(REFUSED in error for error in errors):
        raise PermissionError(
            f"all {len(errors)} photos were refused, the first by {errors[0]}; give the workers access to the source "
            "and run again"
        )
    if all(UNREACHED in error for error in errors):
        raise ConnectionError(
            f"none of the servers of {len(errors)} photos was reached, the first by {errors[0]}; run again when this "
            "machine reaches the network"
        )


def _counted(errors: list[str], table: pa.Table) -> str:
    return f"{len(errors)} of the {len(table)} photos of this shard {'was' if len(errors) == 1 else 'were'}"


def _remedy(what: str) -> str:
    return (
        f"give the workers access and run again, or, where they are {what} for good, take them out of the source and "
        "run with --extend, or set source.on_missing=row for rows `missing`"
    )
