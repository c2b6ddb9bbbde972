"""Weights of the panoptic model in files of our own: safetensors, and a manifest in JSON with the config behind them.

The manifest is written last and holds the digest of the weights, so that files of two checkpoints never pass for one.
`to_files` and `from_files` speak of bytes, for stores that are no local folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from model.checkpoint.detectron2 import (
    CLS_SCORE,
    SEMANTIC,
    ClassCounts,
    State,
    beside,
    class_counts,
    into_place,
    owned,
)
from model.checkpoint.strangers import HEAD, looks, stranger

WEIGHTS = "model.safetensors"
MANIFEST = "checkpoint.json"
FORMAT, VERSION = "u2label-checkpoint", 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state dict, in the order in which it was given, and the config that made it."""

    state: State
    config: dict[str, Any]


def to_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The checkpoint as file names and contents, to be written in this order. Inverse of `from_files`.

    ValueError when the config lacks the integers `num_things` and `num_stuff`, contradicts the weights with them, or
    cannot be JSON.
    """
    _check_config(checkpoint)
    weights = safetensors.torch.save(owned(checkpoint.state), metadata={"format": "pt"})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest()},
        "config": checkpoint.config,
        "tensors": list(checkpoint.state),
    }
    try:
        text = json.dumps(manifest, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config of a checkpoint must be JSON: {error}") from error
    return {WEIGHTS: weights, MANIFEST: text.encode()}


def from_files(files: Mapping[str, bytes], origin: str = "the checkpoint") -> Checkpoint:
    """Contents of `WEIGHTS` and `MANIFEST` -> the checkpoint; `origin` names it in errors. Inverse of `to_files`.

    ValueError when a file is missing, is not of this format, or the weights are not those that the manifest describes.
    """
    missing = [name for name in (WEIGHTS, MANIFEST) if name not in files]
    if missing:
        raise ValueError(f"{origin} lacks {', '.join(missing)}; give the folder of a whole checkpoint")
    manifest = _read_manifest(files[MANIFEST], origin)
    if hashlib.sha256(files[WEIGHTS]).hexdigest() != manifest["weights"]["sha256"]:
        raise _not_whole(origin, WEIGHTS, files[WEIGHTS], f"is not the file that {MANIFEST} describes")
    try:
        state = safetensors.torch.load(files[WEIGHTS])
    except SafetensorError as error:
        raise ValueError(f"{origin}: {WEIGHTS} cannot be read: {error}") from error
    if set(state) != set(manifest["tensors"]):
        raise ValueError(f"{origin}: {WEIGHTS} and {MANIFEST} name different tensors; copy both again")
    checkpoint = Checkpoint({name: state[name] for name in manifest["tensors"]}, manifest["config"])
    _check_config(checkpoint)
    return checkpoint


def save_checkpoint(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a checkpoint to a local folder, each file atomically and the manifest last. Errors as `to_files`."""
    files = to_files(Checkpoint(dict(state), dict(config)))
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        temporary = beside(Path(folder, name))
        try:
            temporary.write_bytes(data)
            into_place(temporary, Path(folder, name))
        finally:
            temporary.unlink(missing_ok=True)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """The checkpoint in a local folder. FileNotFoundError without the folder, other errors as `from_files`."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give that of a checkpoint, with {MANIFEST} in it")
    names = [name for name in (WEIGHTS, MANIFEST) if Path(folder, name).is_file()]
    return from_files({name: Path(folder, name).read_bytes() for name in names}, str(folder))


def _check_config(checkpoint: Checkpoint) -> None:
    counts = [checkpoint.config.get(key) for key in ClassCounts._fields]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(f"the config of a checkpoint needs the integers num_things and num_stuff, got {counts}")
    state = checkpoint.state
    if CLS_SCORE in state and SEMANTIC in state and class_counts(state) != tuple(counts):
        raise ValueError(f"the config says {counts} thing and stuff classes, the weights {list(class_counts(state))}")


def _not_whole(origin: str, name: str, data: bytes, what: str) -> ValueError:
    """The error of a file of a checkpoint that `what` is wrong with, unless it is plainly no such file at all."""
    what, remedy = stranger(data[:HEAD]) or (what, "copy the checkpoint again, both files")
    return ValueError(f"{origin}: {name} {what} ({looks(data, len(data))}); {remedy}")


def _read_manifest(data: bytes, origin: str) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise _not_whole(origin, MANIFEST, data, f"is not JSON ({error})") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"{origin}: {MANIFEST} is not of format {FORMAT} version {VERSION}; write it with this release"
        )
    kinds = {"weights": dict, "config": dict, "tensors": list}
    damaged = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if damaged or "sha256" not in manifest["weights"]:
        raise ValueError(f"{origin}: {MANIFEST} is damaged at {damaged or ['weights']}; copy the checkpoint again")
    return manifest
