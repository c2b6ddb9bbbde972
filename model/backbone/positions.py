"""How a vision transformer is told where its patches are: by what is added to the tokens (DINO, DINOv2), or by turning
queries and keys in each block (DINOv3).

Each class puts the prefix, CLS and registers, before the patches, and says what the blocks are called with.
Shapes: B images, (h, w) patches, N = h * w, P prefix tokens, D channels.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]


class LearnedPositions:
    """A table of positions, interpolated as DINO itself does, for any grid."""

    def __init__(self, vit: Any, *, exact: bool, device: torch.device) -> None:
        """`exact`: interpolate to exactly the size, antialiased, as the register models were trained.

        The table is taken before the model is rounded to another dtype: it is interpolated in float32.
        """
        self._vit, self._exact = vit, exact
        self._table = vit.pos_embed.detach().float().to(device)

    def __call__(self, patches: Tensor, grid: Grid) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N, D) -> (B, P + N, D) with positions added; the blocks take nothing else."""
        vit, dtype = self._vit, patches.dtype
        cls_position, patch_positions = self._resized(*grid)
        cls_token = vit.cls_token.expand(len(patches), -1, -1)
        if cls_position is not None:
            cls_token = cls_token + cls_position.to(dtype)
        registers = [] if vit.reg_token is None else [vit.reg_token.expand(len(patches), -1, -1)]
        return vit.norm_pre(torch.cat([cls_token, *registers, patches + patch_positions.to(dtype)], dim=1)), {}

    def _resized(self, height: int, width: int) -> tuple[Tensor | None, Tensor]:
        """Position of the CLS token (1, 1, D), None where it is part of the token, and of a (h, w) grid (1, h*w, D)."""
        table = self._table
        cls_position = None if self._vit.no_embed_class else table[:, :1]
        table = table if cls_position is None else table[:, 1:]
        side = math.isqrt(table.shape[1])
        if (height, width) == (side, side):
            return cls_position, table
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        resized = self._interpolate(square, height, width)
        return cls_position, resized.permute(0, 2, 3, 1).reshape(1, height * width, -1)

    def _interpolate(self, square: Tensor, height: int, width: int) -> Tensor:
        if self._exact:
            return F.interpolate(square, size=(height, width), mode="bicubic", antialias=True)
        side = square.shape[-1]
        # DINO samples at the scale (n + 0.1) / side, not at that of the size: the positions differ slightly.
        return F.interpolate(square, scale_factor=((height + 0.1) / side, (width + 0.1) / side), mode="bicubic")


class RotaryPositions:
    """Angles of the patch centres, in [-1, 1] along each side of the image, so that any grid will do."""

    def __init__(self, vit: Any, *, device: torch.device) -> None:
        self._vit = vit
        self._rope = copy.deepcopy(vit.rope).float().to(device)  # before it is rounded with the rest of the model

    def __call__(self, patches: Tensor, grid: Grid) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N, D) -> (B, P + N, D), and the sines and cosines that each block turns its queries and keys by."""
        vit = self._vit
        prefix = [token.expand(len(patches), -1, -1) for token in (vit.cls_token, vit.reg_token)]
        return torch.cat([*prefix, patches], dim=1), {"rope": self._rope.get_embed(list(grid))}
