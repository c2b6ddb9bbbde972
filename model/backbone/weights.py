"""Which weights a backbone has: a file, the official one, that of a package, or random ones, with an identity that
enters fingerprints.

Apart from the backbones, so that a look at a run need not load torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from model.backbone.names import OFFICIAL_URLS, ON_REQUEST, PATCH_DCT, REQUEST_FORM, check_name
from model.backbone.packaged import PACKAGED

Named = Literal["official", "index"]  # files that have a word of their own
NAMED: tuple[Named, ...] = get_args(Named)


@dataclass(frozen=True, slots=True)
class Weights:
    """Resolved weights: a `path`, or the `seed` of random ones. `identity` enters every fingerprint."""

    path: Path | None
    seed: int | None
    identity: str


def resolve_weights(name: str, weights: str, *, sha256: str | None = None, download: bool = True) -> Weights:
    """Find the weights `official` (downloaded once if `download`), `index`, `random:<seed>` or a local file.

    `sha256` pins the file. ValueError for an unknown name, a malformed seed, a wrong checksum, official weights that
    are given on request only, or a backbone that no package has; FileNotFoundError for a missing file, ConnectionError
    when the official file cannot be fetched; each says what to do.
    """
    check_name(name)
    if weights.startswith("random:") or (name == PATCH_DCT and weights == "official"):
        return _random_weights(weights, sha256)
    if name == PATCH_DCT:
        raise ValueError(f"backbone.weights: patch-dct has no weights file, got {weights!r}; use 'random:<seed>'")
    path = _find_file(name, weights, download)
    digest = file_sha256(path)
    if weights == "index" and digest != PACKAGED[name].sha256:
        raise ValueError(
            f"backbone.weights: {path} has SHA-256 {digest} and not that of the weights out of "
            f"{PACKAGED[name].pinned}; {how_to_index(name)}, which replaces it"
        )
    if sha256 is not None and digest != sha256.lower():
        raise ValueError(
            f"backbone.sha256: {path} has SHA-256 {digest}, the config pins {sha256}; it is another file or a "
            "broken download: fetch it again or correct the pin"
        )
    return Weights(path, None, f"sha256:{digest}")


def _find_file(name: str, weights: str, download: bool) -> Path:
    if weights == "official":
        path = official_file(name, download=download)
        remedy = f"run `u2label weights {name} --download`, or give the path of a checkpoint"
    elif weights == "index":
        path, remedy = index_file(name), how_to_index(name)
    else:
        path = Path(weights).expanduser()
        remedy = f"give 'official', 'random:<seed>' or the path of a {name} checkpoint"
    if path.is_dir():
        raise FileNotFoundError(
            f"backbone.weights: {str(path)!r} is a folder; give the file in it, such as model.safetensors"
        )
    if not path.is_file():
        raise FileNotFoundError(f"backbone.weights: no file {str(path)!r}; {remedy}")
    return path


def index_file(name: str) -> Path:
    """Path of the weights out of a package, in torch's hub cache beside the official ones, whether they are there yet.

    ValueError for a backbone that no package has.
    """
    if name not in PACKAGED:
        raise ValueError(
            f"backbone.weights: 'index' is there for {', '.join(PACKAGED)} alone, not for {name}; give 'official' or "
            "the path of a checkpoint"
        )
    packaged = PACKAGED[name]
    return _cached(f"{name}-of-{packaged.package}-{packaged.version}.safetensors")


def how_to_index(name: str) -> str:
    """What puts the weights out of a package where `index` looks for them."""
    return f"run `u2label weights {name} --from-index` on this machine"


def official_file(name: str, *, download: bool = True) -> Path:
    """Path of the official weights in torch's hub cache, fetched from their published URL the first time.

    ValueError for a backbone whose weights are given on request only.
    """
    if name in ON_REQUEST:
        raise ValueError(
            f"backbone.weights: the weights of {name} are not fetched for you, since they are given on request: ask at "
            f"{REQUEST_FORM} or at Hugging Face ({ON_REQUEST[name]}), then set backbone.weights to the path of the "
            "file, .pth or model.safetensors"
        )
    url = OFFICIAL_URLS[name]
    path = _cached(url.rsplit("/", 1)[1])
    if path.is_file() or not download:
        return path
    import torch.hub

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except OSError as error:
        raise ConnectionError(
            f"backbone.weights: cannot fetch {url} ({error}); download it elsewhere and give its path as "
            f"backbone.weights, or put it at {path}"
        ) from error
    return path


def _cached(file_name: str) -> Path:
    return hub_folder() / "checkpoints" / file_name


def hub_folder() -> Path:
    """`torch.hub.get_dir()`, told without torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or f"{cache}/torch").expanduser() / "hub"


def file_sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal; read once while the file stays as it is."""
    now = path.stat()
    return _sha256(path, now.st_mtime_ns, now.st_size, now.st_ino)


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, *version: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _random_weights(weights: str, sha256: str | None) -> Weights:
    text = weights.removeprefix("random:") if weights != "official" else "0"
    if not text.isdecimal():
        raise ValueError(f"backbone.weights: {weights!r} is not random:<seed> with a whole number, such as random:0")
    if sha256 is not None:
        raise ValueError(f"backbone.sha256: {weights!r} reads no file, so there is nothing to pin; remove the key")
    return Weights(None, int(text), f"random:{int(text)}")
