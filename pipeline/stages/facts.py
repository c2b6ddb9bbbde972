"""What fingerprints are made of beside the settings of a stage: the source, and the files that a config names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.backbone.weights import resolve_weights
from pipeline.clusters.names import NAMES
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.sources.index import Index
from pipeline.stages.latest import read_latest
from pipeline.store import storage
from pipeline.store.weights import local_weights

Content = dict[str, Any]  # plain data that enters a fingerprint


class Facts:
    """The index of the source, and the checksums of weights files.

    Each file is read once. Official weights are fetched the first time if `download`, else FileNotFoundError.
    """

    def __init__(self, config: Config, index: Index, *, download: bool = True) -> None:
        self._config, self.index, self._download = config, index, download
        self.checksum = functools.cache(_checksum)

    @functools.cached_property
    def teacher(self) -> str:
        """Backbone and weights in one line, such as `dino_vits8 sha256:...`."""
        try:
            return _teacher(self._config, download=self._download)
        except FileNotFoundError as error:
            if self._download:
                raise
            return _teacher_of_last_run(self._config, error)

    def names(self) -> str:
        """What tells the names that are stored with the run from others. ConfigError: there are none."""
        where = storage.join(self._config.run.uri, NAMES)
        if not storage.exists(where):
            raise ConfigError(
                f"train.names: the run in {storage.redact(self._config.run.uri)} has no names yet; give them with "
                "u2label name RUN --from names.yaml, or leave train.names out"
            )
        return storage.sha256(where)

    def photos(self) -> Content:
        """What every stage that looks at the photos through the backbone depends on."""
        config = self._config
        column = self.index.image_column if self.index.format == "parquet" else "image"
        return {
            "index": self.index.digest + (f" {column}" if column != "image" else ""),
            "shard_size": self.index.shard_size,
            "backbone": self.teacher,
            "dtype": config.backbone.dtype,
            **sections(config, "decode"),
        }


def sections(config: Config, *names: str) -> Content:
    """Sections of the config as plain data. Seeds are said apart, as what they are in the end."""
    return {name: getattr(config, name).model_dump(exclude={"seed"}) for name in names}


def require_there(places: Mapping[str, str | None]) -> None:
    """ConfigError unless there is a file or folder at each of these places, which are by their keys of the config."""
    faults = [fault for key, uri in places.items() if uri is not None and (fault := _not_there(key, uri))]
    if faults:
        raise ConfigError("\n".join(faults))


def require_weights(places: Mapping[str, str | None]) -> None:
    """ConfigError for local files at these places, which are by their keys of the config, that plainly are no weights.
    Folders, and what lies in a store, are looked at when they are read."""
    for key, uri in places.items():
        if uri is not None and not storage.is_remote(uri) and Path(uri).is_file():
            from model.checkpoint import strangers  # loads torch, which a look at most runs can do without

            try:
                strangers.require_weights(Path(uri))
            except ValueError as error:
                raise ConfigError(f"{key}: {error}") from error


def _not_there(key: str, uri: str) -> str:
    errors: tuple[type[Exception], ...] = (*storage.store_errors(uri), ValueError)  # ValueError: unknown scheme
    try:
        found = storage.exists(uri)
    except errors as error:
        return f"{key}: cannot look at {storage.redact(uri)!r}: {storage.redact(str(error))}"
    return "" if found else f"{key}: there is no {storage.redact(uri)!r}; correct the path, or bring it there"


def _teacher(config: Config, *, download: bool) -> str:
    backbone = config.backbone
    given = local_weights(backbone.weights, download=download)
    weights = resolve_weights(backbone.name, given, sha256=backbone.sha256, download=download)
    return f"{backbone.name} {weights.identity}"


def _teacher_of_last_run(config: Config, missing: FileNotFoundError) -> str:
    """As the last run knew it, if it had the same backbone and weights: `status` also works where their file is not."""
    latest = read_latest(config.run.uri)
    if latest is not None and latest.teacher is not None and latest.same_backbone(config):
        return latest.teacher
    raise FileNotFoundError(
        f"backbone.weights: {storage.redact(config.backbone.weights)!r} is not on this machine, and no run with it is "
        f"known to {storage.redact(config.run.uri)}; a run fetches it, or give the path of the file"
    ) from missing


def _checksum(key: str, uri: str | None) -> str | None:
    """SHA-256 of a file that the config names under `key`. ConfigError when it cannot be read."""
    if uri is None:
        return None
    errors: tuple[type[Exception], ...] = (*storage.store_errors(uri), ValueError)  # ValueError: unknown scheme
    try:
        return storage.sha256(local_weights(uri, key=key))
    except errors as error:
        raise ConfigError(f"{key}: cannot read {storage.redact(uri)!r}: {storage.redact(str(error))}") from error
