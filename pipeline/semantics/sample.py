"""Which photos of the source STEGO is fitted to, told from the numbers of the photos alone.

A teacher's features take about a megabyte a photo, and the fit looks at some ten thousand photos however large the
source is. So the stage `features` computes them for a sample, and every worker finds its own part of it: the source is
cut into as many equal stretches as photos are wanted, and of each one photo is drawn. Neighbours in the listing, which
are often of one folder or film, are thus rarely drawn together, and every folder has its share.
"""

from __future__ import annotations

import hashlib

SPARE = 20  # one photo in so many is drawn in addition, for those that turn out to be unreadable


def sample_size(images: int, max_images: int | None) -> int:
    """How many of `images` photos get features: all, or `max_images` and a twentieth more."""
    return images if max_images is None else min(images, max_images + -(-max_images // SPARE))


def sampled_rows(first: int, count: int, *, images: int, wanted: int, seed: int) -> list[int]:
    """Rows, ascending, of the sampled photos among those numbered `first` to `first + count - 1` of `images`.

    Together all rows of a source are exactly `wanted` (1 <= wanted <= images), however it is cut into shards.
    """
    rows = []
    last = (first + count) * wanted - 1
    for stretch in range(((first + 1) * wanted - 1) // images, last // images + 1):
        start, end = (edge * images // wanted for edge in (stretch, stretch + 1))
        row = start + _draw(seed, stretch) % (end - start) - first
        if 0 <= row < count:
            rows.append(row)
    return rows


def _draw(seed: int, stretch: int) -> int:
    """64 random bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {stretch}".encode(), digest_size=8).digest())
