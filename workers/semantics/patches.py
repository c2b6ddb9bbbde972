"""Clusters of patches in one worker: a sample of patch features with what does not matter about them, and class maps.

What a patch shows is the same in a neighbour and in another view of the photo: how features differ there is nuisance
(place, scale, context), and clusters are sought where features vary most against it (`workers.conditioning`).

Shapes: N = h * w patches, C channels of the backbone, d conditioned, K fine clusters, S classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.backbone import Backbone
from model.stego import MergedProbe
from workers.conditioning import Conditioning
from workers.crf import CrfParams
from workers.decode import Pixels, resize_keep_aspect
from workers.embeddings import to_images
from workers.images import LoadedImage, table_of_images
from workers.overlap import Flow
from workers.phases import Phases
from workers.records import patches_schema
from workers.semantics.class_maps import ClassMapWorker, plain_row
from workers.semantics.teacher import ConditionedTeacher

VIEW_SIDES = (0.5, 0.9)  # of the photo's, that an enlarged crop has
ALPHA = 10.0  # by which cosines are multiplied for the probabilities that the CRF takes


@dataclass(frozen=True, slots=True)
class PatchParams:
    """`output` of the backbone; `image_size`: pixels of the short side; `patches` and `differences` kept of a photo."""

    output: str
    image_size: int
    patches: int
    differences: int
    seed: int


@dataclass(frozen=True, slots=True)
class View:
    """An enlarged crop: its corner and sides as shares of the photo's, and whether it is mirrored."""

    left: float
    top: float
    side: float
    mirrored: bool

    def of(self, pixels: Pixels, height: int, width: int) -> Pixels:
        """(H, W, 3) uint8 -> (height, width, 3) uint8."""
        full_h, full_w = pixels.shape[:2]
        x, y = self.left * full_w, self.top * full_h
        box = (x, y, x + self.side * full_w, y + self.side * full_h)
        crop = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))
        return crop[:, ::-1].copy() if self.mirrored else crop


class PatchSampler:
    """Holds the backbone; `process` is a pure function of the images."""

    def __init__(self, backbone: Backbone, params: PatchParams, *, device: str, batch_size: int = 1) -> None:
        self._backbone = backbone
        self._params = params
        self._device = device
        self._batch_size = batch_size

    def process(self, images: Iterable[LoadedImage], phases: Phases) -> pa.Table:
        """The images of a shard, in order -> table of `patches_schema`, one row each.

        At most `batch_size` images are held at a time. RuntimeError, naming the images, for what is not their fault.
        """
        schema = patches_schema(self._backbone.dim)
        return table_of_images(images, self._batch_size, lambda batch: self._rows(batch, phases), phases, schema)

    def _rows(self, batch: list[LoadedImage], phases: Phases) -> Iterator[dict[str, Any]]:
        for image in batch:
            nothing: dict[str, Any] = {"embedding": [], "places": [], "across": [], "views": []}
            found = nothing if image.pixels is None else self._sample(image.image_id, image.pixels, phases)
            yield plain_row(image) | found

    @torch.inference_mode()
    def _sample(self, image_id: str, pixels: Pixels, phases: Phases) -> dict[str, Any]:
        params, patch = self._params, self._backbone.patch_size
        rng = np.random.default_rng(
            list(hashlib.blake2b(f"{params.seed} {image_id}".encode(), digest_size=16).digest())
        )
        view = draw_view(rng)
        with phases("resize"):
            whole = resize_keep_aspect(pixels, params.image_size, patch)
            height, width = whole.shape[:2]
            pair = np.stack([whole, view.of(pixels, height, width)])
        with phases("backbone"):
            outputs = self._backbone.features(to_images(pair, self._device), (params.output,))[params.output]
            grid = outputs.cpu().unflatten(1, (height // patch, width // patch)).numpy()
        with phases("sample"):
            rows, columns, channels = grid.shape[1:]
            kept = _some(rows * columns, params.patches, rng)
            differences = neighbour_differences(grid[0]), view_differences(grid[0], grid[1], view)
            across, views = (each[_some(len(each), params.differences, rng)] for each in differences)
            return {
                "embedding": list(grid[0].reshape(-1, channels)[kept].astype(np.float16)),
                "places": list(patch_places(rows, columns)[kept]),
                "across": list(across.astype(np.float16)),
                "views": list(views.astype(np.float16)),
            }


def draw_view(rng: np.random.Generator) -> View:
    """A random crop, mirrored half of the time."""
    side, x, y = rng.uniform(*VIEW_SIDES), rng.random(), rng.random()
    return View(x * (1 - side), y * (1 - side), side, bool(rng.random() < 0.5))


def neighbour_differences(features_hwC: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, C) differences of patches side by side and one above the other; none in a grid of one patch."""
    channels = features_hwC.shape[-1]
    below, beside = features_hwC[1:] - features_hwC[:-1], features_hwC[:, 1:] - features_hwC[:, :-1]
    return np.concatenate([below.reshape(-1, channels), beside.reshape(-1, channels)])


def view_differences(whole_hwC: NDArray[np.float32], view_hwC: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    """(n, C) features of a view, less those of the whole photo at the same places, bilinearly."""
    seen = torch.from_numpy(view_hwC[:, ::-1].copy() if view.mirrored else view_hwC)
    rows, columns = seen.shape[:2]
    y = 2 * (view.top + view.side * (torch.arange(rows) + 0.5) / rows) - 1
    x = 2 * (view.left + view.side * (torch.arange(columns) + 0.5) / columns) - 1
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1)[None].float()
    whole = torch.from_numpy(whole_hwC).permute(2, 0, 1)[None]
    there = F.grid_sample(whole, places, padding_mode="border", align_corners=False)[0].permute(1, 2, 0)
    return (seen - there).reshape(-1, seen.shape[-1]).numpy()


def patch_places(rows: int, columns: int) -> NDArray[np.float32]:
    """(rows * columns, 2): where the middle of each patch of a grid is, as (y, x) in shares of its height and width."""
    y, x = ((np.arange(count) + 0.5) / count for count in (rows, columns))
    return np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


def _some(rows: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Up to `count` of so many rows, drawn without replacement, ascending."""
    return np.sort(rng.permutation(rows)[:count])


@dataclass(frozen=True, slots=True)
class Codebook:
    """What patches are told by: a conditioning, (K, d) unit centroids, and (K,) the class 0..S-1 of each."""

    conditioning: Conditioning
    centroids: NDArray[np.float32]
    classes: NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        return int(self.classes.max()) + 1


class PatchMapWorker(ClassMapWorker):
    """Holds the backbone and the codebook. A class scores as its nearest centroid does."""

    def __init__(
        self,
        backbone: Backbone,
        codebook: Codebook,
        *,
        output: str,
        image_size: int,
        flip: bool,
        crf: CrfParams | None,
        device: str,
        batch_size: int = 1,
        flow: Flow | None = None,
    ) -> None:
        """ValueError: a codebook of another backbone."""
        teacher = ConditionedTeacher(backbone, output, codebook.conditioning, device=device)
        super().__init__(teacher, image_size=image_size, crf=crf, device=device, batch_size=batch_size, flow=flow)
        self._flip = flip
        self._probe = MergedProbe(*map(torch.from_numpy, (codebook.centroids, codebook.classes))).to(device)

    @torch.inference_mode()
    def log_probs(self, resized_BHW3: Pixels, phases: Phases) -> Tensor:
        """(B, H, W, 3) uint8, sides multiples of the patch -> (B, S, h, w) log-probabilities of the classes."""
        with phases("backbone"):
            images = to_images(resized_BHW3, self._device)
            views = [images, images.flip(3)] if self._flip else [images]
            found = [self._teacher.tokens(view) for view in views]
        with phases("classes"):
            grid = [side // self._teacher.patch_size for side in images.shape[2:]]
            maps = [rows.mT.unflatten(2, grid) for rows in found]
            return self._probe.log_probs((maps[0] + maps[1].flip(3)) / 2 if self._flip else maps[0], ALPHA)


def merge_clusters(centroids_Kd: NDArray[np.float32], sizes_K: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """(K, d) unit centroids -> (K,) class 0..S-1 of each, by average linkage of their cosines, weighted by size.

    The classes are numbered in the order of their first cluster.
    """
    distance = 1 - centroids_Kd.astype(np.float64) @ centroids_Kd.T.astype(np.float64)
    np.fill_diagonal(distance, np.inf)
    weight = np.maximum(sizes_K.astype(np.float64), 1e-3)
    group = np.arange(len(centroids_Kd))
    for _ in range(len(centroids_Kd) - classes):
        a, b = sorted(np.unravel_index(distance.argmin(), distance.shape))
        distance[a] = (weight[a] * distance[a] + weight[b] * distance[b]) / (weight[a] + weight[b])
        distance[:, a] = distance[a]
        distance[a, a] = np.inf
        distance[b], distance[:, b] = np.inf, np.inf
        weight[a] += weight[b]
        group[group == b] = a
    numbers: NDArray[np.int64] = np.unique(group, return_inverse=True)[1]
    return numbers
