"""`u2label report`: one self-contained HTML file that shows what a run made, and another to name its classes.

Counts, times, photos with their masks, clusters with instances of each. The report has no scripts, and neither page
fetches anything; every word that comes from a file name, an error or a configuration is escaped by the templates.

    write       finds the run, renders and writes the page
    page        what the page says: `describe(run) -> Page`, with `clusters`, `copies` and `semantics`
    rows, maps  what is read of the parts; how much of a large run
    pictures    the photos, fetched again, and what is drawn on them (`overlay`)
    fits        what the fits of the stuff classes left behind
    naming      the page on which the classes get their names, with `members`, the instances that it shows
    model       the panoptic model: its losses, and its predictions beside the labels
    charts      the geometry of the charts
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pipeline.errors import ConfigError
from pipeline.report import charts
from pipeline.report.naming import NamingPage, describe_naming
from pipeline.report.page import Page, describe
from pipeline.stages.run import open_run
from pipeline.store import storage
from workers import overlay


@dataclass(frozen=True, slots=True)
class Written:
    """Where the pages are, without credentials; `clusters` is None where there is nothing to name yet. `left_out`: the
    files of the run's source that were not taken, by the reason."""

    report: str
    clusters: str | None
    left_out: dict[str, int]


def write_report(run_or_config: str, output: str | None, *, max_photos: int = 48, max_clusters: int = 24) -> str:
    """The report of `write_pages` alone; returns where it is."""
    return write_pages(run_or_config, output, max_photos=max_photos, max_clusters=max_clusters, naming=False).report


def write_pages(
    run_or_config: str, output: str | None, *, max_photos: int = 48, max_clusters: int = 24, naming: bool = True
) -> Written:
    """Write the report of a run folder (its last run) or of a config file, and if `naming` the page of clusters.

    `output` None: `report.html` in the run folder. The page on which the classes are named lies beside it, once there
    are clusters and panoptic parts: `clusters.html`, or `NAME-clusters.html` beside `NAME.html`. ConfigError when there
    is no run there or nothing of it is done, or a page cannot be written.
    """
    run = open_run(run_or_config)
    target = output or storage.join(run.uri, "report.html")
    page = describe(run, max_photos=max_photos, max_clusters=max_clusters)
    described = describe_naming(run) if naming else None
    beside = None if described is None else _beside(target)
    _write(target, render(page, beside))
    if described is not None and beside is not None:
        _write(beside, render_naming(described))
    shown = None if beside is None else storage.redact(beside)
    return Written(storage.redact(target), shown, run.index.ignored.reasons())


def _beside(report: str) -> str:
    """The page of clusters of a report."""
    folder, slash, name = report.rpartition("/")
    stem = name.removesuffix(".html")
    return f"{folder}{slash}{'' if stem == 'report' else f'{stem}-'}clusters.html"


def _write(target: str, html: str) -> None:
    try:
        storage.write_bytes(target, html.encode("utf-8", errors="backslashreplace"))
    except storage.store_errors(target) as error:
        raise ConfigError(f"--output: cannot write {storage.redact(target)!r}: {error}") from error


def render(page: Page, naming: str | None = None) -> str:
    """The report as HTML; `naming` is where the page of clusters is."""
    beside = None if naming is None else naming.rsplit("/", 1)[-1]
    return _template("report.html.j2").render(page=page, naming=beside)


def render_naming(page: NamingPage) -> str:
    """The page of clusters as HTML."""
    return _template("clusters.html.j2").render(page=page)


@functools.cache
def _environment() -> jinja2.Environment:
    """Everything is escaped; the templates mark nothing as safe."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"charts": charts, "hatched": overlay.HATCHED}
    environment.filters |= {
        "css": overlay.css,
        "duration": duration,
        "size": size,
        "pieces": pieces,
        "percent": percent,
    }
    return environment


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)


def pieces(name: str) -> list[str]:
    """A file name cut where a line may break: after slashes, underscores, dots and dashes."""
    return re.split(r"(?<=[/_.-])", name)


def percent(share: float) -> str:
    """0.1234 -> 12.3 %; what is there is never 0, and what is not all never 100."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """0.02 -> 20 ms; 75 -> 1 min 15 s; 9000 -> 2.5 h."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    return f"{seconds / 3600:,.1f} h"


def size(count: float) -> str:
    """Bytes in the unit that reads best, of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
