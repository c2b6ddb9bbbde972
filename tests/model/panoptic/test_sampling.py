"""Which boxes enter a loss."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.panoptic.sampling import even_choice, random_choice, sample_labels


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=40), st.integers(1, 20), st.sampled_from([0.25, 0.5]))
def test_no_more_than_asked_for_and_background_fills_the_rest(labels: list[int], count: int, fraction: float) -> None:
    values = torch.tensor(labels, dtype=torch.int8)
    positive, negative = sample_labels(
        values, count=count, positive_fraction=fraction, choose=random_choice, generator=torch.Generator()
    )
    assert (values[positive] == 1).all() and (values[negative] == 0).all()
    assert len(positive) == min(labels.count(1), int(count * fraction))
    assert len(negative) == min(labels.count(0), count - len(positive))
    assert len(set(positive.tolist())) == len(positive) and len(set(negative.tolist())) == len(negative)


def test_the_generator_decides_and_the_global_one_does_not() -> None:
    draws = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        draws.append(random_choice(1000, 5, torch.Generator().manual_seed(7)).tolist())
    assert draws[0] == draws[1]
    assert draws[0] != random_choice(1000, 5, torch.Generator().manual_seed(8)).tolist()


def test_an_even_spread() -> None:
    assert even_choice(10, 4).tolist() == [0, 2, 5, 7]
    assert even_choice(3, 0).tolist() == []
