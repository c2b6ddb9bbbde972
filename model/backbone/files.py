"""A file of weights -> what it holds, whichever format it has and whatever its suffix says.

Nothing in a file is executed, nor unpickled but tensors and plain containers. What is no checkpoint at all, such as a
page that a server sent in its place, is told by its first bytes. Every message is one line that names the file, its
size and its first bytes, and says what to do.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from model.checkpoint.restricted_pickle import ZIP, read_weights

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BLANK = b"\xef\xbb\xbf \t\r\n"  # what may stand before the first tag of a page
PICKLE = b"\x80"  # how a pickle of protocol 2 or newer begins, those of torch before 1.6 among them
MAX_HEADER = 100_000_000  # bytes of JSON that safetensors itself accepts
_AGAIN = "fetch it again"


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint of safetensors or `torch.save`, on the CPU, mapped rather than read where it can be.

    ValueError when it is empty, cut off, damaged or something else, or holds more than tensors and plain containers.
    """
    with path.open("rb") as stream:
        head = stream.read(len(LFS_POINTER) + 64)
    problem = _no_checkpoint(head)
    if problem is not None:
        raise _unreadable(path, *problem)
    return _read_torch(path) if _header_size(head) is None else _read_safetensors(path)


def _read_torch(path: Path) -> Any:
    _check_archive(path)
    try:
        # DINO's own training checkpoints keep their arguments in one, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return read_weights(path)
    except ValueError as error:
        reason = str(error).splitlines()[0].removeprefix(f"{path} ")
    # Outside `except`: the cause has torch's advice to switch its restriction off, which a traceback would print.
    raise ValueError(f"backbone.weights: {path} {reason} ({_looks(path)})")


def _check_archive(path: Path) -> None:
    """ValueError for an archive that is cut off, or of a program: torch would take it for one and warn."""
    with path.open("rb") as stream:
        if stream.read(len(ZIP)) != ZIP:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise _unreadable(path, "is cut off or damaged", _AGAIN) from None
    if any(name.endswith("constants.pkl") for name in names):
        raise _unreadable(path, "is a TorchScript program and not weights", "save the state_dict() of its model alone")


def _read_safetensors(path: Path) -> Any:
    missing = _missing_bytes(path)
    if missing:
        raise _unreadable(path, f"is cut off: {missing:,} bytes are missing at its end", _AGAIN)
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
    raise _unreadable(path, f"is a damaged safetensors file ({reason})", _AGAIN)


def _no_checkpoint(head: bytes) -> tuple[str, str] | None:
    """What a file that begins like this is, if it is no checkpoint, and what to do."""
    if not head:
        return "is empty", _AGAIN
    if head.startswith(LFS_POINTER):
        return (
            "is a Git LFS pointer and not the weights",
            "run `git lfs pull` in the clone, or download the file",
        )
    if head.lstrip(BLANK).startswith(b"<"):
        return "is a web page and not the weights", f"{_AGAIN}; its address may want a login or an accepted licence"
    if not head.startswith((ZIP, PICKLE)) and _header_size(head) is None:
        return "is neither a file of safetensors nor of torch.save", f"{_AGAIN}, or give another file"
    return None


def _header_size(head: bytes) -> int | None:
    """Bytes of the JSON that a safetensors file begins with; None when it begins otherwise."""
    size = int.from_bytes(head[:8], "little")
    return size if head[8:9] == b"{" and size <= MAX_HEADER else None


def _missing_bytes(path: Path) -> int:
    """By how many bytes a safetensors file is shorter than its header says; 0 also when the header cannot be read."""
    with path.open("rb") as stream:
        size = _header_size(stream.read(9)) or 0
        stream.seek(8)
        header = stream.read(size)
    if len(header) < size:
        return size - len(header)
    try:
        ends = [entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__"]
        return max(0, 8 + size + max(ends, default=0) - path.stat().st_size)
    except (ValueError, LookupError, TypeError, AttributeError):
        return 0


def _unreadable(path: Path, what: str, remedy: str) -> ValueError:
    return ValueError(f"backbone.weights: {path} {what} ({_looks(path)}); {remedy}")


def _looks(path: Path) -> str:
    with path.open("rb") as stream:
        return f"{path.stat().st_size:,} bytes, the first are {stream.read(16)!r}"
