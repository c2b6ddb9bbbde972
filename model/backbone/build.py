"""A name and weights -> timm's transformer. Files are compared with a model that exists by its shapes alone, first."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.backbone.files import read_checkpoint
from model.backbone.names import ARCHITECTURES, embedding_dim, is_rotary, patch_size
from model.backbone.namings import State, timm_names, unwrapped, without_prefixes
from model.backbone.weights import Weights

SHOWN = 5  # keys of each kind in a message


def build_vit(name: str, weights: Weights) -> Any:
    """The named transformer with these weights, on the CPU. ValueError when their file does not fit or is broken."""
    state = None if weights.path is None else _read_state(name, weights.path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights.seed or 0)
        vit = _create(name)
    for block in vit.blocks:
        block.attn.fused_attn = True
    if state is not None:
        if "pos_embed" in state:  # of the file's own grid: it is interpolated when images come
            vit.pos_embed = nn.Parameter(torch.empty_like(state["pos_embed"], dtype=torch.float32))
        vit.load_state_dict(state)
    return vit


def empty_vit(name: str) -> Any:
    """The named transformer with shapes alone: its parameters are on the meta device and take no memory."""
    with _WithoutMemory():
        return _create(name)


def check_file(name: str, path: Path) -> None:
    """ValueError when the checkpoint does not fit the named transformer or is broken. No model is built in memory."""
    _read_state(name, path)


def _read_state(name: str, path: Path) -> State:
    """The state dict in a file under timm's names, compared and found finite."""
    checkpoint = read_checkpoint(path)
    try:
        state = without_prefixes(unwrapped(checkpoint))
    except ValueError as error:
        raise ValueError(f"backbone.weights: {path} {error}") from error
    shapes = {key: value.to("meta") for key, value in state.items()}
    misfit = _misfit(name, shapes)
    if misfit:
        raise ValueError(f"backbone.weights: {path} does not fit {name}: {misfit}; {_guess(name, shapes)}")
    _check_finite(state, path)
    return timm_names(state, rotary=is_rotary(name))


def _misfit(name: str, state: State) -> str:
    """How a state without prefixes differs from the named transformer; empty when it does not."""
    found, wanted = timm_names(state, rotary=is_rotary(name)), _shapes(name)
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    wrong = [
        f"{key} {tuple(found[key].shape)} {str(found[key].dtype).removeprefix('torch.')}"
        for key in sorted({*found} & {*wanted})
        if not _fits(key, found[key], wanted[key])
    ]
    if not missing and not extra and not wrong:
        return ""
    return ", ".join(
        f"{kind} {keys[:SHOWN]} ({len(keys)})"
        for kind, keys in (("missing keys", missing), ("unexpected keys", extra), ("wrong shapes", wrong))
    )


def _fits(key: str, value: Tensor, shape: torch.Size) -> bool:
    if not value.is_floating_point():
        return False
    if value.shape == shape or key != "pos_embed":
        return value.shape == shape
    prefix = shape[1] - math.isqrt(shape[1]) ** 2  # 1 for the CLS token, where it has a position
    patches = value.shape[1] - prefix if value.ndim == 3 else 0
    return patches > 0 and value.shape[::2] == shape[::2] and math.isqrt(patches) ** 2 == patches


def _guess(name: str, state: State) -> str:
    """What to do about a state that does not fit the named transformer."""
    patch = timm_names(state, rotary=False).get("patch_embed.proj.weight")
    for other in (other for other in ARCHITECTURES if other != name and _in_timm(other)):
        shape = (embedding_dim(other), 3, patch_size(other), patch_size(other))
        if patch is not None and patch.shape == shape and not _misfit(other, state):
            return f"it is one of {other}: set backbone.name to that, or give a file of {name}"
    return "is it of another model?"


@functools.cache
def _shapes(name: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in empty_vit(name).state_dict().items()}


class _WithoutMemory(TorchFunctionMode):
    """Parameters get a shape alone. `torch.device("meta")` would reach the numbers too that older timm computes with
    tensors on the way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _create(name: str) -> Any:
    if not _in_timm(name):
        raise ValueError(
            f"backbone.name: the installed timm {timm.__version__} has no {name}; pip install -U 'timm>=1.0.20'"
        )
    vit = timm.create_model(ARCHITECTURES[name], pretrained=False, dynamic_img_size=True, num_classes=0)
    for block in vit.blocks if is_rotary(name) else ():
        # Zero in the published weights, so that timm does not save it; another training may have one.
        block.attn.register_buffer("k_bias", block.attn.k_bias, persistent=True)
    return vit


def _in_timm(name: str) -> bool:
    return timm.is_model(ARCHITECTURES[name].partition(".")[0])


def _check_finite(state: State, path: Path) -> None:
    for key, value in state.items():
        if not torch.isfinite(value.float()).all():
            raise ValueError(
                f"backbone.weights: {path} has NaN or infinite values in {key!r}; it is damaged or of a training that "
                "diverged: fetch it again, or give an earlier checkpoint"
            )
