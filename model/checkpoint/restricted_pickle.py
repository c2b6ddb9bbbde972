"""Files of weights, read without trusting them: numpy arrays, numpy scalars, tensors and plain containers.

A pickle is a program. Files of torch.save are left to torch with `weights_only`. In all others the few names that
arrays and tensors need lead to stand-ins of our own, so that neither numpy's nor torch's unpickling code runs on the
file's data, and any other name ends the reading before it is imported. Such files come from detectron2's converters (a
pickled dict of numpy arrays), also from those that ran on Python 2.
Left out on purpose: arrays of objects, strings and records.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from model.checkpoint.strangers import ZIP, head_of, looks, require_weights

NUMBERS = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)")  # dtypes that are accepted, as numpy spells them in a pickle
TORCH_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how they began before torch 1.6
BROKEN = (  # what pickle, numpy and torch raise on a file that is cut short, damaged or made to mislead
    *(pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError),
    *(AssertionError, RuntimeError, MemoryError, struct.error, zipfile.BadZipFile),
)


def read_weights(path: str | Path) -> Any:
    """The content of a checkpoint on the CPU: of torch.save read with `weights_only`, of any other by `read_pickle`.

    The first bytes tell which it is, not the suffix. FileNotFoundError without the file; ValueError naming the file,
    and the global where one was refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; give the path of a checkpoint (.pth or .pkl)")
    require_weights(path)
    start = head_of(path)
    if not start.startswith((ZIP, TORCH_LEGACY)):
        return read_pickle(path)
    # Mapped, so that the optimizer's state, which is as large as the weights, is not read. Of a path with this suffix
    # torch expects the other format, whatever is in the file.
    mapped = start.startswith(ZIP) and path.suffix != ".safetensors"
    try:
        with path.open("rb") as stream:
            return torch.load(path if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped)
    except BROKEN as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it asks for the global {refused[1]}, which is refused"
            if refused
            else f"torch fails on it ({type(error).__name__})"
        )
    # Outside `except`: torch's own words advise to turn the restriction off, and a traceback would print them.
    raise ValueError(
        f"{path} is not a checkpoint of plain weights ({looks(start, path.stat().st_size)}): {reason}; fetch it again, "
        "or if you trust its origin, save its 'model' alone with the program that wrote it"
    )


def read_pickle(path: str | Path) -> Any:
    """The content of a pickle of any protocol; numpy arrays and scalars become tensors of their shape and dtype.

    Strings of Python 2 are read as latin1. ValueError naming the file, and the global where one was refused, when it
    holds anything but arrays, tensors, dict, OrderedDict, list, tuple, strings, bytes and numbers, or is broken.
    """
    path = Path(path)
    with path.open("rb") as stream:
        try:
            return _plain(_WeightsUnpickler(stream).load())
        except BROKEN as error:
            seen = looks(head_of(path), path.stat().st_size)
            raise ValueError(
                f"{path} is not a pickle of plain weights ({seen}): {error}; if you trust its "
                " origin, load it with the program that wrote it and save a dict of numpy arrays"
            ) from error


class _Leaf:
    """What takes the place of an array, a scalar, a tensor or its storage while the file is read."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """The state that numpy's `ndarray.__reduce__` writes."""
        _version, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C").value


class _Dtype:
    """A dtype as the file describes it: its code, and by `__setstate__` its byte order."""

    def __init__(self, code: str, _align: bool = False, _copy: bool = False) -> None:
        if not NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError(f"it holds an array of numpy dtype {code!r}, which is no number")
        self.code = code
        self.order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)


class _WeightsUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        stand_in = STAND_INS.get(f"{module.replace('numpy._core', 'numpy.core')}.{name}")
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for the global {module}.{name}, which is refused")
        # A pickle may set attributes of what it was given: of this partial, then, and not of the module's function.
        return functools.partial(stand_in)


def _plain(value: Any) -> Any:
    """`value` with tensors where stand-ins were."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, _Leaf) and isinstance(value.value, (np.ndarray, Tensor)):
        return _tensor(value.value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__.lstrip('_')} where weights were expected")


def _tensor(value: np.ndarray | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # A copy: the array is a view of read-only bytes, and torch knows native byte order and positive strides alone.
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))


def _array(raw: Any, dtype: _Dtype, shape: Sequence[int], order: Any, axes: Sequence[int] | None = None) -> _Leaf:
    data = raw.encode("latin1") if isinstance(raw, str) else raw  # bytes of Python 2 are read as text
    if not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError(f"it holds an array made of a {type(raw).__name__} and not of bytes")
    values = np.frombuffer(data, dtype.numpy()) if data else np.empty(0, dtype.numpy())
    array = values.reshape(tuple(shape), order="F" if order == "F" else "C")
    return _Leaf(array if axes is None else array.transpose(axes))


def _new_array(_subtype: Any, _shape: Any, _code: Any) -> _Leaf:
    """numpy's `_reconstruct`: an empty array whose state follows."""
    return _Leaf()


def _ndarray_type(*_: Any) -> None:
    raise pickle.UnpicklingError("it calls numpy.ndarray itself")


def _scalar(dtype: _Dtype, raw: Any) -> _Leaf:
    return _array(raw, dtype, (), "C")


def _encode(text: str, encoding: str) -> bytes:
    """How protocols before 3 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    return b""


def _storage(data: bytes) -> _Leaf:
    """torch's own function reads these bytes without restrictions."""
    return _Leaf(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def _strided(storage: _Leaf, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> _Leaf:
    values = torch.empty(0, dtype=storage.value.dtype).set_(storage.value)
    return _Leaf(values.as_strided(size, stride, offset))  # as_strided checks the bounds of the storage


def _parameter(data: _Leaf, *_: Any) -> _Leaf:
    return data


STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": _new_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
    "numpy.ndarray": _ndarray_type,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _empty_bytes,
    "builtins.bytes": _empty_bytes,
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _strided,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
}
