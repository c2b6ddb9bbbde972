"""Linear probes of the tokens: the mean of a box's tokens, and what the network makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.panoptic.network import PanopticCascadeRCNN
from model.panoptic.probes import LinearProbe, mean_tokens
from tests.model.panoptic.test_frozen import photo, square
from tests.tiny_panoptic import tiny_vit

STRIDE = 8


def mean_by_pixels(tokens: Tensor, box: list[int]) -> Tensor:
    """Of a map of which every pixel of the frame has the token of its patch."""
    pixels = tokens.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)
    x0, y0, x1, y1 = box
    return pixels[:, y0:y1, x0:x1].mean((1, 2))


@pytest.mark.parametrize("box", [[0, 0, 48, 32], [8, 16, 16, 24], [3, 5, 41, 30], [40, 24, 48, 32], [1, 2, 9, 10]])
def test_the_mean_of_a_box_is_that_of_its_pixels(box: list[int]) -> None:
    tokens = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    found = mean_tokens(tokens, [torch.zeros(0, 4), torch.tensor([box]).float()], stride=STRIDE)
    torch.testing.assert_close(found, mean_by_pixels(tokens[1], box)[None], atol=1e-5, rtol=1e-5)


def test_boxes_of_no_size_or_outside_have_the_nearest_token() -> None:
    tokens = torch.arange(24.0).view(1, 1, 4, 6)
    boxes = torch.tensor([[20.0, 12.0, 20.0, 12.0], [-90.0, -90.0, -80.0, -80.0], [70.0, 70.0, 90.0, 90.0]])
    torch.testing.assert_close(mean_tokens(tokens, [boxes], stride=STRIDE)[:, 0], torch.tensor([8.0, 0.0, 23.0]))


def test_a_probe_that_has_learnt_nothing_says_nothing() -> None:
    assert not LinearProbe(5, 3)(torch.randn(2, 5)).any()
    plain, probed = tiny_vit(score_threshold=0.0), tiny_vit(score_threshold=0.0, linear_probes=True)
    missing, unexpected = probed.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name.rsplit("probe", 1)[0] for name in missing} == {"roi_heads.", "sem_seg_head."}
    for name in missing:
        probed.get_parameter(name).data.zero_()
    (before,), (after,) = plain.predict([photo(64, 96)]), probed.predict([photo(64, 96)])
    assert torch.equal(before.scores, after.scores) and torch.equal(before.semantic, after.semantic)
    with torch.no_grad():
        for k, probe in enumerate(probed.roi_heads.probe or ()):
            probe.bias[1] += 9.0 * (k > 0)
        assert probed.sem_seg_head.probe is not None
        probed.sem_seg_head.probe.bias[1] += 99.0
    (told,) = probed.predict([photo(64, 96)])
    assert (told.semantic == 1).all() and told.classes.bincount(minlength=2)[1] > before.classes.bincount(minlength=2)[
        1
    ]


@pytest.mark.parametrize("settings", [{}, {"finest_stride": 8, "anchor_sizes": (16, 32, 64, 128)}, {"patch_stride": 8}])
def test_probes_learn_with_the_heads(settings: dict[str, object]) -> None:
    model = tiny_vit(linear_probes=True, **settings).train()
    sum(model([photo(60, 90)], [square(60, 90)]).values()).backward()  # type: ignore[union-attr]
    told = {name: bool(p.grad.any()) for name, p in model.named_parameters() if "probe" in name and p.grad is not None}
    assert len(told) == 8 and all(told.values())


def test_probes_need_a_transformer() -> None:
    with pytest.raises(ValueError, match="linear_probes needs the tokens of a vit"):
        PanopticCascadeRCNN(2, 1, linear_probes=True)
