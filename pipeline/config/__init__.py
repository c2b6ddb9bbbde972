"""The configuration of a run: its sections together, read from YAML and `--set a.b=c`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from model.backbone.cards import card_of
from pipeline.config.labels import (
    BackboneConfig,
    ClustersConfig,
    CrfConfig,
    DecodeConfig,
    EmbeddingConfig,
    InstancesConfig,
    MaskCutConfig,
    MergeTreeConfig,
    PanopticConfig,
    RunConfig,
    SemanticsConfig,
    SourceConfig,
    ThingsConfig,
)
from pipeline.config.model import PredictionsConfig, SelfTrainingConfig, TrainConfig
from pipeline.config.section import Section
from pipeline.config.workers import WorkersConfig
from pipeline.errors import ConfigError
from pipeline.store import storage

KIND = re.compile(r"(literal|tuple|function-\w+|constrained-\w+|lax-or-strict)(\[.*\])?|float", re.DOTALL)


class Config(Section):
    """Everything a run needs. Sections that are left out take their defaults."""

    source: SourceConfig
    run: RunConfig
    seed: int = Field(0, ge=0)
    decode: DecodeConfig = DecodeConfig()
    backbone: BackboneConfig = BackboneConfig()
    instances: InstancesConfig = InstancesConfig()
    maskcut: MaskCutConfig = MaskCutConfig()
    merge_tree: MergeTreeConfig = MergeTreeConfig()
    things: ThingsConfig = ThingsConfig()
    crf: CrfConfig = CrfConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    clusters: ClustersConfig = ClustersConfig()
    semantics: SemanticsConfig = SemanticsConfig()
    panoptic: PanopticConfig = PanopticConfig()
    train: TrainConfig = TrainConfig()
    predictions: PredictionsConfig = PredictionsConfig()
    self_training: SelfTrainingConfig = SelfTrainingConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _decide(self) -> Config:
        """What is left to the backbone's card is decided once, here; what the card leaves open a fit decides."""
        card = card_of(self.backbone.name)
        conditioned = self.semantics.method == "kmeans" or not card.published
        if self.semantics.conditioned != "auto":
            conditioned = self.semantics.conditioned
        decided: dict[str, dict[str, Any]] = {
            "instances": {"method": card.masks},
            "maskcut": {"features": card.cut, "tau": card.tau},
            "merge_tree": {"features": card.trees, "embedding": card.embedding},
            "things": {"min_score": card.min_score},
            "semantics": {
                "features": card.stuff,
                "conditioned": conditioned,
                "fill_holes": "nearest" if conditioned else "none",
                "overclustering": 2 if self.semantics.method == "stego" else 4,
                **dict.fromkeys(("flip", "crf"), self.semantics.method != "kmeans"),
            },
        }
        for name, values in decided.items():
            section = getattr(self, name)
            open_ones = {
                key: value for key, value in values.items() if getattr(section, key) == "auto" and value is not None
            }
            self.__dict__[name] = section.model_copy(update=open_ones)
        self._decide_shifts(published=card.published and not conditioned)
        return self

    def _decide_shifts(self, *, published: bool) -> None:
        """A preset's shifts are for the features that it was published for."""
        semantics = self.semantics
        if semantics.method == "stego" and not published:
            open_ones = {term: "auto" for term, value in semantics.shifts if value is None}
            shifts = semantics.shifts.model_copy(update=open_ones)
            self.__dict__["semantics"] = semantics.model_copy(update={"shifts": shifts})

    @model_validator(mode="after")
    def _self_training_has_a_model(self) -> Config:
        if self.self_training.rounds and not self.train.steps:
            raise ValueError(f"self_training.rounds {self.self_training.rounds} needs a model: set train.steps")
        if self.self_training.rounds and self.train.labels is not None:
            raise ValueError("self_training.rounds goes on from the run's own labels: leave out train.labels")
        if self.train.nested is not None and self.instances.method != "merge_tree":
            raise ValueError("train.nested is of the nested masks of instances.method merge_tree: leave it out")
        if self.self_training.rounds and self.self_training.soft and not self.train.whole_masks:
            raise ValueError("self_training.soft is of the scores of whole masks: leave out train.whole_masks")
        if self.self_training.rounds and self.train.names:
            raise ValueError("self_training.rounds goes on from labels without names: leave out train.names")
        mixed = self.self_training.mixing < 1 and self.train.network.backbone == "resnet50"
        if self.self_training.rounds and mixed and not self.train.precise_statistics:
            raise ValueError("self_training.mixing needs new statistics of batch norms: set train.precise_statistics")
        return self

    @model_validator(mode="after")
    def _batches_can_be_shared(self) -> Config:
        workers, fits = self.workers.train_workers, []
        if self.semantics.method == "stego":
            fits.append(("semantics.batch_size", self.semantics.batch_size))
        if self.train.steps:
            fits.append(("train.batch_size", self.train.batch_size))
        for key, batch in fits:
            if workers and batch % workers:
                raise ValueError(f"workers.train_workers {workers} cannot share {key} {batch} equally; change either")
        plain = self.train.steps and self.train.copy_paste.mode == "plain"
        if plain and self.train.batch_size == max(1, workers):
            raise ValueError(
                "train.copy_paste.mode plain pastes from other photos of a process's share of the batch, and "
                "it has one photo: raise train.batch_size, or set mode semantic"
            )
        return self

    @property
    def conditions_patches(self) -> bool:
        """Whether a conditioning of patch features is fitted."""
        return self.semantics.method != "none" and bool(self.semantics.conditioned)

    @property
    def num_stuff(self) -> int:
        """Stuff classes of the labels."""
        return 0 if self.semantics.method == "none" else self.semantics.classes

    @property
    def clusters_seed(self) -> int:
        return self.seed if self.clusters.seed is None else self.clusters.seed

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (local or remote) and apply `a.b=c` overrides. ConfigError names the key and the value."""
    errors: tuple[type[Exception], ...] = (*storage.store_errors(path), ValueError)
    shown = storage.redact(path)
    try:
        text = storage.read_bytes(path).decode()
    except FileNotFoundError as error:
        raise ConfigError(f"no config file {shown!r}; the repository's configs/ has examples") from error
    except errors as error:
        raise ConfigError(f"cannot read the config file {shown!r}: {storage.redact(str(error))}") from error
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{shown} must hold a mapping of sections, got {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    return parse_config(data, origin=shown)


def parse_config(data: dict[str, Any], origin: str) -> Config:
    """A mapping -> Config; ConfigError lists every fault with its key and value."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in _told_once(error.errors()))
        raise ConfigError(f"{origin}: the configuration is not valid:\n{faults}") from error


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: write it as section.key=value, such as maskcut.tau=0.2")
    *sections, name = key.strip().split(".")
    for section in sections:
        child = data.setdefault(section, {})
        if child is None:
            child = data[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
        data = child
    try:
        value = text if text.startswith("*") else yaml.safe_load(text)  # a pattern, which YAML takes for an alias
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {text!r} is not a YAML value: {error}") from error
    plain = isinstance(value, str) and text.strip()[:1] not in {"'", '"'}
    data[name] = text if plain else value  # a path may hold what YAML takes for a comment


def _told_once(faults: Sequence[Any]) -> list[Any]:
    """Without `is not auto` where the value was meant to be the other thing that the key takes."""
    others = {_key(fault) for fault in faults if fault["type"] != "literal_error"}
    return [fault for fault in faults if fault["type"] != "literal_error" or _key(fault) not in others]


def _key(fault: Any) -> str:
    """Where the fault is, without the kinds that pydantic names behind keys which take several."""
    return ".".join(str(part) for part in fault["loc"] if not KIND.fullmatch(str(part))) or "(top level)"


def _explain(fault: Any) -> str:
    key = _key(fault)
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggest(fault['loc'])}"
    if fault["type"] == "missing":
        return f"{key}: is required"
    return f"{key}: {fault['msg'].removeprefix('Value error, ')} (got {storage.redact(repr(fault['input']))})"


def _suggest(location: tuple[Any, ...]) -> str:
    """The nearest known key of the same section."""
    import difflib

    model: Any = Config
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation
        model = next((kind for kind in get_args(annotation) if hasattr(kind, "model_fields")), annotation)
    close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(model.model_fields)}"
