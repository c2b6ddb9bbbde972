"""What a listing of a source does not take, and why: said when the source is indexed, kept in the index's manifest, and
shown by `status`, `plan` and the report."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field
from typing import Any

from workers.formats import IMAGE_EXTENSIONS, remedy

EXTENSIONS_COUNTED = 100
LABEL_MAPS = "label maps beside photos (source.label_maps: true takes them)"
OWN = "of a run, an export or a COCO panoptic JSON"
NOT_CHOSEN = "not chosen by source.include and source.exclude"
NOT_SAMPLED = "beyond the sample of source.limit"


@dataclass
class Ignored:
    """What a scan did not take: files by extension, hidden files, tar members that hold no bytes of their own, and the
    photos that it was told to leave out or that are none."""

    extensions: dict[str, int] = field(default_factory=dict)
    hidden: int = 0
    special: int = 0  # links and devices inside tars
    not_chosen: int = 0  # by source.include and source.exclude
    not_sampled: int = 0  # by source.limit
    label_maps: int = 0  # one-channel PNGs that have a photo of their name
    own: dict[str, int] = field(default_factory=dict)  # pictures, tars and Parquet files of runs and exports, by folder

    def count(self, name: str) -> None:
        """One more file of this name (its ending percent-encoded where it is not UTF-8)."""
        self._count(posixpath.splitext(name)[1].lower() or "(none)", 1)

    def count_own(self, folder: str) -> None:
        self.own[folder] = self.own.get(folder, 0) + 1

    def add(self, other: Ignored) -> None:
        """The counts of another part of the source, which holds no folders of ours."""
        for extension, times in other.extensions.items():
            self._count(extension, times)
        for name in ("hidden", "special", "not_chosen", "not_sampled", "label_maps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _count(self, extension: str, times: int) -> None:
        if extension not in self.extensions and len(self.extensions) >= EXTENSIONS_COUNTED:
            extension = "(other)"
        self.extensions[extension] = self.extensions.get(extension, 0) + times

    def __str__(self) -> str:
        parts = [f"{count} {extension}{_why(extension)}" for extension, count in sorted(self.extensions.items())]
        parts += [f"{count} {reason}" for reason, count in self._others().items()]
        return ", ".join(parts) or "nothing"

    def reasons(self) -> dict[str, int]:
        """Why files were left out -> how many, for people: endings first, then the rest."""
        ended = {f"{extension}{_why(extension)}": count for extension, count in sorted(self.extensions.items())}
        return {**ended, **self._others()}

    def as_json(self) -> dict[str, Any]:
        """As an index's manifest keeps it: without what there is none of, but for the counts of version 0.1."""
        always = {"extensions": dict(sorted(self.extensions.items())), "hidden": self.hidden, "special": self.special}
        later = {name: getattr(self, name) for name in ("not_chosen", "not_sampled", "label_maps", "own")}
        return always | {name: value for name, value in later.items() if value}

    def _others(self) -> dict[str, int]:
        found = {
            "hidden": self.hidden,
            "links or devices": self.special,
            LABEL_MAPS: self.label_maps,
            NOT_CHOSEN: self.not_chosen,
            NOT_SAMPLED: self.not_sampled,
            **{f"in {folder} ({OWN})": count for folder, count in sorted(self.own.items())},
        }
        return {reason: count for reason, count in found.items() if count}


def _why(extension: str) -> str:
    """What to do about files of this ending, in brackets."""
    if extension in IMAGE_EXTENSIONS:
        return " (could not be read when the source was listed: run with --reindex)"
    reason = remedy(extension)
    return f" ({reason})" if reason else ""
