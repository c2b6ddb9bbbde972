"""`u2label report`: one self-contained HTML file that shows what a run made.

Counts, times, photos with their masks, clusters with instances of each. The page has no scripts and fetches nothing;
every word in it that comes from a file name, an error or a configuration is escaped by the template.

    write       finds the run, renders and writes the page
    page        what the page says: `describe(run) -> Page`, with `clusters` and `semantics`
    rows, maps  what is read of the parts; how much of a large run
    pictures    the photos, fetched again, and what is drawn on them (`overlay`)
    fits        what the fits of the stuff classes left behind
    model       the panoptic model: its losses, and its predictions beside the labels
    charts      the geometry of the charts
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2

from pipeline import storage
from pipeline.config import Config, load_config, parse_config
from pipeline.errors import ConfigError
from pipeline.report import charts, overlay
from pipeline.report.page import Page, describe
from pipeline.report.run import Run
from pipeline.sources import Index, open_index
from pipeline.stages import FITS, LATEST, Stage, base_name, done_shards, index_folder, is_fitted, resolve_stages


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


def open_run(run_or_config: str, *, need: str | None = "instances") -> Run:
    """The run of a folder or config file with at least one finished part of the stage `need`; else ConfigError."""
    is_config = run_or_config.lower().endswith((".yaml", ".yml"))
    config, fingerprints = _from_config(run_or_config) if is_config else _from_folder(run_or_config)
    uri = config.run.uri
    try:
        index = open_index(index_folder(config))
    except FileNotFoundError as error:
        raise ConfigError(f"nothing is done yet in {storage.redact(uri)}: start it with u2label run") from error
    stages = _resolve(config, index) if fingerprints is None else _stages(uri, fingerprints, index.shards)
    done = {name: done_shards(stage) for name, stage in stages.items() if stage.kind == "shard"}
    if need is not None and not done[need]:
        raise ConfigError(
            f"nothing is done yet in {storage.redact(uri)}: no part of the stage {need} "
            f"{stages[need].fingerprint} is there; start or go on with u2label run"
        )
    return Run(uri, config, index, stages, done, is_fitted(stages["clusters"]))


def _from_folder(uri: str) -> tuple[Config, dict[str, str]]:
    """What `latest.json` says, with the folder where it lies now: a run may have been moved."""
    found = _read_latest(uri)
    if found is None:
        raise ConfigError(
            f"no run in {storage.redact(uri)!r}: there is no {LATEST}; give the run folder (run.uri) or the run's "
            "config file (.yaml)"
        )
    data, fingerprints = found
    return parse_config({**data, "run": {"uri": uri}}, origin=storage.redact(storage.join(uri, LATEST))), fingerprints


def _from_config(path: str) -> tuple[Config, dict[str, str] | None]:
    """The config, and the fingerprints of the last run if it was of this very config: then no weights are needed."""
    config = load_config(path)
    found = _read_latest(config.run.uri)
    if found is None or _decisive(found[0]) != _decisive(config.model_dump(mode="json")):
        return config, None
    return config, found[1]


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    return {name: section for name, section in config.items() if name not in {"workers", "run"}}


def _read_latest(uri: str) -> tuple[dict[str, Any], dict[str, str]] | None:
    where = storage.join(uri, LATEST)
    try:
        latest = json.loads(storage.read_bytes(where))
        fingerprints = {name: str(value) for name, value in latest["fingerprints"].items()}
        return dict(latest["config"]), fingerprints
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{storage.redact(where)} is not what u2label run writes ({error!r}); run again") from error


def _resolve(config: Config, index: Index) -> dict[str, Stage]:
    try:
        return resolve_stages(config, index)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}\nor give the run folder instead of the config file") from error


def _stages(run_uri: str, fingerprints: dict[str, str], shards: int) -> dict[str, Stage]:
    """The stage table from its fingerprints alone."""
    return {
        name: Stage(
            name,
            "fit" if base_name(name) in FITS else "shard",
            fingerprint,
            storage.join(run_uri, name, fingerprint),
            shards,
        )
        for name, fingerprint in fingerprints.items()
    }


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
