"""The iterative eigenvector against LAPACK on small graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.ncut import (
    _largest_ritz,
    _largest_ritz_by_squaring,
    affinity_edges,
    canonical_sign,
    degrees,
    second_eigenvector,
    second_eigenvector_dense,
    second_eigenvector_unasked,
)


def features(batch: int, patches: int, seed: int, parts: int = 3) -> torch.Tensor:
    """Patches that belong to a few noisy directions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, parts, 16, generator=generator)
    member = torch.randint(parts, (batch, patches), generator=generator)
    noise = torch.randn(batch, patches, 16, generator=generator)
    return centres.gather(1, member[..., None].expand(-1, -1, 16)) + 0.9 * noise


@pytest.mark.parametrize("patches", [2, 3, 5, 40, 144])
def test_iterative_equals_dense(patches: int) -> None:
    edges = affinity_edges(features(4, patches, seed=patches), 0.15)
    free = torch.ones(4, patches)
    free[1:, : patches // 3] = 0
    vectors, values = second_eigenvector(edges, free, tolerance=1e-9)
    expected, expected_values = second_eigenvector_dense(edges, free)
    torch.testing.assert_close(values, expected_values, rtol=1e-4, atol=1e-6)
    weight = degrees(edges, free)
    norm = (weight * vectors.square()).sum(-1)
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-6, atol=1e-9)
    if patches >= 40:  # smaller graphs have ties, where the vector is arbitrary
        cosine = (weight * vectors * expected).sum(-1).abs()
        assert cosine.min() > 1 - 1e-6


@pytest.mark.parametrize("patches", [2, 3, 5, 40, 144])
def test_the_solver_that_asks_nothing_equals_the_one_that_looks(patches: int) -> None:
    edges = affinity_edges(features(4, patches, seed=patches), 0.15)
    free = torch.ones(4, patches)
    free[1:, : patches // 3] = 0
    free[3] = 0  # all is painted: no vector, and no accident
    vectors, residuals = second_eigenvector_unasked(edges, free, steps=96)
    expected, _ = second_eigenvector(edges, free, tolerance=1e-9)
    assert residuals.max() < 1e-6 and not vectors[3].any()
    if patches >= 40:
        torch.testing.assert_close(vectors, expected, rtol=1e-3, atol=1e-7)


def test_too_few_steps_leave_a_residual() -> None:
    edges = affinity_edges(features(1, 144, seed=0), 0.15)
    _, residual = second_eigenvector_unasked(edges, torch.ones(1, 144), steps=4)
    assert residual > 1e-3


def test_the_largest_eigenvector_by_squaring_is_that_of_eigh() -> None:
    generator = torch.Generator().manual_seed(0)
    diagonal, beside = (torch.rand(5, k, generator=generator, dtype=torch.float64) / 3 for k in (24, 23))
    diagonal[0, -1], beside[1:3] = -2, beside[1:3] * 1e-6  # an exhausted space, and eigenvalues that lie close
    _, expected = _largest_ritz(diagonal, beside)
    found = _largest_ritz_by_squaring(diagonal, beside)
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(5).double(), rtol=0, atol=1e-9)


def test_an_image_gives_the_same_vector_alone_and_in_a_batch() -> None:
    edges = affinity_edges(features(3, 60, seed=1), 0.15)
    free = torch.ones(3, 60)
    together, _ = second_eigenvector(edges, free)
    alone, _ = second_eigenvector(edges[1:2], free[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-6)


def test_painted_patches_are_exactly_equal() -> None:
    """The phantom block of painted patches ties, and the first index must win: rounding must not pick another."""
    edges = affinity_edges(features(1, 60, seed=2), 0.15)
    free = torch.ones(1, 60)
    free[0, 10:25] = 0
    vector = second_eigenvector(edges, free)[0][0]
    assert vector[10:25].unique().numel() == 1


def test_edges_are_strict_and_features_without_length_have_none() -> None:
    feats = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]]])
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert affinity_edges(feats, 0.5)[0].int().tolist() == expected
    unit = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert affinity_edges(unit, 0.0)[0].int().tolist() == [[1, 0], [0, 1]]  # cosine 0 is not above 0


def test_sign_is_that_of_the_first_peak() -> None:
    vectors = torch.tensor([[1.0, -3.0, 3.0], [2.0, -1.0, 0.0]], dtype=torch.float64)
    assert canonical_sign(vectors).tolist() == [[-1.0, 3.0, -3.0], [2.0, -1.0, 0.0]]


def test_one_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 patches, got 1"):
        second_eigenvector(torch.ones(1, 1, 1), torch.ones(1, 1))


def test_dense_solver_equals_numpy_on_the_normalised_matrix() -> None:
    edges = affinity_edges(features(1, 30, seed=4), 0.15)
    weights = 1e-5 + (1 - 1e-5) * edges[0].double().numpy()
    scale = 1 / np.sqrt(weights.sum(1))
    spectrum = np.linalg.eigvalsh(scale[:, None] * weights * scale)
    _, values = second_eigenvector_dense(edges, torch.ones(1, 30))
    assert values.item() == pytest.approx(1 - spectrum[-2], abs=1e-9)
