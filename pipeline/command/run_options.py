"""The options of a run, which `run` takes and `submit` hands to its job."""

from __future__ import annotations

import re
from typing import Annotated

import typer


def as_seconds(text: str | float) -> float:
    """Of 90, 90s, 30m or 2h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(text))
    if found is None:
        raise typer.BadParameter(f"{text!r} is no duration; give seconds, or such as 30m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


Stages = Annotated[str | None, typer.Option(help="Only these, comma-separated, such as instances,clusters.")]
MaxFailed = Annotated[
    float, typer.Option(min=0, max=1, help="Stop a stage early when more than this share of its shards failed.")
]
Reindex = Annotated[
    bool, typer.Option(help="List the source again; if it has changed, every stage is computed for the new list.")
]
Extend = Annotated[
    bool, typer.Option(help="List the source again and do what is new, was replaced or is gone, and nothing else.")
]
Prune = Annotated[bool, typer.Option(help="As --extend, and drop the rows of photos that are gone.")]
Refit = Annotated[bool, typer.Option(help="Fit anew what was made of other or fewer parts; classes get other numbers.")]
Retry = Annotated[
    str | None,
    typer.Option(help="Do the shards with such rows again: statuses, comma-separated, such as missing,crashed."),
]
WaitForResources = Annotated[
    float,
    typer.Option(
        metavar="DURATION",
        parser=as_seconds,
        help="How long the cluster may take to get the nodes that are asked for, such as 30m or 2h.",
    ),
]


def as_arguments(**options: str | float | bool | None) -> list[str]:
    """The options as a command line has them, by their names; what is False or None is left out."""
    arguments: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif value is not False and value is not None:
            arguments += [flag, str(value)]
    return arguments
