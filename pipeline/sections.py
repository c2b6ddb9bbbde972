"""The sections of the configuration: one frozen pydantic model each, unknown keys refused.

A field that changes the rows of a stage lives in that stage's section and enters its fingerprint; `workers` says how
the work is done. Of it only the device, the batch sizes and the threads can change a row, and only by rounding: the
last bits of an embedding.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer, model_validator

from model.names import BACKBONES
from pipeline import storage

if TYPE_CHECKING:
    from model.stego_terms import LossTerms


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, coerce_numbers_to_str=True)


def _absolute(uri: str) -> str:
    """A local path made absolute, so that workers on the same machine find it from any folder."""
    if not uri:
        raise ValueError("is empty; give a folder, a file or a URL such as s3://bucket/prefix")
    uri = _without_credentials(uri)
    if uri.startswith("file://"):
        uri = urllib.parse.unquote(uri.removeprefix("file://"))
    return uri.rstrip("/") if storage.is_remote(uri) else str(Path(uri).expanduser().absolute())


def _without_credentials(uri: str) -> str:
    """The config is written into every part, so that no secret may be in it."""
    if storage.redact(uri) != uri:
        raise ValueError(storage.NO_CREDENTIALS_IN_URLS)
    return uri


Uri = Annotated[str, AfterValidator(_absolute)]
Weights = Annotated[str, AfterValidator(_without_credentials)]


def _known_backbone(name: str) -> str:
    if name not in BACKBONES:
        raise ValueError(f"is not one of {', '.join(BACKBONES)}")
    return name


BackboneName = Annotated[str, AfterValidator(_known_backbone)]


class SourceConfig(Section):
    uri: Uri  # a folder, one tar or Parquet file, or s3://bucket/prefix
    format: Literal["auto", "folder", "tar", "parquet"] = "auto"
    shard_size: int = Field(256, ge=1)  # images a part; what is lost when a worker dies is at most one shard
    image_column: str = "image"  # Parquet only: bytes, or a struct with a field `bytes`
    anonymous: bool = False  # read a public bucket without credentials; the run folder keeps those of the user


class RunConfig(Section):
    uri: Uri  # where all parts, artifacts and receipts go


class DecodeConfig(Section):
    max_pixels: int = Field(
        50_000_000, ge=1, le=178_956_970
    )  # (Pillow's own limit) larger images become rows with status too_large, never decoded
    min_side: int = Field(8, ge=1)  # pixels


class BackboneConfig(Section):
    name: BackboneName = "dino_vitb8"
    weights: Weights = "official"  # official, random:<seed>, or a path, local or s3://
    dtype: Literal["float32", "bfloat16"] = "float32"
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")  # pin of the weights file


class MaskCutConfig(Section):
    image_size: int = Field(480, ge=16)  # pixels; made a multiple of the patch
    resize: Literal["square", "keep_aspect"] = "square"  # square is what was published
    tau: float = Field(0.15, gt=-1, lt=1)  # cosine similarity above which two patches are joined
    max_masks: int = Field(3, ge=1, le=64)  # cuts an image


class CrfConfig(Section):
    iterations: int = Field(10, ge=0)
    gaussian_sxy: float = Field(3.0, gt=0)
    gaussian_compat: float = Field(7.0, ge=0)
    bilateral_sxy: float = Field(50.0, gt=0)
    bilateral_srgb: float = Field(5.0, gt=0)
    bilateral_compat: float = Field(10.0, ge=0)
    min_iou: float = Field(0.5, ge=0, le=1)  # a mask that the CRF changes more than this is dropped


class EmbeddingConfig(Section):
    crop_size: int = Field(224, ge=16)  # pixels


class ClustersConfig(Section):
    k: int = Field(300, ge=1)  # instance classes
    seed: int | None = None  # None: the run's seed
    spherical: bool = True
    max_iterations: int = Field(100, ge=1)
    tolerance: float = Field(1e-4, ge=0)  # relative drop of the inertia at which the iteration stops


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
    """Similarity of the teacher's features above which STEGO pulls a pair together; None is the preset's."""

    intra: Shift | None = None
    inter: Shift | None = None
    negative: Shift | None = None


class SemanticsConfig(Section):
    method: Literal["none", "stego", "datus"] = "none"
    classes: int = Field(27, ge=1, le=254)  # stuff classes
    # stego: the fit
    preset: Literal["cocostuff27_vits", "cocostuff27_vitb", "cityscapes", "potsdam"] = "cocostuff27_vits"
    weights: LossWeights = LossWeights()  # in place of the preset's, to fit another backbone
    shifts: LossShifts = LossShifts()  # likewise; the histograms of a fit tell which way
    crops: Literal["centre", "five"] = "centre"  # of a photo whose teacher features are learnt from
    neighbours: int = Field(7, ge=1)  # a positive is one of so many most similar photos
    batch_size: int = Field(16, ge=2)
    steps: int = Field(5000, ge=1)
    # Photos fitted to, spread over the source; None: all. COCO-Stuff's training list is 50,000, and 5000 steps of 16
    # draw 80,000 photos or crops, so that more would hardly be seen. Each costs 1.2 MB (ViT-B/8; five crops: 6 MB).
    max_images: int | None = Field(50_000, ge=2)
    # stego: the class maps
    image_size: int = Field(448, ge=16)  # pixels of the short side
    flip: bool = True  # average with the mirrored photo
    crf: bool = True  # STEGO's dense CRF
    # datus
    fill_holes: Literal["none", "nearest"] = "none"  # patches of segments too small to have a class
    refine: Literal["none", "deeplabv3"] = "none"  # a network trained on the maps, whose maps replace them
    refine_steps: int = Field(4000, ge=1)
    refine_batch_size: int = Field(16, ge=2)  # a multiple of 4
    refine_image_size: int = Field(224, ge=16)
    refine_backbone: Weights | None = None  # path of a DINO ResNet-50; None: random weights

    @model_validator(mode="after")
    def _refines_datus(self) -> SemanticsConfig:
        if self.refine != "none" and self.method != "datus":
            raise ValueError(f"refine {self.refine!r} belongs to method datus, not {self.method!r}")
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

    def loss_terms(self) -> LossTerms:
        """The preset with those weights and shifts in their place that are given."""
        from model.stego_terms import PRESETS

        given = {
            f"{term}_{kind}": value
            for kind, values in (("weight", self.weights), ("shift", self.shifts))
            for term, value in values
            if value is not None
        }
        return replace(PRESETS[self.preset], **given)


class PanopticConfig(Section):
    max_cover: float = Field(0.7, ge=0, le=1)  # a stuff class that things cover more than this stays void


Count = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=32)]


class CopyPasteConfig(Section):
    """Instances pasted between the photos of a batch (CutLER); not in the published U2Seg."""

    mode: Literal["none", "plain", "semantic"] = "none"  # semantic: half the time crops of the photo's own classes
    rate: float = Field(1.0, ge=0, le=1)  # share of the photos that receive anything
    ratio: tuple[float, float] = (0.3, 1.0)  # range of the pasted size, as a share of the photo's sides

    @model_validator(mode="after")
    def _is_a_range(self) -> CopyPasteConfig:
        if not 0 < self.ratio[0] <= self.ratio[1] <= 1:
            raise ValueError(f"ratio {self.ratio} needs 0 < low <= high <= 1")
        return self


class NetworkConfig(Section):
    """The panoptic network; the defaults are the published one, with a ResNet-50."""

    depths: tuple[Count, Count, Count, Count] = (3, 4, 6, 3)  # blocks of the ResNet's stages
    width: int = Field(64, ge=4)  # channels of its first stage
    channels: int = Field(256, ge=8)  # of the pyramid
    box_dim: int = Field(1024, ge=8)  # of the box heads
    mask_channels: int = Field(256, ge=8)
    semantic_channels: int = Field(128, ge=32, multiple_of=32)
    rpn_pre_nms: tuple[Count, Count] = (2000, 1000)  # proposals a level before suppression, in training and test
    rpn_post_nms: tuple[Count, Count] = (4000, 1000)  # and a photo after it
    roi_sampled: int = Field(512, ge=8)  # proposals a photo in the losses
    droploss_threshold: float | None = Field(None, ge=0, lt=1)  # CutLER's DropLoss has 0.01


class TrainConfig(Section):
    """The panoptic model, trained on the labels (U2Seg's published schedule)."""

    steps: int = Field(0, ge=0)  # 0: no model is trained; published: 270000
    batch_size: int = Field(16, ge=1)  # photos a step, of all workers together
    rate: float = Field(0.01, gt=0)  # learning rate
    weight_decay: float = Field(5e-5, ge=0)
    warmup_steps: int = Field(1000, ge=0)
    drops: tuple[Count, ...] = (210_000, 250_000)  # steps at which the rate falls
    drop_factor: float = Field(0.02, gt=0, le=1)  # to this share of it
    ema: float | None = Field(None, gt=0, lt=1)  # decay of averaged weights, which then are the result
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward pass
    precise_statistics: int = Field(200, ge=0)  # batches after the last step that batch norms take their statistics of
    short_sides: tuple[Pixels, ...] = Field((240, 320, 480, 640, 672, 704, 736, 768, 800, 1024), min_length=1)  # pixels
    max_side: Pixels = 1333
    flip: float = Field(0.5, ge=0, le=1)  # probability
    copy_paste: CopyPasteConfig = CopyPasteConfig()
    whole_masks: bool = True  # learn the whole masks of the instances, as published, and not what is visible of them
    labels: Uri | None = None  # a COCO panoptic JSON of human labels to learn instead of the run's own
    label_pngs: Uri | None = None  # the folder of its PNGs; None: beside the JSON
    label_images: Uri | None = None  # the folder of its images
    fraction: float = Field(1.0, gt=0, le=1)  # of the photos, chosen at random but always the same
    init: Uri | None = None  # weights to start from: a checkpoint folder, or a .pth or .pkl of detectron2
    init_classes: Literal["same", "new"] = "same"  # new: the layers that know the classes start at random
    backbone: Uri | None = None  # ResNet-50 weights for the backbone, such as DINO's
    network: NetworkConfig = NetworkConfig()
    threads: int = Field(4, ge=1)  # that read and augment photos, in each worker
    checkpoint_every: int = Field(1000, ge=1)  # steps
    picture_every: int = Field(5000, ge=1)  # steps between two looks at what the model sees

    @model_validator(mode="after")
    def _human_labels_are_whole(self) -> TrainConfig:
        if (self.labels is None) != (self.label_images is None):
            raise ValueError("labels and label_images belong together: give both or neither")
        return self


class PredictionsConfig(Section):
    """What the trained model sees in the source, as parts."""

    enabled: bool = False
    short: Pixels = 800  # short side
    max_side: Pixels = 1333


Score = Annotated[float, Field(ge=0, le=1)]


class SelfTrainingConfig(Section):
    """CutLER's rounds: sure predictions join the labels, and the model is trained on from its own weights."""

    rounds: int = Field(0, ge=0, le=9)
    steps: int = Field(80_000, ge=1)  # of each round
    rate: float = Field(0.005, gt=0)  # learning rate, constant
    thresholds: tuple[Score, ...] = Field((0.7, 0.65), min_length=1)  # least score, round by round
    max_iou: float = Field(0.5, ge=0, le=1)  # an old mask that a prediction overlaps more is replaced
    most: int = Field(30, ge=1)  # predictions a photo


class PoolSize(Section):
    """How many actors a stage has: one number, or `{min: 2, max: 8}`. `min` of them must fit the cluster before work
    begins; more, up to `max`, are started where there is room and when nodes join."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"min": value, "max": value}
        if not isinstance(value, dict | PoolSize):
            raise ValueError("is a number of actors, or a range of them such as {min: 2, max: 8}")
        return value

    @model_validator(mode="after")
    def _is_a_range(self) -> PoolSize:
        if self.min > self.max:
            raise ValueError(f"has min {self.min} above max {self.max}")
        return self

    @model_serializer
    def _as_given(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}


def _custom_resource(name: str) -> str:
    if name in {"CPU", "GPU", "memory", "object_store_memory"}:
        raise ValueError(f"{name!r} is no custom resource; workers.cpus, .gpus and .memory_gb ask for Ray's own")
    return name


def _placeable(amount: float) -> float:
    if not amount >= 0.0001 or (amount > 1 and amount != int(amount)):
        raise ValueError("is no amount that Ray can reserve: at least 0.0001, and whole above 1")
    return amount


class WorkersConfig(Section):
    size: PoolSize = PoolSize(min=1, max=1)  # actors a stage
    device: str = Field("cpu", pattern="^(cpu|cuda)$")  # Ray shows an actor its own cards alone
    cpus: float = Field(1, gt=0)  # CPUs, and threads, of an actor
    gpus: float = Field(0, ge=0)  # GPUs of an actor; fractions share a card
    # Custom resources of Ray that an actor of a stage of the photos asks for, such as {accelerator_type:H200: 0.001}:
    # it is placed on nodes that have them; other stages run anywhere.
    resources: dict[Annotated[str, AfterValidator(_custom_resource)], Annotated[float, AfterValidator(_placeable)]] = {}
    memory_gb: float = Field(2.5, gt=0)  # heap that Ray reserves for an actor
    # A shard that killed so many workers is given up; an image that alone killed one fewer gets the status `crashed`.
    # Raise it where workers are lost for reasons of their own; those that go down with their node do not count.
    attempts: int = Field(3, ge=2)
    # A worker that takes in no next image for so long is killed and its shard tried again; None: it may hang for ever.
    hang_timeout_s: float | None = Field(3600, gt=0)
    batch_size: int = Field(1, ge=1)  # images a forward pass
    crop_batch: int = Field(16, ge=1)  # mask crops a forward pass
    prefetch: int = Field(4, ge=1, le=64)  # images fetched and decoded ahead of the device
    # Of fits that train a network, by Ray Train; 0: in the driver's process, on the CPUs of all workers together.
    train_workers: int = Field(0, ge=0)
    kmeans_device: Literal["cpu", "cuda"] = "cpu"  # cuda needs the extra u2label[gpu]

    @model_validator(mode="after")
    def _gpu_reserved(self) -> WorkersConfig:
        if self.device != "cpu" and self.gpus == 0:
            raise ValueError(f"device {self.device!r} needs workers.gpus above 0, so that Ray assigns the card")
        return self
