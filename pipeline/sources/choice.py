"""Which photos of a source are meant: `source.include`, `source.exclude`, `source.limit`, and what is not the user's.

Patterns are those of a `.gitignore`, on the path inside the source, which is the photo's image_id: `*.jpg` is a name in
any folder, `train/` a folder of that name and all below it, `/train/*.jpg` or `a/*.jpg` one below the source; in them
`*` stays in one folder and `**` goes into those below. Names are compared in NFC. A photo is taken when a pattern of
`include` matches it, or there is none, and none of `exclude` does.
"""

from __future__ import annotations

import hashlib
import heapq
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pathspec import GitIgnoreSpec

from pipeline.config import Config
from pipeline.sources.left_out import Ignored
from pipeline.store import storage
from workers.records import ImageRecord


@dataclass(frozen=True)
class Choice:
    """Which photos are taken. `own`: folders inside the source, each with a slash at its end, that are ours to leave
    out, such as the run folder's; `""` where that is the source itself."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0
    label_maps: bool = False  # whether label maps beside photos are taken for photos too
    uri_column: str = "uri"  # of a manifest
    own: tuple[str, ...] = ()

    def takes(self, path: str) -> bool:
        """Whether `include` and `exclude` let the photo at this path inside the source through."""
        name = unicodedata.normalize("NFC", path)
        chosen = not self.include or self._included.match_file(name)
        return chosen and not self.excludes(path)

    def excludes(self, path: str) -> bool:
        """Whether `exclude` leaves out a photo, or a whole tar or Parquet file."""
        return bool(self.exclude) and self._excluded.match_file(unicodedata.normalize("NFC", path))

    @cached_property
    def _included(self) -> GitIgnoreSpec:
        return _patterns(self.include)

    @cached_property
    def _excluded(self) -> GitIgnoreSpec:
        return _patterns(self.exclude)

    def sample(self, records: Iterable[ImageRecord], ignored: Ignored) -> Iterator[ImageRecord]:
        """`limit` of the records, in their order: those whose names have the least digests, so that a larger limit
        takes the same and more, and a photo that is added replaces one at most. All are listed; `limit` are held."""
        if self.limit is None:
            yield from records
            return
        best: list[tuple[int, int, ImageRecord]] = []  # a heap, the greatest digest first
        for place, record in enumerate(records):
            entry = (-self._draw(record.image_id), -place, record)
            if len(best) < self.limit:
                heapq.heappush(best, entry)
            else:
                heapq.heappushpop(best, entry)
                ignored.not_sampled += 1
        yield from (record for _, _, record in sorted(best, key=lambda entry: -entry[1]))

    def _draw(self, image_id: str) -> int:
        name = unicodedata.normalize("NFC", image_id)
        return int.from_bytes(hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest())


ALL = Choice()


def choice_of(config: Config) -> Choice:
    """What the section `source` says, and where the run folder lies when it is inside the source."""
    source = config.source
    return Choice(
        source.include,
        source.exclude,
        source.limit,
        source.seed,
        source.label_maps,
        source.uri_column,
        folder_inside(source.uri, config.run.uri),
    )


def folder_inside(source: str, folder: str) -> tuple[str, ...]:
    """A folder as the source names it, with a slash; nothing when it is elsewhere."""
    source, folder = (uri if storage.is_remote(uri) else storage.filesystem(uri)[1] for uri in (source, folder))
    source, folder = source.rstrip("/") + "/", folder.rstrip("/") + "/"
    return (folder.removeprefix(source),) if folder.startswith(source) else ()


def _patterns(patterns: Sequence[str]) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(unicodedata.normalize("NFC", pattern) for pattern in patterns)
