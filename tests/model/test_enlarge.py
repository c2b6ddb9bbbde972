"""The class of every pixel, band by band, is that of the scores resized whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model.enlarge import argmax_at_size

sides = st.tuples(st.integers(1, 6), st.integers(1, 6))
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def scores(grid: tuple[int, int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(5, *grid, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None, max_examples=60)
@given(grid=sides, size=sizes, seed=st.integers(0, 9), band_pixels=st.integers(1, 200))
def test_bands_of_rows_give_the_argmax_of_the_whole(
    grid: tuple[int, int], size: tuple[int, int], seed: int, band_pixels: int
) -> None:
    given_scores = scores(grid, seed, torch.float64)
    whole = F.interpolate(given_scores[None], size=size, mode="bilinear", align_corners=False)[0]
    labels = argmax_at_size(given_scores, size, band_pixels=band_pixels)
    assert labels.dtype == torch.uint8
    torch.testing.assert_close(labels.long(), whole.argmax(0))


@pytest.mark.parametrize("size", [(23, 31), (2, 3), (7, 7)])
def test_in_float32_only_a_tie_may_differ(size: tuple[int, int]) -> None:
    given_scores = scores((7, 5), 0, torch.float32)
    whole = F.interpolate(given_scores[None], size=size, mode="bilinear", align_corners=False)[0]
    chosen = whole.gather(0, argmax_at_size(given_scores, size).long()[None])[0]
    assert torch.allclose(chosen, whole.amax(0), atol=1e-5)


def test_equal_scores_go_to_the_lowest_class() -> None:
    assert argmax_at_size(torch.zeros(4, 2, 2), (3, 3)).tolist() == [[0] * 3] * 3
