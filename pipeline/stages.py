"""The stage table: which stages there are, what each depends on, and under which fingerprint its output lies.

`<run>/<stage>/<fingerprint>/` holds the parts of a shard stage or the artifact of a fit stage. The fingerprint covers
what decides the content: the stage's own sections of the config, its inputs' fingerprints, its version and the weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import storage
from pipeline.config import Config
from pipeline.sources import Index
from workers.records import SCHEMA_VERSION

ARTIFACT = "artifact.json"  # written last: an artifact folder that has it is complete
STAGES = ("instances", "clusters", "panoptic")
VERSIONS = {"instances": 1, "clusters": 1, "panoptic": 1}  # raised when the code gives other rows for the same config


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of one run. A `shard` stage has a part per shard, a `fit` stage one artifact."""

    name: str
    kind: Literal["shard", "fit"]
    fingerprint: str
    folder: str
    shards: int

    def part(self, shard: int) -> str:
        return storage.join(self.folder, f"part-{shard:05d}.parquet")

    def parts(self) -> list[str]:
        return [self.part(shard) for shard in range(self.shards)]


def resolve_stages(config: Config, index: Index) -> dict[str, Stage]:
    """Every stage of the config by name, in the order they run. Reads the weights file for its checksum."""
    from model.backbone import resolve_weights  # loads torch, which a look at a run can do without

    backbone = config.backbone
    weights = resolve_weights(backbone.name, backbone.weights, sha256=backbone.sha256).identity
    instances = _fingerprint(
        "instances",
        index=index.digest,
        shard_size=index.shard_size,
        backbone={"name": backbone.name, "weights": weights, "dtype": backbone.dtype},
        **_sections(config, "decode", "maskcut", "crf", "embedding"),
    )
    clusters = _fingerprint("clusters", instances=instances, seed=config.clusters_seed, **_sections(config, "clusters"))
    panoptic = _fingerprint(
        "panoptic", instances=instances, clusters=clusters, **_sections(config, "semantics", "panoptic")
    )
    kinds: dict[str, tuple[Literal["shard", "fit"], str]] = {
        "instances": ("shard", instances),
        "clusters": ("fit", clusters),
        "panoptic": ("shard", panoptic),
    }
    return {
        name: Stage(name, kind, digest, storage.join(config.run.uri, name, digest), index.shards)
        for name, (kind, digest) in kinds.items()
    }


def index_folder(config: Config) -> str:
    """Where the index of the config's source lies, by the source section alone."""
    return storage.join(config.run.uri, "index", _digest(config.source.model_dump()))


def done_shards(stage: Stage) -> set[int]:
    """The shards whose part is there and whole. A local part that was cut short does not count."""
    return {
        int(name[5:-8])
        for name, size in storage.list_folder(stage.folder).items()
        if name.startswith("part-") and name.endswith(".parquet") and _whole(storage.join(stage.folder, name), size)
    }


def is_fitted(stage: Stage) -> bool:
    return storage.exists(storage.join(stage.folder, ARTIFACT))


def _whole(uri: str, size: int) -> bool:
    """An object is put whole or not at all; a local file may have lost its end with the power."""
    return size > 8 and (storage.is_remote(uri) or storage.read_bytes(uri, size - 4, 4) == b"PAR1")


def _sections(config: Config, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name).model_dump(exclude={"seed"}) for name in names}


def _fingerprint(stage: str, **content: Any) -> str:
    return _digest({"stage": stage, "version": VERSIONS[stage], "schema": SCHEMA_VERSION, **content})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
