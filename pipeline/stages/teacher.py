"""The patch features that STEGO and DatUS2 learn from: those published, or conditioned ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.engine.shards import PhotoShards
from pipeline.stages.facts import Content

if TYPE_CHECKING:
    from workers.semantics.teacher import Teacher


def load_teacher(actor: PhotoShards) -> Teacher:
    """The backbone of an actor, conditioned where the config says so; the conditioning is then an input of its stage.

    ValueError: a conditioning of another backbone.
    """
    semantics, backbone = actor.config.semantics, actor.load_backbone()
    if not semantics.conditioned:
        return backbone
    from pipeline.semantics.patches import read_conditioning
    from workers.semantics.teacher import ConditionedTeacher

    conditioning = read_conditioning(actor.job.inputs["conditioning"].folder)
    return ConditionedTeacher(backbone, semantics.features, conditioning, device=actor.config.workers.device)


def conditioned_content(config: Config) -> Content:
    """What conditioned features depend on beside their input and the photos; nothing for published ones."""
    return config.semantics.model_dump(include={"features", "image_size"}) if config.semantics.conditioned else {}
