"""Photos that a model cannot learn from are refused before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.sources.index import Index, build_index
from pipeline.train.coco_photos import CocoPhotos
from pipeline.train.photos import Labels, PhotosOfLabels
from tests.pipeline.label_files import categories, segment, unreadable_row, write_coco, write_part
from workers.decode import DecodeLimits
from workers.masks import encode_panoptic_png


def row(image_id: str, ids: list[int], status: str = "ok") -> dict[str, Any]:
    """A photo of one line of pixels with a thing for each id."""
    things = [
        {"id": i, "category": 1, "is_thing": True, "area": ids.count(i), "bbox": [0.0] * 4, "score": 0.5}
        for i in sorted({*ids} - {0})
    ]
    readable = {"status": status, "height": 1, "width": len(ids), "panoptic": encode_panoptic_png(np.array([ids]))}
    return unreadable_row(image_id) | readable | {"segments": things}


@pytest.fixture
def index(tmp_path: Path) -> Index:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"photo")
    return build_index(str(tmp_path / "index"), str(tmp_path / "photos"), shard_size=2)


def photos(index: Index, tmp_path: Path, *parts: list[dict[str, Any]]) -> PhotosOfLabels:
    listed = categories(2, 0)
    written = [write_part(tmp_path / f"part-{i:05d}.parquet", rows, listed) for i, rows in enumerate(parts)]
    return PhotosOfLabels(index, Labels(written), num_things=2, num_stuff=0, limits=DecodeLimits())


def test_labels_of_which_no_photo_has_a_segment_teach_nothing(index: Index, tmp_path: Path) -> None:
    empty = row("a.jpg", [0, 0], "no_masks")
    with pytest.raises(ConfigError, match=r"none of the 2 photos to train on has a segment.*things\.min_score"):
        photos(index, tmp_path, [empty, empty])
    assert len(photos(index, tmp_path, [empty], [unreadable_row("b.jpg"), row("c.jpg", [1, 1])])) == 2
    with pytest.raises(ConfigError, match="no image of the 1 panoptic parts has labels"):
        photos(index, tmp_path, [unreadable_row("b.jpg")])


def test_human_labels_without_a_segment_teach_nothing(tmp_path: Path) -> None:
    def coco(name: str, segments: list[dict[str, Any]]) -> CocoPhotos:
        labels = write_coco(tmp_path, {"a.jpg": ([[len(segments)] * 2], segments)}, categories(2, 0), name)
        return CocoPhotos(labels, str(tmp_path), limits=DecodeLimits())

    with pytest.raises(ConfigError, match=r"none\.json has 1 photos without a segment"):
        coco("none", [])
    assert len(coco("one", [segment(1, 1)])) == 1
