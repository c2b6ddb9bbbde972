"""A name and weights -> timm's transformer, from files with the official key names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from model.backbone.files import read_checkpoint
from model.backbone.names import ARCHITECTURES
from model.backbone.weights import Weights


def check_file(name: str, path: Path) -> None:
    """ValueError when the checkpoint does not fit the named transformer, which is not built in memory."""
    with torch.device("meta"):
        vit = timm.create_model(ARCHITECTURES[name], pretrained=False, dynamic_img_size=True, num_classes=0)
    _matching_state(vit, _read_state(path), path, name)


def build_vit(name: str, weights: Weights) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights.seed or 0)
        vit = timm.create_model(ARCHITECTURES[name], pretrained=False, dynamic_img_size=True, num_classes=0)
    for block in vit.blocks:
        block.attn.fused_attn = True
    if weights.path is not None:
        vit.load_state_dict(_matching_state(vit, _read_state(weights.path), weights.path, name))
    return vit


def _read_state(path: Path) -> dict[str, Any]:
    """The state dict in a checkpoint file, out of its wrappers. ValueError when there is none."""
    state = read_checkpoint(path)
    for wrapper in ("teacher", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"backbone.weights: {path} holds no state dict of tensors")
    return state


def _matching_state(vit: VisionTransformer, state: dict[str, Any], path: Path, name: str) -> dict[str, Tensor]:
    """The state under timm's keys, from official ones (also with `module.` and `backbone.` prefixes, and with a
    projection head, which is left out). ValueError that lists what is missing, unexpected or of another shape."""
    state = {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    state, wanted = checkpoint_filter_fn(state, vit), vit.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = sorted(f"{k} {tuple(state[k].shape)}" for k in {*state} & {*wanted} if state[k].shape != wanted[k].shape)
    if missing or extra or shapes:
        raise ValueError(
            f"backbone.weights: {path} does not fit {name}: missing keys {missing[:5]} ({len(missing)}), unexpected "
            f"keys {extra[:5]} ({len(extra)}), wrong shapes {shapes[:5]} ({len(shapes)}); is it of another model?"
        )
    return state
