"""A merge tree of regions: Ward's agglomeration of what touches, from the leaves to the whole.

All pairs that are each other's best merge at once. Ward's dissimilarity is reducible (no merge brings others nearer):
these rounds give the tree of one merge after the other, but for ties and for pairs that do not touch.

Shapes: S leaves, K = S - 1 inner nodes, E pairs that touch, C channels, A attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tree:
    """The inner nodes of a merge tree, children before their parents, the root last."""

    sums: Tensor  # (K, A) sums of the leaves' attributes
    outline: Tensor  # (K, B) sums of the pairs' attributes along the outline; the photo's border is none
    height: Tensor  # (K,) dissimilarity at which the node was made
    parent: Tensor  # (K,) int64, -1 for the root
    first: Tensor  # (K,) int64: its leaves are those of rank first .. first + leaves - 1
    leaves: Tensor  # (K,) int64
    rank: Tensor  # (S,) int64

    def members(self, nodes: Tensor) -> Tensor:
        """(n,) inner nodes -> (n, S) bool, the leaves of each."""
        offset = self.rank[None] - self.first[nodes, None]
        return (offset >= 0) & (offset < self.leaves[nodes, None])


def merge_tree(features_SC: Tensor, size_S: Tensor, pairs_2E: Tensor, edges_EB: Tensor, attributes_SA: Tensor) -> Tree:
    """Merge until one is left, by the means of the features, weighted by size.

    `pairs_2E`: int64, who touches whom; `edges_EB` and `attributes_SA` are summed up the tree. Pieces that do not touch
    are joined at the end, at the last height.
    """
    growing = _Growing(features_SC, size_S, pairs_2E, edges_EB, attributes_SA)
    while growing.made < growing.total:
        growing.merge()
    return growing.tree()


class _Growing:
    """The nodes made so far, leaves first, and the pairs of those on top that touch, each with its cost."""

    def __init__(self, features: Tensor, size: Tensor, pairs: Tensor, edges: Tensor, attributes: Tensor) -> None:
        self.leaves, self.device = len(features), features.device
        self.total, self.made = 2 * self.leaves - 1, self.leaves
        self.mass, self.weight = self._grown(features * size[:, None]), self._grown(size)
        self.sums, self.count = self._grown(attributes), self._grown(torch.ones_like(size, dtype=torch.long))
        self.first, self.second = pairs
        self.edges = edges
        self.outline = edges.new_zeros(self.total, edges.shape[1])
        self.outline.index_add_(0, self.first, edges).index_add_(0, self.second, edges)
        self.height = features.new_zeros(self.total)
        self.parent = torch.full((self.total,), -1, dtype=torch.long, device=self.device)
        self.children = torch.full((self.total, 2), -1, dtype=torch.long, device=self.device)
        self.cost = self._distance(self.first, self.second)
        self.rounds: list[Tensor] = []

    def merge(self) -> None:
        """One round: every pair whose two are each other's best becomes a node."""
        if not len(self.first):
            self._touch_two_pieces()
        mutual = self._mutual()
        a, b = self.first[mutual], self.second[mutual]
        new = torch.arange(self.made, self.made + len(a), device=self.device)
        self.made += len(a)
        for table in (self.mass, self.weight, self.sums, self.count, self.outline):
            table[new] = table[a] + table[b]
        self.outline[new] -= 2 * self.edges[mutual]  # the edge between them lies inside now
        self.height[new] = torch.maximum(self.cost[mutual], torch.maximum(self.height[a], self.height[b]))
        self.parent[a], self.parent[b] = new, new
        self.children[new] = torch.stack([a, b], 1)
        self.rounds.append(new)
        self._rename(a, b, new)

    def tree(self) -> Tree:
        """Leaves get ranks such that those of every node follow each other."""
        start = torch.zeros(self.total, dtype=torch.long, device=self.device)
        for new in reversed(self.rounds):
            left, right = self.children[new].unbind(1)
            start[left] = start[new]
            start[right] = start[new] + self.count[left]
        inner = slice(self.leaves, None)
        parent = self.parent[inner]
        return Tree(
            sums=self.sums[inner],
            outline=self.outline[inner],
            height=self.height[inner],
            parent=torch.where(parent < 0, parent, parent - self.leaves),
            first=start[inner],
            leaves=self.count[inner],
            rank=start[: self.leaves],
        )

    def _grown(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(self.total - self.leaves, *rows.shape[1:])])

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Ward's: how much the sum of squares within grows when a and b become one."""
        gap = (self.mass[a] / self.weight[a, None] - self.mass[b] / self.weight[b, None]).square().sum(1)
        return gap * self.weight[a] * self.weight[b] / (self.weight[a] + self.weight[b])

    def _touch_two_pieces(self) -> None:
        roots = torch.nonzero(self.parent[: self.made] < 0)[:2, 0]
        self.first, self.second = roots[:1], roots[1:]
        self.edges = self.edges.new_zeros(1, self.edges.shape[1])
        self.cost = self.height.max().expand(1)

    def _mutual(self) -> Tensor:
        """(E,) bool; of equal costs the first pair is a node's best."""
        ends, cost = (self.first, self.second), self.cost
        order = torch.arange(len(cost), device=self.device)
        best = cost.new_full((self.total,), torch.inf)
        choice = order.new_full((self.total,), len(cost))
        for end in ends:
            best.scatter_reduce_(0, end, cost, "amin")
        for end in ends:
            choice.scatter_reduce_(0, end, torch.where(cost <= best[end], order, len(cost)), "amin")
        return (choice[self.first] == order) & (choice[self.second] == order)

    def _rename(self, a: Tensor, b: Tensor, new: Tensor) -> None:
        """Pairs of nodes that were merged become pairs of what they were merged into; parallel ones become one."""
        to = torch.arange(self.total, device=self.device)
        to[a], to[b] = new, new
        first, second = to[self.first], to[self.second]
        moved = (first != self.first) | (second != self.second)
        outer = first != second
        first, second, moved = first[outer], second[outer], moved[outer]
        key = torch.minimum(first, second) * self.total + torch.maximum(first, second)
        unique, inverse = torch.unique(key, return_inverse=True)
        self.first, self.second = unique // self.total, unique % self.total
        self.edges = self.edges.new_zeros(len(unique), self.edges.shape[1]).index_add_(0, inverse, self.edges[outer])
        stale = torch.zeros(len(unique), dtype=torch.bool, device=self.device)
        stale[inverse[moved]] = True
        cost = self.cost.new_zeros(len(unique))
        cost[inverse] = self.cost[outer]
        cost[stale] = self._distance(self.first[stale], self.second[stale])
        self.cost = cost
