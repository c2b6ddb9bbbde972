"""Names that a person gave to the classes of a run, as the file `names.yaml`, and the classes that come of them.

    format: u2label names 1
    fits: {things: 1a2b3c4d5e6f-0123456789abcdef, stuff: null}   # the fits whose classes these are; null: none
    classes: {things: 300, stuff: 27}                   # how many they have: categories 1..300, and 301..327
    names:
      1: {"name": "cat"}
      2: {"merge": 1}                                   # the same class as 1
      3: {"noise": true}                                # dropped: its pixels become void
      4: {"name": "grass", "stuff": true}               # no things, but stuff
      301: {"name": "sky"}

A class without an entry keeps its own name, such as "thing 17". The new classes are numbered as the labels of a run
are: things from 1, then stuff, each in the order of the old ones.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config.section import Section
from pipeline.errors import ConfigError
from pipeline.store import storage
from workers.merge import VOID_LABEL
from workers.renaming import NOISE, Renaming

if TYPE_CHECKING:
    from pipeline.sources.classes import Classes

NAMES = "names.yaml"  # in the run folder
FORMAT: Literal["u2label names 1"] = "u2label names 1"
LONGEST = 100  # characters of a name
SHOWN = 5  # faults in an error


class Fits(Section):
    """The fits that made the classes, by fingerprint and artifact; `stuff` is None where a run labels none."""

    things: str
    stuff: str | None = None


class Counts(Section):
    things: int = Field(ge=0)
    stuff: int = Field(ge=0)

    @property
    def total(self) -> int:
        return self.things + self.stuff

    def default_name(self, category: int) -> str:
        return f"thing {category}" if category <= self.things else f"stuff {category - self.things}"


class Entry(Section):
    """What was said of one class."""

    name: str | None = None
    merge: int | None = None
    stuff: bool = False
    noise: bool = False

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str | None) -> str | None:
        if name is None:
            return None
        name = unicodedata.normalize("NFC", name).strip()
        if not name or len(name) > LONGEST or not name.isprintable():
            raise ValueError(f"must be 1 to {LONGEST} printable characters on one line")
        return name

    @model_validator(mode="after")
    def _one_thing_at_a_time(self) -> Entry:
        said = [self.merge is not None, self.noise, self.name is not None or self.stuff]
        if sum(said) != 1:
            raise ValueError("has to say one of merge, noise, and name (with or without stuff)")
        return self


@dataclass(frozen=True, slots=True)
class Category:
    """A class that came of the names: its new id, and the old classes that it is made of."""

    id: int
    name: str
    is_thing: bool
    members: tuple[int, ...]


class Names(Section):
    """The file. It is checked by `read_names`."""

    format: Literal["u2label names 1"]
    fits: Fits
    classes: Counts
    names: dict[int, Entry] = Field(default_factory=dict)

    @functools.cached_property
    def new_categories(self) -> tuple[Category, ...]:
        """Things before stuff, numbered from 1. ConfigError: merges in a circle, as `faults` says before."""
        groups: dict[int, list[int]] = {}
        for category in range(1, self.classes.total + 1):
            if (root := self.root(category)) != NOISE:
                groups.setdefault(root, []).append(category)
        ordered = sorted(groups, key=lambda root: (not self.is_thing(root), root))
        return tuple(
            Category(number, self.name_of(root), self.is_thing(root), tuple(groups[root]))
            for number, root in enumerate(ordered, start=1)
        )

    @functools.cached_property
    def renaming(self) -> Renaming:
        category_of = [NOISE] * (self.classes.total + 1)
        for category in self.new_categories:
            for member in category.members:
                category_of[member] = category.id
        things = sum(category.is_thing for category in self.new_categories)
        return Renaming(tuple(category_of), things, len(self.new_categories) - things)

    @functools.cached_property
    def written(self) -> Classes:
        """The new classes as labels are read and exported with them."""
        from pipeline.sources.classes import Classes  # what it imports is not needed to look at a run
        from pipeline.sources.coco import Category as Written

        categories = {c.id: Written(c.id, c.name, c.is_thing) for c in self.new_categories}
        return Classes(categories, {member: c.id for c in self.new_categories for member in c.members})

    @property
    def listed(self) -> list[dict[str, Any]]:
        """The new classes as parts and COCO files list them."""
        return [{"id": c.id, "name": c.name, "isthing": int(c.is_thing)} for c in self.new_categories]

    def root(self, category: int) -> int:
        """The class that a class is merged into, in the end; `NOISE` for noise. ConfigError for a circle."""
        seen = [category]
        while (target := self.names.get(category, _NOTHING).merge) is not None:
            if target in seen:
                raise ConfigError(f"names: {' -> '.join(map(str, [*seen, target]))} are merged in a circle; end it")
            seen.append(category := target)
        return NOISE if self.names.get(category, _NOTHING).noise else category

    def is_thing(self, root: int) -> bool:
        return root <= self.classes.things and not self.names.get(root, _NOTHING).stuff

    def name_of(self, root: int) -> str:
        return self.names.get(root, _NOTHING).name or self.classes.default_name(root)

    def to_yaml(self) -> bytes:
        """As the page of clusters reads and writes it: an entry a line."""
        lines = [
            f"format: {FORMAT}",
            f"fits: {json.dumps(self.fits.model_dump())}",
            f"classes: {json.dumps(self.classes.model_dump())}",
            "names:" if self.names else "names: {}",
        ]
        for category, entry in sorted(self.names.items()):
            said = entry.model_dump(exclude_defaults=True)
            lines.append(f"  {category}: {json.dumps(said, ensure_ascii=False)}")
        return ("\n".join(lines) + "\n").encode()


_NOTHING = Entry.model_construct(name=None, merge=None, stuff=False, noise=False)


def read_names(uri: str) -> Names:
    """Read and check a file of names, local or remote.

    ConfigError names the file, the class and what to do: no file, no YAML, unknown keys or classes, a class twice,
    merges in a circle or into noise, stuff merged into things, two classes of one name, or none left.
    """
    shown = storage.redact(uri)
    unreadable: tuple[type[Exception], ...] = (*storage.store_errors(uri), UnicodeDecodeError)
    try:
        document = yaml.load(storage.read_bytes(uri).decode("utf-8-sig"), _Loader)
        names = Names.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{shown}: " + "; ".join(map(_explain, error.errors()[:SHOWN]))) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown} is not valid YAML: {error}") from error
    except unreadable as error:
        raise ConfigError(f"cannot read the names in {shown!r}: {storage.redact(str(error))}") from error
    if faults := list(_faults(names)):
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ConfigError(f"{shown}: {'; '.join(faults[:SHOWN])}{more}")
    return names


def _faults(names: Names) -> Iterator[str]:
    """What is wrong; the later checks need the earlier ones to find nothing."""
    faults = list(_unknown(names)) or list(_circles(names)) or [*_merges(names), *_twins(names), *_counts(names)]
    yield from faults


def _unknown(names: Names) -> Iterator[str]:
    total = names.classes.total
    for category, entry in names.names.items():
        for number in (category, entry.merge):
            if number is not None and not 1 <= number <= total:
                yield f"{number} is none of the classes 1..{total}"
        if entry.merge == category:
            yield f"{category} is merged into itself; leave the entry out"


def _circles(names: Names) -> Iterator[str]:
    for category in names.names:
        try:
            names.root(category)
        except ConfigError as error:
            yield str(error)
            return


def _merges(names: Names) -> Iterator[str]:
    for category, entry in names.names.items():
        root = names.root(category)
        if entry.merge is None:
            continue
        if root == NOISE:
            yield f"{category} is merged into {entry.merge}, which is noise; mark {category} as noise, too"
        elif category > names.classes.things and names.is_thing(root):
            yield f"{category} is stuff, but merged into the things {root}; mark {root} as stuff, or turn it round"


def _twins(names: Names) -> Iterator[str]:
    first: dict[str, Category] = {}
    for category in names.new_categories:
        other = first.setdefault(category.name.casefold(), category)
        if other is not category:
            one, two = other.members[0], category.members[0]
            yield f"{one} and {two} are both called {category.name!r}; merge one into the other, or rename one"


def _counts(names: Names) -> Iterator[str]:
    if not names.new_categories:
        yield "every class is noise; keep one"
    if (stuff := names.renaming.num_stuff) >= VOID_LABEL:
        yield f"{stuff} classes are stuff, and a map holds {VOID_LABEL - 1}; mark fewer as stuff, or merge some"


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice in a mapping, of which YAML's loader takes the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} comes twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _explain(fault: Any) -> str:
    key = ".".join(map(str, fault["loc"])) or "the file"
    what = {"extra_forbidden": "unknown key", "missing": "is missing"}.get(fault["type"], fault["msg"])
    return f"{key}: {what.removeprefix('Value error, ')} (got {fault['input']!r:.80})"


def has_names(names: Names, listed: Sequence[Mapping[str, Any]], where: str) -> bool:
    """Whether labels with the categories `listed` are in the classes of these names already; else they are in those
    that the names are of. ConfigError: in neither."""
    found = [(int(entry["id"]), str(entry["name"]), bool(entry["isthing"])) for entry in listed]
    of, total = names.classes, names.classes.total
    if found == [(category.id, category.name, category.is_thing) for category in names.new_categories]:
        return True
    if found == [(number, of.default_name(number), number <= of.things) for number in range(1, total + 1)]:
        return False
    raise ConfigError(
        f"{where} has {len(listed)} categories, which are neither the {of.things} things and {of.stuff} stuff that the "
        f"names are of nor the {len(names.new_categories)} that came of them; name the classes of this run"
    )
