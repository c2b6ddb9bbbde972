"""How far a device's results are from the CPU's: each function gives figures, and is asked for a device and a size.

`size` is the side of the photos in pixels. The device does everything the way of a GPU, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from tests.gpu import made, steps

Figures = dict[str, float]


def backbone(device: str, size: int, *, name: str, dtype: str) -> Figures:
    """Largest difference over the largest value, and the least cosine of a patch's outputs."""
    from model.backbone import load_backbone

    alone = load_backbone(name, "random:0")
    side = max(2, size // alone.patch_size) * alone.patch_size
    images = torch.from_numpy(made.photos(2, side, side)).permute(0, 3, 1, 2).float() / 255
    there = load_backbone(name, "random:0", device=device, dtype=dtype)
    pairs = [
        (there.features(images.to(device), [kind])[kind].cpu(), alone.features(images, [kind])[kind])
        for kind in ("keys", "tokens", "cls")
    ]
    return {
        "difference": max(float((mine - other).abs().max() / other.abs().max()) for mine, other in pairs),
        "least_cosine": min(float(torch.cosine_similarity(*pair, dim=-1).min()) for pair in pairs),
    }


def maskcut(device: str, size: int) -> Figures:
    """Share of all patches of all masks that agree, of photos with two discs."""
    from workers.maskcut import maskcut as cut

    grid = (size // 8, size // 11)
    feats = made.colour_features(made.photos(3, 8 * grid[0], 8 * grid[1]), 8)
    expected = cut(feats, grid, tau=0.15, max_masks=3)
    with made.as_a_gpu(device):
        found = cut(feats.to(device), grid, tau=0.15, max_masks=3)
    same = [np.mean(mine.masks == other.masks) for mine, other in zip(found, expected, strict=True)]
    return {"same": float(np.mean(same)), "masks": float(sum(cut.masks.any((1, 2)).sum() for cut in expected))}


def crf_masks(device: str, size: int, *, fast: bool) -> Figures:
    """Share of pixels that are refined alike, of photos of two sizes."""
    from workers.crf import CUTLER, exact_log_odds, refine_masks, refine_masks_of
    from workers.fast_crf import fast_log_odds

    log_odds = fast_log_odds if fast else exact_log_odds
    shapes = [(size, size * 3 // 4), (size * 3 // 4, size), (size, size * 3 // 4)]
    photos = [made.photos(number + 1, *shape)[number] for number, shape in enumerate(shapes)]
    masks = [made.discs(number, *shape, patch=8) for number, shape in enumerate(shapes)]
    with made.as_a_gpu(device):
        found = refine_masks_of(photos, masks, CUTLER, device=device, log_odds=log_odds)
    each = [
        refine_masks(photo, mask, CUTLER, device="cpu", log_odds=log_odds)[0]
        for photo, mask in zip(photos, masks, strict=True)
    ]
    moved = [np.mean(refined != coarse) for refined, coarse in zip(each, masks, strict=True)]
    same = [np.mean(mine[0] == refined) for mine, refined in zip(found, each, strict=True)]
    return {"same": float(np.mean(same)), "moved": float(np.mean(moved))}


def crf_classes(device: str, size: int, *, fast: bool, classes: int = 12) -> Figures:
    """Largest difference of a marginal, and share of pixels with the same class."""
    from workers.crf import STEGO, dense_crf, dense_crf_of
    from workers.fast_crf import fast_crf, fast_crf_of

    photos = made.photos(2, size, size)
    probs = made.class_probs(photos, classes, 8)
    alone, together = (fast_crf, fast_crf_of) if fast else (dense_crf, dense_crf_of)
    with made.as_a_gpu(device):
        found = torch.stack(together([*photos], [*probs.to(device)], STEGO)).cpu()
    expected = torch.stack([alone(photo, given, STEGO) for photo, given in zip(photos, probs, strict=True)])
    same = (found.argmax(1) == expected.argmax(1)).float().mean()
    return {"difference": float((found - expected).abs().max()), "same": float(same)}


def stego(device: str, size: int) -> Figures:
    """Largest difference of a loss over that loss, in five steps; and how far these led."""
    wanted = {"batch": 4, "channels": 2 * size, "side": max(4, size // 16)}
    there, alone = (steps.stego_step(where, **wanted) for where in (device, "cpu"))
    found, expected = (torch.stack([step().cpu() for _ in range(5)]) for step in (there, alone))
    return {
        "difference": float(((found - expected).abs() / expected.abs().clamp_min(1e-2)).max()),
        "led": float((expected[-1] - expected[0]).abs().max()),
    }


def panoptic_training(device: str, size: int) -> Figures:
    """Largest difference of the total loss over that, in three steps; and how far these led."""
    from tests.tiny_panoptic import NETWORK

    wanted = {"classes": (3, 2), "batch": 2, "size": (size, size * 3 // 4), "network": NETWORK}
    there, alone = (steps.panoptic_step(where, **wanted) for where in (device, "cpu"))
    found, expected = (np.array([step()["total"] for _ in range(3)]) for step in (there, alone))
    return {
        "difference": float(np.abs(found / expected - 1).max()),
        "led": float(abs(expected[-1] - expected[0])),
    }


def panoptic_inference(device: str, size: int) -> Figures:
    """Share of pixels of the same segment, and the number of segments."""
    from tests.tiny_panoptic import scene, tiny_model

    images = [torch.from_numpy(scene(size, size * 3 // 4, seed)).permute(2, 0, 1) for seed in range(2)]
    there, alone = (
        [prediction.panoptic() for prediction in tiny_model().to(where).predict([image.to(where) for image in images])]
        for where in (device, "cpu")
    )
    same = [float((mine.ids.cpu() == other.ids).float().mean()) for mine, other in zip(there, alone, strict=True)]
    return {"same": float(np.mean(same)), "segments": float(sum(len(each.segments) for each in alone))}


def outlines(device: str, size: int) -> Figures:
    """Share of pixels of masks with the same outlines, and of those that these moved."""
    from model.panoptic.mask_head import paste_masks
    from model.panoptic.outlines import outlined_masks

    photo = torch.from_numpy(made.photos(1, size, size * 3 // 4)[0]).permute(2, 0, 1)
    tokens = torch.nn.functional.avg_pool2d(photo.float(), 8)
    line = 1 - (torch.arange(28) - 13.5).abs() / 14
    probs = torch.minimum(line[:, None], line).repeat(3, 1, 1).mul(2).clamp(max=0.95)
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.0, 0.3, 1.0, 1.0], [0.4, 0.0, 0.9, 0.5]])
    boxes = boxes * torch.tensor([photo.shape[2], photo.shape[1]] * 2)
    output = (2 * size, size)
    found, expected = (
        outlined_masks(*(each.to(where) for each in (probs, boxes, photo, tokens)), stride=8, output=output).cpu()
        for where in (device, "cpu")
    )
    coarse = paste_masks(
        probs, boxes * torch.tensor([output[1] / photo.shape[2], output[0] / photo.shape[1]] * 2), output
    )
    return {"same": float((found == expected).float().mean()), "moved": float((expected != coarse).float().mean())}


def probes(device: str, size: int) -> Figures:
    """Largest difference of the logits of probes of boxes over the largest logit, and how many boxes there are."""
    from model.panoptic.probes import LinearProbe, TokenSums

    torch.manual_seed(0)
    tokens, probe = torch.randn(2, 32, size // 8, size // 6), LinearProbe(32, 5)
    torch.nn.init.normal_(probe.weight)
    corners = torch.rand(2, 20, 2, 2) * size * 1.2
    boxes = [torch.cat([image.amin(1), image.amax(1)], 1) for image in corners]

    @torch.no_grad()
    def logits(where: str) -> torch.Tensor:
        means = TokenSums(tokens.to(where), stride=8).means([image.to(where) for image in boxes])
        return probe.to(where)(means).cpu()

    expected = logits("cpu")
    found = logits(device)
    return {"difference": float((found - expected).abs().max() / expected.abs().max()), "boxes": float(len(expected))}


def kmeans(device: str, size: int) -> Figures:
    """Share of rows whose nearest centroid is that found by differences in float64."""
    from workers.kmeans import assign

    rng = np.random.default_rng(0)
    rows, centroids = (rng.standard_normal((count, 32)).astype(np.float32) for count in (20 * size, 40))
    labels, _ = assign(rows, centroids, spherical=False, device=device)
    squares = ((rows[:, None].astype(np.float64) - centroids[None]) ** 2).sum(2)
    return {"same": float(np.mean(labels == squares.argmin(1)))}


PARITIES: dict[str, Callable[[str, int], Figures]] = {
    **{
        f"backbone {name} {dtype}": partial(backbone, name=name, dtype=dtype)
        for name in ("dino_vits16", "dinov2_vits14")
        for dtype in ("float32", "bfloat16")
    },
    "maskcut": maskcut,
    **{f"crf of masks, {kind}": partial(crf_masks, fast=kind == "fast") for kind in ("exact", "fast")},
    **{f"crf of classes, {kind}": partial(crf_classes, fast=kind == "fast") for kind in ("exact", "fast")},
    "stego step": stego,
    "panoptic training step": panoptic_training,
    "panoptic inference": panoptic_inference,
    "panoptic outlines": outlines,
    "panoptic probes": probes,
    "k-means": kmeans,
}
