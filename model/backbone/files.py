"""A file of weights -> what it holds, whichever format it has and whatever its suffix says.

Nothing in a file is executed, nor unpickled but tensors and plain containers. What is no checkpoint at all, such as a
page that a server sent in its place, is told by its first bytes. Every message is one line that names the file, its
size and its first bytes, and says what to do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from model.checkpoint.restricted_pickle import read_weights
from model.checkpoint.strangers import AGAIN, ZIP, head_of, stranger, unreadable

PICKLE = b"\x80"  # how a pickle of protocol 2 or newer begins, those of torch before 1.6 among them
MAX_HEADER = 100_000_000  # bytes of JSON that safetensors itself accepts


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint of safetensors or `torch.save`, on the CPU, mapped rather than read where it can be.

    ValueError when it is empty, cut off, damaged or something else, or holds more than tensors and plain containers.
    """
    head = head_of(path)
    torch_or_other = _header_size(head) is None
    if torch_or_other and head and stranger(head) is None and not head.startswith((ZIP, PICKLE)):
        raise _of_backbone(
            unreadable(path, "is neither a file of safetensors nor of torch.save", f"{AGAIN}, or give another file")
        )
    return _read_torch(path) if torch_or_other else _read_safetensors(path)


def _read_torch(path: Path) -> Any:
    try:
        # DINO's own training checkpoints keep their arguments in one, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return read_weights(path)
    except ValueError as error:
        raise _of_backbone(error) from None


def _read_safetensors(path: Path) -> Any:
    missing = _missing_bytes(path)
    if missing:
        raise _of_backbone(unreadable(path, f"is cut off: {missing:,} bytes are missing at its end", AGAIN))
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
    raise _of_backbone(unreadable(path, f"is a damaged safetensors file ({reason})", AGAIN))


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


def _of_backbone(error: ValueError) -> ValueError:
    return ValueError(f"backbone.weights: {error}")
