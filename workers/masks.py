"""Binary masks and id maps: COCO run lengths, boxes, overlaps, panoptic PNGs and the resize of MaskCut.

Arrays are (height, width); boxes are xyxy in pixels with x1 and y1 exclusive; a panoptic id map holds 0 for void.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

ID_LIMIT = 1 << 24  # an id must fit the three bytes of a panoptic PNG's pixel

BoolArray = NDArray[np.bool_]
Box = tuple[float, float, float, float]


def encode_rle(mask_hw: ArrayLike) -> str:
    """(h, w) bool -> COCO's compressed run-length counts, column by column. ValueError on another rank or dtype."""
    mask = _checked_mask(mask_hw)
    from pycocotools import mask as coco  # who asks for boxes and sizes alone does without

    counts: bytes = coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    return counts.decode("ascii")


def decode_rle(counts: str, height: int, width: int) -> BoolArray:
    """COCO's compressed counts -> (height, width) bool. ValueError unless the runs fill the mask exactly.

    The check matters: pycocotools decodes counts that are cut short into memory it never initialised.
    """
    runs = _run_lengths(counts)
    if runs.size == 0 or runs.min() < 0 or runs.sum() != height * width:
        raise ValueError(f"the RLE does not fill {height}x{width}: {runs.size} runs, {runs.sum()} pixels")
    from pycocotools import mask as coco

    decoded: NDArray[np.uint8] = coco.decode({"size": [height, width], "counts": counts.encode("ascii")})
    return np.ascontiguousarray(decoded, dtype=np.bool_)


def _run_lengths(counts: str) -> NDArray[np.int64]:
    """Run lengths of compressed counts: five bits a character, lowest first, bit 5 set when more follow, the sign in
    bit 4 of the last; from the fourth on, a run is the difference to the run two before."""
    codes = np.frombuffer(counts.encode("ascii", errors="replace"), dtype=np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return codes
    last = (codes & 32) == 0
    if codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ValueError(f"not compressed RLE counts: {counts[:40]!r}")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    sizes = np.diff(np.append(starts, codes.size))
    if sizes.max() > 12:
        raise ValueError(f"a run of more than 60 bits in the RLE counts {counts[:40]!r}")
    place = np.arange(codes.size) - np.repeat(starts, sizes)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where((codes[last] & 16) != 0, np.int64(1) << (5 * sizes), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def mask_box(mask_hw: ArrayLike) -> Box:
    """The smallest box around a (h, w) bool mask, xyxy, x1 and y1 exclusive; all zeros for an empty mask."""
    mask = _checked_mask(mask_hw)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def encode_panoptic_png(ids_hw: ArrayLike) -> bytes:
    """(h, w) integer ids in [0, 2**24) -> RGB PNG with id = R + 256 G + 65536 B, as COCO panoptic stores them.

    Raises:
        ValueError: the map is not two-dimensional or not integer, or an id does not fit 24 bits.
    """
    ids = np.asarray(ids_hw)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"expected a (h, w) integer id map, got shape {ids.shape} and dtype {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= ID_LIMIT:
        raise ValueError(f"panoptic ids must be in [0, {ID_LIMIT}), got {low}..{high}")
    # The three low bytes of a little-endian word are R, G and B in that order.
    words = np.ascontiguousarray(ids, dtype="<u4")
    rgb = np.ascontiguousarray(words.view(np.uint8).reshape(*ids.shape, 4)[..., :3])
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, format="PNG")
    return stream.getvalue()


def open_png(data: bytes) -> Image.Image:
    """A PNG, by its content too: of other formats Pillow would start programs. OSError when it is none."""
    return Image.open(io.BytesIO(data), formats=("PNG",))


def decode_panoptic_png(data: bytes) -> NDArray[np.int32]:
    """Bytes of an RGB PNG -> (h, w) int32 ids. ValueError when the picture is not RGB, OSError when it is none."""
    with open_png(data) as image:
        if image.mode != "RGB":
            raise ValueError(f"a panoptic PNG is RGB, this one is {image.mode}")
        rgb = np.asarray(image).astype(np.int32)
    ids: NDArray[np.int32] = rgb[..., 0] | (rgb[..., 1] << 8) | (rgb[..., 2] << 16)
    return ids


def resize_mask(mask_hw: ArrayLike, height: int, width: int) -> BoolArray:
    """(h, w) bool -> (height, width) bool by Pillow's bicubic filter, cut at half of its maximum (CutLER, maskcut.py).

    ValueError when a side is not positive.
    """
    mask = _checked_mask(mask_hw)
    if height < 1 or width < 1:
        raise ValueError(f"cannot resize a mask to {height}x{width}")
    grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    resized = np.asarray(grey.resize((width, height), Image.Resampling.BICUBIC))
    return resized > resized.max() / 2


def _checked_mask(mask_hw: ArrayLike) -> BoolArray:
    mask = np.asarray(mask_hw)
    if mask.ndim != 2 or mask.size == 0 or mask.dtype != np.bool_:
        raise ValueError(f"expected a (h, w) bool mask, got shape {mask.shape} and dtype {mask.dtype}")
    return mask
