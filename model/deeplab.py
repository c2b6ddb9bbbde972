"""DeepLabV3 with a ResNet-50 (arXiv 1706.05587), trained on a class map to smooth it: the second stage of DatUS2.

torchvision's model without any of its labelled weights. The ResNet starts at random or from a self-supervised
checkpoint such as DINO's. Shapes: B images, (H, W) pixels, S classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.segmentation import DeepLabV3, deeplabv3_resnet50


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
