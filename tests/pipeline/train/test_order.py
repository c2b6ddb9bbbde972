"""The order of a training: every image once an epoch, alike shapes together, and nothing but seed and step decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.order import MIXED_PARTS, TrainingOrder


def order(count: int, batch: int, *, parts: int = 5, seed: int = 0) -> TrainingOrder:
    rng = np.random.default_rng(count)
    return TrainingOrder(np.sort(rng.integers(parts, size=count)), rng.random(count) < 0.6, batch, seed)


@given(count=st.integers(1, 60), batch=st.integers(1, 9), parts=st.integers(1, 30), seed=st.integers(0, 5))
def test_an_epoch_has_every_image_and_repeats_only_to_fill_the_last_batch(
    count: int, batch: int, parts: int, seed: int
) -> None:
    o = order(count, batch, parts=parts, seed=seed)
    for epoch in (0, 1):
        first = epoch * o.steps_per_epoch
        batches = np.stack([o.batch(step) for step in range(first, first + o.steps_per_epoch)])
        assert batches.shape == (-(-count // batch), batch)
        seen = np.bincount(batches.ravel(), minlength=count)
        assert seen.min() >= 1
        assert np.bincount(batches[:-1].ravel(), minlength=count).max(initial=0) <= 1


def test_wide_and_tall_images_share_only_the_last_batches() -> None:
    o = order(203, 8)
    batches = [o.batch(step) for step in range(o.steps_per_epoch)]
    mixed = [len(set(o.wide[b])) == 2 for b in batches]
    assert sum(mixed) <= 2
    assert not any(mixed[:-2])


def test_epochs_and_seeds_differ_and_steps_do_not_depend_on_history() -> None:
    o = order(40, 4)
    assert not np.array_equal(o.batch(0), o.batch(10))
    assert not np.array_equal(o.batch(0), order(40, 4, seed=1).batch(0))
    late = [order(40, 4).batch(step) for step in (25, 3, 25)]
    np.testing.assert_array_equal(late[0], o.batch(25))
    np.testing.assert_array_equal(late[1], o.batch(3))
    np.testing.assert_array_equal(late[2], late[0])


def test_few_parts_are_read_at_a_time() -> None:
    parts = np.repeat(np.arange(100), 50)
    o = TrainingOrder(parts, np.ones(len(parts), bool), 10, seed=0)
    for start in range(0, o.steps_per_epoch, 7):
        window = np.concatenate([o.batch(step) for step in range(start, min(start + 7, o.steps_per_epoch))])
        assert len(set(parts[window])) <= 2 * MIXED_PARTS


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image to train on"):
        TrainingOrder(np.zeros(0, np.int64), np.zeros(0, bool), 4, 0)
