"""What the commands share: their common arguments, and how an error of the user's ends one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.receipts import Receipt

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, local or s3://; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as maskcut.tau=0.2.")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, such as auto or ray://head:10001.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(path: str, overrides: list[str] | None) -> Config:
    from pipeline.config import load_config

    return load_config(path, overrides or ())


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors that a user can mend, in one paragraph and without a traceback."""
    from pipeline.errors import ConfigError, LeaseHeld, StageFailed

    try:
        yield
    except (ConfigError, LeaseHeld) as error:
        fail(str(error), 2)
    except StageFailed as error:
        _print_failures(error.failures)
        again = "\nthe parts that are done are kept; run the same command again to do the rest"
        fail(f"{error}{again if error.failures else ''}", 1)
    except KeyboardInterrupt:
        fail("interrupted; the parts that are done are kept, run the same command again to go on", 130)


def fail(message: str, code: int) -> NoReturn:
    from pipeline.storage import redact

    print(f"u2label: {redact(message)}", file=sys.stderr)
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
def stop_on_sigterm() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: cleanly."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
