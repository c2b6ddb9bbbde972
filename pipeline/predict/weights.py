"""Weights of the panoptic model -> the model, ready to look at photos.

predictor = load_predictor("runs/demo/model")  # or a .pth or .pkl of detectron2 or U2Seg
prediction = predictor(np.asarray(Image.open("photo.jpg").convert("RGB")))
ids, segments = prediction.panoptic()
detections = prediction.to_supervision()  # with the extra `exports`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoint.detectron2 import class_counts, load_state, read_detectron2
from model.checkpoint.files import MANIFEST, WEIGHTS, from_files
from model.panoptic.network import PanopticCascadeRCNN
from pipeline.errors import ConfigError
from pipeline.predict.frozen import FrozenBackbone
from pipeline.predict.prediction import Prediction
from pipeline.store import storage
from workers.images import LoadedImage
from workers.phases import Phases
from workers.predict import MAX_SIDE, SHORT, PredictWorker

DETECTRON2 = (".pth", ".pkl")
REMEDY = "give the folder of a checkpoint that u2label wrote, or a .pth or .pkl of detectron2 or U2Seg"


@dataclass(frozen=True, slots=True)
class Weights:
    """A model in evaluation mode, on the CPU but for a frozen transformer. `digest` is the SHA-256 of what it was read
    from, `short` and `max_side` the pixels of the sides that it was trained for, None where nobody knows, and `names`
    the names of its categories."""

    model: PanopticCascadeRCNN
    digest: str
    short: int | None
    max_side: int | None
    names: Mapping[int, str]


class Predictor:
    """What the model sees in a photo, whatever its size."""

    def __init__(self, worker: PredictWorker, *, num_things: int, num_stuff: int, names: Mapping[int, str]) -> None:
        self._worker = worker
        self.num_things, self.num_stuff, self.names = num_things, num_stuff, names

    def __call__(self, photo_hw3: NDArray[np.uint8]) -> Prediction:
        """(H, W, 3) uint8 RGB, upright -> boxes, scores, classes, masks and the semantic map at its size, on the CPU.

        `.panoptic()` of the result combines them to an id map (H, W) and its segments, and `.to_supervision()` has the
        things as Roboflow's supervision draws and counts them. ValueError for another array.
        """
        photo = np.asarray(photo_hw3)
        if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or photo.size == 0:
            raise ValueError(f"a photo is (height, width, 3) uint8 RGB, got {photo.shape} {photo.dtype}")
        image = LoadedImage("photo", np.ascontiguousarray(photo))
        prediction = next(self._worker.predict([image], Phases())).prediction
        assert prediction is not None
        return Prediction.of(prediction, self.names)


def load_predictor(
    weights: str,
    device: str = "cpu",
    *,
    short: int | None = None,
    max_side: int | None = None,
    score: float | None = None,
    amp: bool = False,
    backbone_weights: str | None = None,
) -> Predictor:
    """A function from photos to predictions.

    Args:
        weights: folder of a checkpoint, or `.pth` or `.pkl` of detectron2 or U2Seg, local or `s3://`.
        device: such as "cpu" or "cuda".
        short, max_side: pixels; a photo's shorter side becomes `short`, or less where the longer would pass `max_side`.
            None: those that the checkpoint was trained for, or U2Seg's 800 and 1333.
        score: least score of an instance in `.panoptic()`; None: 0.5, or what the checkpoint says.
        amp: compute in bfloat16.
        backbone_weights: of the frozen transformer, if the model stands behind one: a file, `official` or `index`;
            None: where they were when it was trained.

    Raises:
        ConfigError: weights that are not there or do not fit, a device that is not there, a number out of range.
    """
    check_device(device)
    loaded = load_weights(weights, score=score, device=device, backbone_weights=backbone_weights)
    worker = make_worker(loaded, device, batch_size=1, short=short, max_side=max_side, amp=amp)
    counts = {"num_things": loaded.model.num_things, "num_stuff": loaded.model.num_stuff}
    return Predictor(worker, **counts, names=loaded.names)


def make_worker(
    weights: Weights, device: str, *, batch_size: int, short: int | None, max_side: int | None, amp: bool
) -> PredictWorker:
    """The worker of these weights. ConfigError for a number that is not positive."""
    short, max_side = sides_of(weights, short, max_side)
    try:
        return PredictWorker(
            weights.model, device=device, batch_size=batch_size, short=short, max_side=max_side, amp=amp
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def sides_of(weights: Weights, short: int | None, max_side: int | None) -> tuple[int, int]:
    """The sides that are asked for, else those of the training, else U2Seg's."""
    asked = (short, weights.short, SHORT), (max_side, weights.max_side, MAX_SIDE)
    short, max_side = (next(side for side in sides if side is not None) for sides in asked)
    return short, max_side


def load_weights(
    uri: str, *, score: float | None = None, device: str = "cpu", backbone_weights: str | None = None
) -> Weights:
    """The model of a checkpoint folder or of a detectron2 file, local or remote; `score`, and the `device` and
    `backbone_weights` of a frozen transformer, as in `load_predictor`.

    K and S come from the weights, the rest of the architecture from the checkpoint's config (`model`: keywords of
    PanopticCascadeRCNN), or is U2Seg's. ConfigError names the weights and what does not fit.
    """
    shown = storage.redact(uri)
    if score is not None and not 0 <= score <= 1:
        raise ConfigError(f"--score: {score} must be in [0, 1]")
    try:
        state, config, digest = read_weights(uri)
        counts = class_counts(state)
        keywords = dict(config.get("model", {}))
        if score is not None:
            keywords["combine_confidence"] = score
        frozen = FrozenBackbone.from_checkpoint(config, backbone_weights)
        model = PanopticCascadeRCNN(*counts, frozen=None if frozen is None else frozen.load(device), **keywords)
        load_state(model, state, **counts._asdict(), origin=shown)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"--weights: there is no {shown}, or it lacks {MANIFEST} or {WEIGHTS}; {REMEDY}") from error
    except storage.store_errors(uri) as error:
        raise ConfigError(f"--weights: cannot read {shown}: {storage.redact(str(error))}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--weights: {shown}: {error}; {REMEDY}") from error
    categories = config.get("categories", [])
    names = {int(category["id"]): str(category["name"]) for category in categories}
    return Weights(model.eval(), digest, config.get("short"), config.get("max_side"), names)


def read_weights(uri: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """State dict, config (empty where the file has none) and SHA-256 of a checkpoint folder or a detectron2 file, local
    or remote. FileNotFoundError or ValueError: it is not there, not whole, or holds no weights."""
    return _read_detectron2(uri) if uri.lower().endswith(DETECTRON2) else _read_checkpoint(uri)


def identifying_file(uri: str) -> str:
    """The file whose checksum tells these weights from others: a detectron2 file itself, or the manifest of a
    checkpoint folder, which holds the checksum of its weights."""
    return uri if uri.lower().endswith(DETECTRON2) else storage.join(uri, MANIFEST)


def read_categories(uri: str) -> list[dict[str, Any]]:
    """The categories that the checkpoint in a folder was trained on, as COCO lists them; weights are not read."""
    manifest = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
    categories: list[dict[str, Any]] = manifest["config"]["categories"]
    return categories


def check_device(device: str) -> None:
    """ConfigError unless torch knows the device and it is there."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device: cannot use {device!r}: {reason}; give cpu, or cuda where there is a GPU"
        ) from error


def _read_checkpoint(uri: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    files = {name: storage.read_bytes(storage.join(uri, name)) for name in (WEIGHTS, MANIFEST)}
    checkpoint = from_files(files, storage.redact(uri))
    return checkpoint.state, checkpoint.config, hashlib.sha256(files[MANIFEST]).hexdigest()  # it holds the weights'


def _read_detectron2(uri: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    with storage.local_copy(uri) as path:
        return read_detectron2(path), {}, storage.sha256(str(path))
