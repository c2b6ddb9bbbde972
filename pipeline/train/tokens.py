"""The tokens of a frozen transformer, kept, so that a step of a training costs the heads alone.

A file holds the tokens of one photo at one size and is named for the photo's pixels; its folder is
named for all else that decides them. So tokens of another backbone, other weights or another photo are never found, and
the rounds of self-training share them. `<run>/tokens` may be removed at any time: what is missing is made again.
"""

from __future__ import annotations

import hashlib
import io
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.panoptic.frozen import FrozenPatches
from pipeline.engine.stage import digest
from pipeline.predict.frozen import FrozenBackbone
from pipeline.store import storage

FOLDER = "tokens"
VERSION = 1  # raised when the same photo gets other tokens


class TokenCache:
    """Safe in threads, of which one at a time uses the transformer; processes may share the folder."""

    def __init__(self, folder: str, frozen: FrozenPatches, backbone: FrozenBackbone, *, device: str) -> None:
        """`folder` (URI) may hold tokens of any number of backbones; `device` is that of `frozen`."""
        self.folder = storage.join(folder, digest([*backbone.content(), frozen.stride, VERSION]))
        self.stride = frozen.stride
        self._frozen, self._device = frozen, device
        self._lock = threading.Lock()

    def __call__(self, image: Tensor) -> Tensor:
        """(3, h, w) uint8 -> (D, h', w') float16 on the CPU, as `FrozenPatches` gives them."""
        uri = self._uri(image)
        kept = self._read(uri)
        if kept is None:
            with self._lock:
                kept = self._frozen([image.to(self._device)])[0].half().cpu().numpy()
            stream = io.BytesIO()
            np.save(stream, kept)
            storage.write_bytes(uri, stream.getvalue())
        return torch.from_numpy(kept)

    def kept(self, image: Tensor) -> Tensor | None:
        """The same where it is kept already, else None: nothing is computed, and nothing written."""
        found = self._read(self._uri(image))
        return None if found is None else torch.from_numpy(found)

    def _uri(self, image: Tensor) -> str:
        pixels = hashlib.blake2b(str(tuple(image.shape)).encode() + image.numpy().tobytes(), digest_size=16)
        return storage.join(self.folder, f"{pixels.hexdigest()}.npy")

    def _read(self, uri: str) -> NDArray[np.float16] | None:
        """None: there is no such file, or it is not whole."""
        try:
            kept = np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            return None
        whole = kept.ndim == 3 and kept.dtype == np.float16 and len(kept) == self._frozen.dim
        return kept if whole else None
