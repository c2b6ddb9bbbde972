"""The frozen vision transformers of DINO, DINOv2 and DINOv3. Shapes as in `model.backbone`.

Attention runs fused, so no N x N attention matrix is ever stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backbone.base import IMAGENET_MEAN, IMAGENET_STD
from model.backbone.last_block import cls_after
from model.backbone.names import is_rotary, patch_size
from model.backbone.outputs import Output, block_names, parse_output
from model.backbone.positions import LearnedPositions, RotaryPositions


class ViTBackbone:
    """A frozen transformer, for images of any shape."""

    def __init__(self, vit: Any, *, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.patch_size = patch_size(name)
        self.dim: int = vit.embed_dim
        self._positions = (
            RotaryPositions(vit, device=device)
            if is_rotary(name)
            else LearnedPositions(vit, exact=name.endswith("_reg"), device=device)
        )
        self._vit = vit.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self._mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
        self._dtype = dtype

    def keys(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, h*w, D) float32 keys of the last block; its attention and MLP are skipped.

        They are the plain projection of the patch tokens, all heads concatenated, with every family: DINOv3's are
        taken before positions turn them, so that they say what a patch shows and not where it is.
        """
        return self.features(images, ["keys"])["keys"]

    def cls(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) float32 CLS token after the final norm."""
        return self.features(images, ["cls"])["cls"]

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, h*w, D) float32 after the final norm; CLS and registers are dropped."""
        return self.features(images, ["tokens"])["tokens"]

    def blocks(self, images: Tensor, numbers: Sequence[int], *, norm: bool) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] -> patch tokens (B, h*w, D) float32 after each of these blocks, in one forward pass.

        Numbers count from 0, or from the end if negative. ValueError for a block that there is not.
        """
        names = block_names(numbers, norm=norm)
        found = self.features(images, names)
        return [found[name] for name in names]

    @torch.inference_mode()
    def features(self, images: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """(B, 3, H, W) in [0, 1] -> the wanted outputs by their names, float32, in one forward pass that ends with the
        last of them. Names and ValueError as `model.backbone.outputs.parse_output`."""
        due: defaultdict[int, dict[str, Output]] = defaultdict(dict)
        for name in wanted:
            output = parse_output(name, len(self._vit.blocks))
            due[output.after][name] = output
        tokens, positions = self._embed(images)
        found: dict[str, Tensor] = {}
        last = max(due, default=0)
        for done in range(last + 1):
            if done == last and not positions and {output.kind for output in due[done].values()} == {"cls"}:
                tokens = cls_after(self._vit.blocks[done - 1], tokens)
            elif done:
                tokens = self._vit.blocks[done - 1](tokens, **positions)
            found |= {name: self._read(output, tokens) for name, output in due[done].items()}
        return {name: found[name] for name in wanted}

    def _read(self, output: Output, tokens: Tensor) -> Tensor:
        """One output, of the tokens (B, P + N, D) after its blocks."""
        if output.kind == "cls":
            return self._vit.norm(tokens[:, 0]).float()
        patches = tokens[:, self._vit.num_prefix_tokens :]
        if output.kind == "keys":
            return self._project_keys(patches).float()
        return (self._vit.norm(patches) if output.norm else patches).float()

    def _project_keys(self, patches: Tensor) -> Tensor:
        last = self._vit.blocks[-1]
        qkv = last.attn.qkv
        key = slice(self.dim, 2 * self.dim)
        bias = last.attn.k_bias if qkv.bias is None else qkv.bias[key]
        return F.linear(last.norm1(patches), qkv.weight[key], bias)

    def _embed(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, H, W) -> (B, P + N, D) tokens, and what the blocks are told of positions."""
        grid = check_images(images, self.patch_size)
        normalised = ((images.to(self._mean.device).float() - self._mean) / self._std).to(self._dtype)
        patches = self._vit.patch_embed.proj(normalised).flatten(2).transpose(1, 2)
        return self._positions(patches, grid)


def check_images(images: Tensor, patch: int) -> tuple[int, int]:
    """The patch grid (h, w) of (B, 3, H, W) images; ValueError when the shape does not fit."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[2:]
    if height % patch or width % patch or not height or not width:
        raise ValueError(f"image sides must be multiples of the patch size {patch}, got {height} x {width}")
    return height // patch, width // patch
