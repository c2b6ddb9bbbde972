"""The instances stage of one worker: decoded images in, one row of masks and embeddings each out."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from workers.images import LoadedImage, Row, table_of_jobs
from workers.instances.found import Found, MaskGenerator
from workers.overlap import Flow, Job
from workers.phases import Phases
from workers.records import Status, instances_schema


class InstanceWorker:
    """Holds the generator; `process` is a pure function of the images. A bad image passes through with its status."""

    def __init__(self, generator: MaskGenerator, *, batch_size: int = 1, flow: Flow | None = None) -> None:
        self._generator = generator
        self._batch_size = batch_size
        self._flow = flow

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of `instances_schema`, one row each.

        At most `batch_size` images are held at a time, and as many again for each batch that `flow` has under way.
        RuntimeError, naming the images, for what is not their fault.
        """
        schema = instances_schema(self._generator.dim, nested=self._generator.nested)
        return table_of_jobs(
            images, self._batch_size, lambda batch: self._rows(batch, phases), phases, schema, self._flow
        )

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> Job[list[Row]]:
        readable = [image for image in batch if image.pixels is not None]
        masks = yield from self._generator.find(readable, phases)
        found = dict(zip((image.image_id for image in readable), masks, strict=True))
        return [self._row(image, found.get(image.image_id)) for image in batch]

    def _row(self, image: LoadedImage, found: Found | None) -> Row:
        status = image.status if found is None else Status.OK if found.rle else Status.NO_MASKS
        height, width = (None, None) if image.pixels is None else image.pixels.shape[:2]
        return {
            "image_id": image.image_id,
            "height": height,
            "width": width,
            "status": str(status),
            "error": image.error,
            **(found or Found()).columns(self._generator.nested),
        }
