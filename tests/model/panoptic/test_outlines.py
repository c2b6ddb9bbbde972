"""Coarse masks of boxes get the outlines of the photo, where these are near and the tokens agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.panoptic.mask_head import paste_masks, paste_probs
from model.panoptic.outlines import OutlineParams, _enlarge, _kernel, _Regions, outlined_masks

STRIDE = 8


def scene(height: int = 96, width: int = 128) -> tuple[Tensor, Tensor]:
    """A photo with a red square on blue, rows 20 to 67 and columns 37 to 90, and tokens that tell the two apart."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[2] = 150
    image[:, 20:67, 37:90] = torch.tensor([200, 30, 30], dtype=torch.uint8)[:, None, None]
    rows, columns = height // STRIDE, width // STRIDE
    tokens = torch.zeros(4, rows, columns)
    tokens[0] = 1
    tokens[:2, 2:8, 5:11] = torch.tensor([0.0, 1.0])[:, None, None]
    return image, tokens


def blob() -> Tensor:
    """(1, 28, 28): sure in the middle, falling to the sides, as a mask of a box that is too large."""
    line = (1 - (torch.arange(28) - 13.5).abs() / 14).clamp(min=0)
    return (2 * torch.minimum(line[:, None], line[None]))[None].clamp(max=0.95)


def iou(first: Tensor, second: Tensor) -> float:
    return float((first & second).sum() / (first | second).sum())


@pytest.mark.parametrize("scale", [1, 3])
def test_a_mask_takes_the_outline_of_what_it_roughly_covers(scale: int) -> None:
    image, tokens = scene()
    boxes = torch.tensor([[25.0, 10.0, 98.0, 80.0]])
    output = (96 * scale, 128 * scale)
    truth = torch.zeros(*output, dtype=torch.bool)
    truth[20 * scale : 67 * scale, 37 * scale : 90 * scale] = True
    coarse = paste_masks(blob(), boxes * scale, output)
    fine = outlined_masks(blob(), boxes, image, tokens, stride=STRIDE, output=output)
    assert fine.shape == (1, *output) and fine.dtype == torch.bool
    assert iou(coarse[0], truth) < 0.85 < 0.98 < iou(fine[0], truth)


def test_tokens_keep_apart_what_has_one_colour() -> None:
    """The right part of the square is another thing by its tokens: a mask that reaches into it draws back."""
    image, tokens = scene()
    halves = tokens.clone()
    halves[:, 2:8, 8:11] = torch.tensor([0.0, 0.0, 1.0, 0.0])[:, None, None]
    boxes = torch.tensor([[28.0, 14.0, 78.0, 74.0]])
    one, two = (
        outlined_masks(blob(), boxes, image, seen, stride=STRIDE, output=(96, 128))[0] for seen in (tokens, halves)
    )
    assert one[30:60, 64:90].float().mean() > 0.3 > 0.15 > two[30:60, 64:90].float().mean()
    assert two[30:60, 40:62].all()


def test_a_mask_that_would_vanish_stays_as_it_was() -> None:
    output = (96, 128)
    image, tokens = scene()
    boxes, unsure = torch.tensor([[44.0, 28.0, 56.0, 40.0]]), torch.full((1, 28, 28), 0.55)
    coarse = paste_masks(unsure, boxes, output)
    assert coarse.sum() > 100
    assert torch.equal(outlined_masks(unsure, boxes, image, tokens, stride=STRIDE, output=output), coarse)
    assert not outlined_masks(
        unsure, boxes, image, tokens, stride=STRIDE, output=output, params=OutlineParams(least_iou=-1.0)
    ).any()


def test_tokens_are_seen_where_they_lie_in_a_wide_photo() -> None:
    """Rows and columns of the raster are rounded each for itself: a token has 5.7 columns of this one, and 6.4 rows."""
    image = torch.full((3, 20, 448), 120, dtype=torch.uint8)
    tokens = torch.zeros(2, 4, 56)
    tokens[0, :, :40], tokens[1, :, 40:] = 1, 1  # another thing begins at column 320
    boxes = torch.tensor([[200.0, 0.0, 333.0, 20.0]])
    mask = outlined_masks(torch.full((1, 28, 28), 0.9), boxes, image, tokens, stride=STRIDE, output=(20, 448))[0]
    reached = mask.any(0).nonzero().flatten()
    assert abs(int(reached[-1]) - 320) <= 8


@pytest.mark.parametrize("output", [(30, 40), (97, 61), (11, 300)])
def test_masks_are_enlarged_as_by_interpolation(output: tuple[int, int]) -> None:
    odds = torch.randn(5, 24, 32, generator=torch.Generator().manual_seed(0))
    odds[1] = -1
    odds[2, 5:], odds[2, :, 4:] = -1, -1
    odds[3, :-2], odds[3, :, :-1] = -1, -1
    masks = torch.zeros(5, *output, dtype=torch.bool)
    _enlarge(odds[:4], [0, 1, 2, 3], masks)
    whole = torch.nn.functional.interpolate(odds[:, None], output, mode="bilinear")[:, 0] > 0
    assert (masks == whole)[:4].float().mean() > 0.9999
    assert not masks[4].any()


def test_the_iou_of_masks_of_superpixels_is_that_of_their_pixels() -> None:
    labels = torch.tensor([[0, 0, 1], [2, 2, 1]])
    regions = _Regions(labels)
    chosen = torch.tensor([[True, False, False], [False, True, False], [True, True, False]])
    coarse = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[0, 1, 1], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]]).bool()
    found = regions.iou(chosen, regions.mean(coarse.flatten(1).t().float()))
    fine = chosen.t()[:, labels]
    common, either = ((each.flatten(1).sum(1)) for each in (fine & coarse, fine | coarse))
    torch.testing.assert_close(found, common / either.clamp(min=1))


def test_a_superpixel_hears_of_others_by_place_colour_and_token() -> None:
    params = OutlineParams()
    labels = torch.arange(6).view(2, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    lab, tokens = (torch.rand(n, 8, 12, generator=torch.Generator().manual_seed(n)) * 9 for n in (3, 5))
    found = _kernel(_Regions(labels), lab, tokens, torch.ones(2), params)
    centres = torch.tensor([[y, x] for y in (2.0, 6.0) for x in (2.0, 6.0, 10.0)])
    colours = torch.stack([lab[:, labels == n].mean(1) for n in range(6)])
    seen = torch.stack([tokens[:, int(y) - 1 : int(y) + 1, int(x) - 1 : int(x) + 1].mean((1, 2)) for y, x in centres])
    seen = torch.nn.functional.normalize(seen - seen.mean(0), dim=1)
    wanted = torch.exp(
        -((torch.cdist(centres, centres) / params.place) ** 2) / 2
        - ((torch.cdist(colours, colours) / params.colour) ** 2) / 2
        - (1 - seen @ seen.t()) / params.token
    ).fill_diagonal_(0)
    torch.testing.assert_close(found, wanted / wanted.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_masks_do_not_depend_on_each_other() -> None:
    image, tokens = scene()
    boxes = torch.tensor([[25.0, 10.0, 98.0, 80.0], [0.0, 0.0, 40.0, 96.0], [90.0, 50.0, 128.0, 96.0]])
    probs = torch.cat([blob(), blob().square(), blob()])
    output = (50, 200)
    together = outlined_masks(probs, boxes, image, tokens, stride=STRIDE, output=output)
    for place in range(3):
        alone = outlined_masks(probs[place, None], boxes[place, None], image, tokens, stride=STRIDE, output=output)
        assert torch.equal(together[place], alone[0])


def test_half_precision_around_it_changes_nothing() -> None:
    """A photo of more superpixels than bfloat16 has whole numbers."""
    image = torch.randint(0, 255, (3, 240, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = torch.rand(4, 32, 40, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[25.0, 10.0, 198.0, 180.0]])
    known = (blob(), boxes, image, tokens)
    plain = outlined_masks(*known, stride=STRIDE, output=(96, 128))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(outlined_masks(*known, stride=STRIDE, output=(96, 128)), plain)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 200), (200, 3)])
def test_single_pixels_strips_and_no_masks(height: int, width: int) -> None:
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    tokens = torch.zeros(4, -(-height // 32) * 4, -(-width // 32) * 4)
    boxes = torch.tensor([[0.0, 0.0, float(width), float(height)]])
    output = (7, 9)
    assert outlined_masks(torch.ones(1, 28, 28), boxes, image, tokens, stride=STRIDE, output=output).shape == (1, 7, 9)
    assert outlined_masks(torch.ones(0, 28, 28), boxes[:0], image, tokens, stride=STRIDE, output=output).shape == (
        0,
        7,
        9,
    )


def test_pasted_probabilities_are_those_that_masks_are_of() -> None:
    probs = torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[3.0, 4.0, 50.0, 30.0]]).repeat(5, 1) + torch.arange(5)[:, None]
    assert torch.equal(paste_probs(probs, boxes, (40, 60)) >= 0.5, paste_masks(probs, boxes, (40, 60)))


def test_pasted_probabilities_reach_half_a_cell_beyond_the_box() -> None:
    """As far as a cell's weight does, so that a CPU, which pastes in a window, gives what a GPU does."""
    maps = paste_probs(torch.ones(1, 28, 28), torch.tensor([[56.0, 56.0, 168.0, 168.0]]), (224, 224))[0]
    inside = maps.nonzero()
    assert inside.amin(0).tolist() == [54, 54] and inside.amax(0).tolist() == [169, 169]  # a cell has 4 pixels
