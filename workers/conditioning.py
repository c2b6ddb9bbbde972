"""Features made comparable before they are clustered: less the mean, in few directions, evenly scaled.

A layer of a transformer has a few directions that are stronger than all others together and say little of what a patch
shows. A conditioning is fitted to a sample and applied to rows: the same numbers whatever the number of workers.

Shapes: N rows, D channels, d components.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS_A_COMPONENT = 8  # fewer rows than that tell no more components apart
RIDGE = 0.01  # of the mean eigenvalue, so that a direction without nuisance is not everything


@dataclass(frozen=True, slots=True)
class Conditioning:
    """`mean` (D,) float32; `directions` (D, d) float32, a component each, scaled."""

    mean: NDArray[np.float32]
    directions: NDArray[np.float32]

    def __call__(self, rows_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """(N, D) -> (N, d) float32 of unit norm. A row like the mean becomes zeros. ValueError for another D."""
        if rows_ND.shape[1] != len(self.mean):
            raise ValueError(f"the rows have {rows_ND.shape[1]} values, the conditioning {len(self.mean)}")
        return unit_rows((rows_ND - self.mean) @ self.directions)

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, mean=self.mean, directions=self.directions)
        return stream.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Conditioning:
        with np.load(io.BytesIO(data), allow_pickle=False) as saved:
            return Conditioning(saved["mean"], saved["directions"])


class Moments:
    """Count, sum and products of rows, in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._sum = np.zeros(dim)
        self._products = np.zeros((dim, dim))

    def add(self, rows_ND: NDArray[np.floating]) -> None:
        rows = rows_ND.astype(np.float64)
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._products += rows.T @ rows

    @property
    def mean(self) -> NDArray[np.float64]:
        return self._sum / max(1, self.count)

    @property
    def power(self) -> NDArray[np.float64]:
        """(D, D) mean product of two channels, with the mean left in: the covariance of differences, twice."""
        return self._products / max(1, self.count)

    @property
    def covariance(self) -> NDArray[np.float64]:
        return self.power - np.outer(self.mean, self.mean)


def whitening(moments: Moments, components: int, power: float) -> Conditioning:
    """Principal components, each scaled by its standard deviation to the power of `-power`: 0 leaves them as they are,
    1 makes all equally strong.

    Of few rows only an eighth as many components are kept; those that are missing are zeros, so that the width is
    always `components`.
    """
    values, vectors = np.linalg.eigh(moments.covariance)
    kept = min(components, len(values), moments.count // ROWS_A_COMPONENT)
    values, vectors = values[::-1][:kept], _canonical(vectors[:, ::-1][:, :kept])
    strong = values > max(1e-12, 1e-9 * values.max(initial=0))
    scale = np.where(strong, np.where(strong, values, 1) ** (-power / 2), 0)
    directions = np.zeros((len(vectors), components))
    directions[:, :kept] = vectors * scale
    return Conditioning(moments.mean.astype(np.float32), directions.astype(np.float32))


def signal_over_nuisance(moments: Moments, nuisances: Sequence[Moments], components: int) -> Conditioning:
    """The directions in which rows vary most against what should not matter, scaled so that the latter is white.

    `nuisances`: differences of rows that show the same, such as neighbours or two views; each kind counts alike. These
    are the generalised eigenvectors of the covariance of the rows against theirs.
    """
    import scipy.linalg  # which a look at a run need not wait for

    dim = len(moments.mean)
    noise = sum((_of_mean_one(each.power) for each in nuisances), np.zeros((dim, dim)))
    noise = _of_mean_one(noise) + RIDGE * np.eye(dim)
    kept = min(components, dim)
    vectors = scipy.linalg.eigh(_of_mean_one(moments.covariance), noise, subset_by_index=[dim - kept, dim - 1])[1]
    return Conditioning(moments.mean.astype(np.float32), _canonical(vectors[:, ::-1]).astype(np.float32))


def principal_axes(moments: Moments, count: int) -> NDArray[np.float32]:
    """(D, min(count, D)) float32 orthonormal columns, along which rows are largest on average; the mean is left in."""
    vectors = np.linalg.eigh(moments.power)[1]
    return _canonical(vectors[:, ::-1][:, :count]).astype(np.float32)


def unit_rows(rows_ND: NDArray[np.floating]) -> NDArray[np.float32]:
    """(N, D) -> (N, D) float32 of unit norm; a row of zeros stays zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND, dtype=np.float64))
    return (rows_ND / np.where(norms > 0, norms, 1)[:, None]).astype(np.float32)


def _of_mean_one(matrix_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scaled so that the mean of its eigenvalues is 1; zeros stay zeros."""
    mean = np.trace(matrix_DD) / len(matrix_DD)
    return matrix_DD / mean if mean > 0 else matrix_DD


def _canonical(vectors_Dd: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns with the sign that makes the entry of largest modulus positive."""
    peaks = np.take_along_axis(vectors_Dd, np.abs(vectors_Dd).argmax(0)[None], 0)
    return np.where(peaks < 0, -vectors_Dd, vectors_Dd)
