"""Shifts from the features, the start near the identity, and fits that go on or are shared from there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.stego import StegoHead
from model.stego_terms import PRESETS
from pipeline.semantics.stego import StegoArtifact
from pipeline.semantics.stego_job import StegoSettings
from pipeline.semantics.stego_start import Similarities, margin, measure_similarities, settled_terms
from pipeline.semantics.stego_train import draw_step
from tests.pipeline.semantics.test_stego import DIM, GROUPS, feature_maps, fit, weights, write_parts
from workers.conditioning import unit_rows

TERMS = ("intra", "inter", "negative")
CONDITIONED = StegoSettings(
    classes=GROUPS,
    dim=20,
    points=5,
    batch_size=8,
    steps=60,
    conditioned=True,
    overclustering=2,
    auto_shifts=TERMS,
    head_rate=5e-3,
)


def conditioned_maps(count: int, seed: int = 0) -> np.ndarray:
    """As `feature_maps`, of unit norm."""
    feats = feature_maps(count, seed=seed)[0].astype(np.float32)
    return (feats / np.linalg.norm(feats, axis=2, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_parts(tmp_path_factory.mktemp("parts"), list(conditioned_maps(30)))


@pytest.fixture(scope="module")
def unbroken(parts: list[str], tmp_path_factory: pytest.TempPathFactory) -> StegoArtifact:
    return fit(parts, tmp_path_factory.mktemp("artifact"), CONDITIONED)


def looked_up(feats_Chw: np.ndarray, points_mn2: np.ndarray) -> np.ndarray:
    """(P, C) unit features at points in [-1, 1], x before y, bilinearly between the centres of patches."""
    found = []
    for x, y in points_mn2.reshape(-1, 2):
        column, row = (np.array([x, y]) + 1) / 2 * (np.array(feats_Chw.shape[:0:-1]) - 1)
        left, top = min(int(column), feats_Chw.shape[2] - 2), min(int(row), feats_Chw.shape[1] - 2)
        right, bottom = column - left, row - top
        corners = feats_Chw[:, top : top + 2, left : left + 2]
        found.append(np.einsum("cij,i,j->c", corners, [1 - bottom, bottom], [1 - right, right]))
    return unit_rows(np.array(found))


def test_shifts_are_quantiles_of_how_alike_unrelated_photos_are() -> None:
    feats = feature_maps(6, seed=2)[0][:, 0]
    neighbours = np.array([[1], [0], [3], [2], [5], [4]], np.int32)
    settings = StegoSettings(points=3, batch_size=4, steps=1)
    head = StegoHead(DIM, 4)
    found = measure_similarities(feats, neighbours, settings, head)
    pairs: dict[str, list[np.ndarray]] = {term: [] for term in TERMS}
    for step in range(20):
        draws = draw_step(settings, step, neighbours, head)
        others = draws.items[draws.neg_perms[0]]
        batch: dict[str, list[np.ndarray]] = {term: [] for term in TERMS}
        for place, item in enumerate(draws.items):
            first, second = draws.coords1[place].numpy(), draws.coords2[place].numpy()
            rows = looked_up(feats[item], first)
            batch["intra"].append(rows @ rows.T)
            batch["inter"].append(rows @ looked_up(feats[draws.positives[place]], second).T)
            batch["negative"].append(rows @ looked_up(feats[others[place]], second).T)
        for term, values in batch.items():
            similarity = np.stack(values)
            pairs[term].append(similarity + similarity.mean() - similarity.mean(2, keepdims=True))
    means = [np.mean(pairs[term]) for term in TERMS]
    assert [found.intra, found.inter, found.negative] == pytest.approx(means, abs=1e-4)
    assert [found.pull, found.push] == pytest.approx(np.quantile(pairs["negative"], [0.9, 0.99]), abs=1e-4)
    assert found == measure_similarities(feats, neighbours, replace(settings, steps=9), head)
    assert found != measure_similarities(feats, neighbours, replace(settings, seed=1), head)


def test_only_the_shifts_that_are_auto_are_found() -> None:
    found, preset = Similarities(0.5, 0.4, 0.3, 0.6, 0.9), PRESETS["cocostuff27_vits"]
    assert settled_terms(preset, (), found) == preset
    some = settled_terms(preset, ("intra", "negative"), found)
    assert (some.intra_shift, some.inter_shift, some.negative_shift) == (0.6, 0.02, 0.9)
    assert some.intra_weight == preset.intra_weight
    wanted = 0.67 * (0.08 - 0.5) + 0.25 * (0.02 - 0.4) + 0.63 * (0.66 - 0.3)
    assert margin(preset, found) == pytest.approx(wanted)


def test_the_head_starts_near_a_rotation_of_the_features() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = StegoHead(6, 8).eval()
    axes = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    head.start_near(axes)
    feats = torch.nn.functional.normalize(torch.randn(50, 6, 2, 1, generator=torch.Generator().manual_seed(1)), dim=1)
    rows = feats.movedim(1, -1).reshape(-1, 6)
    code = torch.nn.functional.normalize(head(feats).movedim(1, -1).reshape(-1, 8), dim=-1)
    assert (code @ code.T - rows @ rows.T).abs().max() < 0.1
    assert not any(layer.bias.any() for layer in (head.linear, head.nonlinear[2]))


def test_a_conditioned_fit_finds_the_groups_and_says_which_shifts_it_took(unbroken: StegoArtifact) -> None:
    feats, groups = conditioned_maps(20, seed=1), feature_maps(20, seed=1)[1]
    labels = unbroken.probe.log_probs(unbroken.head(torch.from_numpy(feats[:, 0].astype(np.float32)))).argmax(1)
    pairs = set(zip(labels.numpy().ravel().tolist(), groups.ravel().tolist(), strict=True))
    assert len(pairs) < 2 * GROUPS and len({label for label, _ in pairs}) == GROUPS
    record = unbroken.record
    found, terms = record["similarities"], record["settings"]["terms"]
    shifts = [terms[f"{term}_shift"] for term in TERMS]
    assert shifts == [found["pull"], found["pull"], found["push"]]
    assert found["negative"] < found["pull"] < found["push"] < 1
    assert sum(record["probe_sizes"]) == 30 * 25
    assert len(unbroken.probe.clusters) == CONDITIONED.overclustering * GROUPS
    assert np.linalg.norm(unbroken.probe.clusters.detach(), axis=1) == pytest.approx(1, abs=1e-5)


def test_a_conditioned_fit_that_was_stopped_goes_on_to_the_same_bits(
    unbroken: StegoArtifact, parts: list[str], tmp_path: Path
) -> None:
    for stopped_at in (1, 50):  # before the first checkpoint but that of step 0, and after one

        def stop(entry: dict[str, float], last: int = stopped_at) -> None:
            if entry["step"] == last:
                raise KeyboardInterrupt

        out = tmp_path / str(stopped_at)
        with pytest.raises(KeyboardInterrupt):
            fit(parts, out, CONDITIONED, on_log=stop)
        resumed = fit(parts, out, CONDITIONED)
        assert torch.equal(weights(resumed), weights(unbroken))
        assert resumed.record == unbroken.record


def test_two_workers_take_the_same_shifts(
    ray_session: None, unbroken: StegoArtifact, parts: list[str], tmp_path: Path
) -> None:
    shared = fit(parts, tmp_path, CONDITIONED, num_workers=2)
    assert shared.record["similarities"] == unbroken.record["similarities"]
    assert shared.record["settings"] == unbroken.record["settings"]
    assert (weights(shared) - weights(unbroken)).abs().max() < 1e-4


def test_a_fit_of_another_start_is_another(parts: list[str], tmp_path: Path) -> None:
    def stop(entry: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(parts, tmp_path, CONDITIONED, on_log=stop)
    with pytest.raises(ValueError, match="is of a fit with other settings"):
        fit(parts, tmp_path, replace(CONDITIONED, auto_shifts=("negative",)))
