"""Embeddings of all masks -> K centroids: the instance classes (U2Seg, arXiv 2312.17243, section 3.2)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

from pipeline.config import Config
from pipeline.engine.done import FitChanges
from pipeline.engine.fits import kmeans_actors, said_now_and_then
from pipeline.engine.shards import read_part
from pipeline.engine.stage import ARTIFACT, Stage
from pipeline.errors import ConfigError
from pipeline.stages.base import FitStage, Photos, Run, thing_stage
from pipeline.stages.facts import Content, Facts, sections
from pipeline.store import storage

if TYPE_CHECKING:
    from pipeline.clusters.drift import Drift
    from workers.copies import Weights


class Clusters(FitStage):
    name = "clusters"

    def inputs(self, config: Config) -> tuple[str, ...]:
        return (thing_stage(config),)

    def content(self, config: Config, facts: Facts) -> Content:
        content = {"seed": config.clusters_seed, **sections(config, "clusters")}
        if content["clusters"]["dedup"] == "none":  # what was clustered before there was a choice
            del content["clusters"]["dedup"]
        return content

    def check(self, config: Config, index: Photos | None) -> None:
        nested = thing_stage(config) == "things"
        key, most = ("things.most", config.things.most) if nested else ("maskcut.max_masks", config.maskcut.max_masks)
        if index is not None and config.clusters.k > index.images * most:
            raise ConfigError(
                f"clusters.k {config.clusters.k} is above the {index.images * most} masks that {index.images} photos "
                f"can have with {key} {most}: lower clusters.k, or give the source more photos"
            )

    def fit(self, run: Run, stage: Stage) -> str:
        from pipeline.clusters.artifact import KMeansSettings, write_empty
        from pipeline.clusters.kmeans import fit_kmeans

        config, instances = run.config, run.stages[thing_stage(run.config)]
        clusters = config.clusters
        settings = KMeansSettings(
            k=clusters.k,
            seed=config.clusters_seed,
            spherical=clusters.spherical,
            max_iterations=clusters.max_iterations,
            tolerance=clusters.tolerance,
        )
        if not _has_masks(instances):
            write_empty(stage.folder, settings, _width(instances))
            keys = "maskcut.tau or crf.min_iou" if config.instances.method == "maskcut" else "things.min_score"
            return f"no image has a mask, so there are no things; lower {keys} to find some"
        weights = _weights(instances, clusters.dedup)
        result = fit_kmeans(
            instances.parts(),
            stage.folder,
            settings,
            **kmeans_actors(config.workers),
            on_iteration=said_now_and_then(stage.name),
            weights=weights,
        )
        said = f"{result.iterations} iterations, inertia {result.inertia[-1]:.6g}"
        if weights is None:
            return said
        return f"{said}; with copies as one, {len(weights.units)} masks count as {weights.groups}"

    def came_to_nothing(self, stage: Stage) -> bool:
        return not any(json.loads(storage.read_bytes(storage.join(stage.folder, ARTIFACT)))["sizes"])

    def drift(self, run: Run, stage: Stage, changes: FitChanges) -> str:
        found = drift_of(run, stage, changes)
        return "" if found is None else str(found)


def drift_of(run: Run, stage: Stage, changes: FitChanges) -> Drift | None:
    """How far the masks that came since the fit lie from its centroids; None where none came, or it has no class.
    ValueError: a part that cannot be read."""
    from pipeline.clusters.artifact import read_centroids
    from pipeline.clusters.drift import measure_drift

    parts = changes.parts.get(run.things.name)
    if parts is None or not parts.newer:
        return None
    older, newer = ([run.things.part(shard) for shard in shards] for shards in (parts.older, parts.newer))
    return measure_drift(older, newer, read_centroids(stage.folder), spherical=run.config.clusters.spherical)


def _weights(instances: Stage, dedup: float | Literal["none"]) -> Weights | None:
    if dedup == "none":
        return None
    from pipeline.clusters.copies import find_copies

    return find_copies(instances.parts(), dedup).weights()


def _width(instances: Stage) -> int:
    """Numbers of an embedding, which a part without masks tells, too."""
    column = read_part(instances, 0, ["embedding"]).schema.field("embedding")
    return int(column.type.value_type.list_size)


def _has_masks(instances: Stage) -> bool:
    parts = (read_part(instances, shard, ["area"])["area"] for shard in range(instances.shards))
    return any(len(areas.combine_chunks().flatten()) for areas in parts)


STAGES = (Clusters,)
