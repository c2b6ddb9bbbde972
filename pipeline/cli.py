"""The command `u2label`. Each command is a few lines over a module that does the work and is imported when used.

Exit codes: 0 done, 1 some work failed, 2 the configuration or its surroundings are wrong, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.receipts import Receipt

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

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, local or s3://; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as maskcut.tau=0.2.")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, such as auto or ray://head:10001.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    stages: Annotated[str | None, typer.Option(help="Only these, comma-separated, such as instances,clusters.")] = None,
    address: Address = None,
    max_failed_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Stop a stage early when more than this share of its shards failed.")
    ] = 0.5,
    reindex: Annotated[
        bool, typer.Option(help="List the source again; if it has changed, every stage is computed for the new list.")
    ] = False,
) -> None:
    """Do everything that is not done yet. The same command continues after any interruption."""
    with _user_errors(), _stop_on_sigterm():
        from pipeline.runner import run as run_stages
        from pipeline.status import print_status, run_status

        loaded = _load(config, overrides)
        chosen = tuple(name.strip() for name in stages.split(",")) if stages else None
        run_stages(loaded, stages=chosen, address=address, max_failed_fraction=max_failed_fraction, reindex=reindex)
        print_status(run_status(loaded))


@app.command()
def status(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """What is done, what is missing, and rows by status. Reads only."""
    with _user_errors():
        from pipeline.status import print_status, run_status

        print_status(run_status(_load(config, overrides)), as_json=as_json)


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """What a run would do, how long and how big, from the rates measured so far. Starts nothing."""
    with _user_errors():
        from pipeline.status import print_plan, run_status

        print_plan(run_status(_load(config, overrides)), as_json=as_json)


@app.command()
def report(
    run_or_config: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or the run's config file.")],
    output: Annotated[str | None, typer.Option(help="HTML file to write; by default report.html in the run.")] = None,
    photos: Annotated[int, typer.Option(min=1, help="Photos on the first page.")] = 48,
    clusters: Annotated[int, typer.Option(min=0, help="Largest clusters to show.")] = 24,
) -> None:
    """One self-contained HTML file: counts, seconds by phase, photos with their masks, clusters."""
    with _user_errors():
        from pipeline.report.write import write_report

        print(write_report(run_or_config, output, max_photos=photos, max_clusters=clusters))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for scenes, run and report.")] = Path("runs/demo"),
    config: Annotated[Path, typer.Option(help="The demo's configuration.")] = Path("configs/demo.yaml"),
    photos: Annotated[Path | None, typer.Option(help="A folder of your own photos to label too.")] = None,
) -> None:
    """Generate scenes with known truth, label them without looking at it, and score the labels."""
    with _user_errors(), _stop_on_sigterm():
        from pipeline.demo.run import run_demo

        run_demo(output, config, photos)


@evaluate_app.command("semantic")
def evaluate_semantic(
    run_or_config: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or the run's config file.")],
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
    with _user_errors():
        import json

        from pipeline.evaluate import semantic as evaluation
        from pipeline.evaluate.labels import read_names

        found = evaluation.evaluate_semantic(
            run_or_config, labels, ignore=ignore or (255,), names=read_names(names) if names else None, output=output
        )
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            evaluation.print_scores(found)
            print("\n".join(found["files"]))


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None) -> None:
    """The whole configuration with every default filled in."""
    with _user_errors():
        print(_load(config, overrides).to_yaml(), end="")


def main() -> NoReturn:
    app()
    sys.exit(0)


def _load(path: str, overrides: list[str] | None) -> Config:
    from pipeline.config import load_config

    return load_config(path, overrides or ())


@contextmanager
def _user_errors() -> Iterator[None]:
    """Errors that a user can mend, in one paragraph and without a traceback."""
    from pipeline.errors import ConfigError, LeaseHeld, StageFailed

    try:
        yield
    except (ConfigError, LeaseHeld) as error:
        _fail(str(error), 2)
    except StageFailed as error:
        _print_failures(error.failures)
        again = "\nthe parts that are done are kept; run the same command again to do the rest"
        _fail(f"{error}{again if error.failures else ''}", 1)
    except KeyboardInterrupt:
        _fail("interrupted; the parts that are done are kept, run the same command again to go on", 130)


def _fail(message: str, code: int) -> NoReturn:
    print(f"u2label: {message}", file=sys.stderr)
    sys.exit(code)


def _print_failures(failures: list[Receipt]) -> None:
    """A table of failed shards, equal errors together."""
    from rich.console import Console
    from rich.table import Table

    if not failures:
        return
    groups: dict[str, list[int]] = {}
    for receipt in failures:
        last_line = (receipt.error or "").strip().rsplit("\n", 1)[-1]
        groups.setdefault(last_line, []).append(receipt.shard)
    table = Table("shards", "which", "error", title="failed shards")
    for message, shards in sorted(groups.items(), key=lambda group: -len(group[1])):
        which = ", ".join(map(str, sorted(shards)[:8])) + (" ..." if len(shards) > 8 else "")
        table.add_row(str(len(shards)), which, message)
    Console(stderr=True).print(table)


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: cleanly."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
