"""Purity and normalised mutual information by hand, and their properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.metrics.clusters import cluster_quality, joint_counts, normalized_mutual_information, purity


def test_purity_and_nmi_by_hand() -> None:
    found = cluster_quality([5, 5, 5, 2, 2, 2], [1, 1, 9, 9, 9, 9])
    assert (found.items, found.clusters, found.classes) == (6, 2, 2)
    assert found.purity == pytest.approx(5 / 6)
    # Entropies: clusters (1/2, 1/2) 0.6931, classes (1/3, 2/3) 0.6365, both together (1/3, 1/6, 1/2) 1.0114 nats.
    assert found.nmi == pytest.approx(2 * (0.6931 + 0.6365 - 1.0114) / (0.6931 + 0.6365), abs=1e-4)


def test_clusters_that_are_the_classes_under_other_names_are_perfect() -> None:
    found = cluster_quality([7, 7, 0, 3], [1, 1, 2, 5])
    assert found.purity == found.nmi == pytest.approx(1.0)
    assert found.purity_by_chance < 1


def test_a_cluster_an_item_is_pure_and_so_it_is_by_chance() -> None:
    found = cluster_quality(range(6), [1, 1, 1, 2, 2, 2])
    assert (found.purity, found.purity_by_chance) == (1.0, 1.0)
    expected = 2 * math.log(2) / (math.log(2) + math.log(6))
    assert (found.nmi, found.nmi_by_chance) == pytest.approx((expected, expected))


def test_one_cluster_has_the_share_of_the_commonest_class_and_tells_nothing() -> None:
    found = cluster_quality([4] * 4, [1, 2, 2, 2])
    assert (found.purity, found.purity_by_chance, found.nmi, found.nmi_by_chance) == (0.75, 0.75, 0.0, 0.0)
    assert cluster_quality([4], [1]).nmi == 1.0


def test_chance_is_seeded_and_near_its_expectation() -> None:
    rng = np.random.default_rng(3)
    clusters, classes = rng.integers(0, 10, 2000), rng.integers(0, 4, 2000)
    found = cluster_quality(clusters, classes)
    assert found == cluster_quality(clusters, classes)
    assert found != cluster_quality(clusters, classes, seed=1)
    assert found.purity == pytest.approx(found.purity_by_chance, abs=0.01)
    assert found.nmi == pytest.approx(found.nmi_by_chance, abs=0.01)
    # Two pairs of equals in two clusters of two: together in one of three ways (purity 1), else apart (1/2).
    assert cluster_quality([1, 1, 2, 2], [1, 1, 2, 2], shuffles=400).purity_by_chance == pytest.approx(2 / 3, abs=0.03)


def test_no_item_has_no_quality() -> None:
    found = cluster_quality([], [])
    assert (found.items, found.clusters) == (0, 0)
    assert math.isnan(found.purity)
    assert math.isnan(found.nmi_by_chance)
    with pytest.raises(ValueError, match="of the same items"):
        cluster_quality([1], [1, 2])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40))
def test_measures_lie_in_their_range_and_nmi_is_symmetric(items: list[tuple[int, int]]) -> None:
    clusters, classes = (np.array(ids) for ids in zip(*items, strict=True))
    counts = joint_counts(clusters, classes)
    assert counts.sum() == len(items)
    assert 1 / counts.shape[1] <= purity(counts) <= 1
    nmi = normalized_mutual_information(counts)
    assert 0 <= nmi <= 1 + 1e-12
    assert nmi == pytest.approx(normalized_mutual_information(counts.T), abs=1e-12)
