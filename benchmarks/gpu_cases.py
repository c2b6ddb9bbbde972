"""What `gpu.py` measures: calls on made photos, with seeded random weights, on any device and in any size.

What may be missing where it runs, such as scipy and pyarrow, is imported by the entry that needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from model.backbone import load_backbone
from model.backbone.names import patch_size
from model.panoptic.network import PanopticCascadeRCNN
from tests.gpu import made, steps
from workers.embeddings import embed_crops, masked_crop, to_images

Call = Callable[[], object]
Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
FORMS = ("channels_last", "compiled")
MASKS = 2  # a photo
CLASSES = (300, 27)  # things and stuff


made_photos = functools.lru_cache(maxsize=12)(made.photos)


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    backbones: dict[str, int]  # and pixels a side of their photos
    batches: tuple[int, ...]
    photo: tuple[int, int]  # pixels, before it is resized
    crop: int  # pixels a side
    crops: int  # a forward pass
    scene: tuple[int, int]  # pixels, of the panoptic model
    scenes: int  # a step of its training
    network: dict[str, Any]
    stego: dict[str, int]
    rows: int  # of k-means
    parity: int  # pixels a side
    seconds: float  # of calls that are measured, an entry


FULL = Scale(
    {"dino_vitb8": 480, "dinov2_vits14": 476, "dinov2_vitb14": 476},
    (1, 8, 32), (480, 640), 224, 32, (480, 640), 16, {},
    {"batch": 32, "channels": 384, "side": 28}, 200_000, 240, 1.0,
)  # fmt: skip
SMALL_NETWORK = {"depths": [1, 1, 1, 1], "width": 8, "channels": 16, "box_dim": 32, "mask_channels": 16}
TINY = Scale(
    {"dinov2_vits14": 28}, (1, 2), (48, 64), 56, 4, (64, 96), 2,
    SMALL_NETWORK | {"semantic_channels": 32, "roi_sampled": 64},
    {"batch": 4, "channels": 32, "side": 4}, 2000, 48, 0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Something to be measured. `build` gives the call, and counts in the entry's time."""

    what: str
    settings: dict[str, Any]
    photos: int  # a call
    build: Callable[[], Call]
    limit: float = 20.0  # seconds, with building and warming up


class Cases:
    """All entries, on one device."""

    def __init__(self, device: str, scale: Scale, tiny: bool) -> None:
        self.device, self.scale = device, scale
        self._compiler = "eager" if tiny else "inductor"

    def all(self) -> Iterator[Entry]:
        """Those that say most come first."""
        for name in self.scale.backbones:
            for dtype in DTYPES:
                yield from (self._forward(name, dtype, batch) for batch in self.scale.batches)
                yield self._embedding(name, dtype)
        for batch in self.scale.batches:
            yield from self._steps(batch)
        yield from self._models()
        for name in self.scale.backbones:
            yield from (self._forward(name, dtype, self.scale.batches[1], form) for dtype in DTYPES for form in FORMS)

    @functools.lru_cache(maxsize=1)  # noqa: B019  one object, which lives as long as the program
    def _backbone(self, name: str, dtype: Dtype) -> Any:
        return load_backbone(name, "random:0", device=self.device, dtype=dtype)

    def _forward(self, name: str, dtype: Dtype, batch: int, form: str = "as it is") -> Entry:
        side = self.scale.backbones[name]

        def build() -> Call:
            images = torch.rand(batch, 3, side, side, device=self.device)
            backbone = self._backbone(name, dtype)
            if form == "as it is":
                return lambda: backbone.keys(images)
            self._backbone.cache_clear()  # which is not as it is any more
            if form == "channels_last":
                backbone._vit.to(memory_format=torch.channels_last)
                images = images.to(memory_format=torch.channels_last)
            else:
                for block in backbone._vit.blocks:
                    block.compile(backend=self._compiler)
            return lambda: backbone.keys(images)

        settings = {"backbone": name, "dtype": dtype, "batch": batch, "form": form, "side": side}
        return Entry("backbone", settings, batch, build, 75 if form == "compiled" else 20)

    def _embedding(self, name: str, dtype: Dtype) -> Entry:
        """Of the crops of some photos."""
        photos = self.scale.crops // MASKS

        def build() -> Call:
            crops = [*made_photos(self.scale.crops, self.scale.crop, self.scale.crop)]
            backbone = self._backbone(name, dtype)
            return lambda: embed_crops(backbone, crops, batch_size=self.scale.crops, device=self.device)

        return Entry("embedding", {"backbone": name, "dtype": dtype, "crop": self.scale.crop}, photos, build)

    def _steps(self, batch: int) -> Iterator[Entry]:
        """What is beside the backbone."""
        yield Entry("resize", {"batch": batch}, batch, lambda: self._resize(batch))
        for pinned in (False, True) if torch.cuda.is_available() else (False,):
            settings = {"batch": batch, "pinned": pinned}
            yield Entry("transfer", settings, batch, functools.partial(self._transfer, batch, pinned))
        yield Entry("crops", {"batch": batch}, batch, lambda: self._crops(batch))
        for side, patch in sorted({(side, patch_size(name)) for name, side in self.scale.backbones.items()}):
            build = functools.partial(self._maskcut, batch, side, patch)
            yield Entry("maskcut", {"batch": batch, "grid": side // patch}, batch, build)
        for fast in (False, True):
            kind, masks, maps = {"batch": batch, "fast": fast}, {"masks": MASKS}, {"classes": 27}
            yield Entry("crf of masks", kind | masks, batch, functools.partial(self._crf_masks, batch, fast))
            yield Entry("crf of classes", kind | maps, batch, functools.partial(self._crf_classes, batch, fast))

    def _resize(self, batch: int) -> Call:
        from workers.decode import resize_square

        side, photos = self._side(), made_photos(batch, *self.scale.photo)
        return lambda: [resize_square(photo, side) for photo in photos]

    def _transfer(self, batch: int, pinned: bool) -> Call:
        photos = self._photos(batch)
        return lambda: to_images(photos, self.device, pinned=pinned)

    def _crops(self, batch: int) -> Call:
        photos = made_photos(batch, *self.scale.photo)
        pairs = [(photo, mask) for i, photo in enumerate(photos) for mask in made.discs(i, *self.scale.photo)]
        return lambda: [masked_crop(photo, mask, self.scale.crop) for photo, mask in pairs]

    def _maskcut(self, batch: int, side: int, patch: int) -> Call:
        from workers.maskcut import maskcut

        feats = made.colour_features(made_photos(batch, side, side), patch).to(self.device)
        grid = (side // patch, side // patch)
        return lambda: maskcut(feats, grid, tau=0.15, max_masks=3)

    def _crf_masks(self, batch: int, fast: bool) -> Call:
        from workers.crf import CUTLER, exact_log_odds, refine_masks_of
        from workers.fast_crf import fast_log_odds

        photos, log_odds = [*self._photos(batch)], fast_log_odds if fast else exact_log_odds
        masks = [made.discs(number, *photos[0].shape[:2], patch=8) for number in range(batch)]
        return lambda: refine_masks_of(photos, masks, CUTLER, device=self.device, log_odds=log_odds)

    def _crf_classes(self, batch: int, fast: bool) -> Call:
        from workers.crf import STEGO, dense_crf_of
        from workers.fast_crf import fast_crf_of

        photos, refine = self._photos(batch), fast_crf_of if fast else dense_crf_of
        probs = [*made.class_probs(photos, 27, 8, self.device)]
        return lambda: refine([*photos], probs, STEGO)

    def _models(self) -> Iterator[Entry]:
        stego, rows = self.scale.stego, self.scale.rows
        yield Entry("stego step", stego, stego["batch"], lambda: steps.stego_step(self.device, **stego))
        for dtype in DTYPES:
            training = {"classes": CLASSES, "batch": self.scale.scenes, "size": self.scale.scene, "precision": dtype}
            build = functools.partial(steps.panoptic_step, self.device, **training, network=self.scale.network)
            yield Entry("panoptic training step", training, self.scale.scenes, build, 40)
            for batch in self.scale.batches[:2]:
                inference = {"batch": batch, "size": self.scale.scene, "dtype": dtype}
                build = functools.partial(self._inference, batch, dtype)
                yield Entry("panoptic inference", inference, batch, build)
        yield Entry("k-means", {"rows": rows, "dim": 384, "centroids": 300}, 0, self._kmeans)

    def _inference(self, batch: int, dtype: Dtype) -> Call:
        torch.manual_seed(0)
        model = PanopticCascadeRCNN(*CLASSES, **self.scale.network).eval().to(self.device)
        photos = torch.from_numpy(made_photos(batch, *self.scale.scene)).permute(0, 3, 1, 2)
        images = [*photos.to(self.device)]

        def call() -> object:
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
                return [prediction.panoptic() for prediction in model.predict(images)]

        return call

    def _kmeans(self) -> Call:
        from workers.kmeans import faiss_search

        rng = np.random.default_rng(0)
        rows, centroids = (rng.standard_normal((count, 384), np.float32) for count in (self.scale.rows, 300))
        search = faiss_search(self.device)
        return lambda: search(rows, centroids)

    def _side(self) -> int:
        return max(self.scale.backbones.values())

    def _photos(self, batch: int) -> Any:
        return made_photos(batch, self._side(), self._side())
