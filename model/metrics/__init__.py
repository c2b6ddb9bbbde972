"""Scores against human labels: panoptic quality, masks (AP, AR), class maps, clusters (purity, NMI)."""

from model.metrics.panoptic import PanopticQuality, hungarian_mapping, panoptic_quality

__all__ = ["PanopticQuality", "hungarian_mapping", "panoptic_quality"]
