"""Which picture formats can be read here, by file ending: what this Pillow has, and HEIC where pillow-heif is there."""

from __future__ import annotations

import functools
from importlib.util import find_spec

HAS_AVIF = find_spec("PIL._avif") is not None  # Pillow 11.3 and newer, as it is published
HAS_HEIC = find_spec("pillow_heif") is not None

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(("AVIF",) if HAS_AVIF else ()))  # of Pillow itself
AVIF = frozenset({".avif"})
HEIC = frozenset({".heic", ".heif", ".hif"})
IMAGE_EXTENSIONS = (
    frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
    | (AVIF if HAS_AVIF else frozenset())
    | (HEIC if HAS_HEIC else frozenset())
)
# Photos that no installation reads: raw files of cameras, and formats of few programs.
UNREAD = frozenset({".arw", ".cr2", ".cr3", ".dng", ".jp2", ".jxl", ".nef", ".orf", ".psd", ".raf", ".rw2"})
GET_AVIF = "this Pillow cannot read AVIF: pip install -U pillow"
GET_HEIC = "HEIC needs pillow-heif: pip install 'u2label[heic]'"
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
ANY_BRANDS = frozenset({b"mif1", b"msf1"})  # of HEIC as of AVIF


def remedy(extension: str) -> str | None:
    """Why photos of this ending (lower case, with the dot) are left out here, and what to do; None where they are read
    or are no photos."""
    if extension in IMAGE_EXTENSIONS:
        return None
    if extension in AVIF | HEIC:
        return GET_AVIF if extension in AVIF else GET_HEIC
    return f"photos ending in {extension} are not read; convert them" if extension in UNREAD else None


def is_heic(data: bytes) -> bool:
    """Whether bytes begin as a HEIC file does, by its brands (ISO 14496-12, `ftyp`)."""
    if data[4:8] != b"ftyp":
        return False
    brands = data[8 : min(int.from_bytes(data[:4]), 256)]
    return data[8:12] in HEIC_BRANDS or (data[8:12] in ANY_BRANDS and b"avi" not in brands)


@functools.cache
def register_heic() -> str:
    """Lets Pillow read HEIC in this process, and returns what it calls the format. ImportError without pillow-heif."""
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return "HEIF"
