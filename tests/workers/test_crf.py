from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from workers import devices
from workers.crf import CUTLER, STEGO, CrfParams, dense_crf, dense_crf_of, fill_holes, refine_masks, refine_masks_of
from workers.permutohedral import build_lattice

SMALL = CrfParams(iterations=4, gaussian_sxy=1.5, bilateral_sxy=6.0, bilateral_srgb=20.0)


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def random_probs(classes: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (classes, height, width)).astype(np.float32))
    return logits.softmax(0).numpy()


def two_colours(size: int) -> np.ndarray:
    """Red on the left half, blue on the right, with a little noise."""
    image = np.zeros((size, size, 3), np.int64)
    image[:, : size // 2] = (200, 40, 40)
    image[:, size // 2 :] = (40, 40, 200)
    return (image + np.random.default_rng(0).integers(-4, 5, image.shape)).astype(np.uint8)


def literal_crf(image: np.ndarray, probs: np.ndarray, params: CrfParams) -> np.ndarray:
    """Mean field straight from the equations, with each kernel as a matrix of all pixels by all pixels."""
    height, width = image.shape[:2]
    y, x = (grid.astype(np.float32) for grid in np.mgrid[:height, :width])
    colours = [c / np.float32(params.bilateral_srgb) for c in np.moveaxis(image.astype(np.float32), 2, 0)]
    pairwise = np.zeros((height * width, height * width))
    for weight, deviation, extra in (
        (params.gaussian_compat, params.gaussian_sxy, []),
        (params.bilateral_compat, params.bilateral_sxy, colours),
    ):
        features = np.stack([f.ravel() for f in (x / np.float32(deviation), y / np.float32(deviation), *extra)])
        kernel = build_lattice(torch.from_numpy(features)).filter(torch.eye(height * width)).double().numpy()
        norm = 1 / np.sqrt(kernel.sum(1))
        pairwise += weight * norm[:, None] * kernel * norm
    logits = np.log(np.clip(probs, 1e-5, 1)).reshape(len(probs), -1).T

    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values - values.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    q = softmax(logits)
    for _ in range(params.iterations):
        q = softmax(logits + pairwise @ q)
    return q.T.reshape(probs.shape)


def test_matches_the_literal_mean_field() -> None:
    image, probs = noise_image(12, 10) // 3, random_probs(3, 12, 10)
    q = dense_crf(image, probs, SMALL)
    assert q.shape == (3, 12, 10) and q.dtype == torch.float32
    np.testing.assert_allclose(q, literal_crf(image, probs, SMALL), atol=2e-5)


def test_two_labels_in_one_channel_match_the_literal_mean_field() -> None:
    image = noise_image(10, 12, seed=1) // 2
    mask = np.random.default_rng(1).random((10, 12)) < 0.5
    foreground = np.where(mask, 0.7310586, 0.2689414)
    q = literal_crf(image, np.stack([1 - foreground, foreground]), SMALL)
    refined, _ = refine_masks(image, mask[None], SMALL, device="cpu")
    np.testing.assert_array_equal(refined[0], ndimage.binary_fill_holes(q[1] > 0.5))


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 7), width=st.integers(1, 7), classes=st.integers(2, 4), seed=st.integers(0, 999))
def test_marginals_are_distributions_at_any_size(height: int, width: int, classes: int, seed: int) -> None:
    q = dense_crf(noise_image(height, width, seed), random_probs(classes, height, width, seed), CUTLER)
    assert q.min() >= 0
    torch.testing.assert_close(q.sum(0), torch.ones(height, width))


def test_classes_may_be_renamed() -> None:
    image, probs, order = noise_image(9, 14), random_probs(4, 9, 14), [2, 0, 3, 1]
    renamed = dense_crf(image, probs[order], SMALL)
    torch.testing.assert_close(renamed, dense_crf(image, probs, SMALL)[order], atol=1e-4, rtol=0)


def test_no_iterations_or_no_kernels_leave_the_probabilities() -> None:
    image, probs = noise_image(6, 5), random_probs(3, 6, 5)
    for params in (replace(SMALL, iterations=0), replace(SMALL, gaussian_compat=0, bilateral_compat=0)):
        np.testing.assert_allclose(dense_crf(image, probs, params), probs, atol=1e-4)


def test_compat_zero_switches_a_kernel_off() -> None:
    probs = random_probs(2, 12, 12)
    position_only = replace(SMALL, bilateral_compat=0)
    torch.testing.assert_close(
        dense_crf(noise_image(12, 12, 1), probs, position_only), dense_crf(noise_image(12, 12, 2), probs, position_only)
    )
    colour_only = replace(SMALL, gaussian_compat=0)
    changed = dense_crf(noise_image(12, 12, 1), probs, colour_only) - dense_crf(two_colours(12), probs, colour_only)
    assert changed.abs().max() > 0.1


def test_constant_image_smooths_by_position() -> None:
    image = np.full((24, 24, 3), 127, np.uint8)
    mask = np.zeros((24, 24), bool)
    mask[:, :12] = True
    noisy = mask.copy()
    noisy[5, 5], noisy[18, 20] = False, True
    refined, _ = refine_masks(image, noisy[None], replace(CUTLER, bilateral_sxy=3.0), device="cpu")
    np.testing.assert_array_equal(refined[0], mask)


def test_ragged_mask_snaps_to_the_colour_edge() -> None:
    ragged = np.zeros((48, 48), bool)
    for row, end in enumerate(np.random.default_rng(0).integers(18, 31, 48)):
        ragged[row, :end] = True
    refined, iou = refine_masks(two_colours(48), ragged[None], CUTLER, device="cpu")
    edge = np.zeros((48, 48), bool)
    edge[:, :24] = True
    np.testing.assert_array_equal(refined[0], edge)
    assert iou[0] == pytest.approx((ragged & edge).sum() / (ragged | edge).sum())


def test_masks_together_equal_masks_one_by_one() -> None:
    image = two_colours(32)
    masks = np.random.default_rng(0).random((5, 32, 32)) < np.array([0.0, 0.2, 0.5, 0.8, 1.0])[:, None, None]
    refined, iou = refine_masks(image, masks, SMALL, device="cpu")
    assert refined.shape == (5, 32, 32) and refined.dtype == bool and iou.dtype == np.float32
    for i in range(5):
        alone, alone_iou = refine_masks(image, masks[i : i + 1], SMALL, device="cpu")
        np.testing.assert_array_equal(refined[i], alone[0])
        assert iou[i] == alone_iou[0]
    assert not refined[0].any() and iou[0] == 0  # empty before and after
    assert refined[4].all() and iou[4] == 1


@pytest.mark.usefixtures("either_way")
def test_photos_together_equal_photos_one_by_one() -> None:
    """Of three sizes, in no order, two of them the same photo."""
    images = [noise_image(20, 16) // 3, two_colours(24), noise_image(16, 20, 1) // 3, noise_image(20, 16) // 3]
    probs = [random_probs(3, *image.shape[:2], seed) for seed, image in enumerate(images)]
    together = dense_crf_of(images, probs, SMALL)
    for q, image, alone in zip(together, images, probs, strict=True):
        torch.testing.assert_close(q, dense_crf(image, alone, SMALL), atol=1e-5, rtol=0)
    assert dense_crf_of([], [], SMALL) == []


@pytest.mark.usefixtures("either_way")
def test_masks_of_several_photos_equal_those_of_each() -> None:
    """Of other numbers, and none."""
    images = [two_colours(24), noise_image(20, 16) // 3, two_colours(32), two_colours(24)]
    rng = np.random.default_rng(0)
    masks = [rng.random((n, *image.shape[:2])) < 0.5 for n, image in zip((2, 1, 0, 3), images, strict=True)]
    together = refine_masks_of(images, masks, SMALL, device="cpu")
    for (refined, iou), image, coarse in zip(together, images, masks, strict=True):
        alone, alone_iou = refine_masks(image, coarse, SMALL, device="cpu")
        np.testing.assert_array_equal(refined, alone)
        np.testing.assert_array_equal(iou, alone_iou)
        assert refined.shape == coarse.shape and refined.dtype == bool


def test_unlike_numbers_of_classes_or_of_photos_are_refused() -> None:
    images, probs = [noise_image(4, 4)] * 2, [random_probs(2, 4, 4), random_probs(3, 4, 4)]
    with pytest.raises(ValueError, match=r"the same classes, not \[2, 3\]"):
        dense_crf_of(images, probs, SMALL)
    with pytest.raises(ValueError, match="shorter"):
        dense_crf_of(images, probs[:1], SMALL)


def test_no_masks() -> None:
    refined, iou = refine_masks(noise_image(4, 6), np.zeros((0, 4, 6), bool), CUTLER, device="cpu")
    assert refined.shape == (0, 4, 6) and iou.shape == (0,)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), density=st.floats(0.3, 1), seed=st.integers(0, 999))
def test_fill_holes_is_scipys(height: int, width: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < density
    np.testing.assert_array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


def test_numpy_torch_read_only_reversed_and_half_precision_inputs_agree() -> None:
    image, probs = noise_image(8, 8), random_probs(2, 8, 8).astype(np.float16)
    image.flags.writeable = False
    expected = dense_crf(image, probs, SMALL)
    assert torch.equal(dense_crf(torch.tensor(image), torch.from_numpy(probs), SMALL), expected)
    assert torch.equal(dense_crf(image, probs.astype(np.float64), SMALL), expected)
    assert torch.equal(dense_crf(image[..., ::-1].copy()[..., ::-1], probs, SMALL), expected)


def test_tiny_deviations_on_a_large_image_do_not_overflow() -> None:
    # Every pixel is alone in its cells, so its own vote is all it hears and no label changes.
    image, mask = noise_image(3, 4000), np.random.default_rng(0).random((1, 3, 4000)) < 0.5
    params = CrfParams(gaussian_compat=0, bilateral_sxy=0.05, bilateral_srgb=0.01)
    refined, _ = refine_masks(image, mask, params, device="cpu")
    np.testing.assert_array_equal(refined[0], fill_holes(mask[0]))


@pytest.mark.parametrize(
    ("image", "probs", "message"),
    [
        (np.zeros((4, 4), np.uint8), np.full((2, 4, 4), 0.5), "image must be"),
        (np.zeros((4, 4, 4), np.uint8), np.full((2, 4, 4), 0.5), "image must be"),
        (np.zeros((4, 4, 3), np.float32), np.full((2, 4, 4), 0.5), "image must be"),
        (np.zeros((4, 4, 3), np.uint8), np.full((1, 4, 4), 0.5), "C >= 2"),
        (np.zeros((4, 4, 3), np.uint8), np.ones((2, 4, 4), np.int64), "floating"),
        (np.zeros((4, 4, 3), np.uint8), np.full((2, 4, 5), 0.5), r"\(4, 5\), but the image is \(4, 4\)"),
        (np.zeros((4, 4, 3), np.uint8), np.full((2, 4, 4), -3.0), "softmax"),
        (np.zeros((4, 4, 3), np.uint8), np.full((2, 4, 4), np.nan), "softmax"),
        (np.zeros((0, 4, 3), np.uint8), np.zeros((2, 0, 4)), "not empty"),
    ],
)
def test_wrong_inputs_are_named(image: np.ndarray, probs: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_crf(image, probs, CUTLER)


def test_wrong_masks_are_named() -> None:
    with pytest.raises(ValueError, match="bool"):
        refine_masks(noise_image(4, 4), np.zeros((1, 4, 4), np.uint8), CUTLER, device="cpu")
    with pytest.raises(ValueError, match="but the image is"):
        refine_masks(noise_image(4, 4), np.zeros((1, 4, 5), bool), CUTLER, device="cpu")


@pytest.mark.parametrize("change", [{"iterations": -1}, {"gaussian_sxy": 0.0}, {"bilateral_compat": float("nan")}])
def test_wrong_params_are_named(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        CrfParams(**change)


@pytest.fixture(scope="module")
def reference(shared_dir: Path) -> dict[str, np.ndarray]:
    with np.load(shared_dir / "parity" / "densecrf.npz") as arrays:
        return dict(arrays)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("photo", ["cutler0", "cutler1", "cutler2"])
def test_parity_with_cutlers_crf(reference: dict[str, np.ndarray], photo: str) -> None:
    image = reference[f"{photo}_image"]
    mask = np.kron(reference[f"{photo}_mask60"], np.ones((8, 8), np.uint8)).astype(bool)
    probs = torch.from_numpy(np.stack([~mask, mask]).astype(np.float32)).softmax(0)

    q = dense_crf(image, probs, CUTLER).numpy()
    np.testing.assert_array_equal(q.argmax(0), reference[f"{photo}_map"])
    assert np.abs(q[1] - reference[f"{photo}_Q"]).max() < 5e-4  # float16 storage alone is 2.4e-4
    first = dense_crf(image, probs, replace(CUTLER, iterations=1))[1].numpy()
    assert np.abs(first - reference[f"{photo}_Q1"]).max() < 5e-4

    refined, iou = refine_masks(image, mask[None], CUTLER, device="cpu")
    np.testing.assert_array_equal(refined[0], reference[f"{photo}_filled"])
    assert iou[0] == pytest.approx(float(reference[f"{photo}_iou"]), abs=1e-6)


def test_masks_of_photos_that_are_refined_together_are_cutlers(
    reference: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "many_threads", lambda where: True)
    names = ("cutler0", "cutler1", "cutler2")
    masks = [np.kron(reference[f"{name}_mask60"], np.ones((1, 8, 8), np.uint8)).astype(bool) for name in names]
    together = refine_masks_of([reference[f"{name}_image"] for name in names], masks, CUTLER, device="cpu")
    for name, (refined, _) in zip(names, together, strict=True):
        np.testing.assert_array_equal(refined[0], reference[f"{name}_filled"])


def test_parity_with_stegos_crf(reference: dict[str, np.ndarray]) -> None:
    image = reference["stego0_image_crf_bgr"]
    logits = torch.from_numpy(reference["stego0_logits"].astype(np.float32))
    size = image.shape[:2]
    probs = torch.nn.functional.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].softmax(0)
    np.testing.assert_array_equal(probs.argmax(0), reference["stego0_map0"])

    q = dense_crf(image, probs, STEGO).numpy()
    np.testing.assert_array_equal(q.argmax(0), reference["stego0_map"])
    assert np.abs(q - reference["stego0_Q"]).max() < 5e-4
    first = dense_crf(image, probs, replace(STEGO, iterations=1)).numpy()
    np.testing.assert_array_equal(first.argmax(0), reference["stego0_Q1_map"])
    assert np.abs(first.max(0) - reference["stego0_Q1_top"]).max() < 5e-4
