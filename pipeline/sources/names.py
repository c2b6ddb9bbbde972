"""Names of images: what they are called in a run, which is meant by a name from elsewhere, and what files get.

A photo goes by many names: `train/0001.jpg` in a run, `0001.jpg` in COCO's JSON, `0001.png` in a folder of maps. A name
means the image that is called so, or that of the same path but for its ending (and dots, which names of copies have
not), or else the only image of that name in any folder. Names are compared in Unicode's form NFC, for a disk may give
back `é` as two characters; they are kept as they are.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from pipeline.errors import ConfigError
from workers.formats import IMAGE_EXTENSIONS

SHOWN = 3
AMBIGUOUS = re.compile("[\udc80-\udcff]|%25|%[89A-F][0-9A-F]")
LONGEST = 200  # bytes of a name in a path: a file system takes 255, with an ending and what is added while writing
NUMBERED = re.compile(r"[#~]\d+$")  # a row of a Parquet file, or a member that comes again in a tar
ENDINGS = IMAGE_EXTENSIONS | {".txt", ".json"}  # of files that are written beside names


class ImageNames:
    """Looks up images by name; `shown` says in messages where they are from. Memory: the names."""

    def __init__(self, names: Iterable[str], shown: str) -> None:
        self.shown = shown
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_path_without_dots: dict[str, list[str]] = defaultdict(list)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_whole: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self._by_whole[unicodedata.normalize("NFC", name)].append(name)
            self._by_path[comparable(name)].append(name)
            self._by_path_without_dots[without_dots(comparable(name))].append(name)
            self._by_name[posixpath.basename(comparable(name))].append(name)
        self.claimed: dict[str, str] = {}  # images that were claimed, and by which name

    def find(self, name: str) -> str | None:
        """The image of `name`; None when there is none. ConfigError when several would do."""
        stem = comparable(name)
        found = (
            self._by_whole.get(unicodedata.normalize("NFC", name))
            or self._by_path.get(stem)
            or self._by_path_without_dots.get(without_dots(stem))
            or self._by_name.get(posixpath.basename(stem), [])
        )
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


def image_id(path: str) -> str:
    """The path as a string of valid UTF-8 that no other path maps to (see `pipeline.sources.scan`)."""
    if not AMBIGUOUS.search(path):
        return path
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", path.replace("%", "%25"))


def image_stem(name: str) -> str:
    """The path of an image without its ending; a number behind the ending tells images apart, and all of it stays."""
    return name if NUMBERED.search(name) else posixpath.splitext(name)[0]


class OutputNames:
    """Names for the files of each photo, no two the same, not even where case or the way an accent is written does not
    count. Memory: the names."""

    def __init__(self, *, dots: bool = True, folder: str | None = None) -> None:
        """`dots`: whether names may have them. Some readers take what is behind the first one for an ending. `folder`
        is the name that no folder may have, as a reader looks for it in paths."""
        self._dots, self._folder = dots, folder
        self._taken: set[str] = set()

    def claim(self, image_id: str) -> str:
        """A relative path without an ending that stays below its folder, whatever the image_id."""
        *folders, last = safe_path(image_id).split("/")
        whole = "/".join([*(part + "_" * (part == self._folder) for part in folders), last])
        stem, ending = posixpath.splitext(whole)
        name = stem if ending.lower() in IMAGE_EXTENSIONS else whole
        if not self._dots:
            whole, name = without_dots(whole), without_dots(name)
        number = 1
        while (key := unicodedata.normalize("NFC", name).casefold()) in self._taken:
            name = whole if number == 1 else f"{whole}~{number}"
            number += 1
        self._taken.add(key)
        return name


def without_dots(path: str) -> str:
    return path.replace(".", "_")


def safe_path(image_id: str) -> str:
    """The path without empty segments, `.` and `..`, each segment short enough for a file's name; of folders none has
    the ending of a file that may lie beside it."""
    parts = ["_" if part == ".." else part for part in image_id.split("/") if part not in {"", "."}] or ["photo"]
    folders = [part + "_" * (posixpath.splitext(part)[1].lower() in ENDINGS) for part in parts[:-1]]
    return "/".join(map(_shortened, [*folders, parts[-1]]))


def _shortened(part: str) -> str:
    encoded = part.encode(errors="surrogateescape")
    if len(encoded) <= LONGEST:
        return part
    ending = posixpath.splitext(part)[1] if len(posixpath.splitext(part)[1]) < 10 else ""
    kept = encoded[: LONGEST - 20 - len(ending.encode())].decode(errors="ignore")
    return f"{kept}~{hashlib.sha256(encoded).hexdigest()[:12]}{ending}"
