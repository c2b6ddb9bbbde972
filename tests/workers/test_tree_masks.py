"""Masks from merge trees: they find what stands out, at its edges, whatever the statistics of the features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.tree_masks import TreeMasks, TreeParams, draw, find_tree_masks

GRID = (10, 14)
CHANNELS = 32


def photo_of(disc: np.ndarray) -> np.ndarray:
    """(140, 196, 3): a bright disc on a dark ground, both a little noisy."""
    noise = np.random.default_rng(0).integers(0, 12, (140, 196, 3))
    return (np.where(disc[..., None], [200, 160, 40], [30, 60, 90]) + noise).astype(np.uint8)


def disc_at(row: int, column: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:140, :196]
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


def features_of(disc: np.ndarray, *, common: float = 0.0, strong: float = 1.0, seed: int = 0) -> torch.Tensor:
    """(N, C) features that differ on the disc, with a common direction and three dimensions of another strength."""
    rng = np.random.default_rng(seed)
    inside = share_of(disc).numpy()
    kinds = rng.normal(size=(2, CHANNELS))
    rows = inside * kinds[0] + (1 - inside) * kinds[1] + 0.2 * rng.normal(size=(140, CHANNELS))
    rows[:, :3] *= strong
    return torch.from_numpy(rows + common * rng.normal(size=CHANNELS)).float()


def share_of(disc: np.ndarray) -> torch.Tensor:
    """(N, 1) how much of each patch lies on the disc."""
    return torch.from_numpy(disc.reshape(10, 14, 14, 14).mean((1, 3)).reshape(-1, 1)).float()


def find(disc: np.ndarray, features: torch.Tensor, **params: float) -> TreeMasks:
    return find_tree_masks(photo_of(disc), [features], features, None, GRID, TreeParams(raster_side=196, **params))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize(("common", "strong"), [(0, 1), (20, 1), (0, 30), (20, 30)])
def test_an_object_is_the_best_mask_and_follows_its_edge(common: float, strong: float) -> None:
    disc = disc_at(70, 90, 36)
    masks = find(disc, features_of(disc, common=common, strong=strong))
    assert iou(next(draw(masks, 140, 196)), disc) > 0.93  # patches alone would reach 0.85
    assert (masks.scores[:-1] >= masks.scores[1:]).all()
    assert masks.scores[0] < 1 and masks.scores.min() > 0


def test_two_objects_are_two_masks_and_parts_know_what_holds_them() -> None:
    disc = disc_at(60, 50, 30) | disc_at(80, 140, 34)
    masks = find(disc, features_of(disc))
    drawn = list(draw(masks, 140, 196))
    for one in (disc_at(60, 50, 30), disc_at(80, 140, 34)):
        assert max(iou(mask, one) for mask in drawn[:4]) > 0.9
    for number, parent in enumerate(masks.parents.tolist()):
        assert (masks.levels[number] == 0) == (parent == -1)
        if parent >= 0:
            assert masks.levels[number] == masks.levels[parent] + 1
            assert (drawn[number] & drawn[parent]).sum() >= 0.85 * drawn[number].sum()


def test_they_are_bounded_and_repeat_none() -> None:
    disc = disc_at(70, 90, 36)
    masks = find(disc, features_of(disc), max_masks=7)
    assert len(masks.scores) == 7
    everything = find(disc, features_of(disc), max_iou=0.5)
    drawn = [mask.reshape(-1) for mask in draw(everything, *everything.labels.shape)]
    assert max(iou(a, b) for i, a in enumerate(drawn) for b in drawn[:i]) <= 0.52


def test_what_the_photo_is_of_counts_where_cls_says_it() -> None:
    left, right = disc_at(70, 50, 30), disc_at(70, 140, 30)
    rng = np.random.default_rng(3)
    kinds = torch.from_numpy(rng.normal(size=(2, CHANNELS))).float()
    features = share_of(left) * kinds[0] + share_of(right) * kinds[1]
    features = features + 0.1 * torch.from_numpy(rng.normal(size=(140, CHANNELS))).float()
    photo = photo_of(left | right)
    for disc, cls in ((left, kinds[0]), (right, kinds[1])):
        masks = find_tree_masks(photo, [features], features, cls, GRID, TreeParams(raster_side=196))
        assert iou(next(draw(masks, 140, 196)), disc) > 0.9


def test_the_mean_inside_a_mask() -> None:
    disc = disc_at(70, 90, 40)
    masks = find(disc, features_of(disc))
    share = share_of(disc)
    assert masks.mean(share)[0] > 0.8
    torch.testing.assert_close(masks.mean(torch.ones(140, 5)), torch.ones(len(masks.scores), 5))


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (30, 5000), (3000, 2)])
def test_photos_of_any_size(size: tuple[int, int]) -> None:
    photo = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    masks = find_tree_masks(photo, [features], features, None, (2, 3))
    assert len(masks.scores) <= 100 and torch.isfinite(masks.scores).all()
    assert all(mask.shape == size for mask in draw(masks, *size))


def test_nothing_to_tell_apart() -> None:
    flat = np.full((64, 64, 3), 90, np.uint8)
    alike = torch.ones(16, 8)
    assert len(find_tree_masks(flat, [alike], alike, None, (4, 4)).scores) == 0 or bool(
        (find_tree_masks(flat, [alike], alike, None, (4, 4)).scores < 1e-3).all()
    )
    with pytest.raises(ValueError, match="NaN or infinite"):
        find_tree_masks(flat, [alike * torch.nan], alike, None, (4, 4))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_the_same_photo_gives_the_same_masks(seed: int) -> None:
    photo = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    features = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed))
    one, two = (find_tree_masks(photo, [features], features, None, (3, 4)) for _ in range(2))
    assert torch.equal(one.members, two.members) and torch.equal(one.scores, two.scores)
