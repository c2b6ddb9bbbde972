"""DeepLabV3 with a ResNet-50 (arXiv 1706.05587), trained on a class map to smooth it: the second stage of DatUS2.

torchvision's model without any of its labelled weights. The ResNet starts at random or from a self-supervised
checkpoint such as DINO's. Shapes: B images, (H, W) pixels, (h, w) a smaller map, S classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.segmentation import DeepLabV3, deeplabv3_resnet50

STRIP_FLOATS = 1 << 24  # 64 MiB of float32 logits at a time


def build_deeplab(classes: int, *, seed: int = 0, backbone: str | Path | None = None) -> DeepLabV3:
    """DeepLabV3-R50 with `classes` outputs: (B, 3, H, W) normalised by ImageNet -> {"out": (B, S, H, W) logits}.

    Random weights of `seed`, the global generator untouched; with `backbone`, the ResNet of a checkpoint of
    torchvision's key names, read with weights_only. FileNotFoundError or ValueError says what does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=classes, aux_loss=False)
    if backbone is not None:
        _load_resnet(model, Path(backbone))
    return model


def argmax_at_size(logits_Shw: Tensor, height: int, width: int, *, strip_floats: int = STRIP_FLOATS) -> Tensor:
    """(S, h, w) float -> (height, width) uint8: argmax of the logits enlarged bilinearly, S <= 255.

    As F.interpolate with align_corners=False, in strips of rows of at most `strip_floats` logits (at least one row),
    so that memory does not grow with the photo.
    """
    rows = max(1, strip_floats // (logits_Shw.shape[0] * width))
    above, below, weight = _row_weights(logits_Shw, height)
    classes = torch.empty(height, width, dtype=torch.uint8, device=logits_Shw.device)
    for start in range(0, height, rows):
        strip = slice(start, min(start + rows, height))
        tall = torch.lerp(logits_Shw[:, above[strip]], logits_Shw[:, below[strip]], weight[strip, None])
        wide = F.interpolate(tall[None], size=(tall.shape[1], width), mode="bilinear", align_corners=False)
        classes[strip] = wide[0].argmax(0)
    return classes


def _row_weights(logits_Shw: Tensor, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `target` rows the two of the logits that it lies between, and the share of the lower one."""
    source = logits_Shw.shape[1]
    position = (
        (torch.arange(target, device=logits_Shw.device, dtype=logits_Shw.dtype) + 0.5) * (source / target) - 0.5
    ).clamp(0, source - 1)
    above = position.long()
    return above, (above + 1).clamp(max=source - 1), position - above


def _load_resnet(model: DeepLabV3, path: Path) -> None:
    state = _read_resnet(path)
    wanted = model.backbone.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    missing, extra = sorted(set(wanted) - set(state) - counters), sorted(set(state) - set(wanted))
    shapes = sorted(key for key in {*state} & {*wanted} if state[key].shape != wanted[key].shape)
    if missing or extra or shapes:
        raise ValueError(
            f"{path} is not a ResNet-50 of torchvision's names: missing keys {missing[:5]} ({len(missing)}), "
            f"unexpected {extra[:5]} ({len(extra)}), wrong shapes {shapes[:5]} ({len(shapes)})"
        )
    model.backbone.load_state_dict(state, strict=False)


def _read_resnet(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no ResNet-50 checkpoint {str(path)!r}; leave it out to start at random")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its unpickler's many types here
        raise ValueError(f"{path} is not a checkpoint that torch can read safely: {error}") from error
    for wrapper in ("teacher", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    named = {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}
    return {key: value for key, value in named.items() if not key.startswith(("fc.", "head."))}
