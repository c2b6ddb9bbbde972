"""MaskCut: several objects of one image by iterated normalised cuts (CutLER, arXiv 2301.11320, section 3.2).

Works on any features of any patch grid. What the published program leaves to chance is fixed: the eigenvector's sign
is canonical (peak positive, which is what its authors describe), a graph without any cut gives no mask, and a stage
whose graph has not changed is not solved again. On a GPU a batch is done without a word to the host
(`workers.batch_cuts`), here photo by photo.

Shapes: B images, N = h * w patches row by row, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from workers import devices
from workers.batch_cuts import MAX_OVERLAP, MIN_AREA, BatchCut, batch_cuts, cuttable
from workers.ncut import MAX_STEPS, TOLERANCE, affinity_edges, second_eigenvector, second_eigenvector_dense

Solver = Literal["iterative", "dense"]
SOLVERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "iterative": second_eigenvector,
    "dense": second_eigenvector_dense,
}
Beside = Callable[[Tensor, Tensor], Tensor]  # (B, N, D) features, (B, n, N) bool masks -> (B, X) numbers
FIRST_STEPS = 32  # of Lanczos on a GPU, which suffice for nearly all photos


class MaskCut(NamedTuple):
    """The masks of one image in the order found; a stage without a mask has an empty one.

    masks: (n, h, w) bool, disjoint, n = max_masks; eigenvectors: (n, h, w) float64, canonical sign, x' D x = 1;
    beside: (X,) float64, what was asked for beside them.
    """

    masks: np.ndarray
    eigenvectors: np.ndarray
    beside: np.ndarray


@dataclass(frozen=True, slots=True)
class Cut:
    """One stage of one image; all arrays (h, w)."""

    eigenvector: np.ndarray
    side: np.ndarray  # foreground side of the bipartition, after the reversal rule
    seed: int  # flat index of the patch the object grows from
    reversed: bool
    component: np.ndarray  # 4-connected component of `side` that holds the seed
    accepted: bool
    mask: np.ndarray  # component if accepted, minus all earlier masks


@torch.inference_mode()
def maskcut(
    feats_BND: Tensor | np.ndarray,
    grid: tuple[int, int],
    *,
    tau: float,
    max_masks: int,
    solver: Solver = "iterative",
    beside: Beside | None = None,
) -> list[MaskCut]:
    """(B, N, D) patch features of a (h, w) grid -> up to `max_masks` disjoint masks an image.

    tau: cosine similarity above which two patches are joined, in (-1, 1). `solver` "dense" is the float64 oracle.
    `beside`: numbers of each image that a GPU is to find with its masks, and send with them.
    Runs on the device of the features. ValueError when the shapes or parameters do not fit or a feature is not finite.
    """
    stages, numbers = _stages(torch.as_tensor(feats_BND), grid, tau, max_masks, solver, beside)
    return [
        MaskCut(np.stack([cut.mask for cut in cuts]), np.stack([cut.eigenvector for cut in cuts]), row)
        for cuts, row in zip(stages, numbers, strict=True)
    ]


@torch.inference_mode()
def maskcut_stages(
    feats_BND: Tensor | np.ndarray,
    grid: tuple[int, int],
    *,
    tau: float,
    max_masks: int,
    solver: Solver = "iterative",
) -> list[list[Cut]]:
    """As `maskcut`, with every decision of every stage: (B lists of max_masks cuts)."""
    return _stages(torch.as_tensor(feats_BND), grid, tau, max_masks, solver, None)[0]


def _stages(
    feats_BND: Tensor, grid: tuple[int, int], tau: float, max_masks: int, solver: Solver, beside: Beside | None
) -> tuple[list[list[Cut]], np.ndarray]:
    """The cuts, and (B, X) of what is beside them."""
    _check(feats_BND, grid, tau, max_masks, solver)
    if devices.many_threads(feats_BND) and solver == "iterative" and feats_BND.shape[1] > 1:
        return _stages_unasked(feats_BND, grid, tau, max_masks, beside)
    _check_finite(bool(torch.isfinite(feats_BND).all()))
    edges_BNN = affinity_edges(feats_BND, tau)
    can_be_cut = cuttable(edges_BNN).tolist() if feats_BND.shape[1] > 1 else [False] * len(feats_BND)
    cuts: list[list[Cut]] = [[] for _ in range(len(feats_BND))]
    for _ in range(max_masks):
        active = [i for i, earlier in enumerate(cuts) if can_be_cut[i] and not _unchanged(earlier)]
        vectors = _solve(edges_BNN, cuts, active, grid, solver)
        for i, earlier in enumerate(cuts):
            earlier.append(_next_cut(vectors.get(i), earlier, grid))
    if beside is None:
        return cuts, np.zeros((len(cuts), 0))
    masks = np.array([[cut.mask.ravel() for cut in stages] for stages in cuts]).reshape(
        len(cuts), max_masks, feats_BND.shape[1]
    )
    numbers_BX = beside(feats_BND, torch.from_numpy(masks).to(feats_BND.device))
    return cuts, numbers_BX.double().cpu().numpy()


def _stages_unasked(
    feats_BND: Tensor, grid: tuple[int, int], tau: float, max_masks: int, beside: Beside | None
) -> tuple[list[list[Cut]], np.ndarray]:
    """One transfer; and of photos whose eigenvectors need more steps, which are rare, a second one."""
    edges_BNN = affinity_edges(feats_BND, tau)

    def rows(edges_BNN: Tensor, feats_BND: Tensor, steps: int) -> Tensor:
        """(B, S (4 N + 4) + X) float64."""
        cuts = batch_cuts(edges_BNN, grid, max_masks, steps)
        packed = _pack(cuts).flatten(1)
        if beside is None:
            return packed
        return torch.cat([packed, beside(feats_BND, torch.stack([cut.mask_BN for cut in cuts], 1)).double()], 1)

    first = rows(edges_BNN, feats_BND, FIRST_STEPS)
    finite = torch.isfinite(feats_BND).all().to(first.dtype)
    fetched = torch.cat([first.flatten(), finite[None]]).cpu().numpy()
    _check_finite(fetched[-1] == 1)
    found = fetched[:-1].reshape(first.shape)
    width = max_masks * (4 * feats_BND.shape[1] + 4)
    stages = found[:, :width].reshape(len(found), max_masks, -1)
    hard = np.flatnonzero((stages[..., -1] >= TOLERANCE).any(1))
    if len(hard):
        chosen = torch.from_numpy(hard).to(edges_BNN.device)
        found[hard] = rows(edges_BNN[chosen], feats_BND[chosen], MAX_STEPS).cpu().numpy()
        stages = found[:, :width].reshape(len(found), max_masks, -1)
    return [[_unpack(stage, grid) for stage in each] for each in stages], found[:, width:]


def _pack(cuts: list[BatchCut]) -> Tensor:
    """(B, S, 4 N + 4) float64: maps one after the other, then the numbers."""
    rows = []
    for cut in cuts:
        maps = (cut.eigenvector_BN, cut.side_BN, cut.component_BN, cut.mask_BN)
        numbers = (cut.seed_B, cut.reversed_B, cut.accepted_B, cut.residual_B)
        rows.append(torch.cat([*maps, *(number_B[:, None] for number_B in numbers)], 1))
    return torch.stack(rows, 1)


def _unpack(stage: np.ndarray, grid: tuple[int, int]) -> Cut:
    vector_hw, *maps = stage[:-4].reshape(4, *grid)
    side_hw, component_hw, mask_hw = (each.astype(bool) for each in maps)
    seed, exchanged, accepted = (int(number) for number in stage[-4:-1])
    return Cut(vector_hw, side_hw, seed, bool(exchanged), component_hw, bool(accepted), mask_hw)


def bipartition(vector_hw: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """The foreground side (h, w) bool of a cut, its seed patch and whether the sides were exchanged.

    The side above the mean is the foreground unless it holds three corners or lacks the patch of largest modulus.
    """
    side_hw = vector_hw > vector_hw.mean()
    corners = int(side_hw[[0, 0, -1, -1], [0, -1, 0, -1]].sum())
    exchange = corners >= 3 or not side_hw.flat[np.abs(vector_hw).argmax()]
    if exchange:
        return ~side_hw, int((-vector_hw).argmax()), True
    return side_hw, int(vector_hw.argmax()), False


def cut_from_vector(vector_hw: np.ndarray, earlier: list[Cut]) -> Cut:
    """Steps 7 to 11 of the method: eigenvector (h, w) -> the stage's cut, given the cuts before it."""
    side_hw, seed, exchanged = bipartition(vector_hw)
    labels_hw, _ = ndimage.label(side_hw)  # 4-connectivity
    component_hw = labels_hw == labels_hw.flat[seed]
    return _accept(Cut(vector_hw, side_hw, seed, exchanged, component_hw, False, component_hw), earlier)


def _accept(cut: Cut, earlier: list[Cut]) -> Cut:
    """Reject the component when it is small or repeats the mask just before (and only that one, as published)."""
    component = cut.component
    accepted = bool(component.any())
    if earlier:
        previous = earlier[-1].component & earlier[-1].accepted
        union = (component | previous).sum()
        overlap = (component & previous).sum() / union if union else 0.0
        accepted = bool(overlap <= MAX_OVERLAP and component.mean() > MIN_AREA)
    mask = component & accepted & ~_painted(earlier, component.shape)
    return Cut(cut.eigenvector, cut.side, cut.seed, cut.reversed, component, accepted, mask)


def _next_cut(vector_hw: np.ndarray | None, earlier: list[Cut], grid: tuple[int, int]) -> Cut:
    if vector_hw is not None:
        return cut_from_vector(vector_hw, earlier)
    if earlier and earlier[-1].side.any():
        return _accept(earlier[-1], earlier)  # the graph is that of the stage before: so is the component
    empty = np.zeros(grid, bool)
    return Cut(np.zeros(grid), empty, 0, False, empty, False, empty)


def _unchanged(earlier: list[Cut]) -> bool:
    """Whether the last stage painted nothing new, so that the next graph is the same."""
    return bool(earlier) and not earlier[-1].mask.any()


def _painted(earlier: list[Cut], grid: tuple[int, ...]) -> np.ndarray:
    painted = np.zeros(grid, bool)
    for cut in earlier:
        painted |= cut.mask
    return painted


def _solve(
    edges_BNN: Tensor, cuts: list[list[Cut]], active: list[int], grid: tuple[int, int], solver: str
) -> dict[int, np.ndarray]:
    """Eigenvector (h, w) of each active image that still has a free patch, by its number in the batch."""
    free = {i: ~_painted(cuts[i], grid) for i in active}
    solvable = [i for i in active if free[i].any()]
    if not solvable:
        return {}
    free_BN = torch.as_tensor(np.stack([free[i].reshape(-1) for i in solvable]), device=edges_BNN.device).float()
    chosen_BNN = edges_BNN if len(solvable) == len(edges_BNN) else edges_BNN[solvable]
    vectors_BN, _ = SOLVERS[solver](chosen_BNN, free_BN)
    return {i: vector.reshape(grid) for i, vector in zip(solvable, vectors_BN.cpu().numpy(), strict=True)}


def _check(feats_BND: Tensor, grid: tuple[int, int], tau: float, max_masks: int, solver: str) -> None:
    if feats_BND.ndim != 3 or feats_BND.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"features {tuple(feats_BND.shape)} do not fit a grid of {grid[0]} x {grid[1]} patches")
    if not -1 < tau < 1:
        raise ValueError(f"tau is a cosine similarity in (-1, 1), got {tau}")
    if max_masks < 1:
        raise ValueError(f"max_masks must be at least 1, got {max_masks}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {solver!r}")


def _check_finite(finite: bool) -> None:
    if not finite:
        raise ValueError("features hold NaN or infinite values")
