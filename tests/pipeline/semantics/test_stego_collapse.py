"""A fit of STEGO that loses its classes is refused with the figures; one that has few to lose is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.semantics.stego import StegoSettings
from pipeline.semantics.stego_classes import effective_classes, lost_at_end, lost_early
from pipeline.store import storage
from tests.pipeline.semantics.test_stego import GROUPS, feature_maps, fit, write_parts

SETTINGS = StegoSettings(classes=GROUPS, dim=8, points=5, batch_size=8, steps=100, head_rate=5e-3, probe_rate=0.02)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Features whose common part is so large that all pairs lie above the published shifts, as DINOv2's do."""
    feats = feature_maps(20)[0].astype(np.float32)
    feats[:, :, -1] += 8
    return write_parts(tmp_path_factory.mktemp("alike"), list(feats.astype(np.float16)))


def test_a_fit_that_collapses_is_refused_with_figures_and_remedy(alike: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at step 100 a batch uses 1 of 6 classes") as refused:
        fit(alike, tmp_path, SETTINGS)
    said = str(refused.value)
    assert "intra 0.08 against 0.9" in said and "weighted together -" in said
    assert "set semantics.shifts to auto, set semantics.conditioned to true, or ask for fewer" in said
    assert not storage.exists(storage.join(str(tmp_path), "artifact.json"))
    assert list((Path(alike[0]).parent / "scratch").iterdir()) == []
    steps: list[Any] = []
    with pytest.raises(ValueError, match="has lost its classes"):
        fit(alike, tmp_path, SETTINGS, on_log=steps.append)
    assert steps == []  # the same command again trains nothing


def test_with_shifts_from_the_features_it_does_not(alike: list[str], tmp_path: Path) -> None:
    fitted = fit(alike, tmp_path, replace(SETTINGS, auto_shifts=("intra", "inter", "negative")))
    assert sum(size > 0 for size in fitted.record["probe_sizes"]) == GROUPS


@pytest.mark.slow
def test_workers_of_ray_stop_as_early_and_the_fit_says_the_same(
    ray_session: None, alike: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"at step 100 a batch uses 1 of 6 classes"):
        fit(alike, tmp_path, replace(SETTINGS, steps=150), num_workers=2)


def test_effective_classes_are_as_many_equal_ones() -> None:
    assert effective_classes([5, 5, 5, 5]) == pytest.approx(4)
    assert effective_classes([9, 0, 0]) == pytest.approx(1)
    assert effective_classes([1, 3]) == pytest.approx(np.exp(0.25 * np.log(4) + 0.75 * np.log(4 / 3)))
    assert effective_classes([0, 0]) == 0


def test_few_classes_are_lost_only_when_next_to_nothing_is_left() -> None:
    assert lost_at_end([990, 10, 0, 0, 0, 0], SETTINGS)
    assert not lost_at_end([500, 300, 100, 10, 0, 0], SETTINGS)
    assert not lost_at_end([1000, 0, 0], SETTINGS)  # one of three is a third
    assert not lost_at_end([1000, 0, 0, 0, 0, 0], replace(SETTINGS, steps=99))  # too short to tell
    assert lost_early([{"step": 100, "classes_used": 1}], 6)
    assert not lost_early([{"step": 100, "classes_used": 2}], 6)
    assert not lost_early([{"step": 50, "classes_used": 1}], 6)
    assert not lost_early([], 6)
