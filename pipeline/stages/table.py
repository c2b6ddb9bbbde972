"""The stage table: which stages a config asks for, in which order, and under which fingerprint each lies.

Every module of this package that has a tuple `STAGES` adds its stages; nothing lists their names. The order is that of
their inputs. What a stage's fingerprint covers it says itself (`pipeline.stages.base`).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from graphlib import TopologicalSorter

from pipeline import stages
from pipeline.config import Config
from pipeline.engine.stage import Stage, digest
from pipeline.errors import ConfigError
from pipeline.sources.index import Index
from pipeline.stages.base import Definition, Photos, ShardStage
from pipeline.stages.facts import Facts
from pipeline.store import storage
from workers.records import SCHEMA_VERSION


@functools.cache
def all_stages() -> tuple[type[Definition], ...]:
    """Every stage there is."""
    modules = (
        importlib.import_module(f"{stages.__name__}.{found.name}") for found in pkgutil.iter_modules(stages.__path__)
    )
    return tuple(stage for module in modules for stage in getattr(module, "STAGES", ()))


def is_stage(name: str) -> bool:
    """Whether a folder of a run has the name of a stage, in whatever round."""
    base, _, number = name.rpartition("_")
    names = {stage.name for stage in all_stages()}
    return name in names or (base in names and number.isdecimal())


def define_stages(config: Config) -> dict[str, Definition]:
    """The stages that the config asks for by name, in the order they run."""
    asked = {stage.full_name: stage for kind in all_stages() for stage in kind.of(config)}
    graph = {name: {*stage.inputs(config), *stage.after} & asked.keys() for name, stage in asked.items()}
    sorter, ordered = TopologicalSorter(graph), list[str]()
    sorter.prepare()
    while sorter:
        ready = sorted(sorter.get_ready())
        ordered += ready
        sorter.done(*ready)
    return {name: asked[name] for name in ordered}


def faults(defined: Iterable[Definition], config: Config, index: Photos | None) -> list[str]:
    """What is bound to fail with this source, each as its stage says it; `index` as of `Definition.check`."""
    found = []
    for stage in defined:
        try:
            stage.check(config, index)
        except ConfigError as error:
            found.append(str(error))
    return found


def resolve_stages(config: Config, index: Index, *, download: bool = True) -> dict[str, Stage]:
    """Every stage of the config by name, in the order they run, but for what only the run folder can settle. Reads the
    weights files for their checksums; official ones are fetched the first time if `download`, else FileNotFoundError.
    """
    return resolve(config, index, define_stages(config), Facts(config, index, download=download))


def resolve(config: Config, index: Index, defined: dict[str, Definition], facts: Facts) -> dict[str, Stage]:
    """The stages as they lie in the run folder."""
    table: dict[str, Stage] = {}
    for name, stage in defined.items():
        inputs = stage.inputs(config)
        covered = {
            "stage": name,
            "version": stage.version,
            "schema": SCHEMA_VERSION,
            **{used: table[used].fingerprint for used in inputs},
            **stage.content(config, facts),
        }
        images = stage.images(config, index) if isinstance(stage, ShardStage) else None
        table[name] = place(config, stage, digest(covered), index, table, images)
    return table


def place(
    config: Config,
    stage: Definition,
    fingerprint: str,
    index: Index,
    placed: Mapping[str, Stage],
    images: int | None = None,
) -> Stage:
    """A stage of this config with a fingerprint that is known; `placed` are those that it may read."""
    name = stage.full_name
    folder = storage.join(config.run.uri, name, fingerprint)
    inputs = tuple(placed[used] for used in stage.inputs(config) if used in placed)
    photos = index if stage.kind == "shard" else None
    return Stage(name, stage.kind, fingerprint, folder, index.shards, inputs, images, photos)
