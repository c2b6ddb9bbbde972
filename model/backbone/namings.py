"""Keys of a checkpoint, under whichever names it was saved -> those of timm's models.

Known are the names of DINO, DINOv2 and DINOv3, with and without the wrappers and prefixes of a training, those of
Hugging Face's ViTModel, Dinov2Model and DINOv3ViTModel, and timm's own. Each step is a pure function of a state dict;
what no step knows keeps its name, so that it can be reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

WRAPPERS = ("teacher", "model", "state_dict", "student")  # around a state dict; of several, the first is opened
NESTED = 4  # wrappers in one another, at most
_PARTS = "module|model|backbone|teacher|student|teacher_backbone|student_backbone|_orig_mod|vit|dinov2|dinov3_vit"
_PREFIX = re.compile(rf"((?:{_PARTS})\.)*")
# Heads, what only pretraining uses, and the periods of rotary positions, which are computed: DINOv3's own files have
# them, Hugging Face's have not, and the same weights are to give the same features.
_LEFT_OUT = re.compile(
    r"(\w*head|classifier|pooler|local_cls_norm|projectors|rope|rope_embed|rope_embeddings)\."
    r"|(embeddings\.)?mask_token$|masked_embed$"
)
_HUGGING_FACE = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"^(encoder\.)?layers?\.", "blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
    )
)
_GATED = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}  # DINOv3 S+
_PLAIN = {"up_proj": "fc1", "down_proj": "fc2"}  # its other sizes
_ROTARY = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(storage|register)_tokens$", "reg_token"),
        (r"\.ls(\d)\.gamma$", r".gamma_\1"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    )
)


def unwrapped(checkpoint: Any) -> State:
    """The tensors of the state dict in a checkpoint. ValueError when there is none.

    A training keeps it under `teacher`, `model`, `state_dict` or `student`, or in several of them.
    """
    tensors = _tensors(checkpoint, NESTED)
    if not tensors:
        raise ValueError("holds no state dict of tensors")
    return tensors


def without_prefixes(state: State) -> State:
    """The backbone's tensors without `teacher.`, `module.`, `backbone.` and the like, nor heads.

    Only the teacher's where some keys say `teacher`. ValueError when two tensors then have one name.
    """
    prefixes = {key: _prefix(key) for key in state}
    teacher = any("teacher" in prefix for prefix in prefixes.values())
    found: dict[str, str] = {}
    for key, prefix in prefixes.items():
        name = key[len(prefix) :]
        if _LEFT_OUT.match(name) or (teacher and "teacher" not in prefix):
            continue
        if name in found:
            raise ValueError(f"holds two models, with {found[name]!r} and {key!r}; save the one that is meant alone")
        found[name] = key
    return {name: state[key] for name, key in found.items()}


def timm_names(state: State, *, rotary: bool) -> State:
    """A state without prefixes, under the names of timm's model; `rotary` for DINOv3."""
    if any(key.startswith("embeddings.") for key in state):
        state = _from_hugging_face(state)
    # FSDP trains in chunks of blocks, whose numbers run on: blocks.1.6 is block 6.
    state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key): value for key, value in state.items()}
    return _for_rotary(state) if rotary else _for_learned(state)


def _tensors(checkpoint: Any, depth: int) -> State:
    if not isinstance(checkpoint, Mapping) or not depth:
        return {}
    for wrapper in WRAPPERS:
        inner = _tensors(checkpoint.get(wrapper), depth - 1)
        if inner:
            return inner
    return {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _prefix(key: str) -> str:
    found = _PREFIX.match(key)
    return "" if found is None else found[0]


def _renamed(key: str, table: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, name in table:
        key = pattern.sub(name, key)
    return key


def _from_hugging_face(state: State) -> State:
    """Hugging Face's names -> the official ones of DINO, DINOv2 and DINOv3."""
    mlp = _GATED if any(".gate_proj." in key for key in state) else _PLAIN
    renamed = {}
    for key, value in state.items():
        name = _renamed(key, _HUGGING_FACE)
        renamed[re.sub(r"\.mlp\.(\w+_proj)\.", lambda found: f".mlp.{mlp.get(found[1], found[1])}.", name)] = value
    return _joined(renamed)


def _joined(state: State) -> State:
    """Queries, keys and values of a block -> one projection of all three. DINOv3's keys have no bias: it is zero."""
    joined = dict(state)
    for key in [key for key in state if key.endswith((".attn.q.weight", ".attn.q.bias"))]:
        block, kind = key.split(".q.")
        names = [f"{block}.{part}.{kind}" for part in "qkv"]
        parts = [state.get(name) for name in names]
        if kind == "bias" and parts[1] is None:
            parts[1] = torch.zeros_like(state[key])
        whole = [part for part in parts if part is not None]
        if len(whole) == 3 and len({part.shape for part in whole}) == 1 and whole[0].ndim:
            joined[f"{block}.qkv.{kind}"] = torch.cat(whole)
            for name in names:
                joined.pop(name, None)
    return joined


def _for_learned(state: State) -> State:
    """DINO and DINOv2: timm adds the position of the CLS token to that token where there are registers."""
    named = {"reg_token" if key == "register_tokens" else key: value for key, value in state.items()}
    table, cls_token = named.get("pos_embed"), named.get("cls_token")
    if "reg_token" in named and table is not None and cls_token is not None and _has_cls_position(table, cls_token):
        named |= {"cls_token": cls_token.float() + table[:, :1], "pos_embed": table[:, 1:]}
    return named


def _for_rotary(state: State) -> State:
    """DINOv3: timm has the three biases of a block apart. Those that a file lacks are zero."""
    named = {_renamed(key, _ROTARY): value for key, value in state.items()}
    for key in [key for key in named if key.endswith(".attn.qkv.weight")]:
        attention, weight = key.removesuffix("qkv.weight"), named[key]
        bias = named.get(f"{attention}qkv.bias", weight.new_zeros(weight.shape[:1]))
        mask = named.get(f"{attention}qkv.bias_mask", torch.ones_like(bias))
        if bias.ndim == 1 and len(bias) and len(bias) % 3 == 0 and mask.shape == bias.shape:
            query, key_bias, value = (bias * mask).chunk(3)
            named = {f"{attention}q_bias": query, f"{attention}k_bias": key_bias, f"{attention}v_bias": value} | named
            named.pop(f"{attention}qkv.bias", None)
            named.pop(f"{attention}qkv.bias_mask", None)
    return named


def _has_cls_position(table: Tensor, cls_token: Tensor) -> bool:
    """Whether a table (1, n, D) has positions of a square grid and of the CLS token, and not of a square grid alone."""
    if table.ndim != 3 or table[:, :1].shape != cls_token.shape:
        return False
    patches = table.shape[1] - 1
    return patches > 0 and math.isqrt(patches) ** 2 == patches
