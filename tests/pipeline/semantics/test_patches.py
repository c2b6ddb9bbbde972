"""The conditioning of patch features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.semantics import patches
from pipeline.semantics.patches import fit_conditioning
from workers.conditioning import Moments


def test_a_conditioning_of_other_patches_has_another_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that were made with the one before must see it, even if both are of as many patches."""

    def moments(seed: int) -> Moments:
        found = Moments(6)
        found.add(np.random.default_rng(seed).normal(size=(50, 6)).astype(np.float32))
        return found

    artifacts = []
    for seed in (0, 0, 1):
        found = tuple(moments(10 * seed + k) for k in range(3))
        monkeypatch.setattr(patches, "_moments", lambda parts, found=found: found)
        fit_conditioning([], str(tmp_path), 4)
        artifacts.append((tmp_path / "artifact.json").read_text())
    assert artifacts[0] == artifacts[1] != artifacts[2]
