"""Normalised cuts: the second generalised eigenvector of a thresholded patch-affinity graph.

Shapes: B images, N patches, D feature channels, k Lanczos steps.

The graph has weight 1 between patches whose cosine similarity is above tau and EPS elsewhere, W = EPS 11' + (1-EPS) E
with E the 0/1 edges. MaskCut (arXiv 2301.11320, section 3.2) wants the vector of the second smallest eigenvalue of
(D - W) x = lambda D x. With y = D^1/2 x this is the second largest eigenvalue 1 - lambda of M = D^-1/2 W D^-1/2, whose
largest vector D^1/2 1 is known; it is projected out and Lanczos finds the next. A painted patch (one that an earlier
mask took) has no edge: only a vector `free` changes between stages, so E is computed once an image.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5  # weight of an absent edge, as published
COSINE_BINS = 100  # of similarities from -1 to 1
SAMPLED_PATCHES = 256  # of an image, whose pairs tell its similarities


def affinity_edges(feats_BND: Tensor, tau: float) -> Tensor:
    """(B, N, D) features -> (B, N, N) float32 of 0 and 1: 1 where the cosine similarity is > tau (strict)."""
    unit_BND = F.normalize(feats_BND.float(), dim=-1, eps=1e-12)
    return torch.bmm(unit_BND, unit_BND.mT).gt_(tau)


def sample_cosines(feats_BND: Tensor) -> Tensor:
    """(B, N, D) features -> (B, P) cosine similarities of the pairs of different patches among 256 spread evenly."""
    patches = torch.linspace(0, feats_BND.shape[1] - 1, min(SAMPLED_PATCHES, feats_BND.shape[1])).long()
    unit_BMD = F.normalize(feats_BND[:, patches].float(), dim=-1, eps=1e-12)
    first, second = torch.triu_indices(len(patches), len(patches), 1)
    return torch.bmm(unit_BMD, unit_BMD.mT)[:, first, second]


def degrees(edges_BNN: Tensor, free_BN: Tensor) -> Tensor:
    """Row sums of W in float64, (B, N); `free_BN` is float32, 1 for a patch that is not painted."""
    counts_BN = free_BN * torch.bmm(edges_BNN, free_BN[..., None])[..., 0]  # whole numbers: exact in float32
    return edges_BNN.shape[-1] * EPS + (1 - EPS) * counts_BN.double()


def second_eigenvector(
    edges_BNN: Tensor, free_BN: Tensor, *, tolerance: float = 1e-6, max_steps: int = 96
) -> tuple[Tensor, Tensor]:
    """Lanczos with full reorthogonalisation on the whole batch.

    edges_BNN: (B, N, N) float32 of 0 and 1; free_BN: (B, N) float32 of 0 and 1. Stops when the residual of every image
    is below `tolerance` (M has norm 1) or after `max_steps` products.
    Returns x (B, N) float64 with x' D x = 1 and lambda (B,) float64. The sign is canonical: the entry of largest
    modulus is positive. ValueError for fewer than 2 patches.
    """
    batch, n = free_BN.shape
    if n < 2:
        raise ValueError(f"a cut needs at least 2 patches, got {n}")
    scale_BN = degrees(edges_BNN, free_BN).rsqrt()
    trivial_BN = F.normalize(scale_BN.reciprocal(), dim=-1)
    steps = min(max_steps, n - 1)
    basis_BkN = torch.zeros(batch, steps, n, dtype=torch.float64, device=edges_BNN.device)
    diagonal_Bk = torch.full((batch, steps), -2.0, dtype=torch.float64, device=edges_BNN.device)
    offdiagonal_Bk = torch.zeros_like(diagonal_Bk)
    vector_BN = _deflate(_start(free_BN), trivial_BN)
    vector_BN = F.normalize(vector_BN, dim=-1)
    for k in range(steps):
        basis_BkN[:, k] = vector_BN
        product_BN = _deflate(_multiply(edges_BNN, free_BN, scale_BN, vector_BN), trivial_BN)
        alive_B = vector_BN.any(-1)  # a zero vector: the Krylov space was exhausted before
        diagonal_Bk[:, k] = torch.where(alive_B, (product_BN * vector_BN).sum(-1), -2.0)
        vector_BN = _orthogonalise(product_BN, basis_BkN[:, : k + 1])
        norm_B = vector_BN.norm(dim=-1)
        norm_B = torch.where(norm_B > 1e-12, norm_B, 0.0)
        offdiagonal_Bk[:, k] = norm_B
        vector_BN = torch.where(norm_B[:, None] > 0, vector_BN / norm_B.clamp_min(1e-12)[:, None], 0.0)
        if k + 1 == steps or (k % 4 == 3 and k > 4):
            ritz_B, coefficients_Bk = _largest_ritz(diagonal_Bk[:, : k + 1], offdiagonal_Bk[:, :k])
            if bool((norm_B * coefficients_Bk[:, -1].abs() < tolerance).all()):
                break
    y_BN = torch.bmm(coefficients_Bk[:, None], basis_BkN[:, : k + 1])[:, 0]
    return canonical_sign(F.normalize(y_BN, dim=-1) * scale_BN), 1 - ritz_B


def second_eigenvector_dense(edges_BNN: Tensor, free_BN: Tensor) -> tuple[Tensor, Tensor]:
    """The same by LAPACK in float64 on the dense pencil, seconds an image at N = 3600: the oracle of the tests."""
    vectors, values = [], []
    for edges_NN, free_N in zip(edges_BNN, free_BN, strict=True):
        free = free_N.double().cpu().numpy()
        weights = EPS + (1 - EPS) * edges_NN.double().cpu().numpy() * np.outer(free, free)
        degree = np.diag(weights.sum(1))
        value, vector = scipy.linalg.eigh(degree - weights, degree, subset_by_index=[1, 1])
        vectors.append(vector[:, 0])
        values.append(value[0])
    device = edges_BNN.device
    return canonical_sign(torch.as_tensor(np.stack(vectors), device=device)), torch.as_tensor(values, device=device)


def canonical_sign(vectors_BN: Tensor) -> Tensor:
    """The vectors with the sign that makes the entry of largest modulus (the first of equals) positive."""
    peak_B1 = vectors_BN.gather(1, vectors_BN.abs().argmax(1, keepdim=True))
    return torch.where(peak_B1 < 0, -vectors_BN, vectors_BN)


def _start(free_BN: Tensor) -> Tensor:
    """A fixed start vector, constant over the painted patches so that they stay exactly equal in every product."""
    noise_N = np.random.default_rng(0).standard_normal(free_BN.shape[-1])
    return torch.as_tensor(noise_N, device=free_BN.device) * free_BN.double()


def _multiply(edges_BNN: Tensor, free_BN: Tensor, scale_BN: Tensor, vector_BN: Tensor) -> Tensor:
    """M y. The 0/1 edges are exact in float32, only the vector is rounded to it; the rank-one part stays float64."""
    scaled_BN = scale_BN * vector_BN
    edge_part_BN = free_BN * torch.bmm(edges_BNN, (free_BN * scaled_BN.float())[..., None])[..., 0]
    return scale_BN * (EPS * scaled_BN.sum(-1, keepdim=True) + (1 - EPS) * edge_part_BN.double())


def _deflate(vector_BN: Tensor, trivial_BN: Tensor) -> Tensor:
    return vector_BN - (vector_BN * trivial_BN).sum(-1, keepdim=True) * trivial_BN


def _orthogonalise(vector_BN: Tensor, basis_BkN: Tensor) -> Tensor:
    for _ in range(2):  # twice is enough (Kahan)
        overlap_Bk1 = torch.bmm(basis_BkN, vector_BN[..., None])
        vector_BN = vector_BN - torch.bmm(basis_BkN.mT, overlap_Bk1)[..., 0]
    return vector_BN


def _largest_ritz(diagonal_Bk: Tensor, offdiagonal_Bk: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue (B,) and unit eigenvector (B, k) of symmetric tridiagonal matrices."""
    tridiagonal_Bkk = (
        torch.diag_embed(diagonal_Bk) + torch.diag_embed(offdiagonal_Bk, 1) + torch.diag_embed(offdiagonal_Bk, -1)
    )
    values_Bk, vectors_Bkk = torch.linalg.eigh(tridiagonal_Bkk)
    return values_Bk[:, -1], vectors_Bkk[..., -1]
