"""The sections of the panoptic model: its network, its training, its predictions, the rounds of self-training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section, Uri

Count = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=32)]
Side = Annotated[int, Field(ge=4)]  # pixels
Score = Annotated[float, Field(ge=0, le=1)]


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


class TeacherConfig(Section):
    """The averaged model adds what it sees surely to the labels, while training goes on (CUPS)."""

    start: float = Field(0.5, ge=0, lt=1)  # share of the steps after which it does
    threshold: Score = 0.5  # least score of what it adds
    max_iou: float = Field(0.5, ge=0, lt=1)  # with a label, above which it is that label
    most: int = Field(30, ge=1)  # instances a photo
    soft: bool = False  # what it adds is wanted to be an object as surely as it is for the teacher


class NetworkConfig(Section):
    """The panoptic network; the defaults are the published one, with a ResNet-50."""

    backbone: Literal["resnet50", "vit"] = "resnet50"  # vit: that of the section `backbone`, frozen
    patch_stride: Literal[8, 16] = 16  # vit: pixels of the resized photo that a patch of it stands for
    finest_stride: Literal[4, 8] = 4  # of the pyramid, pixels of the resized photo; vit alone: 8, with half the work
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
    # Pixels, level by level: five, or four with finest_stride 8
    anchor_sizes: tuple[Side, ...] = Field((32, 64, 128, 256, 512), min_length=4, max_length=5)
    class_agnostic: bool = False  # one detection a box, of its likeliest class, scored as an object of any
    class_agnostic_masks: bool = False  # a box has one mask, whatever its class: learnt from the masks of all
    nms_threshold: float = Field(0.5, gt=0, le=1)  # IoU with a better detection above which one is left out
    soft_nms: bool = False  # below it, a score falls by the IoU with the best of the better ones
    mask_scores: bool = False  # a score is times the mean probability of the mask's pixels
    photo_outlines: bool = False  # vit alone: the masks of its patches get the outlines of the photo
    linear_probes: bool = False  # vit alone: classes of boxes and of stuff are told by its tokens, too

    @model_validator(mode="after")
    def _fits_its_pyramid(self) -> NetworkConfig:
        if self.finest_stride != 4 and self.backbone != "vit":
            raise ValueError(f"finest_stride {self.finest_stride} is of a vit, and backbone is {self.backbone}")
        for key in ("photo_outlines", "linear_probes"):
            if getattr(self, key) and self.backbone != "vit":
                raise ValueError(f"{key} needs the tokens of a vit, and backbone is {self.backbone}: leave it out")
        levels = {4: 5, 8: 4}[self.finest_stride]
        if len(self.anchor_sizes) != levels:
            raise ValueError(
                f"anchor_sizes needs {levels} sizes for finest_stride {self.finest_stride}, got {self.anchor_sizes}"
            )
        return self


class TrainConfig(Section):
    """The panoptic model, trained on the labels (U2Seg's published schedule)."""

    steps: int = Field(0, ge=0)  # 0: no model is trained; published: 270000
    batch_size: int = Field(16, ge=1)  # photos a step, of all workers together
    rate: float = Field(0.01, gt=0)  # learning rate
    probe_rate: float = Field(10.0, gt=0)  # by which the rate of linear probes is multiplied
    weight_decay: float = Field(5e-5, ge=0)
    warmup_steps: int = Field(1000, ge=0)
    drops: tuple[Count, ...] = (210_000, 250_000)  # steps at which the rate falls
    drop_factor: float = Field(0.02, gt=0, le=1)  # to this share of it
    optimiser: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["drops", "cosine"] = "drops"  # cosine: the rate falls along half a wave to 0 at the last step
    ema: float | None = Field(None, gt=0, lt=1)  # decay of averaged weights, which then are the result
    teacher: TeacherConfig | None = None  # of what is learnt, beside the labels; needs ema
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward pass
    precise_statistics: int = Field(200, ge=0)  # batches after the last step that batch norms take their statistics of
    short_sides: tuple[Pixels, ...] = Field((240, 320, 480, 640, 672, 704, 736, 768, 800, 1024), min_length=1)  # pixels
    max_side: Pixels = 1333
    flip: float = Field(0.5, ge=0, le=1)  # probability; of kept tokens it is the tokens that are mirrored
    crop: float = Field(0.0, ge=0, le=1)  # probability that a part is learnt, enlarged; of kept tokens alone
    copy_paste: CopyPasteConfig = CopyPasteConfig()
    whole_masks: bool = True  # learn the whole masks of the instances, as published, and not what is visible of them
    # Masks of a merge tree with at least this score are learnt, nested as they are; None: those alone that are things
    nested: float | None = Field(None, ge=0, le=1)
    nested_most: int = Field(30, ge=1)  # of them a photo, the surest
    soft: bool = False  # nested ones: as surely as their scores say (CuVLER)
    names: bool = False  # learn the classes that `u2label name` has stored with the run: merged, without noise
    labels: Uri | None = None  # a COCO panoptic JSON of human labels to learn instead of the run's own
    label_pngs: Uri | None = None  # the folder of its PNGs; None: beside the JSON
    label_images: Uri | None = None  # the folder of its images
    fraction: float = Field(1.0, gt=0, le=1)  # of the photos, chosen at random but always the same
    init: Uri | None = None  # weights to start from: a checkpoint folder, or a .pth or .pkl of detectron2
    init_classes: Literal["same", "new"] = "same"  # new: the layers that know the classes start at random
    backbone: Uri | None = None  # ResNet-50 weights for the backbone, such as DINO's
    network: NetworkConfig = NetworkConfig()
    cache: bool = False  # vit: keep its tokens in the run folder, about 1 MB a photo and size, so that steps cost less
    threads: int = Field(4, ge=1)  # that read and augment photos, in each worker
    checkpoint_every: int = Field(1000, ge=1)  # steps
    picture_every: int = Field(5000, ge=1)  # steps between two looks at what the model sees

    @model_validator(mode="after")
    def _human_labels_are_whole(self) -> TrainConfig:
        if (self.labels is None) != (self.label_images is None):
            raise ValueError("labels and label_images belong together: give both or neither")
        if self.names and self.labels is not None:
            raise ValueError("names are of the run's own classes, and labels are human ones: leave out one of them")
        if self.soft and self.nested is None:
            raise ValueError("soft is of the scores of nested masks: set nested too")
        if self.teacher is not None and self.ema is None:
            raise ValueError("teacher is the averaged model: set ema too, such as 0.999")
        if self.nested is not None and (self.names or self.labels is not None or not self.whole_masks):
            raise ValueError("nested masks are the run's own, whole and without names: leave nested out, or the others")
        return self

    @model_validator(mode="after")
    def _fits_its_backbone(self) -> TrainConfig:
        behind = self.network.backbone
        if behind == "vit" and self.backbone is not None:
            raise ValueError("backbone has weights of a ResNet-50, and network.backbone is vit: leave out one of them")
        if behind != "vit" and self.cache:
            raise ValueError(f"cache keeps what a frozen vit sees, and network.backbone is {behind}: leave out cache")
        if self.crop and not self.cache:
            raise ValueError(f"crop {self.crop} enlarges parts of kept tokens: set cache, or leave out crop")
        if self.cache and self.copy_paste.mode != "none":
            raise ValueError(f"cache is of whole photos, and copy_paste.mode {self.copy_paste.mode} makes new ones")
        return self


class PredictionsConfig(Section):
    """What the trained model sees in the source, as parts."""

    enabled: bool = False
    short: Pixels = 800  # short side
    max_side: Pixels = 1333


class SelfTrainingConfig(Section):
    """CutLER's rounds: sure predictions join the labels, and the model is trained on from its own weights."""

    rounds: int = Field(0, ge=0, le=9)
    steps: int = Field(80_000, ge=1)  # of each round
    rate: float = Field(0.005, gt=0)  # learning rate, constant unless train.schedule is cosine
    thresholds: tuple[Score, ...] = Field((0.7, 0.65), min_length=1)  # least score, round by round
    max_iou: float = Field(0.5, ge=0, le=1)  # an old mask that a prediction overlaps more is replaced
    most: int = Field(30, ge=1)  # predictions a photo
    soft: bool = False  # a prediction is wanted to be an object as surely as it was one, and not more
    mixing: float = Field(1.0, gt=0, le=1)  # share of what a round learnt in its weights; the rest is as it began
