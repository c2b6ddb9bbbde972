"""Shifts and weights of STEGO's loss, published and given. Apart from the loss, which needs torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Shift and weight of each term of the loss. Pairs more similar than the shift are pulled together.

    The published configuration files say pos_intra, pos_inter and neg_inter; the paper says self, knn and rand.
    """

    intra_shift: float
    inter_shift: float
    negative_shift: float
    intra_weight: float
    inter_weight: float
    negative_weight: float


COCOSTUFF27_VITS = LossTerms(0.08, 0.02, 0.66, 0.67, 0.25, 0.63)
COCOSTUFF27_VITB = LossTerms(0.12, 0.20, 1.00, 0.10, 1.00, 0.15385)
CITYSCAPES = LossTerms(0.4583, 0.1755, 0.3136, 1.0, 0.5775, 0.9059)
POTSDAM = LossTerms(0.08, 0.02, 0.46, 0.67, 0.25, 0.63)
PRESETS = {
    "cocostuff27_vits": COCOSTUFF27_VITS,
    "cocostuff27_vitb": COCOSTUFF27_VITB,
    "cityscapes": CITYSCAPES,
    "potsdam": POTSDAM,
}
