"""Reading files of weights without trusting them: what opens, what is refused, and that nothing runs."""

from __future__ import annotations

import os
import pickle
import traceback
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from model.checkpoint.restricted_pickle import STAND_INS, read_weights


class Attack:
    """Unpickled by a program that trusts it, this would make the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def write_pickle(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_arrays_of_every_protocol_become_tensors(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "turned": np.arange(24, dtype=np.float16).reshape(2, 3, 4).transpose(2, 0, 1),
        "big_endian": np.arange(3, dtype=">i4"),
        "counter": np.array(7),
        "scalar": np.float32(0.5),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }
    read = read_weights(write_pickle(tmp_path / "w.pkl", arrays, protocol))
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].numpy().dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(read[name].numpy(), array)


@given(
    hnp.arrays(
        st.sampled_from(["f2", "f4", "f8", "i1", "u1", "i8", "?", ">f4"]), hnp.array_shapes(min_dims=0, max_side=5)
    ),
    st.integers(0, 5),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_array_survives_the_restricted_reading(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    read = read_weights(write_pickle(tmp_path / "w.pkl", {"a": array}, protocol))["a"]
    assert read.numpy().tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()


def test_tensors_and_parameters_in_a_plain_pickle(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"view": base[1:, 2:], "half": base.bfloat16(), "parameter": nn.Parameter(base), "zero": torch.tensor(3)}
    read = read_weights(write_pickle(tmp_path / "w.pkl", tensors))
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].equal(tensor)
        assert not read[name].requires_grad


def test_a_pickle_of_python_2_opens(tmp_path: Path) -> None:
    """{"model": {"w": float32 array [1, -2]}} as Python 2's cPickle wrote it, where bytes and text are one."""
    # "\x80?" and "\xc0" are beyond ASCII: read as anything but latin1 the pickle would not open.
    pickled = (
        b"\x80\x02}q\x01U\x05modelq\x02}q\x03U\x01wq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\n"
        b"q\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02\x85cnumpy\ndtype\nq\x08U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tbss."
    )
    (tmp_path / "py2.pkl").write_bytes(pickled)
    assert read_weights(tmp_path / "py2.pkl")["model"]["w"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("name", ["plain.pkl", "plain.pth", "zip.pth", "legacy.pth", "torch_in.pkl"])
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / name
    attack = {"model": Attack(mark)}
    if name.startswith("plain"):
        path.write_bytes(pickle.dumps(attack))
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=name != "legacy.pth")
    with pytest.raises(ValueError, match=rf"{name}.*global (posix|nt)\.system"):
        read_weights(path)
    assert not mark.exists()


def test_a_command_inside_a_tensors_bytes_is_refused_too(tmp_path: Path) -> None:
    """torch pickles a storage as bytes for its own unrestricted loader."""
    mark = tmp_path / "executed"
    torch.save(Attack(mark), tmp_path / "inner.pth")
    inner = (tmp_path / "inner.pth").read_bytes()

    class Storage:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (inner,)

    with pytest.raises(ValueError, match="system"):
        read_weights(write_pickle(tmp_path / "w.pkl", {"w": Storage()}))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.array(["a", None], dtype=object), "dtype 'O8'"),
        (np.zeros(2, dtype=[("x", "f4")]), "dtype 'V4'"),
        (np.array(["text"]), "dtype 'U4'"),
        ({1, 2}, "set"),
        (slice(1), "slice"),
    ],
    ids=["objects", "records", "strings", "set", "other"],
)
def test_what_is_no_number_is_refused_by_name(tmp_path: Path, value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"w\.pkl.*{reason}"):
        read_weights(write_pickle(tmp_path / "w.pkl", {"w": value}, protocol=2))


def test_a_pickle_cannot_change_what_it_is_given(tmp_path: Path) -> None:
    """The global `scalar`, then BUILD with (None, {"planted": 1}), which sets an attribute of a function."""
    program = b"\x80\x02cnumpy.core.multiarray\nscalar\nN}X\x07\x00\x00\x00plantedK\x01s\x86b."
    (tmp_path / "w.pkl").write_bytes(program)
    with pytest.raises(ValueError, match="not a pickle of plain weights"):
        read_weights(tmp_path / "w.pkl")
    assert not any(hasattr(stand_in, "planted") for stand_in in STAND_INS.values())


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_pickle_opens_or_is_refused_by_name(tmp_path: Path, position: int, value: int) -> None:
    path = write_pickle(tmp_path / "w.pkl", {"w": np.arange(4.0), "v": np.float32(1)}, protocol=2)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data[: max(1, position % (2 * len(data)))])
    try:
        read_weights(path)
    except ValueError as error:  # and nothing else
        assert str(path) in str(error)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04 cut short"], ids=["empty", "text", "zip"])
@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
def test_other_files_are_refused(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        read_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_weights(tmp_path / f"absent-{name}")


@pytest.mark.parametrize(
    ("data", "what", "remedy"),
    [
        (b"", "is empty", "fetch it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
            "is a Git LFS pointer",
            "git lfs pull",
        ),
        (b"\n <!doctype html><html>403 Forbidden</html>", "is a web page", "may want a login"),
        (b"PK\x03\x04 cut short", "is cut off or damaged", "fetch it again"),
        (b"hello", "is not a pickle of plain weights", "load it with the program that wrote it"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
def test_a_file_that_is_no_weights_says_what_it_is_and_how_it_begins(
    tmp_path: Path, data: bytes, what: str, remedy: str, name: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_weights(tmp_path / name)
    message = str(caught.value)
    assert what in message and remedy in message
    assert f"({len(data):,} bytes, the first are {data[:16]!r})" in message


def test_nothing_of_torchs_advice_to_load_all_the_same_is_shown(tmp_path: Path) -> None:
    torch.save({"model": Attack(tmp_path / "executed")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"bytes, the first are b'PK.*the global (posix|nt)\.system") as caught:
        read_weights(tmp_path / "w.pth")
    shown = "".join(traceback.format_exception(caught.value))
    assert not any(advice in shown for advice in ("weights_only=", "`weights_only`", "safe_globals(", "Unpickler"))
