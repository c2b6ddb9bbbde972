"""Frozen feature extractors: the vision transformers of DINO, DINOv2 and DINOv3 (`model.backbone.vit`) and the
weight-free `patch-dct`.

A backbone gives three things: the *keys* of the last block for MaskCut (all heads concatenated, CLS dropped, neither
normalised nor passed through the final norm; CutLER, arXiv 2301.11320), the CLS token after the final norm, and the
patch *tokens* after the final norm, which are the teacher features of STEGO (arXiv 2203.08414). It gives the patch
tokens of any block too, and several of all these from one forward pass (`features`). Nothing is trained here. torch and
timm, which take seconds to import, are loaded by those who build one.

Shapes: B images, (H, W) pixels, (h, w) patches, N = h * w, D channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.backbone.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, Dtype
from model.backbone.names import PATCH_DCT
from model.backbone.weights import resolve_weights

if TYPE_CHECKING:
    import torch

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Backbone", "Dtype", "check_weights", "load_backbone"]


def load_backbone(
    name: str,
    weights: str,
    *,
    device: str | torch.device = "cpu",
    dtype: Dtype | torch.dtype = "float32",
    sha256: str | None = None,
) -> Backbone:
    """The named extractor, frozen, on `device`, computing in `dtype`; its results are float32 always.

    weights: `official`, `index`, `random:<seed>`, or the path of a checkpoint of torch or safetensors, under the
    official key names, Hugging Face's or timm's, and with the wrappers of a training (`model.backbone.namings`).
    Errors as `resolve_weights`, and ValueError for a file that is broken, not finite, or of another model.
    """
    import torch

    resolved = resolve_weights(name, weights, sha256=sha256)
    kind = str(dtype).removeprefix("torch.")
    if kind not in ("float32", "bfloat16"):
        raise ValueError(f"backbone.dtype: {dtype!r} is not one of float32, bfloat16")
    if name == PATCH_DCT:
        from model.backbone.patch_dct import PatchDCT

        return PatchDCT(seed=resolved.seed or 0, device=torch.device(device))
    from model.backbone.build import build_vit
    from model.backbone.vit import ViTBackbone

    vit = build_vit(name, resolved)
    return ViTBackbone(vit, name=name, device=torch.device(device), dtype=getattr(torch, kind))


def check_weights(name: str, weights: str, *, sha256: str | None = None) -> None:
    """Raise what `load_backbone` would raise for these weights, without building the model in memory."""
    resolved = resolve_weights(name, weights, sha256=sha256)
    if resolved.path is not None:
        from model.backbone.build import check_file

        check_file(name, resolved.path)
