"""The Panoptic Cascade Mask R-CNN, piece by piece; `network` puts it together."""

from model.panoptic.network import PanopticCascadeRCNN, Prediction

__all__ = ["PanopticCascadeRCNN", "Prediction"]
