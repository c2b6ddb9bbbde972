"""The fit behind a frozen transformer: kept tokens, resuming, workers, checkpoints that name it, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.backbone import load_backbone
from model.checkpoint.files import load_checkpoint
from model.panoptic.frozen import FrozenPatches
from pipeline.errors import ConfigError
from pipeline.operations.demo.scenes import write_scenes
from pipeline.predict import load_predictor
from pipeline.predict.frozen import FrozenBackbone
from pipeline.train.coco_photos import CocoPhotos
from pipeline.train.fit import _identity, fit_panoptic
from pipeline.train.job import TrainJob, TrainSettings, build_model
from pipeline.train.tokens import TokenCache
from tests.tiny_panoptic import NETWORK, count_passes, scene, stopped_at_step
from workers.decode import DecodeLimits
from workers.training.copy_paste import CopyPaste
from workers.training.teacher import TeacherParams
from workers.training.trainer import LossNotFinite, Optimisation

FROZEN = FrozenBackbone("patch-dct", "random:0", "random:0")
SETTINGS = TrainSettings(
    Optimisation(steps=4, batch_size=2, warmup_steps=0, rate=0.001),
    {**NETWORK, "backbone": "vit", "patch_stride": 8, "linear_probes": True},
    short_sides=(64, 80),
    flip=0,  # kept tokens are mirrored, and others those of the mirrored photo
    frozen=FROZEN,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> CocoPhotos:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(str(folder), 6, 0, (96, 128))
    return CocoPhotos(
        str(folder / "truth.json"), str(folder / "images"), pngs=str(folder / "truth"), limits=DecodeLimits()
    )


@pytest.fixture(scope="module")
def unbroken(photos: CocoPhotos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training without kept tokens."""
    out = tmp_path_factory.mktemp("train")
    fit_panoptic(photos, str(out), SETTINGS)
    return out


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_passes(monkeypatch)


def assert_same_weights(a: Path, b: Path, atol: float) -> None:
    first, second = load_checkpoint(a).state, load_checkpoint(b).state
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=10 * atol, atol=atol, msg=name)


def test_the_checkpoint_names_the_transformer_and_does_not_hold_it(unbroken: Path) -> None:
    checkpoint = load_checkpoint(unbroken)
    assert checkpoint.config["frozen"] == {
        "name": "patch-dct",
        "weights": "random:0",
        "identity": "random:0",
        "dtype": "float32",
    }
    assert not [name for name in checkpoint.state if "frozen" in name]
    assert (checkpoint.config["short"], checkpoint.config["max_side"]) == (80, 1333), "the most that it has learnt from"
    assert load_predictor(str(unbroken))(scene(60, 80)).panoptic().ids.shape == (60, 80)


def test_kept_tokens_give_nearly_the_same_weights_and_are_made_once(
    photos: CocoPhotos, unbroken: Path, tmp_path: Path, counted: list[int]
) -> None:
    tokens = str(tmp_path / "tokens")
    fit_panoptic(photos, str(tmp_path / "a"), SETTINGS, tokens=tokens)
    assert_same_weights(unbroken, tmp_path / "a", 2e-3)  # half precision
    drawn = counted.count(1)
    counted.clear()
    fit_panoptic(photos, str(tmp_path / "b"), SETTINGS, tokens=tokens)
    assert_same_weights(tmp_path / "a", tmp_path / "b", 0)
    made = len(list((tmp_path / "tokens").rglob("*.npy")))
    assert 0 < made <= 8
    assert len(counted) == drawn - made  # those of the picture at the end alone


def test_tokens_kept_once_serve_the_mirrored_photo_and_every_part_of_it(
    photos: CocoPhotos, tmp_path: Path, counted: list[int]
) -> None:
    settings = replace(SETTINGS, short_sides=(64,), flip=0.5, crop=0.5)
    tokens = str(tmp_path / "tokens")
    with stopped_at_step(3):
        fit_panoptic(photos, str(tmp_path / "a"), settings, tokens=tokens, checkpoint_every=2)
    fit_panoptic(photos, str(tmp_path / "a"), settings, tokens=tokens, checkpoint_every=2)
    fit_panoptic(photos, str(tmp_path / "b"), settings, tokens=tokens)
    assert_same_weights(tmp_path / "a", tmp_path / "b", 0)
    assert 0 < len(list((tmp_path / "tokens").rglob("*.npy"))) <= 6


def test_tokens_are_found_again_by_photo_and_backbone_alone(tmp_path: Path, counted: list[int]) -> None:
    def cache(frozen: FrozenBackbone, stride: int = 8) -> TokenCache:
        patches = FrozenPatches(load_backbone(frozen.name, frozen.weights), stride=stride)
        return TokenCache(str(tmp_path), patches, frozen, device="cpu")

    image = torch.from_numpy(scene(64, 96)).permute(2, 0, 1).contiguous()
    assert cache(FROZEN).kept(image) is None
    assert not counted and not [*tmp_path.iterdir()]
    first = cache(FROZEN)(image)
    assert torch.equal(cache(FROZEN).kept(image), first)  # type: ignore[arg-type]
    assert (first.dtype, tuple(first.shape)) == (torch.float16, (384, 8, 12))
    assert torch.equal(cache(FROZEN)(image), first)
    assert len(counted) == 1
    others = [FrozenBackbone("patch-dct", "random:1", "random:1"), replace(FROZEN, dtype="bfloat16")]
    folders = {cache(FROZEN).folder, cache(FROZEN, 16).folder, *(cache(other).folder for other in others)}
    assert len(folders) == 4
    assert not torch.equal(cache(others[0])(image), first)
    assert not torch.equal(cache(FROZEN)(image.flip(2)), first)
    assert not torch.equal(cache(FROZEN)(image.reshape(3, 96, 64)), first.reshape(384, 12, 8))
    assert len(counted) == 4


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY half a file", b"not numpy"])
def test_tokens_that_are_not_whole_are_made_again(tmp_path: Path, damage: bytes) -> None:
    patches = FrozenPatches(load_backbone("patch-dct", "random:0"), stride=8)
    cache = TokenCache(str(tmp_path), patches, FROZEN, device="cpu")
    image = torch.from_numpy(scene(64, 96)).permute(2, 0, 1).contiguous()
    whole = cache(image)
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(damage)
    assert torch.equal(cache(image), whole)
    np.save(file, np.zeros((3, 8, 12), np.float16))
    assert torch.equal(cache(image), whole)


def test_a_fit_that_was_stopped_goes_on_to_the_same_weights(photos: CocoPhotos, unbroken: Path, tmp_path: Path) -> None:
    with stopped_at_step(3):
        fit_panoptic(photos, str(tmp_path), SETTINGS, checkpoint_every=2)
    fit_panoptic(photos, str(tmp_path), SETTINGS, checkpoint_every=2)
    assert_same_weights(unbroken, tmp_path, 0)


def test_a_round_may_keep_a_share_of_the_weights_that_it_began_with(
    photos: CocoPhotos, unbroken: Path, tmp_path: Path
) -> None:
    again = replace(SETTINGS, init=str(unbroken))
    fit_panoptic(photos, str(tmp_path / "all"), again)
    mixed = replace(again, mixing=0.25)
    with stopped_at_step(3):
        fit_panoptic(photos, str(tmp_path / "part"), mixed, checkpoint_every=2)
    fit_panoptic(photos, str(tmp_path / "part"), mixed, checkpoint_every=2)
    first, last, found = (load_checkpoint(each).state for each in (unbroken, tmp_path / "all", tmp_path / "part"))
    for name, values in found.items():
        torch.testing.assert_close(values, 0.75 * first[name] + 0.25 * last[name], rtol=1e-6, atol=1e-7, msg=name)
    assert any((last[name] - first[name]).abs().max() > 1e-3 for name in first)


def test_a_fit_with_a_teacher_that_was_stopped_goes_on_to_the_same_weights(photos: CocoPhotos, tmp_path: Path) -> None:
    teacher = TeacherParams(start=0.25, threshold=0.05)
    settings = replace(SETTINGS, optimisation=replace(SETTINGS.optimisation, ema=0.5, teacher=teacher))
    tokens = str(tmp_path / "tokens")
    whole = fit_panoptic(photos, str(tmp_path / "whole"), settings, tokens=tokens)
    with stopped_at_step(3):
        fit_panoptic(photos, str(tmp_path / "part"), settings, checkpoint_every=2, tokens=tokens)
    fit_panoptic(photos, str(tmp_path / "part"), settings, checkpoint_every=2, tokens=tokens)
    assert whole.record["history"][-1]["taught"] > 0
    assert_same_weights(tmp_path / "whole", tmp_path / "part", 0)
    assert _identity(photos, settings, kept=True) != _identity(
        photos, replace(settings, optimisation=replace(settings.optimisation, teacher=None)), kept=True
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_workers_give_the_weights_of_one_process(photos: CocoPhotos, unbroken: Path, tmp_path: Path) -> None:
    fit_panoptic(photos, str(tmp_path), SETTINGS, num_workers=2)
    assert_same_weights(unbroken, tmp_path, 2e-3)


def test_a_loss_that_is_not_finite_stops_the_training(
    photos: CocoPhotos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.train import loop

    def broken(job: TrainJob, device: str = "cpu") -> Any:
        model = build_model(job, device)
        with torch.no_grad():
            model.sem_seg_head.predictor.bias.fill_(float("nan"))
        return model

    monkeypatch.setattr(loop, "build_model", broken)
    with pytest.raises(LossNotFinite, match=r"loss_sem_seg nan.*with the images 3, 2"):
        fit_panoptic(photos, str(tmp_path), SETTINGS)


def test_weights_to_start_from_must_stand_behind_the_same_transformer(
    photos: CocoPhotos, unbroken: Path, tmp_path: Path
) -> None:
    def build(**changes: Any) -> Any:
        settings = replace(SETTINGS, init=str(unbroken), **changes)
        return build_model(TrainJob(photos, settings, str(tmp_path), "x", "cpu", 1, 9, 1))

    state = load_checkpoint(unbroken).state
    assert all(torch.equal(values, state[name]) for name, values in build().state_dict().items())
    with pytest.raises(ValueError, match=r"behind patch-dct with the weights random:0, and this training behind.*:1"):
        build(frozen=FrozenBackbone("patch-dct", "random:1", "random:1"))
    with pytest.raises(ValueError, match=r"this training behind a ResNet: set backbone\.name"):
        build(frozen=None, model=NETWORK)


@pytest.mark.parametrize("own_masks", [True, False])
@pytest.mark.parametrize("probes", [True, False])
def test_new_classes_keep_what_knows_none(photos: CocoPhotos, tmp_path: Path, probes: bool, own_masks: bool) -> None:
    """Scores of classes start anew, or their probes alone; boxes do not, and masks if a class has its own."""
    network = SETTINGS.model | {"class_agnostic_masks": not own_masks, "linear_probes": probes}
    settings = replace(SETTINGS, model=network)
    before = build_model(TrainJob(photos, settings, str(tmp_path), "x", "cpu", 1, 9, 1))
    with torch.no_grad():
        for values in before.parameters():
            values += 0.125
    torch.save({"model": before.state_dict()}, tmp_path / "before.pth")
    settings = replace(settings, init=str(tmp_path / "before.pth"), init_classes="new")
    after = build_model(TrainJob(photos, settings, str(tmp_path), "x", "cpu", 1, 9, 1)).state_dict()
    new = {name for name, values in before.state_dict().items() if not torch.equal(values, after[name])}
    layers = {name.removesuffix(".weight").removesuffix(".bias") for name in new}
    scores = {f"roi_heads.box_predictor.{k}.{'probe' if probes else 'cls_score'}" for k in range(3)}
    stuff = {f"sem_seg_head.{'probe' if probes else 'predictor'}"}
    assert layers == scores | stuff | ({"roi_heads.mask_head.predictor"} if own_masks else set())


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_new_classes_may_have_probes_that_the_old_ones_had_not(
    photos: CocoPhotos, tmp_path: Path, before: bool, after: bool
) -> None:
    """And masks of their own, or none: layers of another number of rows start anew."""
    networks = [SETTINGS.model | {"linear_probes": on, "class_agnostic_masks": on} for on in (before, after)]
    jobs = [
        TrainJob(photos, replace(SETTINGS, model=network), str(tmp_path), "x", "cpu", 1, 9, 1) for network in networks
    ]
    torch.save({"model": build_model(jobs[0]).state_dict()}, tmp_path / "before.pth")
    settings = replace(jobs[1].settings, init=str(tmp_path / "before.pth"), init_classes="new")
    found = build_model(replace(jobs[1], settings=settings))
    assert found.roi_heads.probed == after
    assert found.roi_heads.mask_head.predictor.weight.shape[0] == (1 if after else photos.num_things)


def test_a_model_asks_for_its_transformer_by_checksum(unbroken: Path, tmp_path: Path) -> None:
    manifest = unbroken / "checkpoint.json"
    checkpoint = json.loads(manifest.read_text())
    with pytest.raises(ConfigError, match=r"behind patch-dct with the weights random:0, and 'random:1' has random:1"):
        load_predictor(str(unbroken), backbone_weights="random:1")
    elsewhere = {"name": "dino_vits16", "weights": str(tmp_path / "gone.pth"), "identity": "sha256:ab12"}
    for name in ("checkpoint.json", "model.safetensors"):
        (tmp_path / name).write_bytes((unbroken / name).read_bytes())
    checkpoint["config"]["frozen"] = elsewhere
    (tmp_path / "checkpoint.json").write_text(json.dumps(checkpoint))
    with pytest.raises(ConfigError, match=r"vits16 with the weights sha256:ab12, and they are not there.*gone\.pth"):
        load_predictor(str(tmp_path))
    (tmp_path / "other.pth").write_bytes(b"another file")
    with pytest.raises(ConfigError, match=r"sha256:ab12, and .*other\.pth' has sha256:.*--backbone-weights of predict"):
        load_predictor(str(tmp_path), backbone_weights=str(tmp_path / "other.pth"))


def test_a_checkpoint_of_before_there_were_parts_is_gone_on_from() -> None:
    known = SimpleNamespace(num_things=2, num_stuff=3, identity="labels")
    assert _identity(known, TrainSettings(Optimisation()), kept=False) == "6e49ebdb1518"  # type: ignore[arg-type]


def test_mirrored_tokens_are_not_gone_on_with_as_mirrored_photos(photos: CocoPhotos) -> None:
    assert _identity(photos, SETTINGS, kept=True) == _identity(photos, SETTINGS, kept=False)  # never mirrored
    mirrored = replace(SETTINGS, flip=0.5)
    assert _identity(photos, mirrored, kept=True) != _identity(photos, mirrored, kept=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixing": 0.0, "init": "x"}, "mixing must be above 0 and at most 1, got 0"),
        ({"mixing": 0.5}, "mixing 0.5 is with the weights to start from"),
        ({"mixing": 0.5, "init": "x", "frozen": None, "precise_statistics": 0}, "set train.precise_statistics"),
    ],
)
def test_what_cannot_be_mixed(photos: CocoPhotos, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_panoptic(photos, str(tmp_path), replace(SETTINGS, **changes))


def test_parts_need_kept_tokens(photos: CocoPhotos, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"crop 0\.5 enlarges parts of kept tokens: give the folder of tokens"):
        fit_panoptic(photos, str(tmp_path), replace(SETTINGS, crop=0.5))


def test_kept_tokens_and_copy_paste_exclude_each_other(photos: CocoPhotos, tmp_path: Path) -> None:
    settings = replace(SETTINGS, copy_paste=CopyPaste())
    with pytest.raises(ValueError, match="tokens are kept of whole photos, and copy-paste makes new ones"):
        fit_panoptic(photos, str(tmp_path), settings, tokens=str(tmp_path / "tokens"))
    fit_panoptic(photos, str(tmp_path / "out"), replace(settings, optimisation=replace(SETTINGS.optimisation, steps=1)))
    assert (tmp_path / "out" / "artifact.json").exists()
