"""The source of a run: its index, made the first time, and what the listing says today."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from pipeline.config import Config
from pipeline.engine.log import say
from pipeline.engine.stage import index_folder
from pipeline.errors import ConfigError
from pipeline.sources.choice import choice_of
from pipeline.sources.extend import Difference, difference, extend_index
from pipeline.sources.index import Index, build_index, open_index
from pipeline.store import storage

PATIENCE_S = 2.0  # that work waits for a listing: some ten thousand objects of a bucket


def open_source(
    config: Config, *, reindex: bool = False, extend: bool = False, prune: bool = False
) -> tuple[Index, bool]:
    """The index of the source, and whether it is of now: made for the first time or again (`reindex`), or with what is
    new and gone taken in (`extend`; `prune` drops rows of what is gone). ConfigError: it cannot be listed."""
    folder = index_folder(config)
    if reindex:
        return _list_anew(config, folder), True
    try:
        index = open_index(folder)
    except FileNotFoundError:
        return _list_anew(config, folder), True
    return (_extend(config, index, prune), True) if extend or prune else (index, False)


def _list_anew(config: Config, folder: str) -> Index:
    source = config.source
    say(f"index: listing {storage.redact(source.uri)}")
    with _as_config_errors(source.uri):
        index = build_index(
            folder,
            source.uri,
            source.format,
            shard_size=source.shard_size,
            image_column=source.image_column,
            anonymous=source.anonymous,
            choice=choice_of(config),
        )
    say(f"index: {index.images} images in {index.shards} shards; left out: {index.ignored}")
    return index


def _extend(config: Config, index: Index, prune: bool) -> Index:
    uri = config.source.uri
    say(f"index: listing {storage.redact(uri)} again")
    with _as_config_errors(uri):
        extended = extend_index(index, uri, choice_of(config), prune=prune)
    anew = sum(extended.version(shard) != index.version(shard) for shard in range(index.shards))
    say(
        f"index: {extended.images} images in {extended.shards} shards: {extended.shards - index.shards} are new, and "
        f"{anew} have photos that were replaced or are gone"
    )
    return extended


@contextlib.contextmanager
def _as_config_errors(uri: str) -> Iterator[None]:
    errors: tuple[type[Exception], ...] = (*storage.store_errors(uri), ValueError)
    try:
        yield
    except errors as error:
        raise ConfigError(str(error)) from error


class Listing:
    """Compares the listing of the source with its index while the run goes on, and says once how they differ."""

    def __init__(self, config: Config, index: Index) -> None:
        self._uri, self._index, self._choice = config.source.uri, index, choice_of(config)
        self._found: Difference | Exception | None = None
        self._said = False
        self._thread = threading.Thread(target=self._compare, name="listing", daemon=True)
        self._thread.start()

    def _compare(self) -> None:
        try:
            self._found = difference(self._index, self._uri, self._choice)
        except Exception as error:
            self._found = error

    def wait(self, seconds: float = PATIENCE_S) -> Difference | Exception | None:
        """The difference, or why there is none; None when it is not known in time."""
        self._thread.join(seconds)
        return self._found

    def tell(self, *, last: bool = False) -> None:
        """Say what there is to say and was not said. `last`: also that the source was not listed to its end."""
        self.wait()
        if self._said or (self._found is None and not last):
            return
        self._said = True
        said = describe_listing(self._found)
        if said:
            say(said, level=logging.WARNING)


def describe_listing(found: Difference | Exception | None) -> str:
    """In words, with what to do; empty where listing and index agree."""
    if found is None:
        return "source: it is not listed to its end yet, so that it was not compared with its index"
    if isinstance(found, Exception):
        return (
            f"source: it cannot be listed now, so that it was not compared with its index: {storage.redact(str(found))}"
        )
    if not found.any:
        return ""
    return (
        f"source: {found} since it was listed; u2label run --extend labels what is new and does the shards of what was "
        "replaced or is gone again (--prune drops the rows of what is gone), --reindex starts over"
    )
