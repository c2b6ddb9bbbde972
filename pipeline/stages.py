"""The stage table: which stages there are, what each depends on, and under which fingerprint its output lies.

`<run>/<stage>/<fingerprint>/` holds the parts of a shard stage or the artifact of a fit stage. The fingerprint covers
what decides the content: the stage's own part of the config, its inputs' fingerprints, its version and the weights.

    instances   clusters                                   always
    features -> semantics_fit -> semantics                 semantics.method: stego
    segments -> semantics_fit -> semantics                 semantics.method: datus
    ... semantics_draft -> refine_fit -> semantics         with semantics.refine
    panoptic                                               always, over `semantics` where there is one
    train, predictions                                     with train.steps, predictions.enabled
    labels_1 -> train_1 -> predictions_1 -> labels_2 ...   with self_training.rounds
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from model.weights import resolve_weights
from pipeline import storage
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.semantics.stego_sample import sample_size
from pipeline.sources import Index
from pipeline.weights import local_weights
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
    "train",
    "predictions",
    "labels",
)
LATEST = "latest.json"  # of the run folder: config and fingerprints of the last run, for `report` and people
PAGE = 1000  # parts that a bucket lists in one answer
PART = re.compile(r"part-(\d{5,})\.parquet")
ROUND = re.compile(r"_(\d+)$")
LABELS = frozenset({"panoptic", "predictions", "labels"})  # stages of parts with panoptic labels
FITS = frozenset({"clusters", "semantics_fit", "refine_fit", "train"})
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
        return storage.join(self.folder, part_name(shard))

    def parts(self) -> list[str]:
        return [self.part(shard) for shard in range(self.shards)]


def part_name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


def stage_names(config: Config) -> tuple[str, ...]:
    """The stages that the config asks for, in the order they run."""
    method, refined = config.semantics.method, config.semantics.refine != "none"
    semantic = {
        "none": (),
        "stego": ("features", "semantics_fit", "semantics"),
        "datus": ("segments", "semantics_fit", *(("semantics_draft", "refine_fit") if refined else ()), "semantics"),
    }[method]
    return ("instances", "clusters", *semantic, "panoptic", *_model_stages(config))


def _model_stages(config: Config) -> tuple[str, ...]:
    """The stages of the panoptic model. Those of a round of self-training end in its number."""
    rounds = config.self_training.rounds
    if not config.train.steps:
        return ()
    names = ["train", *(["predictions"] if config.predictions.enabled or rounds else [])]
    for number in range(1, rounds + 1):
        names += [f"labels_{number}", f"train_{number}"]
        if config.predictions.enabled or number < rounds:
            names.append(f"predictions_{number}")
    return tuple(names)


def base_name(stage: str) -> str:
    """What a stage is, without the number of its round."""
    return ROUND.sub("", stage)


def round_of(stage: str) -> int:
    """The round of self-training that a stage belongs to, 0 for none."""
    found = ROUND.search(stage)
    return int(found[1]) if found else 0


def stage_of_round(base: str, number: int) -> str:
    """The name of a stage of the model in a round; 0 is before self-training."""
    return f"{base}_{number}" if number else base


def resolve_stages(config: Config, index: Index, *, download: bool = True) -> dict[str, Stage]:
    """Every stage of the config by name, in the order they run. Reads the weights files for their checksums; official
    weights are fetched the first time if `download`, else FileNotFoundError."""
    table: dict[str, Stage] = {}
    source = _source(config, index, download)
    for name in stage_names(config):
        inputs, content = _content(name, config, index, source)
        prints = {used: table[used].fingerprint for used in inputs}
        digest = _digest(
            {"stage": name, "version": VERSIONS[base_name(name)], "schema": SCHEMA_VERSION, **prints, **content}
        )
        folder = storage.join(config.run.uri, name, digest)
        if base_name(name) in FITS:
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
                "backbone": _checksum("semantics.refine_backbone", semantics.refine_backbone),
                **refine,
            }
        case "semantics":
            if refined:
                return ("refine_fit",), {"decode": source["decode"]}
            return ("semantics_fit", *(("segments",) if method == "datus" else ())), maps
        case "panoptic":
            stuff = () if method == "none" else ("semantics",)
            return ("instances", "clusters", *stuff), _sections(config, "panoptic")
        case _:
            return _model_content(name, config, source)


def _model_content(name: str, config: Config, source: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """`_content` for the stages of the panoptic model."""
    number, train = round_of(name), config.train
    match base_name(name):
        case "train" if number:
            again = config.self_training.model_dump(include={"steps", "rate"})
            fit = {"self_training": again, "seed": config.seed, "train": _train_content(config)}
            return (f"labels_{number}", stage_of_round("train", number - 1)), fit
        case "train":
            human = {} if train.labels is None else {"labels": _checksum("train.labels", train.labels)}
            inputs = () if human else ("panoptic", "instances") if train.whole_masks else ("panoptic",)
            weights = {
                "init": _checksum("train.init", train.init and _identifying_file(train.init)),
                "backbone": _checksum("train.backbone", train.backbone),
            }
            return inputs, {"seed": config.seed, "train": _train_content(config), **human, **weights}
        case "predictions":
            test = config.predictions.model_dump(exclude={"enabled"})
            looked_at = {key: source[key] for key in ("index", "shard_size", "decode")}
            return (stage_of_round("train", number),), {"test": test, **looked_at}
        case _:
            old = ("panoptic", "instances") if number == 1 else (f"labels_{number - 1}",)
            if number == 1 and config.num_stuff:
                old = (*old, "semantics")
            settings = config.self_training.model_dump(include={"max_iou", "most"})
            return (stage_of_round("predictions", number - 1), *old), {
                "threshold": threshold_of(config, number),
                **settings,
            }


def categories(config: Config) -> list[dict[str, Any]]:
    """The category list of the panoptic labels: things 1..K, stuff K+1..K+S."""
    k, stuff = config.clusters.k, config.num_stuff
    things = [{"id": i, "name": f"thing {i}", "isthing": 1} for i in range(1, k + 1)]
    return things + [{"id": k + i, "name": f"stuff {i}", "isthing": 0} for i in range(1, stuff + 1)]


def threshold_of(config: Config, number: int) -> float:
    """The least score of a prediction that becomes a label in a round of self-training."""
    thresholds = config.self_training.thresholds
    return thresholds[min(number, len(thresholds)) - 1]


def _train_content(config: Config) -> dict[str, Any]:
    """What of `train` decides the weights, but for the files it names."""
    how = {"threads", "checkpoint_every", "picture_every", "labels", "label_pngs", "label_images", "init", "backbone"}
    return config.train.model_dump(exclude=how)


def _sample(config: Config, index: Index) -> dict[str, int] | None:
    """What decides which photos have features; None when all have."""
    wanted = features_sample(config, index)
    return None if wanted == index.images else {"images": wanted, "seed": config.seed}


def index_folder(config: Config) -> str:
    """Where the index of the config's source lies, by the source section alone."""
    source = config.source.model_dump(exclude=None if config.source.anonymous else {"anonymous"})
    return storage.join(config.run.uri, "index", _digest(source))


def done_shards(stage: Stage) -> set[int]:
    """The shards whose part is there and whole. A local part that was cut short does not count."""
    cuts = [part_name(shard) for shard in range(PAGE - 1, stage.shards - 1, PAGE)]
    return {
        int(found[1])
        for name, size in storage.list_folder(stage.folder, cuts=cuts).items()
        if (found := PART.fullmatch(name)) and _whole(storage.join(stage.folder, name), size)
    }


def is_fitted(stage: Stage) -> bool:
    return storage.exists(storage.join(stage.folder, ARTIFACT))


def teacher_identity(config: Config, *, download: bool = True) -> str:
    """Backbone and weights in one line, such as `dino_vits8 sha256:...`."""
    backbone = config.backbone
    try:
        given = local_weights(backbone.weights, download=download)
        weights = resolve_weights(backbone.name, given, sha256=backbone.sha256, download=download)
    except FileNotFoundError as error:
        if download:
            raise
        recorded = _teacher_of_last_run(config)
        if recorded is None:
            raise FileNotFoundError(
                f"backbone.weights: {storage.redact(backbone.weights)!r} is not on this machine, and no run with it is "
                f"known to {storage.redact(config.run.uri)}; a run fetches it, or give the path of the file"
            ) from error
        return recorded
    return f"{backbone.name} {weights.identity}"


def _teacher_of_last_run(config: Config) -> str | None:
    """`teacher_identity` as the last run knew it, if it had the same backbone and weights: `status` also works where
    the file of weights is not."""
    try:
        latest = json.loads(storage.read_bytes(storage.join(config.run.uri, LATEST)))
        same = {key: latest["config"]["backbone"][key] for key in ("name", "weights", "sha256")}
        found = str(latest["teacher"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return found if same == config.backbone.model_dump(include=set(same)) else None


def _source(config: Config, index: Index, download: bool) -> dict[str, Any]:
    """What every stage that looks at the photos depends on."""
    return {
        "index": index.digest,
        "shard_size": index.shard_size,
        "backbone": teacher_identity(config, download=download),
        "dtype": config.backbone.dtype,
        **_sections(config, "decode"),
    }


def _identifying_file(uri: str) -> str:
    from pipeline.predict.weights import identifying_file  # loads torch, which a look at a run can do without

    return identifying_file(uri)


def _checksum(key: str, uri: str | None) -> str | None:
    """SHA-256 of a file that the config names under `key`. ConfigError when it cannot be read."""
    if uri is None:
        return None
    errors: tuple[type[Exception], ...] = (*storage.store_errors(uri), ValueError)  # ValueError: unknown scheme
    try:
        return storage.sha256(local_weights(uri, key=key))
    except errors as error:
        raise ConfigError(f"{key}: cannot read {storage.redact(uri)!r}: {storage.redact(str(error))}") from error


def _whole(uri: str, size: int) -> bool:
    """An object is put whole or not at all; a local file may have lost its end with the power."""
    return size > 8 and (storage.is_remote(uri) or storage.read_bytes(uri, size - 4, 4) == b"PAR1")


def _sections(config: Config, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name).model_dump(exclude={"seed"}) for name in names}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
