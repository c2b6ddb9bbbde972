"""DINOv3 against a plain restatement of it, and how its weights are come by."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from dinov3_reference import dinov3_forward, seeded_state

from model.backbone import load_backbone
from model.backbone.names import ON_REQUEST
from model.backbone.weights import resolve_weights


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def drawn(*size: int) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dinov3") / "vits16.pth"
    torch.save(seeded_state(), path)
    return path


@pytest.mark.parametrize("size", [(112, 112), (64, 96)])
def test_everything_equals_a_naive_forward(weights: Path, size: tuple[int, int]) -> None:
    keys, outputs, tokens = dinov3_forward(seeded_state(), drawn(*size))
    backbone = load_backbone("dinov3_vits16", str(weights))
    found = backbone.features(drawn(*size), ["keys", "cls", "tokens", "block:8"])
    assert found["keys"].shape == (2, size[0] // 16 * size[1] // 16, 384)
    assert relative(found["keys"], keys) < 1e-5
    assert relative(found["cls"], tokens[:, 0]) < 1e-5
    assert relative(found["tokens"], tokens[:, 5:]) < 1e-5
    assert relative(found["block:8"], outputs[8][:, 5:]) < 1e-5


def test_the_gated_model_equals_a_naive_forward(tmp_path: Path) -> None:
    state = seeded_state(gated=True)
    torch.save(state, tmp_path / "plus.pth")
    keys, _, tokens = dinov3_forward(state, drawn(64, 80))
    found = load_backbone("dinov3_vits16plus", str(tmp_path / "plus.pth")).features(drawn(64, 80), ["keys", "tokens"])
    assert relative(found["keys"], keys) < 1e-5
    assert relative(found["tokens"], tokens[:, 5:]) < 1e-5


def test_a_bias_of_the_keys_counts_where_no_mask_takes_it_away(tmp_path: Path) -> None:
    state = {key: value for key, value in seeded_state().items() if not key.endswith("bias_mask")}
    torch.save(state, tmp_path / "unmasked.pth")
    keys, _, tokens = dinov3_forward(state, drawn(64, 64))
    found = load_backbone("dinov3_vits16", str(tmp_path / "unmasked.pth")).features(drawn(64, 64), ["keys", "cls"])
    assert relative(found["keys"], keys) < 1e-5
    assert relative(found["cls"], tokens[:, 0]) < 1e-5


def test_positions_are_not_rounded_with_the_weights(weights: Path) -> None:
    full = load_backbone("dinov3_vits16", str(weights)).tokens(drawn(64, 96))
    half = load_backbone("dinov3_vits16", str(weights), dtype="bfloat16").tokens(drawn(64, 96))
    assert half.dtype == torch.float32
    assert 0 < relative(half, full) < 0.03


@pytest.mark.parametrize("name", ON_REQUEST)
@pytest.mark.parametrize("download", [True, False])
def test_weights_that_are_given_on_request_say_where_to_ask(name: str, download: bool) -> None:
    with pytest.raises(ValueError, match=rf"{name} .* on request: ask at https://ai\.meta\.com/.*{ON_REQUEST[name]}"):
        resolve_weights(name, "official", download=download)


def test_a_timm_without_it_says_which_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.is_model", lambda name: False)
    with pytest.raises(
        ValueError, match=r"the installed timm .* has no dinov3_vits16; pip install -U 'timm>=1\.0\.20'"
    ):
        load_backbone("dinov3_vits16", "random:0")
