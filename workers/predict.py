"""The trained panoptic model over photos: decoded images in, one row of labels and detections each out.

A row of `PREDICTIONS_SCHEMA` is a row of a panoptic part with two more things that the combined labels do not tell:
the semantic map from before things were put over it, and all scored detections, which AP is measured with and
self-training chooses from.
"""

from __future__ import annotations

import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco
from scipy import ndimage
from torch import Tensor

from model.panoptic.network import PanopticCascadeRCNN, Prediction, test_size
from model.panoptic.resize import padded_size
from workers.images import LoadedImage, Row, table_of_jobs
from workers.masks import encode_panoptic_png
from workers.merge import VOID_LABEL, MergedLabels, Segment
from workers.overlap import Flow, Job
from workers.phases import Phases
from workers.records import PREDICTIONS_SCHEMA, Status

SHORT, MAX_SIDE = 800, 1333  # pixels of the sides at which U2Seg tests
HELD_PIXELS = 8_000_000  # of the images of one batch: up to 100 masks of a byte a pixel exist for each


@dataclass(frozen=True, slots=True)
class Predicted:
    """An image and what the model sees in it, at the image's size and on the CPU; None when it could not be read.

    `seconds` is the image's equal share of what its batch took, resize included.
    """

    image: LoadedImage
    prediction: Prediction | None
    seconds: float = 0.0


class PredictWorker:
    """Holds the model; `predict` and `process` are pure functions of the images.

    An image is resized to a shorter side of `short` pixels, or less where the longer would pass `max_side`. At most
    `batch_size` images are held, and those of one padded size share a forward pass: others would be padded more than
    they are alone, and would change with their neighbours. `amp` computes in bfloat16. `kept_tokens` gives what the
    model's frozen transformer sees in a resized image, (3, h, w) uint8 on the CPU, as float16, or None where it is not
    kept; with it all images are seen with that precision.
    """

    def __init__(
        self,
        model: PanopticCascadeRCNN,
        *,
        device: str,
        batch_size: int = 1,
        short: int = SHORT,
        max_side: int = MAX_SIDE,
        amp: bool = False,
        flow: Flow | None = None,
        kept_tokens: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        if min(batch_size, short, max_side) < 1:
            raise ValueError(f"batch_size {batch_size}, short {short} and max_side {max_side} must be positive")
        self._model = model.to(device).to(memory_format=torch.channels_last).eval()
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._short, self._max_side = short, max_side
        self._amp = amp
        self._flow = flow
        self._kept_tokens = kept_tokens

    def predict(self, images: Iterable[LoadedImage], phases: Phases) -> Iterator[Predicted]:
        """What the model sees in each image, in their order; a batch of images is held at a time."""
        for batch in self._batches(images):
            yield from self._predict_batch(batch, phases)

    def process(self, images: Iterable[LoadedImage], phases: Phases, *, uris: Mapping[str, str]) -> pa.Table:
        """The images of a shard, in order -> table of PREDICTIONS_SCHEMA, one row each.

        `uris` has the `uri` of each image_id. RuntimeError, naming the images, for what is not their fault.
        """

        def job(batch: list[LoadedImage]) -> Job[list[Row]]:
            rows: list[Row] = []
            for part in self._batches(batch):
                found = self._predict_batch(part, phases)
                rows += yield [phases.named("encode", _row, each, uris[each.image.image_id]) for each in found]
            return rows

        return table_of_jobs(images, self._batch_size, job, phases, PREDICTIONS_SCHEMA, self._flow)

    def _batches(self, images: Iterable[LoadedImage]) -> Iterator[list[LoadedImage]]:
        """At most `batch_size` images and, but for a single one, HELD_PIXELS of them together."""
        batch: list[LoadedImage] = []
        pixels = 0
        for image in images:
            size = 0 if image.pixels is None else image.pixels.shape[0] * image.pixels.shape[1]
            if batch and (len(batch) == self._batch_size or pixels + size > HELD_PIXELS):
                yield batch
                batch, pixels = [], 0
            batch.append(image)
            pixels += size
        if batch:
            yield batch

    def _predict_batch(self, batch: list[LoadedImage], phases: Phases) -> list[Predicted]:
        start = time.perf_counter()
        with phases("resize"):
            resized = {
                place: resize_to_model(image.pixels, self._short, self._max_side)
                for place, image in enumerate(batch)
                if image.pixels is not None
            }
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, pixels in resized.items():
            groups[padded_size(pixels.shape[:2])].append(place)
        found: dict[int, Prediction] = {}
        for places in groups.values():
            with phases("network"):
                found.update(zip(places, self._forward(batch, resized, places), strict=True))
        share = (time.perf_counter() - start) / max(1, len(resized))
        return [
            Predicted(image, found[place], share) if place in found else Predicted(image, None)
            for place, image in enumerate(batch)
        ]

    def _forward(
        self, batch: list[LoadedImage], resized: Mapping[int, NDArray[np.uint8]], places: list[int]
    ) -> list[Prediction]:
        images = [torch.from_numpy(resized[place]).permute(2, 0, 1) for place in places]
        sizes = [pixels.shape[:2] for place in places if (pixels := batch[place].pixels) is not None]
        on_device = [image.to(self._device) for image in images]
        tokens = self._tokens(images, on_device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._amp):
            found = self._model.predict(on_device, output_sizes=sizes, tokens=tokens)
        return [each.to("cpu") for each in found]

    def _tokens(self, images: list[Tensor], on_device: list[Tensor]) -> list[Tensor] | None:
        """Of all images, kept or made now; None: the model is to see for itself."""
        if self._kept_tokens is None or self._model.frozen is None:
            return None
        tokens = [self._kept_tokens(image) for image in images]
        missing = [place for place, kept in enumerate(tokens) if kept is None]
        made = iter(self._model.frozen([on_device[place] for place in missing]) if missing else [])
        return [next(made).half() if kept is None else kept for kept in tokens]


def resize_to_model(photo_hw3: NDArray[np.uint8], short: int = SHORT, max_side: int = MAX_SIDE) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> (h, w, 3) uint8 of `test_size`, by Pillow's bilinear filter as in training."""
    height, width = test_size(photo_hw3.shape[0], photo_hw3.shape[1], short, max_side)
    return np.array(Image.fromarray(photo_hw3).resize((width, height), Image.Resampling.BILINEAR))


def combine(prediction: Prediction) -> MergedLabels:
    """The panoptic labels of a prediction, with the boxes of what is visible.

    `hidden` counts the instances that are sure enough, and dropped because surer ones cover them.
    """
    ids, found = prediction.panoptic()
    ids_hw = ids.cpu().numpy()
    segments = []
    for segment, window in zip(found, ndimage.find_objects(ids_hw, max_label=len(found)), strict=True):
        if window is not None:
            rows, columns = window
            box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
            values = (segment.id, segment.category, segment.is_thing, segment.area, box, segment.score)
            segments.append(Segment(*values))
    sure = int((prediction.scores >= prediction.settings.confidence).sum())
    return MergedLabels(ids_hw, segments, hidden=sure - sum(segment.is_thing for segment in segments))


def encode_masks(masks: Tensor) -> list[str]:
    """(n, h, w) bool -> COCO's compressed run-length counts of each."""
    if len(masks) == 0:
        return []
    # Counts run down the columns, so that (n, w, h) in rows is what pycocotools wants of (h, w, n).
    columns = masks.transpose(1, 2).contiguous().view(torch.uint8).cpu().numpy()
    return [rle["counts"].decode("ascii") for rle in coco.encode(columns.T)]


def stuff_classes(prediction: Prediction) -> NDArray[np.uint8]:
    """The semantic map as in a semantics part: (H, W) uint8, stuff 0..S-1, 255 where the model sees things."""
    semantic = prediction.semantic.cpu().numpy()
    return np.where(semantic == 0, np.uint8(VOID_LABEL), semantic - np.uint8(1))


def encode_class_map(classes_hw: NDArray[np.uint8]) -> bytes:
    """(h, w) uint8 -> grey PNG."""
    stream = io.BytesIO()
    Image.fromarray(classes_hw).save(stream, format="PNG")
    return stream.getvalue()


def _row(predicted: Predicted, uri: str) -> Row:
    image, prediction = predicted.image, predicted.prediction
    row: Row = {"image_id": image.image_id, "uri": uri, "error": image.error, "hidden_instances": 0}
    if prediction is None or image.pixels is None:
        lists = ("segments", "rle", "bbox", "area", "score", "category")
        return row | {"status": str(image.status)} | {name: [] for name in lists}
    labels = combine(prediction)
    height, width = image.pixels.shape[:2]
    return row | {
        "height": height,
        "width": width,
        "status": str(Status.OK if labels.segments else Status.NO_MASKS),
        "panoptic": encode_panoptic_png(labels.ids),
        "segments": [asdict(segment) for segment in labels.segments],
        "hidden_instances": labels.hidden,
        "labels": encode_class_map(stuff_classes(prediction)),
        "rle": encode_masks(prediction.masks),
        "bbox": prediction.boxes.tolist(),
        "area": prediction.masks.flatten(1).sum(1).tolist(),
        "score": prediction.scores.tolist(),
        "category": (prediction.classes + 1).tolist(),
    }
