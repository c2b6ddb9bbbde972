"""STEGO's sample of the source: exact in size, spread evenly, the same however the source is cut into shards."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.semantics.sample import sample_size, sampled_rows


def sample(images: int, wanted: int, seed: int, shard_size: int) -> list[int]:
    """Numbers of the sampled photos, shard by shard."""
    numbers = []
    for first in range(0, images, shard_size):
        count = min(shard_size, images - first)
        numbers += [first + row for row in sampled_rows(first, count, images=images, wanted=wanted, seed=seed)]
    return numbers


@given(images=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 5), shard_size=st.integers(1, 400))
def test_shards_together_hold_exactly_the_sample(images: int, share: float, seed: int, shard_size: int) -> None:
    wanted = max(1, round(share * images))
    whole = sample(images, wanted, seed, images)
    assert sample(images, wanted, seed, shard_size) == whole
    assert len(set(whole)) == wanted
    assert whole == sorted(whole) and whole[0] >= 0 and whole[-1] < images
    assert [(number * wanted + wanted - 1) // images for number in whole] == list(range(wanted))  # one of each stretch


def test_the_draw_is_pinned() -> None:
    """A change here changes what the features of every run are made of."""
    assert sample(100, 10, 0, 30) == [6, 10, 22, 30, 47, 52, 69, 71, 85, 96]
    assert sample(100, 10, 1, 30) != sample(100, 10, 0, 30)


def test_every_photo_has_the_same_chance() -> None:
    counts = np.zeros(12, int)
    for seed in range(3000):
        counts[sample(12, 3, seed, 12)] += 1
    assert np.abs(counts / 3000 - 3 / 12).max() < 0.03


def test_a_shard_of_a_source_of_a_hundred_million_costs_its_own_photos_alone() -> None:
    rows = sampled_rows(51_200_000, 512, images=100_000_000, wanted=52_500, seed=0)
    assert len(rows) in {0, 1}


def test_a_twentieth_more_is_drawn_than_the_fit_takes() -> None:
    assert [sample_size(1000, wanted) for wanted in (None, 5000, 1000, 960, 100, 10)] == [
        1000,
        1000,
        1000,
        1000,
        105,
        11,
    ]
