"""A round of self-training has something new to learn, or is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.config import Config
from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.stages.base import Run
from pipeline.stages.facts import Facts
from pipeline.stages.labels import SelfLabels, require_predictions
from tests.pipeline.label_files import categories, unreadable_row, write_part
from workers.records import PREDICTIONS_SCHEMA


def stage(folder: Path, name: str, *photos: list[float]) -> Stage:
    """A stage of one part with the masks of these scores."""
    found = Stage(name, "shard", "f" * 12, str(folder / name), 1)
    rows: list[dict[str, Any]] = [
        unreadable_row(f"{i}.jpg")
        | {"status": "ok", "rle": ["x"] * len(scores), "bbox": [[0.0] * 4] * len(scores)}
        | {"area": [1] * len(scores), "category": [1] * len(scores), "score": scores}
        for i, scores in enumerate(photos)
    ]
    write_part(Path(found.part(0)), rows, categories(1, 0), PREDICTIONS_SCHEMA)
    return found


def run_of(*stages: Stage) -> Run:
    config = Config.model_validate(
        {
            "source": {"uri": "/photos"},
            "run": {"uri": "/run"},
            "train": {"steps": 1},
            "self_training": {"rounds": 2, "thresholds": [0.9, 0.8]},
        }
    )
    return cast(Run, SimpleNamespace(config=config, stages={stage.name: stage for stage in stages}))


def test_a_round_without_a_sure_prediction_is_refused_with_the_best_that_there_was(tmp_path: Path) -> None:
    run = run_of(stage(tmp_path, "predictions_1", [0.25, 0.75], [0.5]))
    with pytest.raises(
        ConfigError, match=r"thresholds 0\.8, and the surest has 0\.75, so that round 2 would learn its"
    ):
        require_predictions(run, 2)
    blind = run_of(stage(tmp_path, "predictions", [], []))
    with pytest.raises(ConfigError, match=r"thresholds 0\.9, and the model detects nothing"):
        require_predictions(blind, 1)


def test_one_sure_prediction_is_enough(tmp_path: Path) -> None:
    require_predictions(run_of(stage(tmp_path, "predictions", [0.1], [0.2, 0.95])), 1)
    with pytest.raises(ConfigError, match=r"the surest has 0\.85"):
        require_predictions(run_of(stage(tmp_path / "other", "predictions", [0.1], [0.2, 0.85])), 1)


@pytest.mark.parametrize(
    ("train", "rounds", "soft"),
    [
        ({}, {"soft": False}, (False, False)),
        ({}, {"soft": True}, (False, True)),  # what a round added is old for the next one
        ({"nested": 0.3, "soft": True}, {"soft": False}, (True, True)),
        ({"nested": 0.3}, {"soft": False}, (False, False)),
    ],
)
def test_old_masks_keep_the_scores_that_they_were_learnt_with(
    train: dict[str, object], rounds: dict[str, object], soft: tuple[bool, bool]
) -> None:
    config = Config.model_validate(
        {
            "source": {"uri": "/photos"},
            "run": {"uri": "/run"},
            "backbone": {"name": "dinov2_vits14"},
            "train": {"steps": 1, **train},
            "self_training": {"rounds": 2, **rounds},
        }
    )
    contents = [SelfLabels(number).content(config, cast(Facts, None)) for number in (1, 2)]
    assert tuple(content.get("soft", False) for content in contents) == soft
