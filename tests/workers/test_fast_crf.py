"""The fast CRF against the exact one, which equals the published programs (test_crf.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.workers.test_crf import noise_image, random_probs, two_colours
from workers import fast_crf as fast_crf_module
from workers.crf import CUTLER, STEGO, CrfParams, LogOdds, dense_crf, exact_log_odds, refine_masks, refine_masks_of
from workers.fast_crf import TWO, fast_crf, fast_crf_of, fast_log_odds
from workers.photo_pixels import stack_photos


def photo(height: int, width: int) -> np.ndarray:
    """Detail at every scale, as a photo has."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3))
    for radius in (0.7, 3, 12, 40):
        octave = ndimage.gaussian_filter(rng.normal(size=image.shape), (radius, radius, 0))
        image += octave / octave.std() * radius**0.7
    return np.clip(128 + 45 * image / image.std(), 0, 255).astype(np.uint8)


def colour_probs(image: np.ndarray, classes: int, patch: int = 8) -> torch.Tensor:
    """Flat probabilities of classes that are colours, of whole patches, as STEGO's probe gives them."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()[None]
    colours = torch.nn.functional.avg_pool2d(pixels, patch, ceil_mode=True, count_include_pad=False)[0]
    centres = torch.rand(classes, 3, generator=torch.Generator().manual_seed(0)) * 160 + 48
    logits = -(colours[None] - centres[:, :, None, None]).pow(2).sum(1) / 2500
    size = image.shape[:2]
    return torch.nn.functional.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].softmax(0)


def foreground(log_odds: LogOdds, image: np.ndarray, masks: np.ndarray, params: CrfParams) -> torch.Tensor:
    """(n, h, w) bool: where the foreground is likelier than the background."""
    photos = stack_photos([torch.from_numpy(image)], "cpu")
    found_PN = log_odds(photos, torch.from_numpy(masks).flatten(1).t(), params)
    return found_PN.t().view(masks.shape) > 0


def agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first == second).float().mean())


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("size", [(96, 128), (97, 113)])
def test_many_classes_get_the_labels_of_the_exact_crf(size: tuple[int, int]) -> None:
    image = photo(*size)
    probs = colour_probs(image, 27)
    exact, fast = dense_crf(image, probs, STEGO), fast_crf(image, probs, STEGO)
    assert agreement(exact.argmax(0), probs.argmax(0)) < 0.95  # the CRF has something to do
    assert agreement(exact.argmax(0), fast.argmax(0)) > 0.99
    assert torch.allclose(fast.sum(0), torch.ones(size), atol=1e-3)
    assert fast.dtype == torch.float32 and fast.min() >= 0


@pytest.mark.usefixtures("either_way")
def test_two_classes_get_the_labels_of_the_exact_crf() -> None:
    image = photo(119, 158)  # odd in one direction
    y, x = np.mgrid[:119, :158] // 8 * 8
    masks = np.stack([(y - 50) ** 2 + (x - 60) ** 2 < 900, (y > 70) & (x < 90), np.zeros((119, 158), bool)])
    exact, fast = (foreground(form, image, masks, CUTLER) for form in (exact_log_odds, fast_log_odds))
    assert agreement(exact, fast) > 0.985  # of a small photo many pixels lie on an outline
    assert not fast[2].any()


def test_masks_keep_to_the_edge_by_the_fast_crf_too() -> None:
    ragged = np.zeros((48, 48), bool)
    ragged[:, :21] = True
    refined, iou = refine_masks(two_colours(48), ragged[None], CUTLER, device="cpu", log_odds=fast_log_odds)
    assert (refined[0] == (np.arange(48) < 24)).mean() > 0.99
    assert iou[0] == pytest.approx(21 / 24, abs=0.02)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 4)])
def test_photos_of_a_few_pixels(size: tuple[int, int]) -> None:
    image, probs = noise_image(*size), random_probs(5, *size)
    found = fast_crf(image, probs, STEGO)
    assert found.shape == probs.shape and torch.allclose(found.sum(0), torch.ones(size), atol=1e-3)
    assert foreground(fast_log_odds, image, np.ones((2, *size), bool), CUTLER).all()


@pytest.mark.usefixtures("either_way")
def test_photos_together_equal_photos_one_by_one() -> None:
    """Of two sizes, and each with other classes of its own."""
    images = [photo(40, 56), photo(56, 40), noise_image(40, 56) // 2, photo(40, 56)[::-1].copy()]
    probs = [colour_probs(image, 12) for image in images]
    probs[3] = torch.cat([probs[3][:2] + 1e-3, probs[3][2:] * 1e-4])
    probs[3] /= probs[3].sum(0)
    together = fast_crf_of(images, probs, STEGO)
    for q, image, given in zip(together, images, probs, strict=True):
        torch.testing.assert_close(q, fast_crf(image, given, STEGO), atol=1e-3, rtol=0)


@pytest.mark.usefixtures("either_way")
def test_masks_of_several_photos_equal_those_of_each() -> None:
    images = [photo(41, 56), two_colours(48), photo(41, 56)[::-1].copy()]
    rng = np.random.default_rng(0)
    masks = [
        np.kron(rng.random((n, 6, 7)) < 0.5, np.ones((1, 8, 8), bool))[:, : image.shape[0], : image.shape[1]]
        for n, image in zip((2, 1, 3), images, strict=True)
    ]
    together = refine_masks_of(images, masks, CUTLER, device="cpu", log_odds=fast_log_odds)
    for (refined, iou), image, coarse in zip(together, images, masks, strict=True):
        alone, alone_iou = refine_masks(image, coarse, CUTLER, device="cpu", log_odds=fast_log_odds)
        assert (refined == alone).mean() > 0.999
        np.testing.assert_allclose(iou, alone_iou, atol=2e-3)


@pytest.mark.parametrize("left_out", ["gaussian_compat", "bilateral_compat"])
def test_a_kernel_may_be_left_out(left_out: str) -> None:
    image = photo(64, 64)
    probs, params = colour_probs(image, 9), replace(STEGO, **{left_out: 0.0})
    assert agreement(dense_crf(image, probs, params).argmax(0), fast_crf(image, probs, params).argmax(0)) > 0.98


@pytest.mark.parametrize("iterations", [0, 1, 2, 3])
def test_few_iterations_are_filtered_all(iterations: int) -> None:
    image = photo(64, 64)
    probs, params = colour_probs(image, 9), replace(STEGO, iterations=iterations)
    assert agreement(dense_crf(image, probs, params).argmax(0), fast_crf(image, probs, params).argmax(0)) > 0.985


@pytest.mark.parametrize("iterations", [1, 2, 5, 10, 20, 40])
def test_messages_of_two_classes_need_not_be_filtered_each_time(
    iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photo(96, 96)
    masks = np.zeros((1, 96, 96), bool)
    masks[:, 24:72, 16:56] = True
    given = image, masks, replace(CUTLER, iterations=iterations)
    thrifty = foreground(fast_log_odds, *given)
    monkeypatch.setattr(fast_crf_module, "TWO", replace(TWO, filtered=lambda iterations: {*range(iterations)}))
    assert agreement(foreground(fast_log_odds, *given), thrifty) > 0.99


def test_what_the_exact_crf_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="apply a softmax"):
        fast_crf(noise_image(4, 4), np.full((3, 4, 4), 2.0, np.float32), STEGO)
    with pytest.raises(ValueError, match="but the image is"):
        fast_crf(noise_image(4, 5), random_probs(3, 4, 4), STEGO)
    with pytest.raises(ValueError, match="weigh more than 60"):
        fast_crf(noise_image(4, 4), random_probs(3, 4, 4), replace(STEGO, bilateral_compat=70.0))


@pytest.mark.usefixtures("either_way")
def test_labels_of_photos_are_the_published_ones_but_for_a_few_in_a_thousand(shared_dir: Path) -> None:
    with np.load(shared_dir / "parity" / "densecrf.npz") as arrays:
        reference = dict(arrays)
    image, logits = reference["stego0_image_crf_bgr"], torch.from_numpy(reference["stego0_logits"].astype(np.float32))
    size = image.shape[:2]
    probs = torch.nn.functional.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].softmax(0)
    labels = fast_crf(image, probs, STEGO).argmax(0)
    # The head is untrained: its labels are noise from patch to patch, of which the CRF changes one in seven.
    assert agreement(labels, torch.from_numpy(reference["stego0_map"].astype(np.int64))) > 0.98
    same = []
    for name in ("cutler0", "cutler1", "cutler2"):
        mask = np.kron(reference[f"{name}_mask60"], np.ones((8, 8), np.uint8)).astype(bool)
        found = foreground(fast_log_odds, reference[f"{name}_image"], mask[None], CUTLER)
        same.append(agreement(found[0], torch.from_numpy(reference[f"{name}_map"]).bool()))
    assert np.mean(same) > 0.994  # of one of the three photos 98.8 %
