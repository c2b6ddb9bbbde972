"""The folder of an export: its own, and whole or not there.

An export writes below the hidden folder `.u2label_NAME` first. At its end the files take their places, those of an
earlier export of that name having made way, the index last that readers of the format begin with; and
`u2label_NAME.json` says what was written. An export that was killed leaves the earlier one, or nothing that a reader
finds; the same export again clears up behind it. On a local disk a file or folder takes its place at once, in a bucket
object after object.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.store import storage
from pipeline.store.places import asking
from pipeline.store.retries import PATIENT

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RECORD = re.compile(r"u2label_([A-Za-z0-9][A-Za-z0-9_-]*)\.json")
MOVERS = 16  # objects of a bucket that are copied at a time
SHOWN = 3


class Folder:
    """A folder, local or remote, that an export of a format takes.

    Args:
        output: its URI.
        format: such as "coco".
        name: of the set; several of one format may lie side by side.
        entries: files and folders of this set, as paths below the folder, the index last. An earlier export's of the
            same set are replaced.
        shared: files that all sets of the format have alike.

    Raises:
        ConfigError: the name is no plain word, or the folder holds files that no export of this format has written.
    """

    def __init__(
        self, output: str, format: str, name: str, entries: Sequence[str], shared: Mapping[str, bytes] | None = None
    ) -> None:
        if not NAME.fullmatch(name):
            raise ConfigError(f"--name: {name!r} must be letters, digits, - and _, for it becomes part of files' names")
        self.output, self.format, self.name = output, format, name
        self.entries, self.shared = list(entries), dict(shared or {})
        self._stage = f".u2label_{name}"
        self._record = f"u2label_{name}.json"
        self.sets = [name]  # that are whole when this one is, by their names
        self._old = self._owned()

    def uri(self, *path: str) -> str:
        """Where to write a file, until the export is finished."""
        return storage.join(self.output, self._stage, *path)

    def final(self, entry: str) -> str:
        """Where a file or folder lies in the end, without credentials."""
        return storage.redact(storage.join(self.output, entry))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A block that writes; what it leaves takes its place after `finish`. Nothing stays of one that raises.

        ConfigError names `--output` for what the store raises.
        """
        try:
            storage.remove_folder(self.uri())
            yield
        except storage.store_errors(self.output) as error:
            self._clear()
            reason = storage.redact(str(error)) or type(error).__name__
            raise ConfigError(f"--output: cannot write to {storage.redact(self.output)!r}: {reason}") from error
        except BaseException:
            self._clear()
            raise

    def finish(self, about: Mapping[str, Any]) -> None:
        """Put everything in its place; `about` goes into the record."""
        self._write_record(about, complete=False)
        for entry in reversed(self._old | dict.fromkeys(self.entries)):
            self._remove(entry)
        for name, content in self.shared.items():
            storage.write_bytes(storage.join(self.output, name), content)
        for entry in self.entries:
            _move(self.uri(entry), storage.join(self.output, entry))
        self._write_record(about, complete=True)
        storage.remove_folder(self.uri())

    def _write_record(self, about: Mapping[str, Any], *, complete: bool) -> None:
        own = {"format": self.format, "complete": complete, "entries": self.entries, "shared": list(self.shared)}
        storage.write_bytes(storage.join(self.output, self._record), json.dumps(own | dict(about), indent=1).encode())

    def _owned(self) -> dict[str, None]:
        """The entries of the earlier export of this name, in their order. ConfigError for files that no export of this
        format has written."""
        shown = storage.redact(self.output)
        there = self._listed()
        records = {name: self._read(name) for name in there if RECORD.fullmatch(name)}
        if other := next((r["format"] for r in records.values() if r["format"] != self.format), None):
            raise ConfigError(f"--output: {shown!r} holds an export as {other}; give another folder")
        ours = {entry.split("/")[0] for found in records.values() for entry in (*found["entries"], *found["shared"])}
        stages = {name for name in there if name.startswith(".u2label_")}
        if foreign := sorted(there - records.keys() - ours - stages):
            raise ConfigError(
                f"--output: {shown!r} holds other files ({', '.join(foreign[:SHOWN])}); give a new or an empty folder"
            )
        whole = {name for name, found in records.items() if found["complete"]}
        self.sets = sorted({self.name, *(match[1] for name in whole if (match := RECORD.fullmatch(name)))})
        return dict.fromkeys(records.get(self._record, {}).get("entries", ()))

    def _listed(self) -> set[str]:
        try:
            if storage.file_size(self.output) is not None:
                raise ConfigError(f"--output: cannot write to {storage.redact(self.output)!r}: it is a file")
            return {*storage.list_folder(self.output), *storage.list_subfolders(self.output)}
        except storage.store_errors(self.output) as error:
            raise ConfigError(f"--output: cannot list {storage.redact(self.output)!r}: {error}") from error

    def _read(self, name: str) -> dict[str, Any]:
        place = storage.join(self.output, name)
        try:
            found = json.loads(storage.read_bytes(place))
            known = {
                "format": str(found["format"]),
                "complete": bool(found.get("complete", True)),
                "shared": found["shared"],
            }
            return known | {"entries": _paths(found["entries"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--output: {storage.redact(place)!r} is not the record of an export ({error}); give another folder"
            ) from error

    def _remove(self, entry: str) -> None:
        place = storage.join(self.output, entry)
        if storage.file_size(place) is not None:
            storage.remove(place)
        else:
            storage.remove_folder(place)

    def _clear(self) -> None:
        with contextlib.suppress(*storage.store_errors(self.output)):
            storage.remove_folder(self.uri())


def _paths(entries: Sequence[str]) -> list[str]:
    """The entries of a record, which somebody else may have written: they are deleted. ValueError for one that leads
    out of the folder."""
    for entry in entries:
        if entry.startswith("/") or {"", ".", ".."} & set(entry.split("/")):
            raise ValueError(f"the entry {entry!r} leads out of the folder")
    return list(entries)


def _move(source: str, target: str) -> None:
    """A file, or a folder with all it holds; of one that nothing was written to, nothing comes."""
    fs, path = storage.filesystem(source)
    if not storage.is_remote(source):
        if Path(path).exists():
            place = Path(storage.filesystem(target)[1])
            place.parent.mkdir(parents=True, exist_ok=True)
            Path(path).rename(place)
        return
    if not storage.exists(source):
        return
    single = storage.file_size(source) is not None
    below = [""] if single else [f"/{file.path}" for file in storage.walk(source)]
    goal = storage.filesystem(target)[1]

    def copy(name: str) -> None:
        asking(fs, target, lambda: fs.cp_file(path + name, goal + name), PATIENT)

    with ThreadPoolExecutor(MOVERS) as pool:
        list(pool.map(copy, below))
