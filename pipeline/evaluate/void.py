"""What of a truth is void, so that it is not scored: what was asked for, else what names and values suggest."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.errors import ConfigError
from pipeline.sources.coco import Categories, CocoPanoptic
from pipeline.stages.parts import PanopticParts

NAMES = frozenset({"void", "unlabeled", "unlabelled", "notlabeled", "ignore", "ignored", "ignorelabel", "dontcare"})
VALUES = frozenset({255, 0xFFFFFF})  # ids of red and of white, where no segment has them
NOTHING = "none"


class Void:
    """The void of a truth beside the value 0, which always is: `categories` are the ids of those that are void.

    `asked` names categories of the truth by name or id, or values of its PNGs; `none` is nothing. Without it there are
    guesses: categories that are called so (NAMES), and the VALUES that occur though no segment has them. The truth then
    reads such values as void. ConfigError for a name that is no category's, and for values of what has no PNGs.
    """

    def __init__(self, truth: CocoPanoptic | PanopticParts, asked: Sequence[str] | None) -> None:
        self._truth, self._guessed = truth, asked is None
        wanted = [word for word in asked or () if word != NOTHING]
        values = {int(word) for word in wanted if word.isdecimal()} - truth.categories.keys()
        self.categories = _guess(truth.categories) if asked is None else self._named(wanted) - values
        if isinstance(truth, CocoPanoptic):
            truth.void = VALUES if asked is None else frozenset(values)
        elif values:
            raise ConfigError(f"--void: {min(values)} is no category of {truth.shown}, whose maps have no other values")

    def _named(self, words: Sequence[str]) -> set[int]:
        """The ids of categories by names or ids, and numbers that are none."""
        by_name = {category.name: number for number, category in self._truth.categories.items()}
        for word in words:
            if word not in by_name and not word.isdecimal():
                some = ", ".join(list(by_name)[:8])
                raise ConfigError(f"--void: {word!r} is no category of {self._truth.shown}, which has {some} ...")
        return {by_name[word] if word in by_name else int(word) for word in words}

    def told(self) -> str:
        """In words. Of guessed values, those that the images had which were read."""
        values = sorted(self._truth.void_found) if isinstance(self._truth, CocoPanoptic) else []
        names = [f"{number} ({self._truth.categories[number].name})" for number in sorted(self.categories)]
        said = ["0", *map(str, values)]
        words = f"the value{'s' if values else ''} {', '.join(said)}"
        if names:
            words += f" and the categor{'ies' if len(names) > 1 else 'y'} {', '.join(names)}"
        return f"{words}, as guessed; --void says it otherwise" if self._guessed and (names or values) else words


def _guess(categories: Categories) -> set[int]:
    return {number for number, category in categories.items() if _plain(category.name) in NAMES}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())
