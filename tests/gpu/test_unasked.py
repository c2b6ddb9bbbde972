"""What is decided on a GPU without waiting for it, on tensors that have a shape and a CUDA device but no values.

Whatever would look at a value, or mix devices, raises. It needs no GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pytest.importorskip("scipy", reason="scipy is not installed")

from workers import crf
from workers.batch_cuts import batch_cuts
from workers.crf import CUTLER, STEGO, exact_log_odds
from workers.fast_crf import fast_log_odds
from workers.maskcut import maskcut
from workers.ncut import COSINE_BINS, affinity_edges, second_eigenvector
from workers.permutohedral import Lattice
from workers.photo_pixels import Photos


def test_cuts_of_a_batch() -> None:
    with FakeTensorMode():
        edges = affinity_edges(torch.randn(3, 20, 6, device="cuda"), 0.15)
        cuts = batch_cuts(edges, (5, 4), max_masks=2, steps=8)
    assert [cut.mask_BN.shape for cut in cuts] == [(3, 20)] * 2
    assert all(each.is_cuda for cut in cuts for each in cut)


def test_the_one_question_of_a_batch_is_for_its_cuts_with_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(values: Tensor) -> Tensor:
        raise LookupError(f"{len(values)} values")

    monkeypatch.setattr(Tensor, "cpu", ask)
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from workers.instances.cuts import _scores_and_graph

    wanted = 2 * (3 * (4 * 12 + 4) + 3 + 1 + COSINE_BINS) + 1
    beside = functools.partial(_scores_and_graph, grid=(4, 3), tau=0.15)
    with FakeTensorMode(), pytest.raises(LookupError, match=f"^{wanted} values"):
        maskcut(torch.randn(2, 12, 6, device="cuda"), (4, 3), tau=0.15, max_masks=3, beside=beside)


def test_a_solver_that_looks_is_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        second_eigenvector(torch.ones(1, 30, 30, device="cuda"), torch.ones(1, 30, device="cuda"))


def no_values(features_dP: Tensor, clouds: Sequence[int]) -> Lattice:
    """A lattice of 50 vertices."""
    (d, points), device = features_dP.shape, features_dP.device
    assert sum(clouds) == points
    whole = [torch.zeros(n, dtype=torch.int32, device=device) for n in (points * (d + 1), 52)]
    neighbours = torch.zeros(d + 1, 51, 2, dtype=torch.int32, device=device)
    weights = torch.zeros(points, d + 1, device=device)
    return Lattice(*whole, weights.flatten(), weights.int(), weights, neighbours)


def test_masks_of_photos_of_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All iterations; the lattices are asked for their vertices before."""
    monkeypatch.setattr(crf, "build_lattice", no_values)
    with FakeTensorMode():
        photos = Photos(torch.zeros(900, 3, dtype=torch.uint8, device="cuda"), ((20, 15), (20, 15), (15, 20)))
        masks = torch.zeros(900, 2, dtype=torch.bool, device="cuda")
        for log_odds in (exact_log_odds, fast_log_odds):
            found = log_odds(photos, masks, CUTLER)
            assert found.is_cuda and found.shape == masks.shape
        assert crf._marginals(photos, torch.zeros(900, 9, device="cuda"), STEGO).is_cuda
