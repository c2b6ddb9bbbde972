"""What the model sees in a photo, with the names of its classes, as other programs take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from model.panoptic import network
from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Prediction(network.Prediction):
    """As of the network, and `names` of the categories, things 1..K and stuff K+1..K+S, where they are known."""

    names: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: network.Prediction, names: Mapping[int, str]) -> Prediction:
        return cls(**{one.name: getattr(found, one.name) for one in fields(found)}, names=names)

    def to_supervision(self, score: float | None = None) -> Any:
        """The things as `supervision.Detections`, the surest first: n of at least that score (None: as of `panoptic`).

        `xyxy` (n, 4) float32 in pixels, `mask` (n, H, W) bool, `confidence` (n,) float32, `class_id` (n,) int64 the
        category, 1..K, and `data["class_name"]` (n,) its name. Detections have no place for stuff: `panoptic` has it.
        ConfigError when supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ConfigError(
                f"supervision is not there ({error}); pip install -c constraints.txt -e '.[exports]'"
            ) from error
        sure = (self.scores >= (self.settings.confidence if score is None else score)).numpy(force=True)
        boxes, scores, classes, masks = (
            one.numpy(force=True)[sure] for one in (self.boxes, self.scores, self.classes, self.masks)
        )
        category = classes.astype(np.int64) + 1
        names = np.array([self.names.get(number, f"thing {number}") for number in category.tolist()], dtype=str)
        return supervision.Detections(
            xyxy=boxes, mask=masks, confidence=scores, class_id=category, data={"class_name": names}
        )
