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
TOLERANCE = 1e-6  # of an eigenvector's residual
MAX_STEPS = 96  # of Lanczos; most photos need 12 to 24
SQUARINGS = 40  # of a matrix, for its power of 2^40
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
    edges_BNN: Tensor, free_BN: Tensor, *, tolerance: float = TOLERANCE, max_steps: int = MAX_STEPS
) -> tuple[Tensor, Tensor]:
    """Lanczos with full reorthogonalisation on the whole batch.

    edges_BNN: (B, N, N) float32 of 0 and 1; free_BN: (B, N) float32 of 0 and 1. Stops when the residual of every image
    is below `tolerance` (M has norm 1) or after `max_steps` products.
    Returns x (B, N) float64 with x' D x = 1 and lambda (B,) float64. The sign is canonical: the entry of largest
    modulus is positive. ValueError for fewer than 2 patches.
    """
    lanczos = _Lanczos(edges_BNN, free_BN, max_steps)
    for k in range(lanczos.steps):
        lanczos.step(k)
        if k + 1 == lanczos.steps or (k % 4 == 3 and k > 4):
            ritz_B, coefficients_Bk = _largest_ritz(*lanczos.tridiagonal(k))
            if bool((lanczos.residual(coefficients_Bk) < tolerance).all()):
                break
    return lanczos.vector(coefficients_Bk), 1 - ritz_B


def second_eigenvector_unasked(edges_BNN: Tensor, free_BN: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """As `second_eigenvector`, by so many steps, without a question to the device on the way.

    Returns x (B, N) float64 and its residual (B,) float64: where that is `TOLERANCE` or more, more steps are needed.
    """
    lanczos = _Lanczos(edges_BNN, free_BN, steps)
    for k in range(lanczos.steps):
        lanczos.step(k)
    coefficients_Bk = _largest_ritz_by_squaring(*lanczos.tridiagonal(k))
    return lanczos.vector(coefficients_Bk), lanczos.residual(coefficients_Bk)


class _Lanczos:
    """The Krylov basis of M without its largest vector, and M in it: a tridiagonal matrix."""

    def __init__(self, edges_BNN: Tensor, free_BN: Tensor, max_steps: int) -> None:
        batch, n = free_BN.shape
        if n < 2:
            raise ValueError(f"a cut needs at least 2 patches, got {n}")
        self.steps = min(max_steps, n - 1)
        self._edges_BNN, self._free_BN = edges_BNN, free_BN
        self._scale_BN = degrees(edges_BNN, free_BN).rsqrt()
        self._trivial_BN = F.normalize(self._scale_BN.reciprocal(), dim=-1)
        self._basis_BkN = torch.zeros(batch, self.steps, n, dtype=torch.float64, device=edges_BNN.device)
        self._diagonal_Bk = self._basis_BkN.new_full((batch, self.steps), -2.0)
        self._offdiagonal_Bk = torch.zeros_like(self._diagonal_Bk)
        self._vector_BN = F.normalize(_deflate(_start(free_BN), self._trivial_BN), dim=-1)

    def step(self, k: int) -> None:
        """Product number k, from 0."""
        vector_BN = self._vector_BN
        self._basis_BkN[:, k] = vector_BN
        product_BN = _multiply(self._edges_BNN, self._free_BN, self._scale_BN, vector_BN)
        product_BN = _deflate(product_BN, self._trivial_BN)
        alive_B = vector_BN.any(-1)  # a zero vector: the Krylov space was exhausted before
        self._diagonal_Bk[:, k] = torch.where(alive_B, (product_BN * vector_BN).sum(-1), -2.0)
        vector_BN = _orthogonalise(product_BN, self._basis_BkN[:, : k + 1])
        norm_B = vector_BN.norm(dim=-1)
        self._norm_B = torch.where(norm_B > 1e-12, norm_B, 0.0)
        self._offdiagonal_Bk[:, k] = self._norm_B
        unit_BN = vector_BN / self._norm_B.clamp_min(1e-12)[:, None]
        self._vector_BN = torch.where(self._norm_B[:, None] > 0, unit_BN, 0.0)

    def tridiagonal(self, k: int) -> tuple[Tensor, Tensor]:
        """Diagonal (B, k+1) and off-diagonal (B, k) after product number k."""
        return self._diagonal_Bk[:, : k + 1], self._offdiagonal_Bk[:, :k]

    def residual(self, coefficients_Bk: Tensor) -> Tensor:
        """(B,) of the last product's Ritz vectors, where M has norm 1."""
        return self._norm_B * coefficients_Bk[:, -1].abs()

    def vector(self, coefficients_Bk: Tensor) -> Tensor:
        """(B, k) Ritz vectors in the basis -> x (B, N), with its canonical sign."""
        basis_BkN = self._basis_BkN[:, : coefficients_Bk.shape[1]]
        y_BN = torch.bmm(coefficients_Bk[:, None], basis_BkN)[:, 0]
        return canonical_sign(F.normalize(y_BN, dim=-1) * self._scale_BN)


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
    return torch.from_numpy(noise_N).to(free_BN.device, non_blocking=True) * free_BN.double()


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


def _tridiagonal(diagonal_Bk: Tensor, offdiagonal_Bk: Tensor) -> Tensor:
    """(B, k), (B, k-1) -> symmetric (B, k, k)."""
    sides_Bkk = torch.diag_embed(offdiagonal_Bk, 1) + torch.diag_embed(offdiagonal_Bk, -1)
    return torch.diag_embed(diagonal_Bk) + sides_Bkk


def _largest_ritz(diagonal_Bk: Tensor, offdiagonal_Bk: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue (B,) and unit eigenvector (B, k) of symmetric tridiagonal matrices."""
    values_Bk, vectors_Bkk = torch.linalg.eigh(_tridiagonal(diagonal_Bk, offdiagonal_Bk))
    return values_Bk[:, -1], vectors_Bkk[..., -1]


def _largest_ritz_by_squaring(diagonal_Bk: Tensor, offdiagonal_Bk: Tensor) -> Tensor:
    """The eigenvector of `_largest_ritz` by powers of the matrix: on a device, `eigh` waits for it.

    Of eigenvalues in [-2, 1] the largest is told from the next where they are 1e-10 apart or more.
    """
    power_Bkk = _tridiagonal(diagonal_Bk, offdiagonal_Bk)
    power_Bkk.diagonal(dim1=1, dim2=2).add_(2)
    for _ in range(SQUARINGS):
        power_Bkk = torch.bmm(power_Bkk, power_Bkk)
        power_Bkk = power_Bkk / power_Bkk.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)[:, None, None]
    longest_B = power_Bkk.diagonal(dim1=1, dim2=2).argmax(1)
    chosen_B1k = longest_B[:, None, None].expand(-1, 1, power_Bkk.shape[2])
    return F.normalize(power_Bkk.gather(1, chosen_B1k)[:, 0], dim=-1, eps=1e-300)
