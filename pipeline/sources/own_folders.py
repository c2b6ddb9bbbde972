"""Folders inside a source that a run, an export or a prediction made: their pictures are no photos.

index/<12 hex digits>/manifest.json    of a run folder
panoptic_NAME.json, panoptic.json      of an export or a prediction (COCO's own too): PNGs in a folder of that name
predict.json                           of a prediction: photos drawn over, in overlays/
u2label_NAME.json                      of an export, to which the whole folder belongs
"""

from __future__ import annotations

import re
from collections.abc import Iterable

RUN = re.compile(r"(?:(?P<folder>.*)/)?index/[0-9a-f]{12}/manifest\.json")
PANOPTIC = re.compile(r"(?P<folder>(?:.*/)?)panoptic(?P<name>_[^/]+)?\.json")
PREDICTION = re.compile(r"(?P<folder>(?:.*/)?)predict\.json")
EXPORT = re.compile(r"(?P<folder>.+/)u2label_[A-Za-z0-9][A-Za-z0-9_-]*\.json")
OF_A_RUN = re.compile(r"(?:[a-z][a-z_0-9]*/[0-9a-f]{12}/|receipts/|evaluation/)")  # where the source is the run folder


def folders_made_by(path: str) -> tuple[str, ...]:
    """What the file at this path (inside the source) tells: folders inside the source, each with a slash at its end;
    `""` for the source itself."""
    if not path.endswith(".json"):
        return ()
    if found := RUN.fullmatch(path):
        return (f"{found['folder']}/" if found["folder"] else "",)
    if found := EXPORT.fullmatch(path):
        return (found["folder"],)
    if found := PANOPTIC.fullmatch(path):
        folder, name = found["folder"], found["name"] or ""
        return tuple(f"{folder}panoptic{kind}{name}/" for kind in ("", "_stuff"))
    if found := PREDICTION.fullmatch(path):
        return (f"{found['folder']}overlays/",)
    return ()


def own_folders(paths: Iterable[str]) -> tuple[str, ...]:
    """All that a listing tells, sorted."""
    return tuple(sorted({folder for path in paths for folder in folders_made_by(path)}))


def holder_of(path: str, own: Iterable[str]) -> str | None:
    """The folder among `own` that holds the file at `path`; None for a file of the user's."""
    for folder in own:
        if folder and path.startswith(folder):
            return folder
        if not folder and (found := OF_A_RUN.match(path)):
            return found[0]
    return None
