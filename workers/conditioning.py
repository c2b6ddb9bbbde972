"""Features made comparable before they are clustered: less the mean, in their strongest directions, evenly scaled.

A layer of a transformer has a few directions that are as strong as all others together and say little of what a patch
shows. Fitted to a sample, applied to rows: the same numbers whatever the number of workers.

Shapes: N rows, D channels, d components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS_A_COMPONENT = 8  # fewer rows than that tell no more components apart


@dataclass(frozen=True, slots=True)
class Conditioning:
    """`mean` (D,) float32 of unit rows; `directions` (D, d) float32, a component each, scaled."""

    mean: NDArray[np.float32]
    directions: NDArray[np.float32]

    @property
    def dim(self) -> int:
        return self.directions.shape[1]

    def __call__(self, rows_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """(N, D) -> (N, d) float32 of unit norm. A row like the mean becomes zeros. ValueError for another D."""
        if rows_ND.shape[1] != len(self.mean):
            raise ValueError(f"the rows have {rows_ND.shape[1]} values, the conditioning {len(self.mean)}")
        return unit_rows((unit_rows(rows_ND) - self.mean) @ self.directions)


class Moments:
    """The sums that a conditioning is fitted to, row by row, in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._sum = np.zeros(dim)
        self._products = np.zeros((dim, dim))

    def add(self, rows_ND: NDArray[np.floating]) -> None:
        """Rows are taken as of unit norm."""
        unit = unit_rows(rows_ND).astype(np.float64)
        self.count += len(unit)
        self._sum += unit.sum(0)
        self._products += unit.T @ unit

    def whitening(self, components: int, power: float) -> Conditioning:
        """Principal components, each scaled by its standard deviation to the power of `-power`: 0 leaves them, 1 makes
        all equally strong.

        Of few rows only an eighth as many components are kept; those that are missing are zeros, so that the width is
        always `components`.
        """
        count = max(1, self.count)
        mean = self._sum / count
        values, vectors = np.linalg.eigh(self._products / count - np.outer(mean, mean))
        kept = min(components, len(values), self.count // ROWS_A_COMPONENT)
        values, vectors = values[::-1][:kept], canonical(vectors[:, ::-1][:, :kept])
        strong = values > max(1e-12, 1e-9 * values.max(initial=0))
        scale = np.where(strong, np.where(strong, values, 1) ** (-power / 2), 0)
        directions = np.zeros((len(mean), components))
        directions[:, :kept] = vectors * scale
        return Conditioning(mean.astype(np.float32), directions.astype(np.float32))


def canonical(vectors_Dd: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns with the sign that makes the entry of largest modulus positive."""
    peaks = np.take_along_axis(vectors_Dd, np.abs(vectors_Dd).argmax(0)[None], 0)
    return np.where(peaks < 0, -vectors_Dd, vectors_Dd)


def unit_rows(rows_ND: NDArray[np.floating]) -> NDArray[np.float32]:
    """(N, D) -> (N, D) float32 of unit norm; a row of zeros stays zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND, dtype=np.float64))
    return (rows_ND / np.where(norms > 0, norms, 1)[:, None]).astype(np.float32)
