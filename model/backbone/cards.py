"""What of each backbone the methods use: which features are cut and at which similarity, what trees are made of.

DINO's card is the published recipe (CutLER, STEGO, U2Seg). The others hold what measured best on at least two labelled
sets of photos (docs/masks.md, docs/stuff.md); where a configuration says `auto`, the card decides. Apart from the code
of the backbones, so that a look at a run need not load torch.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    whole: bool  # whether CLS says what the photo is of, in the space of the tokens
    published_shifts: bool  # of STEGO: those of the preset; else they come from the fit's own similarities


DINO = Card("maskcut", "keys", 0.15, ("keys",), whole=False, published_shifts=True)
# The last block's keys of DINOv2 are all alike, so that every graph of them is complete; its tokens are not.
DINOV2_SMALL = Card("merge_tree", "tokens", 0.3, ("block:9", "tokens", "block:8"), whole=True, published_shifts=False)
DINOV2_LARGE = Card("merge_tree", "tokens", 0.3, ("block:20", "tokens", "block:18"), whole=True, published_shifts=False)
PATCHES = Card("maskcut", "keys", 0.15, ("tokens",), whole=False, published_shifts=True)


def card_of(name: str) -> Card:
    """The card of a backbone. ValueError for a name that is not known."""
    check_name(name)
    if name == PATCH_DCT:
        return PATCHES
    if name.startswith("dino_"):
        return DINO
    return DINOV2_LARGE if "vitl" in name else DINOV2_SMALL
