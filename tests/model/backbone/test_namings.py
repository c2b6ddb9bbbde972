"""A model under each naming of its keys is the same model: renamed here, key by key, from timm's names."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.backbone import load_backbone
from model.backbone.names import ARCHITECTURES, patch_size
from model.backbone.namings import timm_names, unwrapped, without_prefixes
from model.backbone.vit import ViTBackbone

State = dict[str, Tensor]

SHARED = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
VIT = SHARED | {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
}
DINOV2 = VIT | {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
DINOV3 = SHARED | {
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "mlp.fc1_g": "mlp.gate_proj",
    "mlp.fc1_x": "mlp.up_proj",
    "gamma_1": "layer_scale1.lambda1",
    "gamma_2": "layer_scale2.lambda1",
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
}


@functools.cache
def seeded_vit(name: str) -> Any:
    """timm's model with weights of which every one shows in the features."""
    vit = timm.create_model(ARCHITECTURES[name], pretrained=False, dynamic_img_size=True, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    for key, value in vit.state_dict().items():
        value.normal_(0, 0.05, generator=generator)
        if "gamma" in key or re.search(r"norm\d?\.weight", key):
            value += 1
    return vit


def seeded(name: str) -> State:
    return {key: value.clone() for key, value in seeded_vit(name).state_dict().items()}


@functools.cache
def features(name: str) -> dict[str, Tensor]:
    backbone = ViTBackbone(seeded_vit(name), name=name, device=torch.device("cpu"), dtype=torch.float32)
    return backbone.features(drawn(name), ["keys", "cls", "tokens"])


def drawn(name: str) -> Tensor:
    patch = patch_size(name)
    return torch.rand(1, 3, 4 * patch, 5 * patch, generator=torch.Generator().manual_seed(1))


def with_cls_position(state: State) -> State:
    """DINOv2 with registers keeps the position of the CLS token apart from that token."""
    place = state["cls_token"] / 2  # so that nothing is rounded when both are added
    table = torch.cat([place, state["pos_embed"]], dim=1)
    return state | {"cls_token": state["cls_token"] - place, "pos_embed": table}


def hugging_face(state: State, names: dict[str, str], layers: str) -> State:
    """The state under Hugging Face's names; `layers` is the prefix of a layer's number."""
    renamed = {}
    for key, value in state.items():
        block, part, kind = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", key).groups()  # type: ignore[union-attr]
        prefix = "" if block is None else f"{layers}{block.split('.')[1]}."
        if part == "attn.qkv":
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{prefix}{names[letter]}{kind}"] = third.clone()
        elif part in ("attn.q_bias", "attn.v_bias"):
            renamed[f"{prefix}{names[part[5]]}.bias"] = value
        else:
            renamed[f"{prefix}{names[part]}{kind or ''}"] = value
    return renamed


def as_vit_model(state: State) -> State:
    pooler = {"pooler.dense.weight": torch.zeros(384, 384), "pooler.dense.bias": torch.zeros(384)}
    return hugging_face(state, VIT, "encoder.layer.") | pooler


def as_dinov2_model(state: State) -> State:
    state = with_cls_position(state) if "reg_token" in state else state
    return hugging_face(state, DINOV2, "encoder.layer.") | {"embeddings.mask_token": torch.zeros(1, 384)}


def as_dinov3_model(state: State) -> State:
    return hugging_face(state, DINOV3, "layer.") | {"embeddings.mask_token": torch.zeros(1, 1, 384)}


def as_dinov2_itself(state: State) -> State:
    state = with_cls_position(state) if "reg_token" in state else state
    renamed = {key.replace("reg_token", "register_tokens"): value for key, value in state.items()}
    return renamed | {"mask_token": torch.zeros(1, 384)}


def as_dinov3_itself(state: State) -> State:
    """With its periods, a mask that takes the bias of the keys away, and a bias for it to take away."""
    official = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16, dtype=torch.bfloat16)}
    for key, value in state.items():
        name = re.sub(r"gamma_(\d)", r"ls\1.gamma", key).replace("reg_token", "storage_tokens")
        name = name.replace("fc1_g", "w1").replace("fc1_x", "w2")
        official[name.replace("mlp.fc2", "mlp.w3") if "blocks.0.mlp.fc1_g.weight" in state else name] = value
    for block in range(12):
        query, value = (official.pop(f"blocks.{block}.attn.{letter}_bias") for letter in "qv")
        official[f"blocks.{block}.attn.qkv.bias"] = torch.cat([query, torch.ones(384), value])
        official[f"blocks.{block}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(384)
    return official


def in_timms_names(state: State) -> State:
    return state


@pytest.mark.parametrize(
    ("name", "naming"),
    [
        ("dino_vits16", as_vit_model),
        ("dinov2_vits14", as_dinov2_model),
        ("dinov2_vits14_reg", as_dinov2_model),
        ("dinov2_vits14_reg", as_dinov2_itself),
        ("dinov2_vits14_reg", in_timms_names),
        ("dinov3_vits16", as_dinov3_model),
        ("dinov3_vits16", as_dinov3_itself),
        ("dinov3_vits16", in_timms_names),
        ("dinov3_vits16plus", as_dinov3_model),
    ],
)
def test_features_do_not_depend_on_the_naming(tmp_path: Path, name: str, naming: Callable[[State], State]) -> None:
    save_file(naming(seeded(name)), tmp_path / "model.safetensors")
    found = load_backbone(name, str(tmp_path / "model.safetensors")).features(drawn(name), ["keys", "cls", "tokens"])
    for output, wanted in features(name).items():
        assert ((found[output] - wanted).norm() / wanted.norm()).item() < 1e-6, output


@pytest.mark.parametrize(
    ("name", "naming", "rotary"),
    [
        ("dinov2_vits14", as_dinov2_itself, False),
        ("dinov3_vits16plus", as_dinov3_itself, True),
        ("dinov3_vits16plus", in_timms_names, True),
    ],
)
def test_names_become_timms(name: str, naming: Callable[[State], State], rotary: bool) -> None:
    found = timm_names(without_prefixes(naming(seeded(name))), rotary=rotary)
    wanted = seeded(name)
    assert {key for key in found if not key.endswith("k_bias")} == set(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert all(not found[key].any() for key in set(found) - set(wanted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_gives_the_features_of_its_rounded_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    rounded = {key: value.to(dtype) for key, value in seeded("dino_vits16").items()}
    torch.save(rounded, tmp_path / "half.pth")
    torch.save({key: value.float() for key, value in rounded.items()}, tmp_path / "full.pth")
    half, full = (load_backbone("dino_vits16", str(tmp_path / f"{file}.pth")) for file in ("half", "full"))
    assert torch.equal(half.tokens(drawn("dino_vits16")), full.tokens(drawn("dino_vits16")))


TEACHER, STUDENT = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)


def under(prefix: str, token: Tensor) -> State:
    return {f"{prefix}cls_token": token, f"{prefix}blocks.0.norm1.weight": token}


@pytest.mark.parametrize(
    "checkpoint",
    [
        under("", TEACHER),
        under("module.", TEACHER),
        under("module.backbone.", TEACHER),
        under("student.backbone.", STUDENT)
        | under("teacher.backbone.", TEACHER)
        | under("teacher.dino_head.", STUDENT),
        {"state_dict": under("student_backbone.", STUDENT) | under("teacher_backbone.", TEACHER)},
        {"state_dict": under("model.teacher.backbone.", TEACHER) | under("model.backbone.", STUDENT), "epoch": 3},
        {"student": under("module.backbone.", STUDENT), "teacher": under("backbone.", TEACHER), "epoch": 3},
        {"model": {"teacher": under("", TEACHER), "student": under("", STUDENT)}, "optimizer": {"state": {}}},
        {"model": under("teacher.backbone.", TEACHER) | under("gram_teacher.backbone.", STUDENT), "iteration": 5},
        {"teacher": under("backbone.", TEACHER) | under("ibot_head.", STUDENT)},
        {"model": {"arch": "vit_small"}, "state_dict": under("_orig_mod.", TEACHER)},
        {"student": under("", TEACHER)},
        {"args": argparse.Namespace(arch="vit_small"), "model": under("", TEACHER)},
        {"teacher": {"cls_token": TEACHER, "mask_token": STUDENT, "backbone.blocks.0.0.norm1.weight": TEACHER}},
    ],
)
def test_wrappers_and_prefixes_are_taken_off_and_the_teacher_taken(checkpoint: Any) -> None:
    found = timm_names(without_prefixes(unwrapped(checkpoint)), rotary=False)
    assert set(found) == {"cls_token", "blocks.0.norm1.weight"}
    assert all(torch.equal(value, TEACHER) for value in found.values())


def test_blocks_in_chunks_keep_their_numbers() -> None:
    state = {"blocks.0.2.norm1.weight": TEACHER, "blocks.3.11.ls1.gamma": TEACHER, "blocks.3.mlp.fc1.bias": TEACHER}
    assert set(timm_names(state, rotary=False)) == {
        *("blocks.2.norm1.weight", "blocks.11.ls1.gamma", "blocks.3.mlp.fc1.bias")
    }


def test_two_models_in_one_file_are_not_mixed() -> None:
    with pytest.raises(ValueError, match=r"holds two models, with 'backbone\.cls_token' and 'student\.cls_token'"):
        without_prefixes({"backbone.cls_token": TEACHER, "student.cls_token": STUDENT})


@pytest.mark.parametrize("checkpoint", [{}, [], TEACHER, {"model": {}}, {"epoch": 3}, {"model": {"arch": "vit"}}])
def test_a_file_without_tensors_is_refused(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        unwrapped(checkpoint)
