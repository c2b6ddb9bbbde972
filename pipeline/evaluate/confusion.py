"""A confusion matrix as a picture: clusters in the order of the classes they were mapped to, against true classes.

A cell is the share of the true class's pixels that the cluster holds, so that every column adds up to 100 %, and a
perfect labelling is a dark diagonal of framed cells. Drawn with Pillow alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MAX_ROWS = 64  # further clusters without a class share one row
DARK, LIGHT, FRAME, LINE = (24, 32, 44), (255, 255, 255), (214, 69, 0), (214, 220, 228)
FULL = np.array((8, 60, 130))  # the colour of 100 %
MARGIN = 16


@dataclass(frozen=True, slots=True)
class Rows:
    """What the picture shows: a label and (C,) pixels a row; `framed` is the column of its class, -1 for none."""

    labels: list[str]
    counts: NDArray[np.int64]
    framed: list[int]


def arrange(
    counts_KC: NDArray[np.int64], void_C: NDArray[np.int64], mapping_K: NDArray[np.int64], clusters: Sequence[str]
) -> Rows:
    """Mapped clusters in the order of their classes, then those left over by size, then void; no empty rows."""
    mapped = sorted(np.flatnonzero(mapping_K >= 0).tolist(), key=lambda k: int(mapping_K[k]))
    sizes = counts_KC.sum(axis=1)
    spare = sorted((k for k in np.flatnonzero(mapping_K < 0).tolist() if sizes[k]), key=lambda k: -int(sizes[k]))
    room = max(1, MAX_ROWS - len(mapped))
    shown, rest = (spare, []) if len(spare) <= room else (spare[: room - 1], spare[room - 1 :])
    rows = [(clusters[k], counts_KC[k], int(mapping_K[k])) for k in [*mapped, *shown]]
    if rest:
        rows.append((f"{len(rest)} more", counts_KC[rest].sum(axis=0), -1))
    if void_C.any():
        rows.append(("void", void_C, -1))
    labels, counts, framed = zip(*rows, strict=True)
    return Rows(list(labels), np.stack(counts), list(framed))


def confusion_png(rows: Rows, classes: Sequence[str], title: str) -> bytes:
    """PNG bytes of the matrix of `rows` against `classes`, with the share in percent where a cell has room for it."""
    totals = rows.counts.sum(axis=0)
    shares = rows.counts / np.maximum(totals, 1)
    heads = [f"{name:.32} ({total / max(1, totals.sum()):.1%})" for name, total in zip(classes, totals, strict=True)]
    cell = int(np.clip(1500 // max(len(classes), 1), 14, 40))
    font, bold = (ImageFont.load_default(size) for size in (min(15, cell - 1), 18))
    left = MARGIN + 26 + max(int(font.getlength(label)) for label in rows.labels)
    top = MARGIN + 40 + max(int(font.getlength(head)) for head in heads)
    width = max(left + cell * len(classes), int(bold.getlength(title)) + MARGIN) + MARGIN
    image = Image.new("RGB", (width, top + cell * len(rows.labels) + MARGIN), LIGHT)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN - 4), title, DARK, bold)
    for column, head in enumerate(heads):
        _upright_text(image, (left + column * cell, top - 6), cell, head, font)
    for row, label in enumerate(rows.labels):
        middle = top + row * cell + cell // 2
        draw.text((left - 8, middle), label, DARK, font, anchor="rm")
        _draw_row(draw, (left, top + row * cell), cell, shares[row])
    for row, column in enumerate(rows.framed):
        if column >= 0:
            x, y = left + column * cell, top + row * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=FRAME, width=2)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def _draw_row(draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: int, shares_C: NDArray[np.float64]) -> None:
    font = ImageFont.load_default(13)
    for column, share in enumerate(shares_C.tolist()):
        x, y = corner[0] + column * cell, corner[1]
        # The root makes a few percent visible beside a hundred.
        color = np.rint(255 + (FULL - 255) * share**0.5).astype(int)
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=tuple(color.tolist()), outline=LINE)
        if cell >= 28 and share >= 0.005:
            text = DARK if share < 0.25 else LIGHT
            draw.text((x + cell // 2, y + cell // 2), f"{100 * share:.0f}", text, font, anchor="mm")


def _upright_text(
    image: Image.Image, foot: tuple[int, int], cell: int, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """Text that reads upwards, centred over a column of width `cell` with its start at `foot`."""
    strip = Image.new("RGB", (int(font.getlength(text)) + 2, cell), LIGHT)
    ImageDraw.Draw(strip).text((0, cell // 2), text, DARK, font, anchor="lm")
    turned = strip.rotate(90, expand=True)
    image.paste(turned, (foot[0], foot[1] - turned.height))
