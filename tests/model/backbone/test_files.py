"""Files that hold no weights, weights of another model, or broken ones: one line that says what they are."""

from __future__ import annotations

import argparse
import io
import os
import struct
import subprocess
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from model.backbone import check_weights, load_backbone
from model.backbone.build import build_vit
from model.backbone.files import read_checkpoint
from model.backbone.weights import Weights

State = dict[str, Tensor]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a96\nsize 86\n"
PAGE = b"<html>403 Forbidden</html>\n"
TENSORS = {"cls_token": torch.ones(1, 1, 384), "norm.weight": torch.ones(384)}
SAFETENSORS = safetensors.torch.save(TENSORS)


class Code:
    """A pickle of it calls a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", "/nowhere"],)


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def zipped(member: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(member, "none")
    return stream.getvalue()


TORCH = saved(TENSORS)
OLD_TORCH = saved(TENSORS, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (b"", "is empty (0 bytes", "fetch it again"),
        (LFS, "is a Git LFS pointer and not the weights (", "run `git lfs pull` in the clone"),
        (
            b"<html>403 Forbidden</html>\n",
            "is a web page and not the weights (27 bytes, the first are b'<html>403",
            "login",
        ),
        (b"\n <!DOCTYPE html>", "is a web page", "an accepted licence"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "is a web page", "fetch it again"),
        (b"Entry not found", "is neither a file of safetensors nor of torch.save (15 bytes", "give another file"),
        (b'{"error": "gated repo"}', "is neither", "give another file"),
        (bytes(4096), "is neither", "give another file"),
        (SAFETENSORS[:-700], "is cut off: 700 bytes are missing at its end (", "fetch it again"),
        (SAFETENSORS[:20], "is cut off:", "fetch it again"),
        (struct.pack("<Q", 9) + b'{"a": 1}\n', "is a damaged safetensors file (", "fetch it again"),
        (struct.pack("<Q", 9) + b"{nothing}", "is a damaged safetensors file (", "fetch it again"),
        (TORCH[: len(TORCH) // 2], "is cut off or damaged (", "fetch it again"),
        (OLD_TORCH[: len(OLD_TORCH) // 2], "is not a checkpoint of plain weights", "fetch it again"),
        (zipped("weights.txt"), "is not a checkpoint of plain weights", "fetch it again"),
        (
            zipped("relu/constants.pkl"),
            "is a TorchScript program and not weights (",
            "save the state_dict() of its model alone",
        ),
        (
            saved({"model": Code()}),
            "it asks for the global ",
            "save its 'model' alone",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_checkpoint_says_what_it_is(
    tmp_path: Path, content: bytes, what: str, remedy: str, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"backbone.weights: {path} ")
    assert what in message
    assert remedy in message
    assert f"{len(content):,} bytes, the first are {content[:16]!r}" in message
    assert "\n" not in message
    shown = "".join(traceback.format_exception(caught.value))
    assert not any(
        advice in shown for advice in ("weights_only=", "`weights_only`", "safe_globals(", "WeightsUnpickler")
    )


@pytest.mark.parametrize("content", [SAFETENSORS, TORCH, OLD_TORCH])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "4665a5ea423c"])
def test_the_content_says_which_format_it_is_and_not_the_suffix(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    found = read_checkpoint(tmp_path / name)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], value) for key, value in TENSORS.items())


def test_a_safetensors_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    content = next(
        content
        for padding in range(0, 300, 4)
        if (content := safetensors.torch.save(TENSORS, {"padding": "x" * padding})).startswith(b"\x80")
    )
    (tmp_path / "w.safetensors").write_bytes(content)
    assert read_checkpoint(tmp_path / "w.safetensors").keys() == TENSORS.keys()


def test_arguments_of_a_training_beside_the_weights_are_no_obstacle(tmp_path: Path) -> None:
    torch.save({"teacher": TENSORS, "args": argparse.Namespace(arch="vit_small", lr=1e-3)}, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth")
    assert found["args"].arch == "vit_small"
    assert torch.equal(found["teacher"]["cls_token"], TENSORS["cls_token"])


@pytest.fixture(scope="module")
def whole() -> State:
    return build_vit("dino_vits16", Weights(None, 0, "random:0")).state_dict()


Spoil = Callable[[State], Any]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("dino_vits8", dict, "wrong shapes .*patch_embed.proj.weight.* it is one of dino_vits16: set backbone.name to"),
        ("dinov2_vits14", dict, r"missing keys \['blocks.0.ls1.gamma', .*\] \(24\), .*it is one of dino_vits16"),
        ("dinov3_vits16", dict, r"missing keys .*'blocks.0.gamma_1'.*unexpected keys \['pos_embed'\] \(1\)"),
        (
            "dino_vits16",
            lambda state: {key: value for key, value in state.items() if "norm1" not in key} | {"x": torch.ones(1)},
            r"missing keys \['blocks.0.norm1.bias', .*\] \(24\), unexpected keys \['x'\] \(1\), wrong shapes \[\]",
        ),
        ("dino_vits16", lambda state: {"norm.weight": state["norm.weight"]}, r"is it of another model\?"),
        ("dino_vits16", lambda state: {"epoch": 3}, "holds no state dict of tensors"),
        (
            "dino_vits16",
            lambda state: state | {"norm.weight": torch.ones(384, dtype=torch.int8)},
            r"wrong shapes \['norm.weight \(384,\) int8'\] \(1\)",
        ),
        (
            "dino_vits16",
            lambda state: state | {"norm.weight": torch.full((384,), torch.nan), "norm.bias": torch.ones(384) / 0},
            r"has NaN or infinite values in 'norm.weight'.*fetch it again",
        ),
        (
            "dino_vits16",
            lambda state: (
                {"backbone.cls_token": torch.tensor(70000.0).half().expand(1, 1, 384)}
                | {key: value for key, value in state.items() if key != "cls_token"}
            ),
            "has NaN or infinite values in 'cls_token'",
        ),
    ],
)
def test_weights_that_will_not_do_are_told_before_the_work(
    tmp_path: Path, whole: State, name: str, spoil: Spoil, message: str
) -> None:
    torch.save(spoil(whole), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as caught:
        check_weights(name, str(tmp_path / "w.pth"))
    assert str(caught.value).startswith(f"backbone.weights: {tmp_path / 'w.pth'} ")


def test_at_most_five_keys_of_each_kind_are_shown(tmp_path: Path, whole: State) -> None:
    torch.save({f"encoder.{key}": value for key, value in whole.items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing keys .* \(150\), unexpected keys .* \(150\)") as caught:
        check_weights("dino_vits16", str(tmp_path / "w.pth"))
    assert str(caught.value).count("'") == 2 * (5 + 5)


@pytest.mark.parametrize(
    ("saved_as", "asked_for"), [("dinov2_vits14_reg", "dinov2_vits14"), ("dinov3_vits16", "dinov3_vits16plus")]
)
def test_the_name_that_a_file_fits_is_said(tmp_path: Path, saved_as: str, asked_for: str) -> None:
    state = build_vit(saved_as, Weights(None, 0, "random:0")).state_dict()
    torch.save({"teacher": state}, tmp_path / "w.pth")
    check_weights(saved_as, str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match=f"does not fit {asked_for}: .*; it is one of {saved_as}: set backbone.name"):
        check_weights(asked_for, str(tmp_path / "w.pth"))


def test_heads_and_what_is_left_out_may_be_what_they_like(tmp_path: Path, whole: State) -> None:
    torch.save(whole | {"head.last_layer.weight": torch.tensor(torch.nan)}, tmp_path / "w.pth")
    check_weights("dino_vits16", str(tmp_path / "w.pth"))


def test_positions_of_another_grid_are_those_of_the_file(tmp_path: Path, whole: State) -> None:
    table = torch.randn(1, 1 + 3 * 3, 384, generator=torch.Generator().manual_seed(0))
    torch.save(whole | {"pos_embed": table}, tmp_path / "w.pth")
    vit = build_vit("dino_vits16", Weights(tmp_path / "w.pth", None, ""))
    assert torch.equal(vit.pos_embed, table)
    images = torch.zeros(1, 3, 48, 48)
    assert load_backbone("dino_vits16", str(tmp_path / "w.pth")).tokens(images).shape == (1, 9, 384)
    torch.save(whole | {"pos_embed": table[:, 1:9]}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"wrong shapes \['pos_embed \(1, 8, 384\) float32'\]"):
        check_weights("dino_vits16", str(tmp_path / "w.pth"))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a folder; give the file in it"):
        check_weights("dino_vits16", os.fspath(tmp_path))
