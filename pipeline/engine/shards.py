"""What every actor of a shard stage does: it loads its model once, then turns shard numbers into parts.

Nothing but the receipt goes back through Ray: an actor reads its inputs, computes and writes the part itself. The same
object runs without Ray (`InstanceShards(job).run(7)`), which is how tests and benchmarks use it.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import itertools
import json
import math
import resource
import socket
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.engine.attempts import Attempts
from pipeline.engine.done import CONTENT, DIGITS, MADE_OF, identities_of_artifacts, made_of
from pipeline.engine.missing import AskAgain, judge_missing
from pipeline.engine.receipts import Receipt
from pipeline.engine.stage import Stage
from pipeline.sources.fetch import load_photo
from pipeline.sources.index import open_index
from pipeline.store import storage
from pipeline.store.weights import local_weights
from workers.counts import count
from workers.overlap import UNDER_WAY
from workers.phases import Phases
from workers.records import GONE, ImageRecord, Status, with_columns, with_metadata

if TYPE_CHECKING:
    from workers.images import LoadedImage

CRASHED = (
    "this image, processed alone, killed its worker again and again: out of memory, a crash of native code or a hang; "
    "u2label run --retry crashed tries it once more"
)
SECOND = -1  # in place of a shard: one that is late elsewhere
T = TypeVar("T")
U = TypeVar("U")


class Overtaken(Exception):
    """Another worker was faster with the same shard, whose part stands."""


@dataclass(frozen=True, slots=True)
class StageJob:
    """What an actor needs to know: small, picklable, the same for all shards of a stage."""

    stage: Stage
    config: Config
    index_folder: str
    inputs: dict[str, Stage]
    metadata: dict[str, str]  # written into every part
    teacher: str = ""  # backbone and weights of the run, in a line
    schema: pa.Schema | None = None  # that every part must have; None: not told


class ShardActor(ABC):
    """One worker of a shard stage. Subclasses say what a shard's table is."""

    uses_device = False  # whether an actor gets the GPUs of `workers.gpus`

    def __init__(self, job: StageJob, ledger: Any = None) -> None:
        self.job = job
        self.config = job.config
        workers = job.config.workers
        batches = max(UNDER_WAY, math.floor(workers.cpus) + 1)  # of whichever flow
        self.attempts = Attempts(ledger, workers.hang_timeout_s, batches * workers.batch_size)
        with self.attempts.attempt() as attempt:
            if attempt.given_up:
                raise RuntimeError(attempt.given_up)
            self.index = open_index(job.index_folder)
            self._artifacts = identities_of_artifacts(job.stage)
            self.setup()

    @abstractmethod
    def setup(self) -> None:
        """Load what all shards share."""

    @abstractmethod
    def process(self, shard: int, phases: Phases) -> pa.Table:
        """The table of one shard: one row per image, with a column `status`."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Ray Data's entry: a shard number in, its receipt out; for SECOND those of late shards of other workers."""
        (shard,) = batch["shard"].tolist()
        try:
            receipts = self._seconds() if shard == SECOND else [self._attempt(shard)]
        except Overtaken:
            receipts = []
        return {"receipt": np.array([receipt.to_json() for receipt in receipts], dtype=object)}

    def _attempt(self, shard: int) -> Receipt:
        with self.attempts.attempt(shard) as attempt:
            receipt = self.run(shard)
        return replace(receipt, node=self.attempts.node, attempt=attempt.number)

    def _seconds(self) -> list[Receipt]:
        """At most one: its receipt should not wait for another. One that failed is left to the first attempt."""
        for shard in self.attempts.seconds():
            receipt = self.run(shard)
            if receipt.ok:
                return [replace(receipt, node=self.attempts.node, second=True)]
        return []

    def run(self, shard: int) -> Receipt:
        """Compute and write one part. Whatever goes wrong becomes a failed receipt: the other shards go on.

        Overtaken: another worker has written it meanwhile.
        """
        phases = Phases()
        started = time.perf_counter()
        given_up = self.attempts.current.given_up
        try:
            content = {"ok": False, "error": given_up} if given_up else self._write(shard, phases)
        except Overtaken:
            raise
        except Exception:
            content = {"ok": False, "error": storage.redact(traceback.format_exc())}
        return Receipt(
            stage=self.job.stage.name,
            fingerprint=self.job.stage.fingerprint,
            shard=shard,
            wall_s=time.perf_counter() - started,
            seconds=dict(phases.seconds),
            histograms=phases.histograms,
            device_s=phases.device_s,
            cpu_s=phases.cpu_s,
            host=socket.gethostname(),
            peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **content,
        )

    def _write(self, shard: int, phases: Phases) -> dict[str, Any]:
        parts = [used for used in self.job.stage.reads if used.kind == "shard"]
        inputs = made_of(self.job.stage, shard, self._artifacts, parts)  # as they are before they are read
        table = self.process(shard, phases)
        wanted = self.job.schema
        if wanted is not None and not table.schema.equals(wanted):
            raise TypeError(f"{self.job.stage.name} made a table of {table.schema}, not of its schema {wanted}")
        if self.index.format == "manifest":
            table = with_columns(_without_secrets(table), self.index.key_table(shard))
        with phases("write"):
            part = _encode(table, self.job.metadata | {MADE_OF: json.dumps(inputs)})
            if self.attempts.is_done(shard):
                raise Overtaken
            storage.write_bytes(self.job.stage.part(shard), part)
            self.attempts.done(shard)
        return {"ok": True, "bytes": len(part), **count(table)}


def _encode(table: pa.Table, metadata: dict[str, str]) -> bytes:
    """A part with its metadata, to which a checksum of its pages is added."""
    table = with_metadata(table, metadata)
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({f"u2label.{CONTENT}": hashlib.sha256(stream.getbuffer()).hexdigest()[:DIGITS]})
    return stream.getvalue()


class PhotoShards(ShardActor):
    """An actor that looks at the photos: they are fetched and decoded in threads, ahead of the device."""

    uses_device = True
    side_by_side = False  # whether on a CPU a batch a core is faster than all cores for each batch

    def setup(self) -> None:
        import torch

        from workers.decode import DecodeLimits
        from workers.overlap import flow_of

        workers, threads = self.config.workers, max(1, math.floor(self.config.workers.cpus))
        torch.set_num_threads(threads)
        self.flow = flow_of(workers.device, threads, side_by_side=self.side_by_side)
        decode = self.config.decode
        self._fetcher = self.index.fetcher()
        self._limits = DecodeLimits(max_pixels=decode.max_pixels, min_side=decode.min_side)
        self._again = AskAgain()
        self.worker = self.make_worker()

    @abstractmethod
    def make_worker(self) -> Any:
        """An object with `process(images, phases) -> table`."""

    def process(self, shard: int, phases: Phases) -> pa.Table:
        return self.process_records(self.index.records(shard), phases)

    def process_records(self, records: Sequence[ImageRecord], phases: Phases) -> pa.Table:
        """The worker's table of these photos, one row each, in order."""
        if self.attempts.current.one_by_one and records:
            tables = [self.compute([image], records, phases) for image in self._one_by_one(records)]
            return self._judged(pa.concat_tables(tables), records)
        images = ahead(functools.partial(self._load_timed, phases), records, depth=self.config.workers.prefetch)
        table = self.compute(_timed(self._watched(images), phases, "wait_for_input"), records, phases)
        return self._judged(table, records)

    def compute(self, images: Iterable[LoadedImage], records: Sequence[ImageRecord], phases: Phases) -> pa.Table:
        """The worker's table of these images, which are those of the records or some of them."""
        return self.worker.process(images, phases)

    def _watched(self, images: Iterable[LoadedImage]) -> Iterator[LoadedImage]:
        for image in images:
            self.attempts.touch(image.image_id)
            yield image

    def _one_by_one(self, records: Sequence[ImageRecord]) -> Iterator[LoadedImage]:
        """The images of a shard that killed its worker: each is announced before it is fetched."""
        from workers.images import LoadedImage

        for record in records:
            if record.image_id in self.attempts.current.crashed:
                yield LoadedImage(record.image_id, None, Status.CRASHED, CRASHED)
            else:
                self.attempts.touch(record.image_id)
                yield self._load(record)
        self.attempts.touch(None)

    def load_backbone(self) -> Any:
        from model.backbone import load_backbone

        backbone = self.config.backbone
        return load_backbone(
            backbone.name,
            local_weights(backbone.weights),
            device=self.config.workers.device,
            dtype=backbone.dtype,
            sha256=backbone.sha256,
        )

    def _load(self, record: ImageRecord) -> LoadedImage:
        return self._again(lambda: load_photo(self._fetcher, record, self._limits), record)

    def _load_timed(self, phases: Phases, record: ImageRecord) -> LoadedImage:
        with phases.cpu():
            return self._load(record)

    def _judged(self, table: pa.Table, records: Sequence[ImageRecord]) -> pa.Table:
        gone = {record.image_id for record in records if record.version == GONE}
        return judge_missing(table, self.index, gone, self.config.source.on_missing)


def _without_secrets(table: pa.Table) -> pa.Table:
    """The table with the places of photos as they may be shown: URLs may be signed."""
    if "uri" not in table.column_names:
        return table
    place = table.schema.get_field_index("uri")
    shown = pa.array([storage.redact(uri) for uri in table["uri"].to_pylist()], pa.string())
    return table.set_column(place, table.schema.field(place), shown)


def read_part(stage: Stage, shard: int, columns: list[str] | None = None) -> pa.Table:
    """One part of a shard stage, whole or some columns of it."""
    return read_columns(stage.part(shard), columns)


def read_columns(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A part, whole or some columns of it; of a remote one only their bytes come."""
    with storage.open_input(uri, block_size=0) as stream, pq.ParquetFile(stream, pre_buffer=True) as file:
        return file.read(columns=columns, use_threads=False)


def ahead(function: Callable[[T], U], items: Iterable[T], *, depth: int) -> Iterator[U]:
    """`map(function, items)` with up to `depth` calls under way or waiting, in threads; results in order."""
    pool = ThreadPoolExecutor(max_workers=min(depth, 8), thread_name_prefix="ahead")
    remaining = iter(items)
    queue: collections.deque[Future[U]] = collections.deque()
    try:
        for item in itertools.islice(remaining, depth):
            queue.append(pool.submit(function, item))
        while queue:
            result = queue.popleft().result()
            queue.extend(pool.submit(function, item) for item in itertools.islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _timed(items: Iterable[T], phases: Phases, name: str) -> Iterator[T]:
    iterator = iter(items)
    while True:
        with phases(name):
            item = next(iterator, None)
        if item is None:
            return
        yield item
