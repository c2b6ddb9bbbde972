"""Several outputs of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from torch.nn.modules.module import register_module_forward_hook

from model.backbone import Backbone, load_backbone
from model.backbone.base import IMAGENET_MEAN, IMAGENET_STD, Dtype
from model.backbone.names import ARCHITECTURES
from model.backbone.outputs import parse_output

ALL = ["keys", "cls", "tokens", "block:0", "block:7", "block:7:norm", "block:-1"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("dino_vits16", "random:0")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@contextmanager
def counted_blocks() -> Iterator[list[str]]:
    """One entry for each attention and each MLP that runs."""
    ran: list[str] = []
    hook = register_module_forward_hook(
        lambda module, *_: ran.append(type(module).__name__) if type(module).__name__ in ("Attention", "Mlp") else None
    )
    try:
        yield ran
    finally:
        hook.remove()


def test_all_outputs_come_from_one_pass(backbone: Backbone, images: torch.Tensor) -> None:
    with counted_blocks() as ran:
        found = backbone.features(images, ALL)
    assert len(ran) == 2 * 12
    assert list(found) == ALL
    assert all(value.dtype == torch.float32 for value in found.values())
    assert torch.equal(found["keys"], backbone.keys(images))
    torch.testing.assert_close(found["cls"], backbone.cls(images))  # alone, by a last block that is not done whole
    assert torch.equal(found["tokens"], backbone.tokens(images))
    assert torch.equal(found["block:7"], backbone.features(images, ["block:7"])["block:7"])


@pytest.mark.parametrize(
    ("wanted", "blocks"),
    [(["keys"], 11), (["block:3", "block:7:norm"], 8), (["block:-12"], 1), (["keys", "cls"], 12), ([], 0)],
)
def test_a_pass_ends_with_what_is_wanted(
    backbone: Backbone, images: torch.Tensor, wanted: list[str], blocks: int
) -> None:
    with counted_blocks() as ran:
        assert set(backbone.features(images, wanted)) == set(wanted)
    assert ran.count("Mlp") == blocks
    assert ran.count("Attention") == (11 if "cls" in wanted else blocks)  # of the last, for CLS alone, only its row


@pytest.mark.parametrize("name", ["dino_vits16", "dinov2_vits14", "dinov2_vits14_reg"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cls_alone_is_that_of_a_whole_pass(name: str, dtype: Dtype) -> None:
    backbone = load_backbone(name, "random:0", dtype=dtype)
    images = torch.rand(2, 3, 112, 224, generator=torch.Generator().manual_seed(1))
    whole = backbone.features(images, ["cls", "tokens"])["cls"]
    alone, tolerance = backbone.cls(images), 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(alone, whole, rtol=tolerance, atol=tolerance)


def test_blocks_are_those_of_timm() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model(ARCHITECTURES["dino_vits16"], pretrained=False, num_classes=0).eval()
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    normalised = (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.inference_mode():
        wanted = {
            norm: vit.forward_intermediates(
                normalised, indices=[2, 8, 11], norm=norm, output_fmt="NLC", intermediates_only=True
            )
            for norm in (False, True)
        }
    backbone = load_backbone("dino_vits16", "random:0")
    for norm, outputs in wanted.items():
        found = backbone.blocks(images, [2, 8, -1], norm=norm)
        for ours, theirs in zip(found, outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_blocks_come_in_the_order_of_their_numbers(backbone: Backbone, images: torch.Tensor) -> None:
    found = backbone.features(images, ["block:2:norm", "block:11:norm", "tokens"])
    last, second, again = backbone.blocks(images, [-1, 2, -1], norm=True)
    assert torch.equal(last, found["tokens"])
    assert torch.equal(last, found["block:11:norm"])
    assert torch.equal(last, again)
    assert torch.equal(second, found["block:2:norm"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("values", "'values' is no output of a backbone: give keys, cls, tokens, block:<n>"),
        ("block:8:", "'block:8:' is no output"),
        ("block:12", "'block:12': there are 12 blocks, 0 to 11, or -12 to -1 from the end"),
        ("block:-13:norm", "there are 12 blocks"),
    ],
)
def test_an_output_that_there_is_not_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_output(name, 12)


def test_patch_dct_gives_its_descriptors_at_once_and_has_no_blocks(images: torch.Tensor) -> None:
    backbone = load_backbone("patch-dct", "random:0")
    found = backbone.features(images, ["tokens", "keys", "cls"])
    for name, alone in (("keys", backbone.keys), ("tokens", backbone.tokens), ("cls", backbone.cls)):
        assert torch.equal(found[name], alone(images))
    with pytest.raises(ValueError, match=r"patch-dct has no 'block:8': it has no blocks"):
        backbone.features(images, ["block:8"])
    with pytest.raises(ValueError, match=r"patch-dct has no 'block:-1:norm'"):
        backbone.blocks(images, [-1], norm=True)
