"""A few photos of a training and what its model sees in them, as one picture."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from model.panoptic.network import PanopticCascadeRCNN
from pipeline.train.job import TrainJob
from workers.overlay import category_color, draw_overlay, shrink, size_within
from workers.predict import resize_to_model

PHOTOS = 6
COLUMNS = 2
HEIGHT, WIDTH = 240, 320  # of a photo in the picture, at most
GAP = 4


def draw_predictions(job: TrainJob, model: PanopticCascadeRCNN) -> bytes:
    """JPEG: photos, evenly spaced over all, each beside its panoptic prediction. The model's mode stays as it is."""
    chosen = np.unique(np.linspace(0, len(job.photos) - 1, min(PHOTOS, len(job.photos))).round().astype(int))
    training = model.training
    model.eval()
    try:
        rows = [_pair(job, model, int(index)) for index in chosen]
    finally:
        model.train(training)
    stream = io.BytesIO()
    Image.fromarray(_grid(rows)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def _pair(job: TrainJob, model: PanopticCascadeRCNN, index: int) -> np.ndarray:
    photo = job.photos.sample(index).image
    short = sorted(job.settings.short_sides)[len(job.settings.short_sides) // 2]
    height, width, _ = photo.shape
    image = torch.from_numpy(resize_to_model(photo, short, job.settings.max_side)).permute(2, 0, 1)
    found = model.predict([image], output_sizes=[(height, width)])[0].to("cpu").panoptic()
    size = size_within(height, width, HEIGHT, WIDTH)
    colors = {segment.id: category_color(segment.category) for segment in found.segments}
    drawn = draw_overlay(photo, found.ids.numpy().astype(np.int32), colors, *size)
    return np.concatenate([shrink(photo, *size), drawn], axis=1)


def _grid(pairs: list[np.ndarray]) -> np.ndarray:
    """The pictures, `COLUMNS` in a row, on white."""
    cell_h, cell_w = (max(pair.shape[axis] for pair in pairs) + GAP for axis in (0, 1))
    rows = -(-len(pairs) // COLUMNS)
    canvas = np.full((rows * cell_h, min(COLUMNS, len(pairs)) * cell_w, 3), 255, np.uint8)
    for number, pair in enumerate(pairs):
        y, x = number // COLUMNS * cell_h, number % COLUMNS * cell_w
        canvas[y : y + pair.shape[0], x : x + pair.shape[1]] = pair
    return canvas
