"""The command of the names of classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.command.common import AsJson, RunOrConfig, answer, user_errors

if TYPE_CHECKING:
    from pipeline.clusters.names import Names
    from pipeline.sources.classes import Classes

WithNames = Annotated[
    bool, typer.Option("--names", help="The classes as u2label name has stored them: named, merged, without noise.")
]


def add_to(app: typer.Typer) -> None:
    """Add the command to the program's."""
    app.command()(name)


def name(
    run: RunOrConfig,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="FILE", help="names.yaml of the page of clusters; without it: what is stored."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the names that a person gave to the classes, and store them with the run."""
    with user_errors(as_json):
        from pipeline.operations.name import name_classes, print_named

        named = name_classes(run, source)
        answer(named, as_json, lambda: print_named(named))


def names_of_run(run_or_config: str, *, wanted: bool) -> Names | None:
    """The names that are stored with a run, if they are `wanted`. ConfigError as of `names_of`."""
    if not wanted:
        return None
    from pipeline.stages.named import names_of
    from pipeline.stages.run import open_run

    return names_of(open_run(run_or_config, need=None))


def classes_of_run(run_or_config: str, *, wanted: bool) -> Classes | None:
    """The classes that came of the names of a run, likewise."""
    names = names_of_run(run_or_config, wanted=wanted)
    return None if names is None else names.written
