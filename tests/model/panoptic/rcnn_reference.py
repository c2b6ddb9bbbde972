"""Reads the reference outputs of the published model (`parity/panoptic_rcnn`), and the weights that made them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.panoptic.boxes import box_iou
from model.panoptic.targets import Target

Arrays = dict[str, NDArray[Any]]


class Reference:
    """The arrays of `golden_300.npz` as tensors, JSON and bit masks, and the modules beside it."""

    def __init__(self, shared: Path) -> None:
        self.folder, self.specs = shared / "parity" / "panoptic_rcnn", shared / "specs"
        self.arrays = np.load(self.folder / "golden_300.npz")

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def json(self, key: str) -> Any:
        return json.loads(self.arrays[key].tobytes())

    def bits(self, key: str, width: int) -> Tensor:
        return torch.from_numpy(np.unpackbits(self.arrays[key], axis=-1)[..., :width].astype(bool))

    def image(self, name: str) -> Tensor:
        """(3, h, w) uint8."""
        return torch.from_numpy(np.array(Image.open(self.folder / "inputs" / f"{name}.png"))).permute(2, 0, 1)

    def target(self, i: int) -> Target:
        """The truth of training image i."""
        key = f"train/img{i}/"
        width = int(self.arrays[f"{key}input_hw"][1])
        return Target(
            boxes=self.tensor(f"{key}gt_boxes"),
            classes=self.tensor(f"{key}gt_classes"),
            masks=self.bits(f"{key}gt_masks_packed", width),
            semantic=self.tensor(f"{key}gt_sem_seg"),
        )

    def entries(self, num_things: int) -> list[tuple[str, list[int], str]]:
        return json.loads((self.specs / f"state_dict_{num_things}.json").read_text())

    def weights(self) -> dict[str, Tensor]:
        state = self.module("weights").state_dict(self.entries(300))
        return {name: torch.from_numpy(np.asarray(value)) for name, value in state.items()}

    def differences(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """By key: the largest difference of floats in standard deviations, the fraction of integers that differ."""
        given = {key: value.detach().numpy() for key, value in outputs.items()}
        rows = self.module("compare").compare({key: self.arrays[key] for key in given}, given)
        return {key: size for key, _, size in rows if size is not None}

    def map_arrays(self, key: str, map_CHW: Tensor) -> dict[str, Tensor]:
        """What the reference keeps of a map."""
        a, b, c = self.arrays[f"{key}/step"]
        wide = map_CHW.double().flatten(1)
        return {
            f"{key}/sample": map_CHW[::a, ::b, ::c],
            f"{key}/channel_mean": wide.mean(1),
            f"{key}/channel_std": wide.std(1, correction=0),
        }

    def module(self, name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"rcnn_{name}", self.folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def found_fraction(boxes: Tensor, others: Tensor, classes: Tensor, other_classes: Tensor) -> float:
    """Of `boxes`, how many have a box of the same class among `others` with an IoU of at least 0.99."""
    alike = box_iou(boxes, others).masked_fill(classes[:, None] != other_classes[None], 0)
    return (alike.amax(1) >= 0.99).double().mean().item()
