"""Label maps that lie beside their photos: PNGs of one channel whose name another picture has.

The name is the file's without folder and ending, `0001.png` of `0001.jpg`, and may end in what data sets add to it
(`0001_mask.png`, `0001.seg.png`). A PNG of one channel (grey or a palette) with such a photo is looked at: it is a map
when it has 16 bits (numbers of instances, or depths), few values, or areas of one value, as no grey photo has.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from pipeline.sources.ahead import map_ahead
from pipeline.sources.fetch import Fetcher
from pipeline.store import storage
from workers.decode import BAD_DATA
from workers.masks import open_png
from workers.records import ImageRecord

ADDED = re.compile(
    r"[._-](masks?|seg|segmentation|labels?|labelids|labeltrainids|gt|semantic|instances?|instanceids|panoptic|l)$",
    re.IGNORECASE,
)
ONE_CHANNEL = frozenset({"1", "L", "P", "I", "I;16", "I;16B"})
FEW_VALUES = 64
FLAT = 0.9  # share of the pixels that are as their left neighbour
MAX_PIXELS = 50_000_000  # of a PNG that is looked at
READERS = 16  # PNGs that are looked at side by side

Records = Callable[[], Iterable[ImageRecord]]


def find_label_maps(records: Records, is_map: Callable[[ImageRecord], bool]) -> frozenset[int]:
    """The digests of the image_ids of the label maps among `records`, which are listed up to three times.

    `is_map` looks at a PNG. Memory: 8 bytes a PNG, and a little for each that shares a name with another picture.
    """
    photos, contested = _contested(records)
    if not contested:
        return frozenset()
    shared = (r for r in records() if _is_png(r) and contested.intersection(_names(r)))
    maps = []
    for record, found in map_ahead(lambda record: (record, is_map(record)), shared, READERS):
        if found:
            maps.append((digest(record.image_id), _names(record)))
        else:
            photos.add(_names(record)[0])
    return frozenset(number for number, names in maps if photos.intersection(names))


def _contested(records: Records) -> tuple[set[int], set[int]]:
    """The names, as digests, that pictures other than PNGs share with PNGs, and all that a PNG shares with another
    picture."""
    own, meant, others = array("Q"), array("Q"), False
    for record in records():
        if _is_png(record):
            name, *without = _names(record)
            own.append(name)
            meant.extend(without)
        else:
            others = True
    unique, times = np.unique(np.array(own), return_counts=True)
    among_pngs = {*unique[times > 1].tolist(), *np.intersect1d(unique, np.array(meant)).tolist()}
    photos: set[int] = set()
    if others and len(own):
        wanted = np.union1d(unique, np.array(meant, np.uint64))
        photos = {name for name in _names_of_others(records()) if _holds(wanted, name)}
    return photos, photos | among_pngs


def _names_of_others(records: Iterable[ImageRecord]) -> Iterator[int]:
    return (_names(record)[0] for record in records if not _is_png(record))


def _holds(ordered: np.ndarray, number: int) -> bool:
    place = int(np.searchsorted(ordered, np.uint64(number)))
    return place < len(ordered) and int(ordered[place]) == number


def _is_png(record: ImageRecord) -> bool:
    return record.image_id.lower().endswith(".png")


def _names(record: ImageRecord) -> tuple[int, ...]:
    """Digests of the picture's name, and of the one that it is a map of by its ending."""
    stem = posixpath.splitext(posixpath.basename(unicodedata.normalize("NFC", record.image_id)))[0]
    without = ADDED.sub("", stem)
    return (digest(stem),) if without == stem else (digest(stem), digest(without))


def digest(name: str) -> int:
    """64 bits of a name. Among ten million names two are the same once in 400,000 listings."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def reader(fetcher: Fetcher) -> Callable[[ImageRecord], bool]:
    """`is_map` of the PNGs of a source. Raises what the store raises when a single PNG is not at fault."""

    def is_map(record: ImageRecord) -> bool:
        try:
            return looks_like_labels(fetcher.fetch(record))
        except storage.store_errors(record.uri) as error:
            fetcher.fetch_status(record, error)
            return False

    return is_map


def looks_like_labels(data: bytes) -> bool:
    """Whether the bytes of a PNG are a label map, by its channels and values."""
    try:
        with open_png(data) as image:
            if image.mode not in ONE_CHANNEL or image.width * image.height > MAX_PIXELS:
                return False
            values, deep = np.asarray(image), image.mode.startswith("I")
    except (*BAD_DATA, Image.DecompressionBombError):
        return False
    flat = float((values[:, 1:] == values[:, :-1]).mean()) if values.shape[1] > 1 else 0.0
    return deep or flat >= FLAT or len(np.unique(values)) <= FEW_VALUES
