"""The commands of those who operate runs: submit one to a cluster, remove what a run folder no longer needs."""

from __future__ import annotations

import enum
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.command.common import AsJson, ConfigPath, Overrides, answer, fail, load, stop_on_sigterm, user_errors
from pipeline.command.run_options import (
    Extend,
    MaxFailed,
    Prune,
    Refit,
    Reindex,
    Retry,
    Stages,
    WaitForResources,
    as_arguments,
)

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from pipeline.operations.server import Job


class Environment(enum.StrEnum):
    IMAGE = "image"
    PIP = "pip"
    UNCHECKED = "unchecked"


JobEnvironment = Annotated[
    Environment,
    typer.Option(
        help="Packages of the job: image, the cluster's, checked against constraints.txt; pip, the pinned ones "
        "installed on every node; unchecked, the cluster's as they are."
    ),
]
Variables = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A variable of here that the job gets, too; repeat for more."),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program's."""
    app.command()(submit)
    app.command()(clean)


def submit(
    config: ConfigPath,
    address: Annotated[str, typer.Option(help="The head's dashboard, such as http://head:8265.")],
    overrides: Overrides = None,
    stages: Stages = None,
    max_failed_fraction: MaxFailed = 0.5,
    reindex: Reindex = False,
    extend: Extend = False,
    prune: Prune = False,
    refit: Refit = False,
    retry: Retry = None,
    wait_for_resources: WaitForResources = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the job's end, and end with its exit code.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Wait likewise, and print the job's log.")] = False,
    environment: JobEnvironment = Environment.IMAGE,
    env: Variables = None,
    as_json: AsJson = False,
) -> None:
    """Run on a Ray cluster, as a job that outlives this command. Submitting again continues after any interruption."""
    with user_errors(as_json), stop_on_sigterm():
        from pipeline.engine import log
        from pipeline.operations import server
        from pipeline.operations.parcel import checkout, find_files
        from pipeline.operations.submit import remarks
        from pipeline.operations.submit import submit as submit_run

        loaded = load(config, overrides)
        parcel = find_files(checkout())
        client = server.connect_to_head(address)
        _remark(remarks(loaded, parcel, address, env or ()))
        of_source = {"reindex": reindex, "extend": extend, "prune": prune}
        options = as_arguments(
            stages=stages,
            **of_source,
            refit=refit,
            retry=retry,
            max_failed_fraction=max_failed_fraction,
            wait_for_resources=wait_for_resources or None,
        )
        job = submit_run(
            client,
            parcel,
            loaded,
            options,
            environment=environment.value,
            variables=env or (),
            global_options=["--log-format", "json"] if log.writes_json() else [],
        )
        if wait or follow:
            code = _see_it_end(client, job, follow=follow, as_json=as_json)
        else:
            answer(server.describe(job), as_json, lambda: server.print_job(job))
            code = 0
    raise typer.Exit(code)


def _see_it_end(client: JobSubmissionClient, job: Job, *, follow: bool, as_json: bool) -> int:
    """Wait for a job, with its log if that is followed, and tell how it ended; its exit code."""
    from pipeline.operations import server

    _remark([f"submitted {job.submission_id}"])
    try:
        ended = server.follow(client, job, _to_stderr if as_json else _to_stdout) if follow else None
        ended = ended or server.wait(client, job)
    except KeyboardInterrupt:
        fail(f"the job {job.submission_id} goes on\n{server.how_to(job)}", 130, as_json=as_json)
    answer(server.describe(job, ended), as_json, lambda: server.print_end(job, ended))
    return server.exit_code(ended)


def clean(
    config: ConfigPath,
    overrides: Overrides = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="CONFIG", help="Another config of the same run folder, whose folders stay; repeat."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only listed.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the run's folders of settings that the config no longer names, or remove them."""
    with user_errors(as_json):
        from pipeline.operations.clean import clean as find_or_remove
        from pipeline.operations.clean import print_cleaned

        others = [load(other, None) for other in keep or ()]
        cleaned = find_or_remove(load(config, overrides), others, remove=yes)
        answer(cleaned, as_json, lambda: print_cleaned(cleaned))


def _to_stdout(text: str) -> None:
    print(text, end="", flush=True)


def _to_stderr(text: str) -> None:
    print(text, end="", flush=True, file=sys.stderr)


def _remark(lines: list[str]) -> None:
    from pipeline.engine.log import say

    for line in lines:
        say(f"u2label: {line}")
