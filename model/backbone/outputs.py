"""The outputs that can be asked of one forward pass, by name.

keys          keys of the last block
cls           the CLS token after the final norm
tokens        the patch tokens after the final norm
block:8       the patch tokens after block 8, counted from 0; block:-1 are those after the last
block:8:norm  the same through the final norm
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_BLOCK = re.compile(r"block:(-?\d+)(:norm)?")


@dataclass(frozen=True, slots=True)
class Output:
    """What to read, and after how many blocks: 0 is the input of the first."""

    kind: Literal["keys", "cls", "patches"]
    after: int
    norm: bool


def parse_output(name: str, depth: int) -> Output:
    """The output called `name`, of a transformer of `depth` blocks.

    ValueError for another name, or a block that there is not.
    """
    if name == "keys":
        return Output("keys", depth - 1, norm=False)
    if name == "cls":
        return Output("cls", depth, norm=True)
    if name == "tokens":
        return Output("patches", depth, norm=True)
    block = _BLOCK.fullmatch(name)
    if block is None:
        raise ValueError(f"{name!r} is no output of a backbone: give keys, cls, tokens, block:<n> or block:<n>:norm")
    number = int(block[1])
    if not -depth <= number < depth:
        raise ValueError(f"{name!r}: there are {depth} blocks, 0 to {depth - 1}, or -{depth} to -1 from the end")
    return Output("patches", number % depth + 1, norm=block[2] is not None)


def block_names(numbers: Sequence[int], *, norm: bool) -> list[str]:
    """Names of the outputs of these blocks."""
    return [f"block:{number}{':norm' if norm else ''}" for number in numbers]
