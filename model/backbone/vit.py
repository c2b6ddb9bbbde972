"""DINO and DINOv2 vision transformers, built by timm from files with the official key names.

Attention runs fused, so no N x N attention matrix is ever stored. Shapes as in `model.backbone`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor
from torch.nn import functional as F

from model.backbone.base import IMAGENET_MEAN, IMAGENET_STD
from model.backbone.names import ARCHITECTURES, patch_size
from model.backbone.weights import Weights


class ViTBackbone:
    """A frozen DINO or DINOv2 transformer. Positions are interpolated as DINO itself does, for any image shape."""

    def __init__(self, vit: VisionTransformer, *, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.patch_size = patch_size(name)
        self.dim: int = vit.embed_dim
        # The register models were trained with exact-size antialiased interpolation, all others with an offset of 0.1.
        self._exact_positions = name.endswith("_reg")
        self._positions = vit.pos_embed.detach().float().to(device)  # before they are rounded: interpolated in float32
        self._vit = vit.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self._mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
        self._dtype = dtype

    @torch.inference_mode()
    def keys(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, h*w, D) float32 keys of the last block; its attention and MLP are skipped."""
        tokens = self._embed(images)
        for block in self._vit.blocks[:-1]:
            tokens = block(tokens)
        last = self._vit.blocks[-1]
        qkv = last.attn.qkv
        key = slice(self.dim, 2 * self.dim)
        bias = None if qkv.bias is None else qkv.bias[key]
        return F.linear(last.norm1(tokens[:, self._vit.num_prefix_tokens :]), qkv.weight[key], bias).float()

    @torch.inference_mode()
    def cls(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) float32 CLS token after the final norm."""
        return self._vit.norm(self._all_blocks(images)[:, 0]).float()

    @torch.inference_mode()
    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, h*w, D) float32 after the final norm; CLS and registers are dropped."""
        return self._vit.norm(self._all_blocks(images)[:, self._vit.num_prefix_tokens :]).float()

    def _all_blocks(self, images: Tensor) -> Tensor:
        tokens = self._embed(images)
        for block in self._vit.blocks:
            tokens = block(tokens)
        return tokens

    def _embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, prefix + N, D) tokens with positions added."""
        height, width = check_images(images, self.patch_size)
        vit = self._vit
        normalised = ((images.to(self._mean.device).float() - self._mean) / self._std).to(self._dtype)
        patches = vit.patch_embed.proj(normalised).flatten(2).transpose(1, 2)
        cls_position, patch_positions = self._position_table(height, width)
        cls_token = vit.cls_token.expand(len(images), -1, -1)
        if cls_position is not None:
            cls_token = cls_token + cls_position.to(self._dtype)
        registers = [] if vit.reg_token is None else [vit.reg_token.expand(len(images), -1, -1)]
        return vit.norm_pre(torch.cat([cls_token, *registers, patches + patch_positions.to(self._dtype)], dim=1))

    def _position_table(self, height: int, width: int) -> tuple[Tensor | None, Tensor]:
        """Position of the CLS token (1, 1, D), None where it is part of the token, and of a (h, w) grid (1, h*w, D)."""
        table = self._positions
        cls_position = None if self._vit.no_embed_class else table[:, :1]
        table = table if cls_position is None else table[:, 1:]
        side = math.isqrt(table.shape[1])
        if (height, width) == (side, side):
            return cls_position, table
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        resized = self._interpolate(square, height, width)
        return cls_position, resized.permute(0, 2, 3, 1).reshape(1, height * width, -1)

    def _interpolate(self, square: Tensor, height: int, width: int) -> Tensor:
        if self._exact_positions:
            return F.interpolate(square, size=(height, width), mode="bicubic", antialias=True)
        side = square.shape[-1]
        # DINO samples at the scale (n + 0.1) / side, not at that of the size: the positions differ slightly.
        return F.interpolate(square, scale_factor=((height + 0.1) / side, (width + 0.1) / side), mode="bicubic")


def check_images(images: Tensor, patch: int) -> tuple[int, int]:
    """The patch grid (h, w) of (B, 3, H, W) images; ValueError when the shape does not fit."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[2:]
    if height % patch or width % patch or not height or not width:
        raise ValueError(f"image sides must be multiples of the patch size {patch}, got {height} x {width}")
    return height // patch, width // patch


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
    """The state dict in a checkpoint file. Pickles are read with weights_only: nothing in the file can be executed."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its unpickler's many types here
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"backbone.weights: {path} is not a checkpoint that torch can read safely: {reason}"
        ) from error
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
