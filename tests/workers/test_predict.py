"""Photos -> rows of predictions: sizes, ids, detections, and images that cannot be read."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.panoptic.combine import CombineSettings
from model.panoptic.network import PanopticCascadeRCNN, Prediction
from tests.tiny_panoptic import STUFF, THINGS, scene, tiny_model, tiny_vit
from workers.images import LoadedImage
from workers.masks import decode_panoptic_png, decode_rle
from workers.overlap import Flow, Overlapped
from workers.phases import Phases
from workers.predict import (
    HELD_PIXELS,
    PREDICTIONS_SCHEMA,
    PredictWorker,
    combine,
    encode_masks,
    resize_to_model,
    stuff_classes,
)
from workers.records import PANOPTIC_SCHEMA, Status
from workers.training.augment import resize_shortest_edge
from workers.training.samples import Sample, from_panoptic_row

BROKEN = LoadedImage("broken.jpg", None, Status.UNDECODABLE, "not an image")


@pytest.fixture(scope="module")
def model() -> PanopticCascadeRCNN:
    return tiny_model()


def worker_of(model: PanopticCascadeRCNN, batch_size: int = 1, flow: Flow | None = None) -> PredictWorker:
    return PredictWorker(model, device="cpu", batch_size=batch_size, short=96, max_side=200, flow=flow)


def table_of(worker: PredictWorker, images: list[LoadedImage]) -> pa.Table:
    return worker.process(images, Phases(), uris={image.image_id: f"/photos/{image.image_id}" for image in images})


@pytest.fixture(scope="module")
def images() -> list[LoadedImage]:
    sizes = [(60, 80), (80, 60), (40, 160), (60, 80)]
    photos = [LoadedImage(f"{i}.jpg", scene(*size, seed=i)) for i, size in enumerate(sizes)]
    return [photos[0], BROKEN, *photos[1:]]


@pytest.fixture(scope="module")
def table(model: PanopticCascadeRCNN, images: list[LoadedImage]) -> pa.Table:
    return table_of(worker_of(model), images)


def test_one_row_an_image_and_the_bad_ones_say_why(table: pa.Table, images: list[LoadedImage]) -> None:
    assert table.schema == PREDICTIONS_SCHEMA
    assert table["image_id"].to_pylist() == [image.image_id for image in images]
    bad = table.slice(1, 1).to_pylist()[0]
    assert (bad["status"], bad["error"], bad["uri"]) == ("undecodable", "not an image", "/photos/broken.jpg")
    assert [bad[name] for name in ("height", "panoptic", "labels")] == [None] * 3
    assert [bad[name] for name in ("segments", "rle", "score", "category")] == [[]] * 4


def test_kept_tokens_take_the_place_of_the_transformer(images: list[LoadedImage]) -> None:
    """They are asked for with the resized photo; what is not kept is made with their precision."""
    model = tiny_vit(photo_outlines=True)
    transformer = model.frozen
    assert transformer is not None
    asked, seen = [], []

    class Counted:
        stride = transformer.stride

        def __call__(self, photos: list[torch.Tensor]) -> list[torch.Tensor]:
            seen.extend(tuple(photo.shape) for photo in photos)
            return transformer(photos)

    model.frozen = Counted()  # type: ignore[assignment]

    def kept(image: torch.Tensor, which: tuple[int, ...]) -> torch.Tensor | None:
        asked.append((image.dtype, tuple(image.shape)))
        return transformer([image])[0].half() if image.shape[2] in which else None

    tables = []
    for widths in ((96, 128, 200), (128,), ()):
        seen.clear()
        worker = PredictWorker(
            model, device="cpu", batch_size=2, short=96, max_side=200, kept_tokens=partial(kept, which=widths)
        )
        tables.append((table_of(worker, images), list(seen)))
    assert [shapes for _, shapes in tables] == [
        [],
        [(3, 128, 96), (3, 50, 200)],
        [(3, 96, 128), (3, 128, 96), (3, 50, 200), (3, 96, 128)],
    ]
    assert {dtype for dtype, _ in asked} == {torch.uint8}
    for table, _ in tables[1:]:
        for name in set(table.column_names) - {"seconds"}:
            assert table[name].equals(tables[0][0][name]), name


def test_a_row_is_one_of_a_panoptic_part_that_can_be_trained_on(table: pa.Table, images: list[LoadedImage]) -> None:
    assert table.select(PANOPTIC_SCHEMA.names).schema == PANOPTIC_SCHEMA
    kinds = set()
    for row, image in zip(table.to_pylist(), images, strict=True):
        if image.pixels is not None:
            sample = from_panoptic_row(row, image.pixels, num_things=THINGS, num_stuff=STUFF)
            assert sample.size == image.pixels.shape[:2] == (row["height"], row["width"])
            kinds |= {segment["is_thing"] for segment in row["segments"]}
    assert kinds == {True, False}, "the tiny model is to see things and stuff"


def test_segments_say_what_the_id_map_shows(table: pa.Table) -> None:
    for row in table.to_pylist():
        ids = np.zeros((1, 1)) if row["panoptic"] is None else decode_panoptic_png(row["panoptic"])
        assert sorted(set(np.unique(ids)) - {0}) == [segment["id"] for segment in row["segments"]]
        for segment in row["segments"]:
            ys, xs = np.nonzero(ids == segment["id"])
            assert segment["bbox"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert segment["area"] == len(xs)
            assert segment["is_thing"] == (segment["category"] <= THINGS) == (segment["score"] is not None)


def test_all_detections_are_there_and_not_only_the_combined_ones(table: pa.Table) -> None:
    row = table.slice(0, 1).to_pylist()[0]
    lists = [row[name] for name in ("rle", "bbox", "area", "score", "category")]
    assert {len(entries) for entries in lists} == {20}, "as many as the model may give"
    assert row["score"] == sorted(row["score"], reverse=True)
    assert set(row["category"]) <= set(range(1, THINGS + 1))
    assert [int(decode_rle(counts, 60, 80).sum()) for counts in row["rle"]] == row["area"]
    sure = sum(score >= 0.5 for score in row["score"])
    assert row["hidden_instances"] == sure - sum(segment["is_thing"] for segment in row["segments"])


@pytest.mark.parametrize(("batch_size", "flow"), [(5, None), (2, Overlapped(2))], ids=["a batch", "overlapped"])
def test_the_batch_changes_no_row(
    model: PanopticCascadeRCNN, table: pa.Table, images: list[LoadedImage], batch_size: int, flow: Flow | None
) -> None:
    """Images of one padded size share a forward pass, here the first and the last; the order stays."""
    together = table_of(worker_of(model, batch_size, flow), images)
    assert together.select(["image_id", "status", "error"]).equals(table.select(["image_id", "status", "error"]))
    for one, other in zip(together.to_pylist(), table.to_pylist(), strict=True):
        if one["panoptic"] is not None:
            ids, other_ids = decode_panoptic_png(one["panoptic"]), decode_panoptic_png(other["panoptic"])
            assert (ids == other_ids).mean() > 0.99, "but for rounding"
        np.testing.assert_allclose(one["score"], other["score"], atol=1e-3)


def test_large_images_are_not_held_together(model: PanopticCascadeRCNN) -> None:
    side = int(np.sqrt(HELD_PIXELS)) // 2
    large = [LoadedImage(str(i), np.zeros((side, 2 * side, 3), np.uint8)) for i in range(5)]
    sizes = [len(batch) for batch in worker_of(model, batch_size=4)._batches([*large, BROKEN])]
    assert sizes == [2, 2, 2]
    huge = LoadedImage("huge", np.zeros((2 * side + 1, 2 * side + 1, 3), np.uint8))
    assert [len(batch) for batch in worker_of(model, batch_size=4)._batches([huge, huge])] == [1, 1]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (500, 3)])
def test_images_of_any_shape(model: PanopticCascadeRCNN, size: tuple[int, int]) -> None:
    row = table_of(worker_of(model), [LoadedImage("odd.png", np.full((*size, 3), 200, np.uint8))]).to_pylist()[0]
    assert row["status"] in {"ok", "no_masks"}
    assert (row["height"], row["width"]) == size == decode_panoptic_png(row["panoptic"]).shape


def test_bfloat16_sees_about_the_same(model: PanopticCascadeRCNN, images: list[LoadedImage]) -> None:
    worker = PredictWorker(model, device="cpu", short=96, max_side=200, amp=True)
    rough, exact = (next(one.predict(images[:1], Phases())).prediction for one in (worker, worker_of(model)))
    assert rough is not None and exact is not None
    assert (rough.semantic == exact.semantic).float().mean() > 0.9
    assert rough.boxes.dtype == rough.scores.dtype == torch.float32


def test_the_resize_is_that_of_training() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (75, 100, 3), np.uint8)
    empty = np.zeros((0, 75, 100), bool)
    sample = Sample("a", photo, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), empty, photo[..., 0])
    resized = resize_to_model(photo, short=48, max_side=60)
    assert resized.shape == (45, 60, 3)
    assert np.array_equal(resized, resize_shortest_edge(sample, 48, 60).image)


def prediction_of(masks: list[list[list[int]]], scores: list[float], semantic: list[list[int]]) -> Prediction:
    found = torch.tensor(masks, dtype=torch.bool).reshape(-1, len(semantic), len(semantic[0]))
    zeros, classes = torch.zeros(len(found), 4), torch.arange(len(found))
    settings = CombineSettings(stuff_area=1)
    return Prediction(
        zeros, torch.tensor(scores), classes, found, torch.tensor(semantic, dtype=torch.uint8), 3, settings
    )


def test_combined_labels_of_a_prediction_worked_out_by_hand() -> None:
    masks = [[[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 0, 1, 0]], [[0, 0, 0, 1], [0, 0, 0, 1]]]
    labels = combine(prediction_of(masks, [0.9, 0.6, 0.4], [[0, 0, 2, 1], [0, 0, 2, 0]]))
    assert labels.ids.tolist() == [[1, 1, 3, 2], [1, 1, 3, 0]]
    segments = [(s.category, s.area, s.bbox) for s in labels.segments]
    assert segments == [(1, 4, (0, 0, 2, 2)), (4, 1, (3, 0, 4, 1)), (5, 2, (2, 0, 3, 2))]
    assert labels.hidden == 1, "the second is sure enough and mostly covered, the third is not sure"


def test_the_semantic_map_is_that_of_a_semantics_part() -> None:
    assert stuff_classes(prediction_of([], [], [[0, 1, 2]])).tolist() == [[255, 0, 1]]


@given(st.integers(0, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_masks_encoded_together_are_the_masks(n: int, height: int, width: int, seed: int) -> None:
    masks = np.random.default_rng(seed).random((n, height, width)) > 0.5
    decoded = [decode_rle(counts, height, width) for counts in encode_masks(torch.from_numpy(masks))]
    assert np.array_equal(np.array(decoded, bool).reshape(masks.shape), masks)


def test_numbers_that_make_no_sense_are_refused(model: PanopticCascadeRCNN) -> None:
    with pytest.raises(ValueError, match=r"batch_size 0, short 800 and max_side 1333 must be positive"):
        PredictWorker(model, device="cpu", batch_size=0)


def test_what_is_not_the_images_fault_names_them(model: PanopticCascadeRCNN) -> None:
    with pytest.raises(RuntimeError, match=r"KeyError on 0\.jpg"):
        worker_of(model).process([LoadedImage("0.jpg", scene(30, 30))], Phases(), uris={})


def test_the_semantic_png_of_a_row_has_only_stuff_and_void(table: pa.Table) -> None:
    for png in table["labels"].to_pylist():
        if png is not None:
            assert set(np.unique(np.asarray(Image.open(io.BytesIO(png))))) <= {0, 1, 255}
