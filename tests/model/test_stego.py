"""STEGO's loss and cluster probe against the published program's numbers, and the properties of its random draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.stego import (
    ClusterProbe,
    Correspondence,
    MergedProbe,
    StegoHead,
    correspondence_loss,
    derangement,
    drop_channels,
    sample_points,
)
from model.stego_terms import PRESETS, LossTerms

TERMS = LossTerms(0.1, 0.2, 0.3, 1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def reference(shared_dir: Path) -> Mapping[str, np.ndarray]:
    return dict(np.load(shared_dir / "parity" / "stego.npz"))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points(batch: int, side: int, seed: int) -> Tensor:
    return torch.rand(batch, side, side, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("preset", ["cocostuff27_vits", "cocostuff27_vitb"])
@pytest.mark.parametrize("pointwise", [True, False])
def test_losses_and_gradients_equal_the_published_ones(
    reference: Mapping[str, np.ndarray], preset: str, pointwise: bool
) -> None:
    inputs = {name: torch.from_numpy(reference[name]) for name in ("feats", "feats_pos", "coords1", "coords2")}
    code, code_pos = (torch.from_numpy(reference[name]).requires_grad_() for name in ("code", "code_pos"))
    perms = torch.from_numpy(reference["neg_perms"])
    result = correspondence_loss(
        **inputs, code=code, code_pos=code_pos, neg_perms=perms, terms=PRESETS[preset], pointwise=pointwise
    )
    losses = torch.stack([result.intra, result.inter, result.negative])
    losses.sum().backward()
    prefix = f"{preset}_{'pointwise' if pointwise else 'plain'}"
    wanted = reference[f"{prefix}_losses_intra_inter_neg"]
    assert losses.detach().numpy() == pytest.approx(wanted, rel=1e-5)
    assert code.grad is not None and code_pos.grad is not None
    assert relative(code.grad, torch.from_numpy(reference[f"{prefix}_grad_code"])) < 1e-5
    assert relative(code_pos.grad, torch.from_numpy(reference[f"{prefix}_grad_code_pos"])) < 1e-5


def test_points_are_looked_up_as_published(reference: Mapping[str, np.ndarray]) -> None:
    found = sample_points(torch.from_numpy(reference["feats"]), torch.from_numpy(reference["coords1"]))
    assert found.mT.numpy() == pytest.approx(reference["sample_feats_coords1"], rel=1e-5, abs=1e-6)


def test_the_probe_gives_the_published_losses_and_probabilities(reference: Mapping[str, np.ndarray]) -> None:
    probe, code = ClusterProbe(70, 27), torch.from_numpy(reference["code"])
    probe.clusters.data = torch.from_numpy(reference["clusters"])
    hard, one_hot = probe(code)
    soft, probabilities = probe(code, alpha=2.0)
    assert hard.item() == pytest.approx(float(reference["cluster_loss_hard"]), rel=1e-5)
    assert soft.item() == pytest.approx(float(reference["cluster_loss_alpha2"]), rel=1e-5)
    assert probe.log_probs(code).detach().numpy() == pytest.approx(reference["cluster_logprobs_alpha2"], rel=1e-5)
    assert (probe.log_probs(code).argmax(1).numpy() == reference["cluster_argmax"]).all()
    assert (one_hot.argmax(1).numpy() == reference["cluster_argmax"]).all()
    assert probabilities.sum(1).detach().numpy() == pytest.approx(1, abs=1e-5)


def test_a_class_of_several_directions_is_as_near_as_the_nearest() -> None:
    clusters, classes = torch.eye(4)[[3, 0, 2, 1]], torch.tensor([1, 0, 0, 2])
    probe = MergedProbe(clusters, classes)
    code = draw(2, 4, 3, 5)
    unit = code / code.norm(dim=1, keepdim=True)
    wanted = torch.stack([unit[:, [0, 2]].amax(1), unit[:, 3], unit[:, 1]], 1)
    assert torch.allclose(probe.cosines(code), wanted, atol=1e-6)
    assert torch.allclose(probe.log_probs(code, 10.0), (10 * wanted).log_softmax(1), atol=1e-5)
    again = MergedProbe(probe.clusters.detach(), probe.classes)
    assert torch.equal(again.cosines(code), probe.cosines(code))


def test_presets_are_the_published_ones() -> None:
    coco = PRESETS["cocostuff27_vits"]
    assert (coco.negative_shift, coco.inter_shift, coco.intra_shift) == (0.66, 0.02, 0.08)
    assert (coco.negative_weight, coco.inter_weight, coco.intra_weight) == (0.63, 0.25, 0.67)
    base = PRESETS["cocostuff27_vitb"]
    assert (base.negative_weight, base.inter_weight, base.intra_weight) == (0.15385, 1.0, 0.10)
    assert PRESETS["cityscapes"].intra_shift == 0.4583
    assert PRESETS["potsdam"].negative_shift == 0.46
    losses = [torch.tensor(value) for value in (1.0, 10.0, 100.0)]
    assert Correspondence(*losses, *losses).total(coco).item() == pytest.approx(0.67 + 2.5 + 63, rel=1e-6)


def test_neither_features_nor_the_head_feel_what_they_must_not() -> None:
    feats, code = draw(3, 6, 5, 5).requires_grad_(), draw(3, 4, 5, 5, seed=1).requires_grad_()
    perms = torch.stack([derangement(3) for _ in range(2)])
    result = correspondence_loss(
        feats, feats, code, code, coords1=points(3, 4, 0), coords2=points(3, 4, 1), neg_perms=perms, terms=TERMS
    )
    ClusterProbe(4, 5)(code)[0].backward()
    assert code.grad is None
    result.total(TERMS).backward()
    assert feats.grad is None
    assert code.grad is not None and code.grad.abs().sum() > 0
    assert result.intra_cosines.shape == (3, 16, 16)
    assert result.negative_cosines.shape == (2, 3, 16, 16)
    assert torch.allclose(result.intra_cosines.diagonal(dim1=1, dim2=2), torch.ones(3, 16), atol=1e-6)


def test_the_zero_clamp_stops_pushing_at_a_right_angle_and_the_other_clamp_stops_pulling() -> None:
    feats = torch.eye(2).reshape(1, 2, 1, 2).repeat(2, 1, 1, 1)  # two unlike patches an image
    ends = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]]).repeat(2, 1, 1, 1)  # (x, y) of both

    def intra(code_pair: Tensor, **options: bool) -> float:
        code = code_pair.T.reshape(1, 2, 1, 2).repeat(2, 1, 1, 1)
        perms = torch.tensor([[1, 0]])
        settings = {"coords1": ends, "coords2": ends, "neg_perms": perms, "terms": TERMS, "pointwise": False}
        return correspondence_loss(feats, feats, code, code, **settings, **options).intra.item()

    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert intra(opposite) == pytest.approx(-0.5 * 0.9)  # the diagonal alone: cosine 1, similarity 1, shift 0.1
    assert intra(opposite, zero_clamp=False) == pytest.approx(-0.5 * 0.9 - 0.5 * 0.1)
    assert intra(opposite, stabilise=True) == pytest.approx(-0.5 * 0.9 * 0.8)


def test_halves_of_a_batch_add_up_to_the_whole() -> None:
    """What two processes compute: own rows, negatives from the whole batch, centring by the whole batch's mean."""
    feats, feats_pos = draw(4, 6, 5, 5), draw(4, 6, 5, 5, seed=1)
    code, code_pos = draw(4, 3, 5, 5, seed=2).requires_grad_(), draw(4, 3, 5, 5, seed=3).requires_grad_()
    coords1, coords2 = points(4, 4, 0), points(4, 4, 1)
    perms = torch.stack([derangement(4, torch.Generator().manual_seed(seed)) for seed in range(3)])
    whole_means: list[Tensor] = []

    def remember(similarity: Tensor) -> Tensor:
        whole_means.append(similarity.mean())
        return whole_means[-1]

    common = {"terms": TERMS}
    points_of = {"coords1": coords1, "coords2": coords2}
    whole = correspondence_loss(
        feats, feats_pos, code, code_pos, **points_of, neg_perms=perms, batch_mean=remember, **common
    )
    (gradient,) = torch.autograd.grad(whole.total(TERMS), code, retain_graph=True)
    total = torch.zeros(())
    for rows in (slice(0, 2), slice(2, 4)):
        means = iter(whole_means)
        half = correspondence_loss(
            *(maps[rows] for maps in (feats, feats_pos, code, code_pos)),
            **{name: coords[rows] for name, coords in points_of.items()},
            neg_perms=perms[:, rows],
            pool=(feats, code),
            batch_mean=lambda _, means=means: next(means),
            **common,
        )
        total = total + half.total(TERMS) / 2
    assert total.item() == pytest.approx(whole.total(TERMS).item(), rel=1e-5)
    assert relative(torch.autograd.grad(total, code)[0], gradient) < 1e-5


def test_constant_features_give_finite_losses_and_gradients() -> None:
    head = StegoHead(6, 4)
    for value in (0.0, 2.0):
        feats = torch.full((2, 6, 3, 3), value)
        code = head(feats)
        settings = {"coords1": points(2, 3, 0), "coords2": points(2, 3, 1), "neg_perms": torch.tensor([[1, 0]])}
        loss = correspondence_loss(feats, feats, code, code, **settings, terms=TERMS).total(TERMS)
        head.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in head.parameters())


def test_the_head_adds_two_branches_that_drop_their_own_channels() -> None:
    head, feats = StegoHead(8, 5, dropout=0.5), draw(2, 8, 3, 4)
    assert sum(parameter.numel() for parameter in StegoHead(768, 70).parameters()) == 698_252
    first, second, third = np.round(head.draw_masks(400, torch.Generator().manual_seed(0)).numpy(), 6)
    assert set(np.unique(first)) == {0.0, 2.0}
    assert 0.9 < first.mean() < 1.1
    for one, other in ((first, second), (second, third), (first, third)):
        assert 0.4 < (one == other).mean() < 0.6

    masks = head.draw_masks(2, torch.Generator().manual_seed(1))
    code = head(feats, masks)
    kept = [drop_channels(feats, mask) for mask in masks]
    linear, first, last = head.linear, head.nonlinear[0], head.nonlinear[2]
    hidden = F.relu(F.conv2d(kept[1], first.weight[..., None, None], first.bias))
    wanted = F.conv2d(hidden, last.weight[..., None, None], last.bias)
    wanted += F.conv2d(kept[0], linear.weight[..., None, None], linear.bias)
    assert torch.allclose(code, wanted, atol=1e-6)
    assert not torch.equal(head(feats), head(feats))
    assert torch.equal(head.eval()(feats), head(feats))


@given(batch=st.integers(2, 40), seed=st.integers(0, 2**32))
def test_a_derangement_is_a_permutation_that_leaves_nothing_in_place(batch: int, seed: int) -> None:
    drawn = derangement(batch, torch.Generator().manual_seed(seed))
    assert sorted(drawn.tolist()) == list(range(batch))
    assert not (drawn == torch.arange(batch)).any()


def test_an_image_alone_has_no_negative() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        derangement(1)
