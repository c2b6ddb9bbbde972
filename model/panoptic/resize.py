"""The size at which the panoptic model looks at an image."""

from __future__ import annotations

DIVISOR = 32  # of the sides of a frame: the coarsest map of the backbone has this stride


def test_size(h: int, w: int, short: int = 800, long: int = 1333) -> tuple[int, int]:
    """(height, width) of an h x w image whose shorter side becomes `short`, or less if the longer would pass `long`.

    Sides are rounded half up, and are never below 1: a strip of 100000 x 10 pixels keeps one column.
    """
    if min(h, w, short, long) < 1:
        raise ValueError(f"sizes must be positive, got {h} x {w}, short {short}, long {long}")
    scale = short / min(h, w)
    height, width = (float(short), scale * w) if h < w else (scale * h, float(short))
    longest = max(height, width)
    if longest > long:
        height, width = height * (long / longest), width * (long / longest)
    return max(1, int(height + 0.5)), max(1, int(width + 0.5))


def padded_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the frame of an image of `size` by itself: rounded up to multiples of 32."""
    height, width = (-(-side // DIVISOR) * DIVISOR for side in size)
    return height, width
