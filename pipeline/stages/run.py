"""Finding a run: by its config over an index, as its folder tells it, or as it was written down."""

from __future__ import annotations

from pipeline.config import Config, load_config, parse_config
from pipeline.engine.stage import Stage, index_folder
from pipeline.errors import ConfigError
from pipeline.sources.index import Index, open_index
from pipeline.stages.base import Run
from pipeline.stages.facts import Facts
from pipeline.stages.latest import LATEST, Latest, read_latest
from pipeline.stages.table import define_stages, place, resolve
from pipeline.store import storage


def resolve_run(config: Config, index: Index, *, download: bool = True) -> Run:
    """The run of a config over an index. Errors as of `resolve_stages`; ConfigError: a file that the config names."""
    defined, facts = define_stages(config), Facts(config, index, download=download)
    stages = resolve(config, index, defined, facts)
    settled = config
    for name, stage in defined.items():

        def begun(asked: Config, name: str = name) -> bool:
            return storage.exists(resolve(asked, index, defined, facts)[name].folder)

        settled = stage.settle(settled, begun)
    if settled is not config:
        stages = resolve(settled, index, defined, facts)
    return Run(settled, index, defined, stages, facts.teacher)


def find_run(config: Config) -> Run | None:
    """The run of a config as its folder tells it: the source is not looked at, and no weights are fetched. None before
    the source was indexed. ConfigError: an index or weights that cannot be read or are not known."""
    folder = index_folder(config)
    errors: tuple[type[Exception], ...] = (*storage.store_errors(folder), ValueError)
    try:
        index = open_index(folder)
    except FileNotFoundError:
        return None
    except errors as error:
        shown = storage.redact(config.run.uri)
        raise ConfigError(f"run.uri: cannot read {shown}: {storage.redact(str(error))}") from error
    try:
        return resolve_run(config, index, download=False)
    except errors as error:
        raise ConfigError(str(error)) from error


def open_run(run_or_config: str, *, need: str | None = "instances") -> Run:
    """The run of a folder or config file with at least one finished part of the stage `need`; else ConfigError, also
    when the run has no such stage."""
    is_config = run_or_config.lower().endswith((".yaml", ".yml"))
    config, latest = _from_config(run_or_config) if is_config else _from_folder(run_or_config)
    uri = config.run.uri
    try:
        index = open_index(index_folder(config))
    except FileNotFoundError as error:
        raise ConfigError(f"nothing is done yet in {storage.redact(uri)}: start it with u2label run") from error
    run = _resolved(config, index) if latest is None else _as_recorded(config, index, latest)
    if need is not None and need not in run.done:
        raise ConfigError(
            f"the run in {storage.redact(uri)} has no stage {need!r} with a part a shard; it has {', '.join(run.done)}"
        )
    if need is not None and not run.done[need]:
        raise ConfigError(
            f"nothing is done yet in {storage.redact(uri)}: no part of the stage {need} "
            f"{run.stages[need].fingerprint} is there; start or go on with u2label run"
        )
    return run


def _from_folder(uri: str) -> tuple[Config, Latest]:
    """What `latest.json` says, with the folder where it lies now: a run may have been moved."""
    found = read_latest(uri)
    if found is None:
        raise ConfigError(
            f"no run in {storage.redact(uri)!r}: there is no {LATEST}; give the run folder (run.uri) or the run's "
            "config file (.yaml)"
        )
    origin = storage.redact(storage.join(uri, LATEST))
    return parse_config({**found.config, "run": {"uri": uri}}, origin=origin), found


def _from_config(path: str) -> tuple[Config, Latest | None]:
    """The config, and the last run if it was of this very config: then no weights are needed."""
    config = load_config(path)
    found = read_latest(config.run.uri)
    return config, found if found is not None and found.same_labels(config) else None


def _resolved(config: Config, index: Index) -> Run:
    try:
        return resolve_run(config, index)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}\nor give the run folder instead of the config file") from error


def _as_recorded(config: Config, index: Index, latest: Latest) -> Run:
    """The run by the fingerprints that it wrote down."""
    defined = {name: stage for name, stage in define_stages(config).items() if name in latest.fingerprints}
    stages: dict[str, Stage] = {}
    for name, stage in defined.items():
        stages[name] = place(config, stage, latest.fingerprints[name], index, stages)
    return Run(config, index, defined, stages, latest.teacher)
