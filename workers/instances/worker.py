"""The instances stage of one worker: decoded images in, one row of masks and embeddings each out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from workers.images import LoadedImage, table_of_images
from workers.instances.found import Found, MaskGenerator
from workers.phases import Phases
from workers.records import Status, instances_schema


class InstanceWorker:
    """Holds the generator; `process` is a pure function of the images. A bad image passes through with its status."""

    def __init__(self, generator: MaskGenerator, *, batch_size: int = 1) -> None:
        self._generator = generator
        self._batch_size = batch_size

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of `instances_schema`, one row each.

        At most `batch_size` images are held at a time. RuntimeError, naming the images, for what is not their fault.
        """
        schema = instances_schema(self._generator.dim, nested=self._generator.nested)
        return table_of_images(images, self._batch_size, lambda batch: self._rows(batch, phases), schema)

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> list[dict[str, Any]]:
        readable = [image for image in batch if image.pixels is not None]
        found = dict(zip((image.image_id for image in readable), self._generator.find(readable, phases), strict=True))
        return [self._row(image, found.get(image.image_id)) for image in batch]

    def _row(self, image: LoadedImage, found: Found | None) -> dict[str, Any]:
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
