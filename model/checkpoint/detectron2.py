"""Weights of the panoptic model in detectron2's files, read and written.

The names of the state dict are detectron2's, so its checkpoints and U2Seg's are read as they are, and one written here
runs there. Nothing in a file is executed: `.pth` is read with `weights_only`, `.pkl` by
`model.checkpoint.restricted_pickle`.
"""

from __future__ import annotations

import os
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.checkpoint.restricted_pickle import read_weights

State = dict[str, Tensor]

AUTHOR = "u2label"

CLS_SCORE = "roi_heads.box_predictor.0.cls_score.weight"  # (K + 1, 1024), background last
SEMANTIC = "sem_seg_head.predictor.weight"  # (S + 1, 128, 1, 1), class 0 = "things"
PROBES = (
    "roi_heads.box_predictor.0.probe.weight",
    "sem_seg_head.probe.weight",
)  # (K, D), (S, D): where they are, they count
BOTTOM_UP = "backbone.bottom_up."
# Constants that old detectron2 kept in the state dict; the model makes them from its settings.
CONSTANTS = re.compile(r"pixel_(mean|std)|.*anchor_generator\.cell_anchors\..*")
CLASSIFIER = re.compile(r"(stem\.)?fc\.(weight|bias)")  # detectron2's converter calls ResNet's fc `stem.fc`
COUNTERS = ".num_batches_tracked"  # converted files lack them, and with a fixed momentum nothing reads them
LISTED = 6  # names of each kind that an error lists


class ClassCounts(NamedTuple):
    """K thing classes and S stuff classes ("things", the semantic head's class 0, is not counted)."""

    num_things: int
    num_stuff: int


@dataclass(frozen=True, slots=True)
class BackboneMatch:
    """Where backbone weights came from: `matched` maps the model's name to the file's, `ignored` are classifier heads
    of the file, `kept` the model's batch counters that the file lacks."""

    matched: dict[str, str]
    ignored: tuple[str, ...]
    kept: tuple[str, ...]


def read_detectron2(path: str | Path) -> State:
    """The model's tensors in a `.pth` or `.pkl` of detectron2, U2Seg or CutLER, on the CPU, in the file's order.

    The file is a state dict or has one under "model"; optimizer, scheduler and iteration are left out, as are the
    constants of old checkpoints (`pixel_mean`, `pixel_std`, anchors) and the prefix `module.` of a wrapped model.
    FileNotFoundError without the file; ValueError naming file and reason when it holds anything but weights.
    """
    content = read_weights(path)
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no state dict: give a file with one, or with one under the key 'model'")
    pairs = state.items()
    wrong = [f"{k} ({type(v).__name__})" for k, v in pairs if not (isinstance(k, str) and isinstance(v, Tensor))]
    if wrong:
        raise ValueError(f"{path} holds no state dict of tensors: {_some(wrong)}; give one of a detectron2 model")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return {name: value for name, value in state.items() if not CONSTANTS.fullmatch(name)}


def class_counts(state: Mapping[str, Tensor]) -> ClassCounts:
    """K and S of a state dict, from the rows of its predictors. ValueError when it lacks them."""
    missing = [name for name in (CLS_SCORE, SEMANTIC) if name not in state]
    if missing:
        raise ValueError(f"these are no weights of a panoptic cascade R-CNN: {_some(missing)} missing")
    pairs = zip(PROBES, (CLS_SCORE, SEMANTIC), strict=True)
    return ClassCounts(*(len(state[probe]) if probe in state else len(state[plain]) - 1 for probe, plain in pairs))


def load_detectron2(model: nn.Module, path: str | Path, *, num_things: int, num_stuff: int) -> None:
    """Put the weights of `path` (see `read_detectron2`) into `model`, whose state dict has detectron2's names.

    num_things and num_stuff are what the model was made with. Batch counters that the file lacks stay as they are.
    ValueError, before anything is loaded, that lists a wrong K or S and missing, extra and misshapen entries.
    """
    load_state(model, read_detectron2(path), num_things=num_things, num_stuff=num_stuff, origin=str(path))


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], *, num_things: int, num_stuff: int, origin: str = "the state dict"
) -> None:
    """`load_detectron2` for a state dict at hand, such as that of `load_checkpoint`; `origin` names it in errors."""
    own = model.state_dict()
    problems = []
    if CLS_SCORE in state and SEMANTIC in state and class_counts(state) != (num_things, num_stuff):
        things, stuff = class_counts(state)
        problems.append(f"it has {things} thing and {stuff} stuff classes, the model {num_things} and {num_stuff}")
    problems += _differences(own, state)
    if problems:
        raise ValueError(
            f"{origin} does not fit the model: {'; '.join(problems)}. Set the numbers of classes and the network to "
            "those of the checkpoint, or give a checkpoint of such a network"
        )
    model.load_state_dict(dict(state), strict=False)  # all but the counters was compared above


def load_backbone_detectron2(model: nn.Module, path: str | Path) -> BackboneMatch:
    """Put ResNet-50 weights (DINO's in detectron2's names, or torchvision's) into `model`'s `backbone.bottom_up`.

    An entry of the file belongs to the name of the model that ends in it after a dot, the longest one first
    (detectron2's `matching_heuristics`). A classifier is ignored. ValueError that lists entries of the file without a
    place, of the model without weights, and of another shape; nothing is loaded then.
    """
    state = read_detectron2(path)
    if any(name.startswith("layer1.") for name in state):
        state = {_from_torchvision(name): value for name, value in state.items()}
    ignored = tuple(name for name in state if CLASSIFIER.fullmatch(name))
    own = {name: value for name, value in model.state_dict().items() if name.startswith(BOTTOM_UP)}
    matched = _match_suffixes(own, [name for name in state if name not in ignored])
    homeless = sorted(set(state) - set(matched.values()) - set(ignored))
    found = {name: state[entry] for name, entry in matched.items()} | {name: state[name] for name in homeless}
    problems = _differences(own, found)
    if several := sorted(entry for entry, times in Counter(matched.values()).items() if times > 1):
        problems.append(f"{len(several)} that fit several entries of the model: {_some(several)}")
    if problems:
        raise ValueError(
            f"{path} does not fit the backbone: {'; '.join(problems)}. Give a ResNet-50 with the stride in its 3x3 "
            "convolutions, such as DINO's, in the names of detectron2 or torchvision"
        )
    model.load_state_dict(found, strict=False)
    return BackboneMatch(matched, ignored, tuple(sorted(set(own) - set(matched))))


def write_detectron2(state: Mapping[str, Tensor], path: str | Path, iteration: int = 0) -> None:
    """Write a `.pth` that detectron2's DetectionCheckpointer reads; atomic, replaces what is there.

    `torch.load(path, weights_only=True)` gives {"model": state, "iteration", "__author__"}.
    """
    content = {"model": owned(state), "iteration": int(iteration), "__author__": AUTHOR}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(target)
    try:
        torch.save(content, temporary)
        into_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _from_torchvision(name: str) -> str:
    """torchvision's name of a ResNet entry in detectron2's terms (`layer1.0.bn2.bias` -> `res2.0.conv2.norm.bias`)."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _match_suffixes(own: Mapping[str, Tensor], entries: Sequence[str]) -> dict[str, str]:
    """For each of the model's names the longest entry that equals it or its end after a dot, if there is one."""
    known = set(entries)
    matched = {}
    for name in own:
        words = name.split(".")
        endings = (".".join(words[start:]) for start in range(len(words)))
        entry = next((ending for ending in endings if ending in known), None)
        if entry is not None:
            matched[name] = entry
    return matched


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from being loaded into a model with the entries `own`, in words."""
    missing = sorted(name for name in own if name not in state and not name.endswith(COUNTERS))
    extra = sorted(set(state) - set(own))
    shapes = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    )
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
    return [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]


def _some(names: Sequence[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def owned(state: Mapping[str, Tensor]) -> State:
    """The tensors on the CPU, contiguous, none sharing memory: a view would be saved with all that it is a view of."""
    owned = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    seen: set[int] = set()
    for name, value in owned.items():
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or (value.nbytes and storage.data_ptr() in seen):
            owned[name] = value.clone()
        seen.add(storage.data_ptr())
    return owned


def beside(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex}")


def into_place(temporary: Path, target: Path) -> None:
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(target)
