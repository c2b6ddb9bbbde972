"""Scores against human labels: panoptic quality, masks (AP, AR), class maps."""

from model.metrics.panoptic import PanopticQuality, class_agnostic_ap, hungarian_mapping, panoptic_quality

__all__ = ["PanopticQuality", "class_agnostic_ap", "hungarian_mapping", "panoptic_quality"]
