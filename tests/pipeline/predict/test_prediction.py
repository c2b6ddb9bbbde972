"""A prediction as supervision takes it."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import supervision
import torch

from model.panoptic import network
from pipeline.errors import ConfigError
from pipeline.predict.prediction import Prediction

MASKS = torch.zeros((3, 4, 6), dtype=torch.bool)
MASKS[0, :2, :3] = MASKS[1, 2:, 3:] = MASKS[2, 1, 1] = True
FOUND = network.Prediction(
    boxes=torch.tensor([[0, 0, 3, 2], [3, 2, 6, 4], [1, 1, 2, 2]], dtype=torch.float32),
    scores=torch.tensor([0.9, 0.6, 0.4]),
    classes=torch.tensor([1, 0, 1]),
    masks=MASKS,
    semantic=torch.zeros((4, 6), dtype=torch.uint8),
    num_things=2,
)


def test_supervision_counts_and_draws_it() -> None:
    detections = Prediction.of(FOUND, {2: "duck"}).to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert detections.class_id is not None and detections.class_id.tolist() == [2, 1]
    assert detections.data["class_name"].tolist() == ["duck", "thing 1"]
    assert detections.xyxy.tolist() == [[0, 0, 3, 2], [3, 2, 6, 4]]
    assert detections.confidence is not None and detections.confidence.tolist() == pytest.approx([0.9, 0.6])
    assert detections.area.tolist() == [6, 6]
    drawn = supervision.MaskAnnotator().annotate(np.zeros((4, 6, 3), np.uint8), detections)
    assert drawn[:2, :3].any() and not drawn[2:, :3].any()


def test_the_least_score_is_that_of_panoptic_or_the_one_that_is_given() -> None:
    found = Prediction.of(FOUND, {})
    assert len(found.to_supervision(0.3)) == 3
    assert len(found.to_supervision(0.95)) == 0
    assert len(replace(found, settings=replace(found.settings, confidence=0.7)).to_supervision()) == 1


def test_without_supervision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match=r"supervision is not there .*\[exports\]"):
        Prediction.of(FOUND, {}).to_supervision()
