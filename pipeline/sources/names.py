"""Names of images: what they are called in a run, and which is meant by a name from elsewhere.

A photo goes by many names: `train/0001.jpg` in a run, `0001.jpg` in COCO's JSON, `0001.png` in a folder of maps. A name
means the image of the same path but for its ending, or else the only image of that name in any folder. Names are
compared in Unicode's form NFC, for a disk may give back `é` as two characters; they are kept as they are.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from pipeline.errors import ConfigError

SHOWN = 3
AMBIGUOUS = re.compile("[\udc80-\udcff]|%25|%[89A-F][0-9A-F]")


class ImageNames:
    """Looks up images by name; `shown` says in messages where they are from. Memory: the names."""

    def __init__(self, names: Iterable[str], shown: str) -> None:
        self.shown = shown
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self._by_path[comparable(name)].append(name)
            self._by_name[posixpath.basename(comparable(name))].append(name)
        self.claimed: dict[str, str] = {}  # images that were claimed, and by which name

    def find(self, name: str) -> str | None:
        """The image of `name`; None when there is none. ConfigError when several would do."""
        stem = comparable(name)
        found = self._by_path.get(stem) or self._by_name.get(posixpath.basename(stem), [])
        if len(found) > 1:
            raise ConfigError(
                f"the image {name!r} could be any of {len(found)} of {self.shown} ({', '.join(found[:SHOWN])}): give "
                "images names that differ by more than folder and ending"
            )
        return found[0] if found else None

    def claim(self, name: str, claimant: str) -> str | None:
        """As `find`, and an image belongs to the first name that asks for it: ConfigError for another one, which says
        that `claimant` has both."""
        image = self.find(name)
        if image is not None and (other := self.claimed.setdefault(image, name)) != name:
            raise ConfigError(
                f"{claimant}: {other!r} and {name!r} could both be the image {image!r} of {self.shown}: give images "
                "names that differ by more than folder and ending, or the same paths on both sides"
            )
        return image


def require_inside(name: str, where: str) -> str:
    """`name`, of a file below a folder. ConfigError when it leads out of it; `where` says what names it."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ConfigError(f"{where}: the file name {name!r} leads out of its folder; rename the file, there too")
    return name


def comparable(name: str) -> str:
    """The path of an image without its ending, in NFC: equal for names that mean the same."""
    return unicodedata.normalize("NFC", image_stem(name))


def image_stem(name: str) -> str:
    """The path of an image without its ending."""
    return posixpath.splitext(name)[0]


def image_id(path: str) -> str:
    """The path as a string of valid UTF-8 that no other path maps to (see `pipeline.sources.scan`)."""
    if not AMBIGUOUS.search(path):
        return path
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", path.replace("%", "%25"))
