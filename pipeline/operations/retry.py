"""`u2label run --retry missing,crashed`: the shards that hold such rows are done again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from pipeline.engine.done import Look
from pipeline.engine.log import say
from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.stages.base import Run
from pipeline.stages.parts import read_part_columns
from pipeline.store import storage
from workers.records import READABLE, Status

READERS = 32  # parts that are looked at at a time
STATUSES = tuple(status.value for status in Status if status not in READABLE | {Status.NOT_SAMPLED})


def remove_parts(run: Run, statuses: Collection[str]) -> None:
    """Remove every part with a row of one of these statuses; what was made of it is then not done either. Of a photo
    that was replaced between two stages (`changed`), the parts of both go. ConfigError: a status that there is not, a
    part that cannot be read."""
    unknown = sorted(set(statuses) - set(STATUSES))
    if unknown:
        raise ConfigError(f"--retry: {', '.join(unknown)} is unknown; the statuses are {', '.join(STATUSES)}")
    if not statuses:
        return
    parts = _with_rows(run, frozenset(statuses))
    for _, part in parts:
        storage.remove(part)
    found = Counter(stage for stage, _ in parts)
    shards = ", ".join(f"{count} of {stage}" for stage, count in found.items()) or "none"
    say(f"retry: shards with rows {', '.join(statuses)}: {shards}")


def _with_rows(run: Run, statuses: frozenset[str]) -> list[tuple[str, str]]:
    """(stage, part) of all that is to go, each once."""
    stages = [stage for stage in run.stages.values() if stage.kind == "shard"]
    look = Look(stages)  # not the run's own, which is to tell what is there when all is done
    places = [(stage, shard) for stage in stages for shard in look.there(stage)]
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda place: _statuses(*place) & statuses, places))
    parts = dict[tuple[str, str], None]()
    for (stage, shard), held in zip(places, found, strict=True):
        behind = list(stage.with_inputs()) if Status.CHANGED in held else [stage] if held else []
        parts |= dict.fromkeys((used.name, used.part(shard)) for used in behind if used.kind == "shard")
    return list(parts)


def _statuses(stage: Stage, shard: int) -> frozenset[str]:
    return frozenset(read_part_columns(stage.part(shard), ["status"])["status"].to_pylist())
