"""Files that hold no weights, or broken ones: one line that says what they are."""

from __future__ import annotations

import argparse
import io
import os
import struct
import subprocess
import traceback
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from model.backbone import check_weights
from model.backbone.files import read_checkpoint

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


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a folder; give the file in it"):
        check_weights("dino_vits16", os.fspath(tmp_path))
