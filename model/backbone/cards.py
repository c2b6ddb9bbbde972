"""What of each backbone the methods use: which features are cut and at which similarity, what trees are made of.

DINO's card is the published recipe (CutLER, STEGO, U2Seg). The others hold what measured best on at least two labelled
sets of photos (docs/masks.md, docs/stuff.md); where a configuration says `auto`, the card decides. Apart from the code
of the backbones, so that a look at a run need not load torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from model.backbone.names import PATCH_DCT, check_name

Masks = Literal["maskcut", "merge_tree"]


@dataclass(frozen=True, slots=True)
class Card:
    """Outputs are named as in `Backbone.features`; blocks are counted from 0."""

    masks: Masks  # generator of instance masks
    cut: str  # what MaskCut cuts
    tau: float  # cosine similarity above which it joins two patches
    trees: tuple[str, ...]  # what merge trees are made of, the first also the contrast of a mask to its surroundings
    embedding: str  # whose mean inside a mask of a tree is the embedding of the thing
    stuff: str  # whose patches are clustered to stuff classes
    whole: bool  # whether CLS says what the photo is of, in the space of the tokens
    min_score: float | None  # of a mask of a tree that becomes a thing; None: such that a photo has two on average
    published: bool  # STEGO and DatUS2 as published: their own features, and shifts of a preset


_DINO = Card(
    masks="maskcut",
    cut="keys",
    tau=0.15,
    trees=("keys",),
    embedding="tokens",
    stuff="tokens",
    whole=False,
    min_score=None,
    published=True,
)
# Measured with DINOv2 ViT-S/14, and taken for the other DINOv2 and DINOv3. The last block's keys are all alike, so that
# every graph of them is complete; tokens are not. Of the blocks the third and fourth from the end tell objects and
# classes apart best.
_DINOV2 = Card(
    masks="merge_tree",
    cut="tokens",
    tau=0.3,
    trees=("block:9", "tokens", "block:8"),
    embedding="block:9",
    stuff="block:8:norm",
    whole=True,
    min_score=None,
    published=False,
)
# Of 24 blocks, those at the same share of the depth: not measured.
_DEEP = replace(_DINOV2, trees=("block:19", "tokens", "block:17"), embedding="block:19", stuff="block:17:norm")
_PATCHES = replace(_DINO, trees=("tokens",))
_MEASURED = replace(_DINOV2, min_score=0.6)


def card_of(name: str) -> Card:
    """The card of a backbone. ValueError for a name that is not known."""
    check_name(name)
    if name == PATCH_DCT:
        return _PATCHES
    if name.startswith("dino_"):
        return _DINO
    if name == "dinov2_vits14":
        return _MEASURED
    return _DEEP if "vitl" in name else _DINOV2
