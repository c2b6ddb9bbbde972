"""The tree of merges is that of one merge after the other, and adds up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from workers.merge_tree import Tree, merge_tree


def grow(features: np.ndarray, size: np.ndarray, pairs: list[tuple[int, int]]) -> Tree:
    edges = torch.ones(len(pairs), 1)
    ends = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    weight = torch.tensor(size, dtype=torch.float64)
    return merge_tree(torch.tensor(features, dtype=torch.float64), weight, ends, edges, weight[:, None])


def one_after_the_other(features: np.ndarray, size: np.ndarray, pairs: list[tuple[int, int]]) -> set[frozenset[int]]:
    """The plain algorithm: merge the cheapest pair that touches, by Ward's dissimilarity, again and again."""
    groups = [frozenset([i]) for i in range(len(size))]
    found = set()

    def mean(group: frozenset[int]) -> tuple[np.ndarray, float]:
        rows = sorted(group)
        return np.average(features[rows], axis=0, weights=size[rows]), float(size[rows].sum())

    while len(groups) > 1:
        costs = []
        for a, b in itertools.combinations(groups, 2):
            if any((i in a and j in b) or (i in b and j in a) for i, j in pairs):
                (mean_a, size_a), (mean_b, size_b) = mean(a), mean(b)
                costs.append((((mean_a - mean_b) ** 2).sum() * size_a * size_b / (size_a + size_b), a, b))
        _, a, b = min(costs, key=lambda cost: cost[0])
        groups = [group for group in groups if group not in (a, b)] + [a | b]
        found.add(a | b)
    return found


def nodes(tree: Tree) -> set[frozenset[int]]:
    members = tree.members(torch.arange(len(tree.parent)))
    return {frozenset(np.flatnonzero(row).tolist()) for row in members.numpy()}


@pytest.mark.parametrize("seed", range(5))
def test_where_all_touch_it_is_wards_tree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, size = rng.normal(size=(9, 3)), rng.integers(1, 9, 9).astype(float)
    pairs = list(itertools.combinations(range(9), 2))
    assert nodes(grow(features, size, pairs)) == one_after_the_other(features, size, pairs)


def test_a_chain_merges_neighbours_alone() -> None:
    features = np.array([[0.0], [10], [0.1], [10.2], [10.3]])
    tree = grow(features, np.ones(5), [(0, 1), (1, 2), (2, 3), (3, 4)])
    assert nodes(tree) >= {frozenset([3, 4]), frozenset(range(5))}
    assert frozenset([0, 2]) not in nodes(tree)  # alike, but they do not touch


def test_sums_outlines_and_parents_add_up() -> None:
    rng = np.random.default_rng(1)
    pairs = [(i, i + 1) for i in range(11)] + [(i, i + 4) for i in range(8)]
    size = rng.integers(1, 5, 12).astype(float)
    tree = grow(rng.normal(size=(12, 2)), size, pairs)
    members = tree.members(torch.arange(11)).numpy()
    np.testing.assert_allclose(tree.sums[:, 0], members @ size)
    outline = [sum(inside[i] != inside[j] for i, j in pairs) for inside in members]
    np.testing.assert_allclose(tree.outline[:, 0], outline)
    assert tree.parent[-1] == -1 and members[-1].all()
    for node, parent in enumerate(tree.parent[:-1].tolist()):
        assert parent > node and (members[parent] >= members[node]).all()
    assert (np.diff(tree.height[tree.parent[:-1]].numpy() - tree.height[:-1].numpy()) > -1e9).all()
    assert all(tree.height[p] >= tree.height[n] for n, p in enumerate(tree.parent[:-1].tolist()))


def test_pieces_that_do_not_touch_are_joined_at_the_end() -> None:
    tree = grow(np.array([[0.0], [0.1], [5], [5.2], [9]]), np.ones(5), [(0, 1), (2, 3)])
    assert nodes(tree) >= {frozenset([0, 1]), frozenset([2, 3]), frozenset(range(5))}
    assert len(nodes(tree)) == 4


def test_equal_costs_do_not_stall_it() -> None:
    tree = grow(np.zeros((16, 2)), np.ones(16), [(i, i + 1) for i in range(15)])
    assert len(nodes(tree)) == 15
