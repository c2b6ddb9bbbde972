"""`u2label report`: one self-contained HTML file that shows what a run made.

Counts, times, photos with their masks, clusters with instances of each. The page has no scripts and fetches nothing;
every word in it that comes from a file name, an error or a configuration is escaped by the template.

    write       finds the run, renders and writes the page
    page        what the page says: `describe(run) -> Page`, with `clusters`, `copies` and `semantics`
    rows, maps  what is read of the parts; how much of a large run
    pictures    the photos, fetched again, and what is drawn on them (`overlay`)
    fits        what the fits of the stuff classes left behind
    model       the panoptic model: its losses, and its predictions beside the labels
    charts      the geometry of the charts
"""

from __future__ import annotations

import re
from pathlib import Path

import jinja2

from pipeline.errors import ConfigError
from pipeline.report import charts
from pipeline.report.page import Page, describe
from pipeline.stages.run import open_run
from pipeline.store import storage
from workers import overlay


def write_report(run_or_config: str, output: str | None, *, max_photos: int = 48, max_clusters: int = 24) -> str:
    """Write the report of a run folder (its last run) or of a config file; returns where, without credentials.

    `output` None: `report.html` in the run folder. ConfigError when there is no run there or nothing of it is done.
    """
    run = open_run(run_or_config)
    target = output or storage.join(run.uri, "report.html")
    html = render(describe(run, max_photos=max_photos, max_clusters=max_clusters))
    try:
        storage.write_bytes(target, html.encode("utf-8", errors="backslashreplace"))
    except storage.store_errors(target) as error:
        raise ConfigError(f"--output: cannot write {storage.redact(target)!r}: {error}") from error
    return storage.redact(target)


def left_out(run_or_config: str) -> dict[str, int]:
    """The files of the run's source that were not taken, by the reason. Errors as of `write_report`."""
    return open_run(run_or_config).index.ignored.reasons()


def render(page: Page) -> str:
    """The page as HTML. Everything is escaped; the template marks nothing as safe."""
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
    return environment.get_template("report.html.j2").render(page=page)


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
