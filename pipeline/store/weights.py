"""Weights files that lie in a store: each machine keeps a copy, where torch keeps the official ones."""

from __future__ import annotations

import hashlib
import posixpath
import shutil

from model.backbone.weights import hub_folder
from pipeline.errors import ConfigError
from pipeline.store import storage

CHUNK = 16 << 20  # bytes fetched at a time


def local_weights(weights: str, *, key: str = "backbone.weights", download: bool = True) -> str:
    """What the config has under `key`, as a path: a URL becomes the path of a copy, made when there is none of the
    object as it is now, and all else stays as it is.

    Without `download` the path is that of a file that may not be there. FileNotFoundError: there is no such object.
    ConfigError: the store refuses or does not answer.
    """
    if not storage.is_remote(weights):
        return weights
    shown = storage.redact(weights)
    try:
        name = hashlib.sha256((weights + storage.version(weights)).encode()).hexdigest()[:12]
        path = hub_folder() / "checkpoints" / f"{name}-{posixpath.basename(weights)}"
        if not path.is_file() and download:
            with storage.open_input(weights, block_size=CHUNK) as source, storage.open_output(str(path)) as copy:
                shutil.copyfileobj(source, copy, CHUNK)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: there is no {shown}") from error
    except storage.store_errors(weights) as error:
        raise ConfigError(f"{key}: cannot read {shown}: {storage.redact(str(error))}") from error
    return str(path)
