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
from pipeline.stages.labels import require_predictions
from tests.pipeline.label_files import categories, unreadable_row, write_part
from workers.records import PREDICTIONS_SCHEMA


def stage(folder: Path, name: str, *photos: list[float | None]) -> Stage:
    """A stage of one part with the masks of these scores, None for an old one."""
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
    labels = stage(tmp_path, "labels_2", [None, None], [])
    run = run_of(labels, stage(tmp_path, "predictions_1", [0.25, 0.75], [0.5]))
    with pytest.raises(
        ConfigError, match=r"thresholds 0\.8, and the surest has 0\.75, so that round 2 would learn its"
    ):
        require_predictions(run, 2)
    blind = run_of(stage(tmp_path, "labels_1", [None]), stage(tmp_path, "predictions", [], []))
    with pytest.raises(ConfigError, match=r"thresholds 0\.9, and the model detects nothing"):
        require_predictions(blind, 1)


def test_one_sure_prediction_is_enough(tmp_path: Path) -> None:
    labels = stage(tmp_path, "labels_1", [None], [None, 0.0])
    predictions = stage(tmp_path, "predictions", [0.1])
    require_predictions(run_of(labels, predictions), 1)
    with pytest.raises(ConfigError, match=r"the surest has 0\.1"):
        require_predictions(run_of(stage(tmp_path / "other", "labels_1", [None]), predictions), 1)
