"""Checkpoints: detectron2's names both ways, restricted reading, our own two files."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.checkpoint.detectron2 import (
    CLS_SCORE,
    SEMANTIC,
    ClassCounts,
    class_counts,
    load_backbone_detectron2,
    load_detectron2,
    read_detectron2,
    write_detectron2,
)
from model.checkpoint.files import MANIFEST, WEIGHTS, Checkpoint, from_files, load_checkpoint, save_checkpoint, to_files

CONFIG = {"num_things": 5, "num_stuff": 3, "categories": ["1", "2"], "settings": {"lr": 0.01}}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Named(nn.Module):
    """A module whose state dict has any names: every dot a level, as detectron2's names have."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            first, _, rest = name.partition(".")
            if not rest:
                self.register_buffer(first, torch.zeros_like(value))
            elif first not in self._modules:
                inside = {n.partition(".")[2]: v for n, v in state.items() if n.startswith(f"{first}.")}
                self.add_module(first, Named(inside))


def tiny_state(num_things: int = 5, num_stuff: int = 3) -> dict[str, Tensor]:
    """A few entries of the panoptic model with small shapes; the order is not alphabetic."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        SEMANTIC: (num_stuff + 1, 4, 1, 1),
        "backbone.bottom_up.stem.conv1.weight": (4, 3, 7, 7),
        **{f"backbone.bottom_up.stem.conv1.norm.{name}": (4,) for name in BATCH_NORM[:4]},
        "backbone.bottom_up.res2.0.shortcut.weight": (8, 4, 1, 1),
        "backbone.bottom_up.res2.0.conv1.weight": (4, 4, 1, 1),
        "backbone.bottom_up.res2.0.conv1.norm.weight": (4,),
        CLS_SCORE: (num_things + 1, 6),
        CLS_SCORE.replace("weight", "bias"): (num_things + 1,),
    }
    state = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return state | {"backbone.bottom_up.stem.conv1.norm.num_batches_tracked": torch.tensor(12)}


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "backbone.bottom_up."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def write_pkl(path: Path, model: Mapping[str, Any], protocol: int = 4) -> Path:
    """As detectron2's converters write it."""
    content = {"model": dict(model), "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def as_arrays(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in state.items()}


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """The same names in the same order, the same dtypes, shapes and bits."""
    assert list(left) == list(right)
    for name, value in left.items():
        other = right[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert value.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_only_the_model_of_a_training_checkpoint_is_read(tmp_path: Path, zipped: bool) -> None:
    state = tiny_state()
    content = {"model": OrderedDict(state), "optimizer": {"lr": 0.1}, "scheduler": {"last_epoch": 3}, "iteration": 9}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_detectron2(tmp_path / "w.pth"), state)


def test_legacy_names_and_constants_are_cleared_away(tmp_path: Path) -> None:
    state = tiny_state()
    constants = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
    }
    torch.save({f"module.{name}": value for name, value in (state | constants).items()}, tmp_path / "ddp.pth")
    assert_same(read_detectron2(tmp_path / "ddp.pth"), state)


@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
def test_what_is_no_weights_is_refused_before_the_model_is_touched(tmp_path: Path, name: str) -> None:
    state = tiny_state()
    (tmp_path / name).write_bytes(pickle.dumps({"model": state, "hook": breakpoint}))
    model = Named(state)
    with pytest.raises(ValueError, match=rf"{name}.*global builtins\.breakpoint, which is refused"):
        load_detectron2(model, tmp_path / name, num_things=5, num_stuff=3)
    assert not any(value.any() for value in model.state_dict().values())


@pytest.mark.parametrize("content", [{}, [1], {"model": {"w": 3}}, {"model": 1}, {3: torch.zeros(1)}])
def test_weights_are_tensors_by_name(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="state dict"):
        read_detectron2(tmp_path / "w.pth")


def test_loading_fills_the_model_and_needs_no_batch_counters(tmp_path: Path) -> None:
    state = tiny_state()
    counter = "backbone.bottom_up.stem.conv1.norm.num_batches_tracked"
    write_detectron2({name: value for name, value in state.items() if name != counter}, tmp_path / "w.pth")
    model = Named(state)
    load_detectron2(model, tmp_path / "w.pth", num_things=5, num_stuff=3)
    assert model.state_dict()[counter] == 0
    write_detectron2(state, tmp_path / "w.pth")
    load_detectron2(model, tmp_path / "w.pth", num_things=5, num_stuff=3)
    loaded = model.state_dict()
    assert_same({name: loaded[name] for name in state}, state)


def test_one_error_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    state = tiny_state(num_things=7)
    del state["backbone.bottom_up.res2.0.conv1.weight"]
    state |= {f"extra.{i:02d}": torch.zeros(1) for i in range(20)}
    write_detectron2(state, tmp_path / "w.pth")
    model = Named(tiny_state())
    with pytest.raises(ValueError) as caught:
        load_detectron2(model, tmp_path / "w.pth", num_things=5, num_stuff=3)
    message = str(caught.value)
    assert "w.pth does not fit the model: it has 7 thing and 3 stuff classes, the model 5 and 3" in message
    assert "1 missing: backbone.bottom_up.res2.0.conv1.weight;" in message
    assert "20 unexpected: extra.00, extra.01, extra.02, extra.03, extra.04, extra.05 and 14 more;" in message
    assert f"2 of another shape: {CLS_SCORE.replace('weight', 'bias')} (8,) instead of (6,)" in message
    assert "Set the numbers of classes" in message
    assert not any(value.any() for value in model.state_dict().values()), "something was loaded all the same"


def test_class_counts_come_from_the_predictors() -> None:
    assert class_counts(tiny_state(11, 4)) == ClassCounts(num_things=11, num_stuff=4)
    with pytest.raises(ValueError, match="cls_score"):
        class_counts({SEMANTIC: torch.zeros(4, 4, 1, 1)})


def test_a_backbone_is_matched_by_suffix(tmp_path: Path) -> None:
    state, model = tiny_state(), Named(tiny_state())
    entries = backbone_of(state)
    del entries["stem.conv1.norm.num_batches_tracked"]
    head = {"stem.fc.weight": torch.ones(10, 4), "stem.fc.bias": torch.ones(10)}
    match = load_backbone_detectron2(model, write_pkl(tmp_path / "dino.pkl", as_arrays(entries | head)))
    assert match.matched == {f"backbone.bottom_up.{name}": name for name in entries}
    assert match.ignored == ("stem.fc.weight", "stem.fc.bias")
    assert match.kept == ("backbone.bottom_up.stem.conv1.norm.num_batches_tracked",)
    loaded = model.state_dict()
    assert all(loaded[own].equal(entries[name]) for own, name in match.matched.items())
    assert not loaded[CLS_SCORE].any()


def test_torchvisions_names_of_a_backbone_are_understood(tmp_path: Path) -> None:
    state, model = tiny_state(), Named(tiny_state())
    published = {
        "conv1.weight": "stem.conv1.weight",
        **{f"bn1.{name}": f"stem.conv1.norm.{name}" for name in BATCH_NORM},
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.bn1.weight": "res2.0.conv1.norm.weight",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
    }
    entries = backbone_of(state)
    torch.save(
        {theirs: entries[ours] for theirs, ours in published.items()} | {"fc.bias": torch.ones(9)}, tmp_path / "r50.pth"
    )
    match = load_backbone_detectron2(model, tmp_path / "r50.pth")
    assert match.ignored == ("stem.fc.bias",)
    assert_same(backbone_of(model.state_dict()), {name: entries[name] for name in backbone_of(model.state_dict())})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"res9.0.conv1.weight": torch.ones(1)}, "1 unexpected: res9.0.conv1.weight"),
        ({"stem.conv1.weight": None}, "1 missing: backbone.bottom_up.stem.conv1.weight"),
        ({"stem.conv1.weight": torch.ones(2)}, r"stem.conv1.weight \(2,\) instead of \(4, 3, 7, 7\)"),
        ({"res2.0.conv1.weight": None, "conv1.weight": torch.ones(4, 4, 1, 1)}, "fit several entries"),
    ],
    ids=["unexpected", "missing", "shape", "ambiguous"],
)
def test_a_backbone_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    entries = backbone_of(tiny_state()) | change
    if change.get("conv1.weight") is not None:
        del entries["stem.conv1.weight"]
    path = write_pkl(tmp_path / "r50.pkl", as_arrays({k: v for k, v in entries.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        load_backbone_detectron2(Named(tiny_state()), path)


def test_a_written_pth_is_what_detectron2_expects(tmp_path: Path) -> None:
    whole = torch.arange(1000.0)
    state = {"a": whole[:10], "b": whole[5:15].view(2, 5).T}
    path = tmp_path / "made" / "w.pth"
    write_detectron2(state, path, iteration=89999)
    content = torch.load(path, weights_only=True)
    assert (content["iteration"], content["__author__"]) == (89999, "u2label")
    assert_same(content["model"], state)
    assert path.stat().st_size < 3000, "a view was saved with all that it is a view of"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_detectron2({"a": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(AttributeError):
        write_detectron2({"a": 3}, tmp_path / "w.pth")  # type: ignore[dict-item]
    assert read_detectron2(tmp_path / "w.pth")["a"].tolist() == [1, 1]
    (tmp_path / "folder" / MANIFEST).mkdir(parents=True)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "folder", tiny_state(), CONFIG)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [MANIFEST, WEIGHTS]


def test_our_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = tiny_state() | {"half": torch.ones(3).bfloat16(), "nan": torch.tensor([float("nan"), -0.0])}
    save_checkpoint(tmp_path / "step-7", state, CONFIG)
    assert sorted(path.name for path in (tmp_path / "step-7").iterdir()) == [MANIFEST, WEIGHTS]
    assert set(load_file(tmp_path / "step-7" / WEIGHTS)) == set(state)
    assert json.loads((tmp_path / "step-7" / MANIFEST).read_text())["config"] == CONFIG
    loaded = load_checkpoint(tmp_path / "step-7")
    assert_same(loaded.state, state)
    assert loaded.config == CONFIG


def test_bytes_are_the_same_checkpoint_as_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_state(), CONFIG)
    files = to_files(checkpoint)
    assert list(files) == [WEIGHTS, MANIFEST], "the manifest is the mark of a whole checkpoint and comes last"
    assert to_files(from_files(files)) == files
    save_checkpoint(tmp_path, checkpoint.state, checkpoint.config)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


def test_files_of_two_checkpoints_never_pass_for_one(tmp_path: Path) -> None:
    one, other = (to_files(Checkpoint({"a": torch.full((2,), x)}, CONFIG)) for x in (1.0, 2.0))
    with pytest.raises(ValueError, match=f"s3://b/w: {WEIGHTS} is not the file that {MANIFEST} describes"):
        from_files(one | {MANIFEST: other[MANIFEST]}, "s3://b/w")
    with pytest.raises(ValueError, match=f"lacks {MANIFEST}"):
        from_files({WEIGHTS: one[WEIGHTS]})
    for broken in (b"{", b"[]", b'{"format": "u2label-checkpoint", "version": 1}'):
        with pytest.raises(ValueError, match=MANIFEST):
            from_files(one | {MANIFEST: broken})
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_files_of_a_checkpoint_that_are_something_else_say_what(name: str) -> None:
    whole = to_files(Checkpoint({"a": torch.zeros(2)}, CONFIG))
    for data, what in {
        b"version https://git-lfs.github.com/spec/v1\n": "is a Git LFS pointer and not the weights (43 bytes, ",
        b"<html>403 Forbidden</html>": "is a web page and not the weights (26 bytes, the first are b'<html>403",
        b"": "is empty (0 bytes",
        whole[name][:100]: "(100 bytes, the first are",
    }.items():
        with pytest.raises(ValueError, match=re.escape(name)) as caught:
            from_files(whole | {name: data}, "s3://b/w")
        assert what in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_things": None}, "needs the integers num_things and num_stuff"),
        ({"num_things": 6}, r"says \[6, 3\] thing and stuff classes, the weights \[5, 3\]"),
        ({"lr": float("nan")}, "must be JSON"),
        ({"path": Path("x")}, "must be JSON"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_not_written(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_files(Checkpoint(tiny_state(), {**CONFIG, **change}))


@pytest.mark.parametrize("num_things", [300, 800])
def test_all_names_of_the_original_round_trip_in_every_format(
    tmp_path: Path, shared_dir: Path, num_things: int
) -> None:
    """Small tensors of the original's ranks under all its names; the class predictors have their true rows."""
    entries = json.loads((shared_dir / "specs" / f"state_dict_{num_things}.json").read_text())
    state = {}
    for name, shape, dtype in entries:
        few = [shape[0] if "predictor" in name else min(2, shape[0]), *(min(2, n) for n in shape[1:])] if shape else []
        state[name] = torch.rand(few).mul(99).to(getattr(torch, dtype))
    assert len(state) == 431
    config = {"num_things": num_things, "num_stuff": 27}
    write_detectron2(state, tmp_path / "w.pth")
    save_checkpoint(tmp_path / "ours", read_detectron2(tmp_path / "w.pth"), config)
    write_detectron2(load_checkpoint(tmp_path / "ours").state, tmp_path / "again.pth")
    pkl = write_pkl(tmp_path / "w.pkl", as_arrays(read_detectron2(tmp_path / "again.pth")))
    assert_same(read_detectron2(pkl), state)
    model = Named(state)
    load_detectron2(model, pkl, **config)
    assert set(model.state_dict()) == set(state)
    with pytest.raises(ValueError, match=f"it has {num_things} thing and 27 stuff classes, the model 400 and 27"):
        load_detectron2(model, pkl, num_things=400, num_stuff=27)


def test_the_seeded_weights_of_the_reference_round_trip(tmp_path: Path, shared_dir: Path) -> None:
    """Full shapes, of the heads alone: the rest only takes time."""
    file = shared_dir / "parity" / "panoptic_rcnn" / "weights.py"
    spec = importlib.util.spec_from_file_location("reference_weights", file)
    assert spec is not None
    assert spec.loader is not None
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    entries = json.loads((shared_dir / "specs" / "state_dict_300.json").read_text())
    heads = [entry for entry in entries if "predictor" in entry[0] or entry[0].startswith("sem_seg_head")]
    state = {name: torch.from_numpy(array) for name, array in weights.state_dict(heads).items()}
    assert class_counts(state) == (300, 27)
    save_checkpoint(tmp_path / "ours", state, {"num_things": 300, "num_stuff": 27})
    write_detectron2(load_checkpoint(tmp_path / "ours").state, tmp_path / "w.pth")
    assert_same(read_detectron2(tmp_path / "w.pth"), state)
