"""Which of many labelled boxes enter a loss: a fixed number, of which objects are at most a fixed fraction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (have, take, generator) -> (take,) int64, distinct numbers below `have`
Choose = Callable[[int, int, torch.Generator | None], Tensor]

Generators = Sequence[torch.Generator] | None  # one an image: what is drawn for it depends on no other image


def each_generator(generators: Generators, images: int) -> Sequence[torch.Generator | None]:
    """One for each image, or None for each."""
    return [None] * images if generators is None else generators


def random_choice(have: int, take: int, generator: torch.Generator | None = None) -> Tensor:
    """`take` of range(have), all subsets alike; drawn where the generator lives, without one from torch's global."""
    device = "cpu" if generator is None else generator.device
    return torch.randperm(have, generator=generator, device=device)[:take]


def even_choice(have: int, take: int, generator: torch.Generator | None = None) -> Tensor:
    """`take` of range(have) at equal distances, for results that do not depend on chance."""
    return torch.arange(take) * have // max(take, 1)


def sample_labels(
    labels: Tensor, *, count: int, positive_fraction: float, choose: Choose, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Indices of the objects and of the background that enter the loss, at most `count` together.

    Objects are at most `positive_fraction` of `count`; background fills the rest as far as there is any.

    Args:
        labels: (n,) int8: 1 object, 0 background, -1 neither.
    """
    positive, negative = (labels == 1).nonzero().flatten(), (labels == 0).nonzero().flatten()
    positives = min(len(positive), int(count * positive_fraction))
    negatives = min(len(negative), count - positives)
    return (
        positive[choose(len(positive), positives, generator).to(labels.device)],
        negative[choose(len(negative), negatives, generator).to(labels.device)],
    )
