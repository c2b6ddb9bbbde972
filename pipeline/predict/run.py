"""`u2label predict`: what a trained model sees in photos, as pictures and as COCO panoptic files.

Photos are fetched and decoded in threads ahead of the model, and drawn and written in threads behind it. Memory is that
of two batches, a few photos and the names of all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch

from pipeline import __version__
from pipeline.clusters.names import Names, has_names
from pipeline.engine.shards import ahead
from pipeline.errors import ConfigError
from pipeline.predict.output import OVERLAYS, Labelled, Output
from pipeline.predict.photos import find_photos, read_photo
from pipeline.predict.weights import Weights, check_device, load_weights, make_worker, sides_of
from pipeline.sources.fetch import Fetcher
from pipeline.sources.names import OutputNames
from pipeline.store import storage
from pipeline.store.json_lists import JsonLists, json_lists
from workers.decode import DecodeLimits
from workers.images import LoadedImage
from workers.phases import Phases
from workers.predict import Predicted, PredictWorker, combine
from workers.records import ImageRecord, Status
from workers.renaming import Renaming, rename_labels

WRITERS = 4  # photos that are drawn and written at a time


@dataclass(frozen=True, slots=True)
class PhotoResult:
    """What became of a photo: its numbers of segments, the model's seconds and its overlay; `error` when not `ok`."""

    image_id: str
    status: Status
    error: str | None = None
    things: int = 0
    stuff: int = 0
    seconds: float = 0.0
    overlay: str | None = None


@dataclass(slots=True)
class PredictSummary:
    """How many photos have predictions, those that could not be read, and where the files are, by kind."""

    files: dict[str, str]
    photos: int = 0
    failed: list[PhotoResult] = field(default_factory=list)


def predict_photos(
    weights: str,
    inputs: str | Sequence[str],
    output: str,
    *,
    device: str = "cpu",
    batch_size: int = 1,
    short: int | None = None,
    max_side: int | None = None,
    score: float | None = None,
    amp: bool = False,
    backbone_weights: str | None = None,
    names: Mapping[int, str] | None = None,
    classes: Names | None = None,
    image_column: str = "image",
    anonymous: bool = False,
    max_pixels: int = DecodeLimits().max_pixels,
    on_photo: Callable[[PhotoResult], None] = lambda result: None,
) -> PredictSummary:
    """Predict the photos of `inputs` and write overlays and COCO panoptic files to the folder `output`.

    Args:
        weights, device, short, max_side, score, amp, backbone_weights: as in `load_predictor`.
        inputs: photos, folders, globs, tars and Parquet files (see photos.py), local or `s3://`.
        output: folder, local or `s3://`; the files in it are listed in output.py. The same prediction again replaces
            them with the same.
        batch_size: photos that are held, of which those of one size share a forward pass.
        names: category -> the name that is drawn in place of its number; by default the checkpoint's, if it has any.
        classes: named classes that the checkpoint's become, merged and without noise; their names are drawn.
        image_column: of Parquet files.
        anonymous: the inputs are in a public bucket, which is read without credentials.
        max_pixels: a photo with more is not decoded.
        on_photo: is called with each photo's result, in the order of the photos.

    A photo that cannot be read is a result with its status and error; the others go on.

    Raises:
        ConfigError: before any work for inputs, weights, device, numbers, classes of another fit or an output that are
            wrong; later for an
            input that cannot be listed to its end, an output that cannot be written or a GPU that is too small.
        StageFailed: the store of the photos failed.
    """
    inputs = [inputs] if isinstance(inputs, str) else list(inputs)
    photos = _at_least_one(find_photos(inputs, output=output, image_column=image_column, anonymous=anonymous), inputs)
    check_device(device)
    loaded = load_weights(weights, score=score, device=device, backbone_weights=backbone_weights)
    worker = make_worker(loaded, device, batch_size=batch_size, short=short, max_side=max_side, amp=amp)
    renaming = None if classes is None else _renaming(loaded, classes, storage.redact(weights))
    target = _target(output, loaded, names, classes)
    short, max_side = sides_of(loaded, short, max_side)
    settings = {"short": short, "max_side": max_side, "amp": amp, "max_pixels": max_pixels}
    target.begin(_about(loaded, weights, inputs, settings, target.names, renaming))
    fetcher = Fetcher(image_column, anonymous=anonymous)
    load = functools.partial(read_photo, fetcher, limits=DecodeLimits(max_pixels, min_side=1))
    images = ahead(load, photos, depth=max(4, 2 * batch_size))
    with json_lists("images", "annotations") as lists:
        summary = _predict_all(worker, images, target, lists, on_photo, renaming)
        target.finish(lists)
    return summary


def _target(output: str, loaded: Weights, names: Mapping[int, str] | None, classes: Names | None) -> Output:
    """The folder, which knows the classes that are written and their names."""
    if classes is not None:
        drawn = {category.id: category.name for category in classes.new_categories}
        return Output(output, classes.renaming.num_things, classes.renaming.num_stuff, drawn)
    return Output(output, loaded.model.num_things, loaded.model.num_stuff, loaded.names if names is None else names)


def _renaming(loaded: Weights, classes: Names, where: str) -> Renaming | None:
    """How what the model sees gets these classes; None where it was trained on them."""
    things, total = loaded.model.num_things, loaded.model.num_things + loaded.model.num_stuff
    listed = [
        {"id": number, "name": loaded.names.get(number, ""), "isthing": int(number <= things)}
        for number in range(1, total + 1)
    ]
    return None if has_names(classes, listed, where) else classes.renaming


def _about(
    loaded: Weights,
    weights: str,
    inputs: Sequence[str],
    settings: Mapping[str, Any],
    names: Mapping[int, str],
    renaming: Renaming | None,
) -> dict[str, Any]:
    """What decides the prediction, without credentials: it is written beside it."""
    return {
        "weights": {"uri": storage.redact(weights), "sha256": loaded.digest},
        "inputs": [storage.redact(one) for one in inputs],
        "settings": {**settings, "score": loaded.model.combine.confidence},
        "names": {str(category): name for category, name in sorted(names.items())},
        **({} if renaming is None else {"classes": renaming.category_of}),
        "software": f"u2label {__version__}",
    }


def _predict_all(
    worker: PredictWorker,
    images: Iterator[LoadedImage],
    target: Output,
    lists: JsonLists,
    on_photo: Callable[[PhotoResult], None],
    renaming: Renaming | None,
) -> PredictSummary:
    def write(photo: Labelled | Predicted) -> Labelled | Predicted:
        if isinstance(photo, Labelled):
            target.write(photo)
        return photo

    summary = PredictSummary(target.files())
    try:
        for photo in ahead(write, _labelled(worker.predict(images, Phases()), renaming), depth=WRITERS):
            result = _result(photo, target.uri)
            if isinstance(photo, Labelled):
                target.add(photo, lists)
                summary.photos += 1
            else:
                summary.failed.append(result)
            on_photo(result)
    except torch.OutOfMemoryError as error:
        raise ConfigError("--batch-size: the GPU's memory is too small; lower it, or --short") from error
    return summary


def _labelled(predicted: Iterator[Predicted], renaming: Renaming | None) -> Iterator[Labelled | Predicted]:
    """Photos with combined labels, so that no masks wait for the writers; the unreadable ones as they are."""
    taken = OutputNames()
    for number, one in enumerate(predicted, start=1):
        if one.prediction is None:
            yield one
        else:
            name = taken.claim(one.image.image_id)
            labels = combine(one.prediction)
            yield Labelled(
                number, name, one.image, labels if renaming is None else rename_labels(labels, renaming), one.seconds
            )


def _result(photo: Labelled | Predicted, output: str) -> PhotoResult:
    image = photo.image
    if isinstance(photo, Predicted):
        return PhotoResult(image.image_id, image.status, image.error)
    segments = photo.labels.segments
    things = sum(segment.is_thing for segment in segments)
    overlay = storage.redact(storage.join(output, OVERLAYS, f"{photo.name}.jpg"))
    status = Status.OK if segments else Status.NO_MASKS
    return PhotoResult(image.image_id, status, None, things, len(segments) - things, photo.seconds, overlay)


def _at_least_one(photos: Iterator[ImageRecord], inputs: Sequence[str]) -> Iterator[ImageRecord]:
    """The photos, of which there is one. ConfigError when all that the inputs hold lies in the output folder."""
    first = next(photos, None)
    if first is None:
        raise ConfigError(
            f"--input: all photos of {', '.join(map(storage.redact, inputs))} lie in the output folder; give another"
        )
    return itertools.chain([first], photos)


def print_header(file: TextIO | None = None) -> None:
    print(f"{'things':>6} {'stuff':>6} {'seconds':>8}  image", file=file)


def print_photo(result: PhotoResult, file: TextIO | None = None) -> None:
    """A line of the table that `print_header` begins; for `on_photo`."""
    if result.error is not None:
        line = f"{'-':>6} {'-':>6} {'-':>8}  {result.image_id}: {result.status}: {result.error}"
    else:
        line = f"{result.things:>6} {result.stuff:>6} {result.seconds:>8.2f}  {result.image_id}"
    print(line, file=file, flush=True)


def print_summary(summary: PredictSummary) -> None:
    failed = f", {len(summary.failed)} could not be read" if summary.failed else ""
    print(f"{summary.photos} photos{failed}")
    for uri in summary.files.values():
        print(uri)
