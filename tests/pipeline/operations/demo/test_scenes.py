"""The generated scenes: the same for the same seed, true to their masks, and written as COCO panoptic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.operations.demo.drawing import BACKGROUNDS, OBJECTS, draw_object, make_frame
from pipeline.operations.demo.scenes import (
    BACKGROUND_KINDS,
    DIAMETERS,
    MAX_OBJECTS,
    OBJECT_KINDS,
    categories,
    make_scene,
    panoptic_truth,
    write_scenes,
)
from workers.masks import decode_panoptic_png, mask_box

# Areas of the outlines in squares of the radius: disc, rounded square, star, ring, lens, octagon.
AREAS = {
    "ball": np.pi,
    "box": 1.28**2 + 4 * 1.28 * 0.1 + np.pi * 0.1**2,
    "star": 5 * 0.5 * np.sin(np.pi / 5),
    "doughnut": np.pi * (1 - 0.34**2),
    "leaf": 1.54,
    "gem": 8 * 0.5 * np.sin(np.pi / 4),
}


def test_the_same_seed_gives_the_same_scene_and_another_seed_another() -> None:
    first, again, other = make_scene((1, 2)), make_scene((1, 2)), make_scene((1, 3))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    assert (first.image != other.image).mean() > 0.5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(64, 64), (96, 160), (200, 128)]))
def test_a_scene_is_consistent(seed: int, size: tuple[int, int]) -> None:
    scene = make_scene(seed, size)
    assert (scene.image.shape, scene.image.dtype) == ((*size, 3), np.uint8)
    assert 1 <= len(scene.masks) == len(scene.kinds) <= MAX_OBJECTS
    assert scene.masks.sum(axis=0).max() == 1
    assert scene.masks.any(axis=(1, 2)).all()
    assert set(scene.kinds.tolist()) <= set(range(len(OBJECT_KINDS)))
    assert 0 <= scene.background < len(BACKGROUND_KINDS)
    for mask in scene.masks:
        x0, y0, x1, y1 = mask_box(mask)
        assert max(x1 - x0, y1 - y0) <= DIAMETERS[1] * min(size) + 2


def test_all_kinds_and_backgrounds_and_counts_come_up() -> None:
    scenes = [make_scene((0, i), (64, 64)) for i in range(120)]
    assert {int(kind) for scene in scenes for kind in scene.kinds} == set(range(len(OBJECT_KINDS)))
    assert {scene.background for scene in scenes} == set(range(len(BACKGROUND_KINDS)))
    assert {len(scene.kinds) for scene in scenes} == {1, 2, 3}


@pytest.mark.parametrize("kind", OBJECT_KINDS)
@pytest.mark.parametrize("angle", [0.0, 1.0])
def test_an_outline_has_its_area_at_every_turn(kind: str, angle: float) -> None:
    radius, canvas = 60.0, np.zeros((160, 160, 3), dtype=np.float32)
    frame = make_frame((160, 160), 80.2, 79.6, radius, angle)
    covered = draw_object(np.random.default_rng(0), canvas, kind, frame, shadow=False)
    expected = AREAS[kind] * radius**2
    assert covered.sum() == pytest.approx(expected, rel=0.1 if kind == "leaf" else 0.005)  # a leaf's width varies
    drawn = canvas[frame.window].sum(axis=-1) > 0
    assert drawn[covered].mean() > 0.999
    assert drawn.sum() - covered.sum() < 0.06 * expected  # beyond the mask lies only the antialiased rim


def test_objects_at_the_edge_are_cut_not_wrapped() -> None:
    canvas = np.zeros((64, 64, 3), dtype=np.float32)
    frame = make_frame((64, 64), 0.0, 64.0, 20.0, 0.0)
    covered = draw_object(np.random.default_rng(0), canvas, "ball", frame, shadow=True)
    assert covered.sum() == pytest.approx(np.pi * 400 / 4, rel=0.03)
    assert canvas[:, :40].max() == 0
    assert canvas[24:].max() == 0


@pytest.mark.parametrize("kind", BACKGROUND_KINDS)
def test_backgrounds_are_textured_colours(kind: str) -> None:
    canvas = BACKGROUNDS[kind](np.random.default_rng(0), (90, 130))
    assert canvas.shape == (90, 130, 3)
    assert 0 <= canvas.min() <= canvas.max() <= 1.2
    assert canvas.std(axis=(0, 1)).max() > 0.02


def test_every_object_differs_from_its_background_in_colour_or_contrast() -> None:
    """If one did not, no method without labels could find it."""
    for index in range(30):
        scene = make_scene((5, index))
        background = scene.image[~scene.masks.any(axis=0)].astype(float)
        for mask in scene.masks:
            colour = np.abs(scene.image[mask].mean(axis=0) - background.mean(axis=0)).max()
            contrast = np.abs(scene.image[mask].std(axis=0) - background.std(axis=0)).max()
            assert max(colour, contrast) > 25


def test_a_side_below_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 64 pixels, got \(63, 200\)"):
        make_scene(0, (63, 200))


def test_categories_number_things_then_stuff_from_one() -> None:
    listed = categories()
    assert [c["id"] for c in listed] == list(range(1, len(OBJECTS) + len(BACKGROUNDS) + 1))
    assert [c["name"] for c in listed if c["isthing"]] == list(OBJECT_KINDS)
    assert [c["name"] for c in listed if not c["isthing"]] == list(BACKGROUND_KINDS)
    assert listed[len(OBJECT_KINDS)] == {"id": 7, "name": "grass", "isthing": 0}


def test_truth_covers_every_pixel_once() -> None:
    scene = make_scene(11, (96, 128))
    ids, segments = panoptic_truth(scene)
    assert ids.dtype == np.int32
    assert sum(s["area"] for s in segments) == ids.size
    for mask, kind, segment in zip(scene.masks, scene.kinds, segments, strict=False):
        np.testing.assert_array_equal(ids == segment["id"], mask)
        assert segment["category_id"] == kind + 1
    assert segments[-1]["category_id"] == len(OBJECT_KINDS) + 1 + scene.background


def test_written_scenes_are_coco_panoptic(tmp_path: Path) -> None:
    names = write_scenes(str(tmp_path), count=3, seed=4, size=(64, 96))
    assert names == ["scene-00000.jpg", "scene-00001.jpg", "scene-00002.jpg"]
    truth = json.loads((tmp_path / "truth.json").read_text())
    assert truth["categories"] == categories()
    assert truth["images"][2] == {"id": 2, "file_name": "scene-00002.jpg", "height": 64, "width": 96}
    for index, annotation in enumerate(truth["annotations"]):
        scene = make_scene((4, index), (64, 96))
        ids, segments = panoptic_truth(scene)
        assert (annotation["image_id"], annotation["segments_info"]) == (index, segments)
        stored = decode_panoptic_png((tmp_path / "truth" / annotation["file_name"]).read_bytes())
        np.testing.assert_array_equal(stored, ids)
        picture = np.asarray(Image.open(tmp_path / "images" / names[index])).astype(int)
        assert np.abs(picture - scene.image).mean() < 4


def test_a_scene_does_not_depend_on_how_many_are_written(tmp_path: Path) -> None:
    write_scenes(str(tmp_path / "few"), count=1, seed=4, size=(64, 64))
    write_scenes(str(tmp_path / "more"), count=2, seed=4, size=(64, 64))
    few, more = (tmp_path / name / "images" / "scene-00000.jpg" for name in ("few", "more"))
    assert few.read_bytes() == more.read_bytes()
