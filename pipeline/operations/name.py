"""`u2label name`: check the names of a run's classes and store them with the run, or show those that are stored."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.clusters.names import NAMES, Category, Names, read_names
from pipeline.engine.log import stdout_console
from pipeline.errors import ConfigError
from pipeline.stages.named import check_fits, names_of
from pipeline.stages.run import open_run
from pipeline.store import storage

SHOWN = 40  # classes in the table


@dataclass(frozen=True, slots=True)
class Named:
    """What came of the names: the new classes with the old ones that each is made of, and how many are noise, have a
    name of their own, or are merged into others. `said` of a class: it has a name, or is made of several. `replaced`:
    other names were stored before."""

    file: str
    things: int
    stuff: int
    noise: int
    named: int
    merged: int
    replaced: bool
    categories: list[dict[str, object]]


def name_classes(run_or_config: str, source: str | None) -> Named:
    """Store the names in the file `source` with the run; None: look at those that are stored.

    ConfigError: no such run, its clusters are not fitted, the file is wrong (see `read_names`), of other fits, or
    cannot be stored.
    """
    run = open_run(run_or_config, need=None)
    if not run.fitted:
        raise ConfigError(f"the run in {storage.redact(run.uri)} has no clusters yet; go on with u2label run")
    where = storage.join(run.uri, NAMES)
    if source is None:
        return _describe(names_of(run), where, replaced=False)
    names = read_names(source)
    check_fits(names, run, storage.redact(source))
    return _describe(names, where, replaced=_store(names, where))


def _store(names: Names, where: str) -> bool:
    """Whether other names were there."""
    content = names.to_yaml()
    try:
        replaced = storage.exists(where) and storage.read_bytes(where) != content
        storage.write_bytes(where, content)
    except storage.store_errors(where) as error:
        raise ConfigError(f"cannot write {storage.redact(where)!r}: {storage.redact(str(error))}") from error
    return replaced


def _describe(names: Names, where: str, *, replaced: bool) -> Named:
    categories, renaming = names.new_categories, names.renaming
    kept = sum(len(category.members) for category in categories)
    return Named(
        file=storage.redact(where),
        things=renaming.num_things,
        stuff=renaming.num_stuff,
        noise=names.classes.total - kept,
        named=sum(entry.name is not None for entry in names.names.values()),
        merged=kept - len(categories),
        replaced=replaced,
        categories=[
            {"id": c.id, "name": c.name, "isthing": int(c.is_thing), "of": list(c.members), "said": _is_said(names, c)}
            for c in categories
        ],
    )


def _is_said(names: Names, category: Category) -> bool:
    return len(category.members) > 1 or category.members[0] in names.names


def print_named(named: Named) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = stdout_console()
    said = [category for category in named.categories if category["said"]]
    table = Table("id", "name", "kind", "made of the classes")
    for category in said[:SHOWN]:
        members, kind = str(category["of"])[1:-1], "thing" if category["isthing"] else "stuff"
        table.add_row(str(category["id"]), escape(str(category["name"])), kind, members)
    if said:
        console.print(table)
    if len(said) > SHOWN:
        console.print(f"and {len(said) - SHOWN} more")
    console.print(
        f"{named.things} things, {named.stuff} stuff; {named.named} with a name, {named.merged} merged into others, "
        f"{named.noise} are noise"
    )
    console.print(f"{named.file}{', in place of other names' if named.replaced else ''}", soft_wrap=True)
