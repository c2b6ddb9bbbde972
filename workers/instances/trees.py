"""Masks from merge trees of superpixels: any number of them, nested, with embeddings from the same forward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.backbone import Backbone
from workers.decode import Pixels, resize_keep_aspect
from workers.images import LoadedImage
from workers.instances.found import Found, encode_masks
from workers.instances.passes import forward_passes, resize_all
from workers.overlap import Job
from workers.phases import Phases
from workers.tree_masks import TreeMasks, TreeParams, draw, find_tree_masks


@dataclass(frozen=True, slots=True)
class TreeInputs:
    """What of a photo and a backbone the trees are made of. Outputs are named as in `model.backbone`."""

    image_size: int  # pixels of the short side
    trees: tuple[str, ...]  # outputs that are merged, a tree each
    tokens: str  # output that is compared with the photo's border and with CLS
    embedding: str  # output whose mean inside a mask is its embedding
    whole: bool  # whether CLS is of the same layer, and says what the photo is of
    params: TreeParams


class MergeTrees:
    """All nodes of a few merge trees, scored, without repetitions."""

    nested = True

    def __init__(self, backbone: Backbone, inputs: TreeInputs, *, device: str) -> None:
        self.dim = backbone.dim
        self._backbone = backbone
        self._inputs = inputs
        self._device = device

    def find(self, images: Sequence[LoadedImage], phases: Phases) -> Job[list[Found]]:
        inputs = self._inputs
        wanted = tuple(
            dict.fromkeys((*inputs.trees, inputs.tokens, inputs.embedding, *(("cls",) if inputs.whole else ())))
        )
        resized = yield from resize_all(images, self._resize, phases)
        passes = forward_passes(self._backbone, images, resized, wanted, self._device, phases)
        photos = [
            (image, each.grid, {name: rows[row] for name, rows in outputs.items()})
            for each in passes
            for outputs in [{name: rows.cpu() for name, rows in each.outputs.items()}]
            for row, image in enumerate(each.images)
        ]
        return (yield [functools.partial(self._of_photo, *photo, phases) for photo in photos])

    def _resize(self, pixels: Pixels) -> Pixels:
        return resize_keep_aspect(pixels, self._inputs.image_size, self._backbone.patch_size)

    @torch.inference_mode()
    def _of_photo(self, image: LoadedImage, grid: tuple[int, int], outputs: dict[str, Tensor], phases: Phases) -> Found:
        inputs = self._inputs
        assert image.pixels is not None
        with phases("trees"):
            masks = find_tree_masks(
                image.pixels,
                [_standard(name, outputs[name]) for name in inputs.trees],
                outputs[inputs.tokens],
                outputs["cls"] if inputs.whole else None,
                grid,
                inputs.params,
            )
        with phases("embedding"):
            means = masks.mean(_standard(inputs.embedding, outputs[inputs.embedding]))
            vectors = F.normalize(means, dim=1).numpy().astype(np.float16)
        with phases("masks"):
            return _found(masks, vectors, image.pixels.shape[:2])


def _standard(name: str, features_NC: Tensor) -> Tensor:
    """A block inside a transformer has no norm of its own: each row gets mean 0 and variance 1."""
    return F.layer_norm(features_NC, features_NC.shape[-1:]) if name.startswith("block:") else features_NC


def _found(masks: TreeMasks, vectors: np.ndarray, size: tuple[int, ...]) -> Found:
    """The masks at the photo's size. One that has no pixel there, or repeats another, is left out; what it holds goes
    to its own parent."""
    height, width = size
    rles, boxes, areas = encode_masks(draw(masks, height, width))
    kept = [i for i, rle in enumerate(rles) if areas[i] and rle not in rles[:i]]
    number = {old: new for new, old in enumerate(kept)}
    parents = masks.parents.tolist()

    def parent_of(mask: int) -> int:
        while parents[mask] >= 0 and parents[mask] not in number:
            mask = parents[mask]
        return number.get(parents[mask], -1)

    scores = masks.scores.tolist()
    parent = [parent_of(mask) for mask in kept]
    return Found(
        [rles[i] for i in kept],
        [boxes[i] for i in kept],
        [areas[i] for i in kept],
        [scores[i] for i in kept],
        [vectors[i] for i in kept],
        level=_levels(parent),
        parent=parent,
    )


def _levels(parents: Sequence[int]) -> list[int]:
    """How many masks hold each, one in the other."""

    def level(mask: int) -> int:
        return 0 if parents[mask] < 0 else 1 + level(parents[mask])

    return [level(mask) for mask in range(len(parents))]
