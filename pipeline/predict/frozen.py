"""The frozen transformer in front of a panoptic model: a checkpoint names it, with a checksum, and does not hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from model.backbone import Backbone, Dtype, load_backbone
from model.backbone.weights import resolve_weights
from pipeline.config.labels import BackboneConfig
from pipeline.store import storage
from pipeline.store.weights import local_weights


@dataclass(frozen=True, slots=True)
class FrozenBackbone:
    """`name`, `weights` and `dtype` as in a config's `backbone`; `identity` is `sha256:...` of the weights' file, or
    the seed of random ones. Picklable."""

    name: str
    weights: str
    identity: str
    dtype: Dtype = "float32"

    @classmethod
    def of(cls, config: BackboneConfig) -> Self:
        """That of a run. Errors as `resolve_weights`."""
        found = resolve_weights(config.name, local_weights(config.weights), sha256=config.sha256)
        return cls(config.name, config.weights, found.identity, config.dtype)

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], weights: str | None = None) -> Self | None:
        """That which the config of a checkpoint names, None where it names none. `weights`: where they are now."""
        if "frozen" not in config:
            return None
        named = cls(**config["frozen"])
        return named if weights is None else replace(named, weights=weights)

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return asdict(self)

    def content(self) -> list[str]:
        """What decides its tokens, wherever its weights lie."""
        return [self.name, self.identity, self.dtype]

    def __str__(self) -> str:
        return f"{self.name} with the weights {self.identity}"

    def load(self, device: str = "cpu") -> Backbone:
        """ValueError: the weights are not there, or are others than those that were trained with."""
        shown = storage.redact(self.weights)
        try:
            path = local_weights(self.weights)
            found = resolve_weights(self.name, path).identity
        except OSError as error:
            raise ValueError(f"the model stands behind {self}, and they are not there: {error}; {REMEDY}") from error
        if found != self.identity:
            raise ValueError(f"the model stands behind {self}, and {shown!r} has {found}; {REMEDY}")
        return load_backbone(self.name, path, device=device, dtype=self.dtype)


REMEDY = "name the right file: --backbone-weights of predict, backbone.weights of a run"
