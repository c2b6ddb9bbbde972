"""The stage table: which stages there are, what each depends on, and under which fingerprint its output lies.

`<run>/<stage>/<fingerprint>/` holds the parts of a shard stage or the artifact of a fit stage. The fingerprint covers
what decides the content: the stage's own part of the config, its inputs' fingerprints, its version and the weights.

    instances   clusters                                   always
    features -> semantics_fit -> semantics                 semantics.method: stego
    segments -> semantics_fit -> semantics                 semantics.method: datus
    ... semantics_draft -> refine_fit -> semantics         with semantics.refine
    panoptic                                               always, over `semantics` where there is one
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline import storage
from pipeline.config import Config
from pipeline.semantics.stego_sample import sample_size
from pipeline.sources import Index
from workers.records import SCHEMA_VERSION

ARTIFACT = "artifact.json"  # written last: an artifact folder that has it is complete
STAGES = (
    "instances",
    "clusters",
    "features",
    "segments",
    "semantics_fit",
    "semantics_draft",
    "refine_fit",
    "semantics",
    "panoptic",
)
PART = re.compile(r"part-(\d{5,})\.parquet")
FITS = frozenset({"clusters", "semantics_fit", "refine_fit"})
VERSIONS = dict.fromkeys(STAGES, 1)  # raised when the code gives other content for the same config

FIT_KEYS = {
    "stego": ("classes", "neighbours", "batch_size", "steps", "max_images"),
    "datus": ("classes",),
}
MAP_KEYS = {"stego": ("image_size", "flip", "crf"), "datus": ("fill_holes",)}
REFINE_KEYS = ("classes", "refine_steps", "refine_batch_size", "refine_image_size")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of one run. A `shard` stage has a part per shard, a `fit` stage one artifact."""

    name: str
    kind: Literal["shard", "fit"]
    fingerprint: str
    folder: str
    shards: int
    inputs: tuple[str, ...] = ()  # the stages it reads
    images: int | None = None  # photos that all its shards together look at; None where that is not known

    def part(self, shard: int) -> str:
        return storage.join(self.folder, f"part-{shard:05d}.parquet")

    def parts(self) -> list[str]:
        return [self.part(shard) for shard in range(self.shards)]


def stage_names(config: Config) -> tuple[str, ...]:
    """The stages that the config asks for, in the order they run."""
    method, refined = config.semantics.method, config.semantics.refine != "none"
    semantic = {
        "none": (),
        "stego": ("features", "semantics_fit", "semantics"),
        "datus": ("segments", "semantics_fit", *(("semantics_draft", "refine_fit") if refined else ()), "semantics"),
    }[method]
    return ("instances", "clusters", *semantic, "panoptic")


def resolve_stages(config: Config, index: Index, *, download: bool = True) -> dict[str, Stage]:
    """Every stage of the config by name, in the order they run. Reads the weights files for their checksums; official
    weights are fetched the first time if `download`, else FileNotFoundError."""
    table: dict[str, Stage] = {}
    source = _source(config, index, download)
    for name in stage_names(config):
        inputs, content = _content(name, config, index, source)
        prints = {used: table[used].fingerprint for used in inputs}
        digest = _digest({"stage": name, "version": VERSIONS[name], "schema": SCHEMA_VERSION, **prints, **content})
        folder = storage.join(config.run.uri, name, digest)
        if name in FITS:
            table[name] = Stage(name, "fit", digest, folder, index.shards, inputs)
        else:
            images = features_sample(config, index) if name == "features" else index.images
            table[name] = Stage(name, "shard", digest, folder, index.shards, inputs, images)
    return table


def features_sample(config: Config, index: Index) -> int:
    """How many photos of the source the stage `features` looks at."""
    return sample_size(index.images, config.semantics.max_images)


def _content(name: str, config: Config, index: Index, source: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The inputs of a stage, and what of the config and the source enters its own fingerprint."""
    semantics = config.semantics
    method, refined = semantics.method, semantics.refine != "none"
    maps = {key: getattr(semantics, key) for key in MAP_KEYS.get(method, ())}
    match name:
        case "instances":
            return (), source | _sections(config, "maskcut", "crf", "embedding")
        case "clusters":
            return ("instances",), {"seed": config.clusters_seed, **_sections(config, "clusters")}
        case "features":
            return (), source | {"crops": semantics.crops, "sample": _sample(config, index)}
        case "segments":
            return (), source
        case "semantics_fit":
            first = "features" if method == "stego" else "segments"
            fit = {key: getattr(semantics, key) for key in FIT_KEYS[method]}
            if method == "stego":
                fit["terms"] = asdict(semantics.loss_terms())  # a preset is what its numbers are
            return (first,), {"method": method, "seed": config.seed, **fit}
        case "semantics_draft":
            return ("segments", "semantics_fit"), maps
        case "refine_fit":
            refine = {key: getattr(semantics, key) for key in REFINE_KEYS}
            return ("semantics_draft",), {
                "seed": config.seed,
                "backbone": _checksum(semantics.refine_backbone),
                **refine,
            }
        case "semantics":
            if refined:
                return ("refine_fit",), {"decode": source["decode"]}
            return ("semantics_fit", *(("segments",) if method == "datus" else ())), maps
        case _:
            stuff = () if method == "none" else ("semantics",)
            return ("instances", "clusters", *stuff), _sections(config, "panoptic")


def _sample(config: Config, index: Index) -> dict[str, int] | None:
    """What decides which photos have features; None when all have."""
    wanted = features_sample(config, index)
    return None if wanted == index.images else {"images": wanted, "seed": config.seed}


def index_folder(config: Config) -> str:
    """Where the index of the config's source lies, by the source section alone."""
    return storage.join(config.run.uri, "index", _digest(config.source.model_dump()))


def done_shards(stage: Stage) -> set[int]:
    """The shards whose part is there and whole. A local part that was cut short does not count."""
    return {
        int(found[1])
        for name, size in storage.list_folder(stage.folder).items()
        if (found := PART.fullmatch(name)) and _whole(storage.join(stage.folder, name), size)
    }


def is_fitted(stage: Stage) -> bool:
    return storage.exists(storage.join(stage.folder, ARTIFACT))


def teacher_identity(config: Config, *, download: bool = True) -> str:
    """Backbone and weights in one line, such as `dino_vits8 sha256:...`."""
    from model.backbone import resolve_weights  # loads torch, which a look at a run can do without

    backbone = config.backbone
    weights = resolve_weights(backbone.name, backbone.weights, sha256=backbone.sha256, download=download)
    return f"{backbone.name} {weights.identity}"


def _source(config: Config, index: Index, download: bool) -> dict[str, Any]:
    """What every stage that looks at the photos depends on."""
    return {
        "index": index.digest,
        "shard_size": index.shard_size,
        "backbone": teacher_identity(config, download=download),
        "dtype": config.backbone.dtype,
        **_sections(config, "decode"),
    }


def _checksum(path: str | None) -> str | None:
    from pathlib import Path

    from model.backbone import file_sha256

    return None if path is None else file_sha256(Path(path))


def _whole(uri: str, size: int) -> bool:
    """An object is put whole or not at all; a local file may have lost its end with the power."""
    return size > 8 and (storage.is_remote(uri) or storage.read_bytes(uri, size - 4, 4) == b"PAR1")


def _sections(config: Config, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name).model_dump(exclude={"seed"}) for name in names}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
