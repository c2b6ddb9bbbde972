"""Backbones against a plain restatement of DINO, and the errors of their weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from dino_reference import dino_keys_and_cls, dino_keys_and_tokens, seeded_state

from model.backbone import load_backbone
from model.backbone.build import empty_vit
from model.backbone.names import ARCHITECTURES, embedding_dim, patch_size
from model.backbone.vit import ViTBackbone


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("name", "dim", "patch", "size"),
    [
        ("dino_vits16", 384, 16, (224, 224)),
        ("dino_vits16", 384, 16, (480, 480)),
        ("dino_vits16", 384, 16, (224, 160)),
        ("dino_vits8", 384, 8, (224, 224)),
        ("dino_vits8", 384, 8, (160, 240)),
        ("dino_vitb8", 768, 8, (224, 224)),
        ("dino_vits8", 384, 8, (320, 320)),
    ],
)
def test_keys_and_cls_equal_a_naive_forward(
    tmp_path: Path, name: str, dim: int, patch: int, size: tuple[int, int]
) -> None:
    state = seeded_state(dim, patch)
    torch.save(state, tmp_path / "dino.pth")
    backbone = load_backbone(name, str(tmp_path / "dino.pth"))
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    keys, cls = dino_keys_and_cls(state, images, patch=patch, heads=dim // 64)
    found = backbone.keys(images)
    assert found.shape == (1, size[0] // patch * size[1] // patch, dim)
    assert relative(found, keys) < 1e-4
    assert relative(backbone.cls(images), cls) < 1e-4


@pytest.mark.parametrize(("name", "patch", "size"), [("dino_vits8", 8, (64, 96)), ("dino_vits16", 16, (224, 160))])
def test_tokens_are_the_patches_after_the_final_norm(
    tmp_path: Path, name: str, patch: int, size: tuple[int, int]
) -> None:
    state = seeded_state(384, patch)
    torch.save(state, tmp_path / "dino.pth")
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    _, tokens = dino_keys_and_tokens(state, images, patch=patch, heads=6)
    found = load_backbone(name, str(tmp_path / "dino.pth")).tokens(images)
    assert found.shape == (2, size[0] // patch * size[1] // patch, 384)
    assert relative(found, tokens[:, 1:]) < 1e-4


def test_bfloat16_stays_close_to_float32() -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    full = load_backbone("dino_vits16", "random:0").keys(images)
    half = load_backbone("dino_vits16", "random:0", dtype="bfloat16").keys(images)
    assert half.dtype == torch.float32
    assert 0 < relative(half, full) < 0.03


def test_random_weights_are_a_function_of_the_seed() -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    first = load_backbone("dino_vits16", "random:3").cls(images)
    torch.manual_seed(6)
    assert torch.equal(first, load_backbone("dino_vits16", "random:3").cls(images))
    assert not torch.allclose(first, load_backbone("dino_vits16", "random:4").cls(images))


def test_full_training_checkpoint_with_prefixes_loads_its_teacher(tmp_path: Path) -> None:
    state = seeded_state(384, 16)
    teacher = {f"module.backbone.{key}": value for key, value in state.items()} | {
        "module.head.mlp.0.weight": state["cls_token"]
    }
    torch.save({"teacher": teacher, "epoch": 3}, tmp_path / "full.pth")
    torch.save(state, tmp_path / "plain.pth")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    full = load_backbone("dino_vits16", str(tmp_path / "full.pth")).cls(images)
    assert torch.equal(full, load_backbone("dino_vits16", str(tmp_path / "plain.pth")).cls(images))


def test_weights_of_another_model_are_refused_with_the_keys(tmp_path: Path) -> None:
    torch.save(seeded_state(384, 16), tmp_path / "s16.pth")
    with pytest.raises(ValueError, match=r"does not fit dino_vitb16.*wrong shapes"):
        load_backbone("dino_vitb16", str(tmp_path / "s16.pth"))
    state = seeded_state(384, 16)
    del state["blocks.3.norm1.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"missing keys \['blocks.3.norm1.weight'\] \(1\)"):
        load_backbone("dino_vits16", str(tmp_path / "cut.pth"))


def test_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"cls_token": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"not a checkpoint of plain weights .*: it asks for the global pathlib\."):
        load_backbone("dino_vits16", str(tmp_path / "code.pth"))


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16", "patch-dct"])
def test_every_family_gives_keys_of_any_grid(name: str) -> None:
    backbone, patch = load_backbone(name, "random:0"), patch_size(name)
    images = torch.rand(2, 3, 3 * patch, 5 * patch, generator=torch.Generator().manual_seed(1))
    assert backbone.keys(images).shape == (2, 15, embedding_dim(name))
    assert backbone.tokens(images).shape == (2, 15, embedding_dim(name))
    assert backbone.cls(images).shape == (2, embedding_dim(name))
    with pytest.raises(ValueError, match=f"{patch}"):
        backbone.keys(images[:, :, 1:])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_table_of_names_agrees_with_the_models(name: str) -> None:
    patch, dim = patch_size(name), embedding_dim(name)
    meta = torch.device("meta")
    backbone = ViTBackbone(empty_vit(name), name=name, device=meta, dtype=torch.float32)
    images = torch.empty(1, 3, 2 * patch, 3 * patch, device=meta)
    found = backbone.features(images, ["keys", "cls", "tokens", "block:-1"])
    assert (backbone.patch_size, backbone.dim) == (patch, dim)
    assert {key: value.shape for key, value in found.items()} == {
        **dict.fromkeys(("keys", "tokens", "block:-1"), (1, 6, dim)),
        "cls": (1, dim),
    }


def test_patch_dct_ignores_a_constant_image_and_separates_two_textures() -> None:
    backbone = load_backbone("patch-dct", "random:0")
    assert backbone.keys(torch.full((1, 3, 64, 64), 0.3)).abs().max() < 2.0  # position alone is left
    images = torch.full((1, 3, 64, 64), 0.2)
    images[..., 32:] = torch.rand(3, 64, 32, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(backbone.keys(images)[0], dim=-1).reshape(8, 8, -1)
    assert (unit[4, 1] @ unit[4, 2]).item() > 0.5 > 0 > (unit[4, 1] @ unit[4, 6]).item()


def test_patch_dct_tokens_tell_images_apart_where_the_mean_of_its_keys_cannot() -> None:
    backbone = load_backbone("patch-dct", "random:0")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 0.2
    images[1] += 0.7
    mean_keys, mean_tokens = (
        torch.nn.functional.normalize(patches.mean(1), dim=-1)
        for patches in (backbone.keys(images), backbone.tokens(images))
    )
    assert (mean_keys[0] @ mean_keys[1]).item() > 0.9999
    assert (mean_tokens[0] @ mean_tokens[1]).item() < 0.5
