"""Gaussian filtering of scattered points by a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010).

Splat the points' values on the vertices of the simplices around them, blur along the d+1 lattice directions, slice the
values back at the points. Linear in the points and in d, where a full Gaussian is quadratic in the points. A vertex
that no point touches does not exist: the blur reads 0 there and does not create it.

Splat, blur and slice are one primitive, a weighted sum of table rows, so one code serves CPU and GPU. The lattices of
several clouds of points (photos) are one lattice, in which no vertex of one is that of another, or its neighbour.

Names end in their shape: P points, D = d+1 lattice coordinates (and vertices of a simplex), V vertices, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from workers import devices

MAX_ELEVATED = 2**20  # above, float32 has less than 3 bits left for the position inside a cell


@dataclass(frozen=True, slots=True)
class Lattice:
    """A filter over P points. Row V of the vertex table stands for every absent vertex and is always 0."""

    splat_points: Tensor  # (P*D,) int32, points grouped by the vertex they touch
    splat_starts: Tensor  # (V+2,) int32, where the group of each vertex begins; group V is empty
    splat_weights: Tensor  # (P*D,) float32
    slice_vertices_PD: Tensor  # int32
    slice_weights_PD: Tensor  # float32
    neighbours_DV2: Tensor  # int32, (D, V+1, 2), the two neighbours of each vertex in each direction, V where absent

    def filter(self, values_PC: Tensor, table: torch.dtype = torch.float32) -> Tensor:
        """(P, C) float32 -> (P, C) of the dtype of the `table` of vertices, the kernel matrix times the values; weights
        of a point sum to about 1. A table of float16 takes two thirds of the time."""
        table_VC = embedding_bag(
            self.splat_points,
            values_PC,
            self.splat_starts,
            mode="sum",
            per_sample_weights=self.splat_weights,
            include_last_offset=True,
        )
        table_VC = table_VC.to(table)
        for neighbours_V2 in self.neighbours_DV2:
            table_VC.add_(embedding_bag(neighbours_V2, table_VC, mode="sum"), alpha=0.5)
        weights_PD = self.slice_weights_PD.to(table)
        return embedding_bag(self.slice_vertices_PD, table_VC, mode="sum", per_sample_weights=weights_PD)

    def normalised(self, gain: float) -> Lattice:
        """The filter `gain * n K n` with n = 1 / sqrt(K 1 + 1e-20) (symmetric normalisation), at no cost a call."""
        ones_P1 = torch.ones(len(self.slice_weights_PD), 1, device=self.slice_weights_PD.device)
        scale_P1 = 1 / torch.sqrt(self.filter(ones_P1) + 1e-20)
        return replace(
            self,
            splat_weights=self.splat_weights * scale_P1[:, 0][self.splat_points],
            slice_weights_PD=self.slice_weights_PD * (gain * scale_P1),
        )


def build_lattice(features_dP: Tensor, clouds: Sequence[int] | None = None) -> Lattice:
    """The lattice of P points with d features each, in units of the Gaussian's standard deviation.

    `features_dP`: (d, P) float32, finite, d and P at least 1; the lattice lies on its device. `clouds`: how many points
    each cloud has, which are filtered as if alone and lie one after the other; None: all are one cloud.
    Raises ValueError when the features spread so far that float32 cannot place a point inside a cell (about 2^20
    lattice units, some 10^5 standard deviations), or when P (d+1) does not fit in an int32.
    """
    d, points = features_dP.shape
    if points * (d + 1) >= 2**31:
        raise ValueError(f"{points} points in {d} dimensions are too many for one lattice: use a smaller image")
    cells_DP, ranks_DP, weights_PD = _enclosing_simplices(features_dP)
    strides_D, cloud_stride = _code_strides(cells_DP, len(clouds or [points]))
    codes_PD = _vertex_codes(cells_DP, ranks_DP, strides_D)
    if clouds is not None and len(clouds) > 1:
        codes_PD += (_cloud_numbers(clouds, points, codes_PD) * cloud_stride)[:, None]
    codes, order = codes_PD.flatten().sort(stable=True)

    first = torch.ones_like(codes, dtype=torch.bool)
    torch.ne(codes[1:], codes[:-1], out=first[1:])
    starts = first.nonzero().squeeze(1)
    rows = first.cumsum(0, dtype=torch.int32) - 1
    return Lattice(
        splat_points=(order // (d + 1)).int(),
        splat_starts=torch.cat([starts, starts.new_full((2,), len(order))]).int(),
        splat_weights=weights_PD.flatten().index_select(0, order),
        slice_vertices_PD=torch.empty_like(rows).scatter_(0, order, rows).view(points, d + 1),
        slice_weights_PD=weights_PD / (1 + 2**-d),
        neighbours_DV2=_neighbours(codes[starts], order[starts] % (d + 1), strides_D),
    )


def _elevate(features_dP: Tensor) -> Tensor:
    """Features in the plane of d+1 coordinates that sum to 0, scaled so that the blur's variance is 1 (section 3.1)."""
    d, points = features_dP.shape
    elevated_DP = features_dP.new_empty(d + 1, points)
    total_P = features_dP.new_zeros(points)
    # Grey levels are whole numbers, so many points lie on a face between cells: the factor is rounded to float32 here,
    # as in the published programs, for them to fall on the same side.
    unit = torch.tensor(math.sqrt(2 / 3) * (d + 1)).item()
    for axis in range(d, 0, -1):
        scaled_P = features_dP[axis - 1] * (unit / math.sqrt(axis * (axis + 1)))
        # Product and difference stay two operations: fused, they round differently and move points across faces.
        elevated_DP[axis] = total_P - scaled_P * axis
        total_P = total_P + scaled_P
    elevated_DP[0] = total_P
    return elevated_DP


def _enclosing_simplices(features_dP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex round every point: its remainder-0 vertex divided by d+1, the ranks, the barycentric weights.

    Returns float32 whole numbers (D, P), int64 permutations (D, P) and float32 weights (P, D), vertex 0 first.
    """
    elevated_DP = _elevate(features_dP)
    size, points = elevated_DP.shape
    if not elevated_DP.abs().max().item() < MAX_ELEVATED:
        raise ValueError("the points spread too far for float32: use larger standard deviations or a smaller image")
    cells_DP = torch.round(elevated_DP * (1 / size))
    offsets_DP = elevated_DP - cells_DP * size
    ranks_DP = torch.zeros(size, points, dtype=torch.int8, device=elevated_DP.device)
    for i in range(size - 1):
        for j in range(i + 1, size):
            less_P = offsets_DP[i] < offsets_DP[j]
            ranks_DP[i] += less_P
            ranks_DP[j] += ~less_P

    ranks_DP += cells_DP.sum(0).to(torch.int8)
    shift_DP = (ranks_DP < 0).to(torch.int8) - (ranks_DP >= size).to(torch.int8)
    ranks_DP += shift_DP * size
    cells_DP += shift_DP

    ranks = ranks_DP.long()
    offsets_DP = (elevated_DP - cells_DP * size) * (1 / size)
    descending_DP = torch.empty_like(offsets_DP).scatter_(0, ranks, offsets_DP)
    weights_PD = elevated_DP.new_empty(points, size)
    weights_PD[:, 0] = descending_DP[-1] + (1 - descending_DP[0])
    weights_PD[:, 1:] = (descending_DP[:-1] - descending_DP[1:]).flip(0).t()
    return cells_DP, ranks, weights_PD


def _cloud_numbers(clouds: Sequence[int], points: int, codes_PD: Tensor) -> Tensor:
    """(P,) the number of each point's cloud, of the codes' dtype and device."""
    counts = torch.tensor(clouds, device=codes_PD.device)
    numbers = torch.arange(len(clouds), dtype=codes_PD.dtype, device=codes_PD.device)
    return numbers.repeat_interleave(counts, output_size=points)


def _code_strides(cells_DP: Tensor, clouds: int) -> tuple[Tensor, int]:
    """(D,) factors that turn the lattice coordinates of a vertex into one integer, int32 if that suffices, else int64;
    and what one cloud's codes lie apart from the next one's.

    A vertex of remainder r has coordinates (d+1) m + r; its code is r + sum(m * stride), so that a step in the lattice
    adds a constant. The last coordinate follows from the others and has stride 0. Mixed radix, hence unique (also when
    it wraps round), while the product of the ranges fits; else a polynomial hash modulo 2^64, for which two of V
    vertices collide with a chance of about V^2 / 2^64.
    """
    lowest, highest = torch.stack(torch.aminmax(cells_DP[:-1], dim=1)).long().tolist()
    strides, product = [], len(cells_DP)
    for low, high in zip(lowest, highest, strict=True):
        strides.append(product)
        product *= high - low + 3  # vertices reach one cell below; no neighbour may be taken for a vertex
    strides.append(product)
    product *= clouds
    if product >= 2**62:
        strides = [pow(0x9E3779B97F4A7C15, axis + 1, 2**63) for axis in range(len(strides))]
    dtype = torch.int32 if product <= 2**32 else torch.int64
    if dtype == torch.int32:
        strides = [_wrapped(stride) for stride in strides]
    return torch.tensor([*strides[:-1], 0], dtype=dtype, device=cells_DP.device), strides[-1]


def _wrapped(number: int) -> int:
    """As an int32 holds it, modulo 2^32."""
    return (number + 2**31) % 2**32 - 2**31


def _vertex_codes(cells_DP: Tensor, ranks_DP: Tensor, strides_D: Tensor) -> Tensor:
    """(P, D) codes of the simplices' vertices. Vertex r is r in all coordinates, less d+1 in the r of top rank."""
    size, points = ranks_DP.shape
    ranked_DP = torch.empty(size, points, dtype=strides_D.dtype, device=strides_D.device)
    ranked_DP.scatter_(0, ranks_DP, strides_D[:, None].expand(size, points))
    codes_PD = torch.empty(points, size, dtype=strides_D.dtype, device=strides_D.device)
    code_P = torch.zeros_like(ranked_DP[0])
    for cells_P, stride in zip(cells_DP, strides_D, strict=True):
        code_P += cells_P.to(strides_D.dtype) * stride
    codes_PD[:, 0] = code_P
    for remainder in range(1, size):
        code_P = code_P + 1 - ranked_DP[size - remainder]
        codes_PD[:, remainder] = code_P
    return codes_PD


def _neighbours(codes_V: Tensor, remainders_V: Tensor, strides_D: Tensor) -> Tensor:
    """(D, V+1, 2) int32 rows of the vertices one step down and up each direction; V where there is none, and in row V.

    One step down direction j takes 1 from every coordinate and gives d+1 to coordinate j.
    """
    vertices, size = len(codes_V), len(strides_D)
    rows_V = torch.arange(vertices, dtype=torch.int32, device=codes_V.device)
    neighbours_DV2 = rows_V.new_full((size, vertices + 1, 2), vertices)
    wrapped = size - 1 - strides_D.sum(dtype=strides_D.dtype)
    one_less_V = codes_V + torch.where(remainders_V == 0, wrapped, -1).to(codes_V.dtype)
    find = _rows_by_search if devices.many_threads(codes_V) else _rows_by_hash
    place_DV = find(codes_V, (one_less_V + strides_D[:, None]).flatten()).view(size, vertices)
    neighbours_DV2[:, :vertices, 0] = place_DV
    neighbours_DV2[:, :, 1].scatter_(1, place_DV.long(), rows_V.expand(size, vertices))
    neighbours_DV2[:, vertices] = vertices
    return neighbours_DV2


def _rows_by_search(codes_V: Tensor, wanted_N: Tensor) -> Tensor:
    """As `_rows_by_hash`, by binary search of the codes, which are sorted; without a word to the host."""
    found_N = torch.searchsorted(codes_V, wanted_N, out_int32=True)
    hit_N = codes_V.index_select(0, found_N.clamp(max=len(codes_V) - 1)) == wanted_N
    return torch.where(hit_N, found_N, len(codes_V))


def _rows_by_hash(codes_V: Tensor, wanted_N: Tensor) -> Tensor:
    """(V,) different codes, (N,) codes -> (N,) int32 rows, V where no row has the code."""
    return _RowsByCode(codes_V).find(wanted_N)


class _RowsByCode:
    """The row of each code: hash tables with room for one row a slot, where a row that lost its slot is in the next.

    Tables are small enough that most look-ups stay in a cache, which a binary search of all codes does not.
    """

    MULTIPLIERS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)  # odd, of well mixed bits

    def __init__(self, codes_V: Tensor) -> None:
        """`codes_V`: int32 or int64, all different."""
        self._codes_V = codes_V
        self._tables: list[Tensor] = []
        left = torch.arange(len(codes_V), dtype=torch.int32, device=codes_V.device)
        while len(left):
            codes = codes_V.index_select(0, left)
            table = left.new_full((1 << max(4, (4 * len(left) - 1).bit_length()),), -1)
            slots = self._slots(codes, len(self._tables), len(table))
            table[slots] = left
            self._tables.append(table)
            left = left[table.index_select(0, slots) != left]

    def find(self, wanted_N: Tensor) -> Tensor:
        """(N,) codes -> (N,) int32 rows, V where no row has the code."""
        vertices = len(self._codes_V)
        found_N = torch.full_like(wanted_N, vertices, dtype=torch.int32)
        left: Tensor | None = None  # places of codes whose slot another row has; None: all
        for number, table in enumerate(self._tables):
            wanted = wanted_N if left is None else wanted_N.index_select(0, left)
            rows = table.index_select(0, self._slots(wanted, number, len(table)))
            taken = rows >= 0  # an empty slot: no row of this or a later table has the code
            hit = taken & (self._codes_V.index_select(0, rows.clamp(min=0)) == wanted)
            if left is None:
                found_N = torch.where(hit, rows, found_N)
            else:
                found_N[left[hit]] = rows[hit]
            missed = (taken & ~hit).nonzero().squeeze(1)
            left = missed if left is None else left.index_select(0, missed)
        return found_N

    def _slots(self, codes: Tensor, number: int, size: int) -> Tensor:
        """Multiplicative hashing: the upper bits of a product, another one in each table."""
        factor, bits = self.MULTIPLIERS[number % 4] + 2 * (number // 4), size.bit_length() - 1
        if codes.dtype == torch.int64:
            return (codes * (factor << 20 | 0x1D872B41) >> (64 - bits)) & (size - 1)
        return (codes * _wrapped(factor) >> (32 - bits)) & (size - 1)
