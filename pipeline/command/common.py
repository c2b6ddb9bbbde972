"""What the commands share: their common arguments, and how an error of the user's ends one."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline.engine.interrupts import interrupted_by

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.errors import Failure

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, local or s3://; see configs/.")]
RunOrConfig = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or the run's config file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as maskcut.tau=0.2.")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, such as auto or ray://head:10001.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout; all else goes to stderr.")]


def load(path: str, overrides: list[str] | None) -> Config:
    from pipeline.config import load_config

    return load_config(path, overrides or ())


@contextmanager
def user_errors(as_json: bool = False) -> Iterator[None]:
    """Errors that a user can mend, in one paragraph and without a traceback; as JSON on stdout too when that is asked
    for, so that there is one document whatever happens."""
    from pipeline.errors import ConfigError, LeaseHeld, StageFailed

    try:
        yield
    except (ConfigError, LeaseHeld) as error:
        fail(str(error), 2, as_json=as_json)
    except StageFailed as error:
        _print_failures(error.failures)
        again = "\nthe parts that are done are kept; run the same command again to do the rest"
        fail(f"{error}{again if error.failures else ''}", 1, as_json=as_json, failures=error.failures)
    except KeyboardInterrupt:
        kept = "interrupted; the parts that are done are kept, run the same command again to go on"
        fail(kept, 130, as_json=as_json)


def fail(message: str, code: int, *, as_json: bool = False, failures: Sequence[Failure] = ()) -> NoReturn:
    from pipeline.engine.log import say
    from pipeline.store.storage import redact

    if as_json:
        failed = [{"stage": r.stage, "shard": r.shard, "error": r.error} for r in failures]
        _print_json({"error": redact(message), "exit_code": code, "failed": failed})
    say(f"u2label: {redact(message)}", level=logging.ERROR)
    sys.exit(code)


def answer(found: Any, as_json: bool, show: Callable[[], None], *, files: Sequence[str] = ()) -> None:
    """What a command has found: as one JSON document on stdout (a dataclass or plain data), or as `show` prints it,
    with the names of `files` behind."""
    if as_json:
        _print_json(asdict(found) if is_dataclass(found) and not isinstance(found, type) else found)
        return
    show()
    for file in files:
        print(file)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


def _print_failures(failures: Sequence[Failure]) -> None:
    """A table of failed shards, equal errors together. Among JSON lines each has said so itself."""
    from rich.table import Table

    from pipeline.engine import log

    if not failures or log.writes_json():
        return
    groups: dict[str, list[int]] = {}
    for receipt in failures:
        groups.setdefault(receipt.last_line, []).append(receipt.shard)
    table = Table("shards", "which", "error", title="failed shards")
    for message, shards in sorted(groups.items(), key=lambda group: -len(group[1])):
        which = ", ".join(map(str, sorted(shards)[:8])) + (" ..." if len(shards) > 8 else "")
        table.add_row(str(len(shards)), which, message)
    log.console.print(table)


def stop_on_sigterm() -> AbstractContextManager[None]:
    """SIGTERM ends a run as Ctrl-C does: cleanly."""
    return interrupted_by(signal.SIGTERM)
