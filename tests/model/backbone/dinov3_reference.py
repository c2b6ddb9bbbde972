"""A plain restatement of DINOv3's forward pass, the oracle for `model.backbone`: naive attention, positions turned pair
by pair, nothing fused, nothing skipped."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def seeded_state(dim: int = 384, *, gated: bool = False, depth: int = 12, seed: int = 0) -> State:
    """Random weights under DINOv3's own key names, with everything that its files have."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.05) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    state = {
        "cls_token": draw(1, 1, dim),
        "storage_tokens": draw(1, 4, dim),
        "mask_token": draw(1, dim),
        "rope_embed.periods": periods().bfloat16(),
        "patch_embed.proj.weight": draw(dim, 3, 16, 16),
        "patch_embed.proj.bias": draw(dim),
        "norm.weight": 1 + draw(dim),
        "norm.bias": draw(dim),
    }
    linears = [("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim)]
    up = ["mlp.w1", "mlp.w2"] if gated else ["mlp.fc1"]
    linears += [(name, 4 * dim, dim) for name in up] + [("mlp.w3" if gated else "mlp.fc2", dim, 4 * dim)]
    mask = torch.ones(3 * dim)
    mask[dim : 2 * dim] = 0
    for i in range(depth):
        for name, rows, columns in linears:
            state[f"blocks.{i}.{name}.weight"] = draw(rows, columns, scale=1 / math.sqrt(columns))
            state[f"blocks.{i}.{name}.bias"] = draw(rows)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
        for part in ("1", "2"):
            state[f"blocks.{i}.norm{part}.weight"] = 1 + draw(dim)
            state[f"blocks.{i}.norm{part}.bias"] = draw(dim)
            state[f"blocks.{i}.ls{part}.gamma"] = 0.5 + draw(dim)
    return state


def periods(head_dim: int = 64) -> Tensor:
    """How many half sides of the image one turn takes, of head_dim / 4 pairs along each side."""
    return torch.tensor([100 ** (4 * i / head_dim) for i in range(head_dim // 4)])


def dinov3_forward(state: State, images: Tensor, *, heads: int = 6) -> tuple[Tensor, list[Tensor], Tensor]:
    """(B, 3, H, W) in [0, 1] -> keys of the last block (B, N, D) before they are turned; all 5 + N tokens after each
    block; and those after the last through the final norm."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    angles = patch_angles(*x.shape[2:])
    prefix = [state[name].expand(len(x), -1, -1) for name in ("cls_token", "storage_tokens")]
    x = torch.cat([*prefix, x.flatten(2).transpose(1, 2)], dim=1)
    outputs, keys = [], x
    for i in range(len([key for key in state if key.endswith(".ls1.gamma")])):
        x, keys = _block(state, f"blocks.{i}.", x, heads, angles)
        outputs.append(x)
    return keys[:, 5:], outputs, F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-5)


def patch_angles(rows: int, columns: int) -> Tensor:
    """(N, 32): by how much each pair of channels is turned: 16 pairs by the row of a patch, and 16 by its column."""
    angles = []
    for row in range(rows):
        for column in range(columns):
            centre = 2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1
            angles.append(torch.cat([2 * math.pi * place / periods() for place in centre]))
    return torch.stack(angles)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """(B, heads, 5 + N, 64) -> the same, patches turned: channel c makes a pair with channel c + 32."""
    prefix, first, second = x[:, :, :5], x[:, :, 5:, :32], x[:, :, 5:, 32:]
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat([prefix, torch.cat(turned, dim=-1)], dim=2)


def _block(state: State, prefix: str, x: Tensor, heads: int, angles: Tensor) -> tuple[Tensor, Tensor]:
    def linear(name: str, y: Tensor) -> Tensor:
        bias = state[f"{prefix}{name}.bias"] * state.get(f"{prefix}{name}.bias_mask", torch.tensor(1.0))
        return y @ state[f"{prefix}{name}.weight"].T + bias

    def norm(name: str, y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"], 1e-5)

    batch, tokens, dim = x.shape
    q, k, v = linear("attn.qkv", norm("norm1", x)).reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    attention = (_turned(q, angles) @ _turned(k, angles).transpose(-2, -1) * (dim // heads) ** -0.5).softmax(-1)
    attended = linear("attn.proj", (attention @ v).transpose(1, 2).reshape(batch, tokens, dim))
    x = x + state[f"{prefix}ls1.gamma"] * attended
    y = norm("norm2", x)
    gated = f"{prefix}mlp.w1.weight" in state
    hidden = F.silu(linear("mlp.w1", y)) * linear("mlp.w2", y) if gated else F.gelu(linear("mlp.fc1", y))
    x = x + state[f"{prefix}ls2.gamma"] * linear("mlp.w3" if gated else "mlp.fc2", hidden)
    return x, k.transpose(1, 2).reshape(batch, tokens, dim)
