"""The size at which the model looks at an image."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from rcnn_reference import Reference

from model.panoptic import resize


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((375, 500), (800, 1067)),
        ((500, 335), (1194, 800)),
        ((477, 1200), (530, 1333)),
        ((5000, 30), (1333, 8)),
        ((1, 1), (800, 800)),
        ((100_000, 10), (1333, 1)),
    ],
)
def test_the_shorter_side_becomes_800_unless_the_longer_would_pass_1333(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert resize.test_size(*size) == expected


def test_no_size_of_an_empty_image() -> None:
    with pytest.raises(ValueError, match="0 x 5"):
        resize.test_size(0, 5)


def test_the_published_sizes(shared_dir: Path) -> None:
    table = Reference(shared_dir).arrays["unit/resize_table"].tolist()
    assert len(table) == 110
    assert [resize.test_size(h, w, short, long) for h, w, short, long, _, _ in table] == [
        (height, width) for *_, height, width in table
    ]
