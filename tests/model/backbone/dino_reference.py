"""A plain restatement of DINO's published forward pass, the oracle for `model.backbone`: naive attention, DINO's own
interpolation of positions, nothing fused, nothing skipped."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def seeded_state(dim: int, patch: int, *, depth: int = 12, seed: int = 0) -> State:
    """Random weights under the official key names of a DINO ViT trained at 224 px."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.05) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    state = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": draw(1, (224 // patch) ** 2 + 1, dim, scale=0.2),
        "patch_embed.proj.weight": draw(dim, 3, patch, patch),
        "patch_embed.proj.bias": draw(dim),
        "norm.weight": 1 + draw(dim),
        "norm.bias": draw(dim),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            state[f"blocks.{i}.{name}.weight"] = draw(rows, columns, scale=1 / math.sqrt(columns))
            state[f"blocks.{i}.{name}.bias"] = draw(rows)
        for norm in ("norm1", "norm2"):
            state[f"blocks.{i}.{norm}.weight"] = 1 + draw(dim)
            state[f"blocks.{i}.{norm}.bias"] = draw(dim)
    return state


def dino_keys_and_cls(
    state: State, images: Tensor, *, patch: int, heads: int, depth: int = 12
) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [0, 1] -> keys of the last block (B, N, D) and the CLS token after the final norm (B, D)."""
    keys, tokens = dino_keys_and_tokens(state, images, patch=patch, heads=heads, depth=depth)
    return keys, tokens[:, 0]


def dino_keys_and_tokens(
    state: State, images: Tensor, *, patch: int, heads: int, depth: int = 12
) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [0, 1] -> keys of the last block (B, N, D) and all tokens after the final norm (B, 1 + N, D)."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    rows, columns = x.shape[2:]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + _positions(state["pos_embed"], rows, columns)
    keys = x
    for i in range(depth):
        x, keys = _block(state, f"blocks.{i}.", x, heads)
    return keys[:, 1:], F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)


def _positions(table: Tensor, rows: int, columns: int) -> Tensor:
    count = table.shape[1] - 1
    if rows * columns == count and rows == columns:
        return table
    side = int(math.sqrt(count))
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / math.sqrt(count), (columns + 0.1) / math.sqrt(count))
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)], dim=1)


def _block(state: State, prefix: str, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    def linear(name: str, y: Tensor) -> Tensor:
        return y @ state[f"{prefix}{name}.weight"].T + state[f"{prefix}{name}.bias"]

    def norm(name: str, y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"], 1e-6)

    batch, tokens, dim = x.shape
    q, k, v = linear("attn.qkv", norm("norm1", x)).reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    attention = ((q @ k.transpose(-2, -1)) * (dim // heads) ** -0.5).softmax(-1)
    x = x + linear("attn.proj", (attention @ v).transpose(1, 2).reshape(batch, tokens, dim))
    x = x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))
    return x, k.transpose(1, 2).reshape(batch, tokens, dim)
