"""The fit of STEGO: the same weights for any number of workers and through interruptions; what it refuses."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model.ranks import Ranks
from model.stego import StegoHead
from model.stego_terms import PRESETS
from pipeline.engine.fit_progress import read_progress, watching
from pipeline.errors import ConfigError
from pipeline.semantics import stego as fit_module
from pipeline.semantics import stego_features
from pipeline.semantics.stego import StegoArtifact, StegoSettings, fit_stego, load_stego
from pipeline.semantics.stego_features import open_features, survey_features
from pipeline.semantics.stego_train import Trainer, draw_step
from pipeline.store import storage
from workers.records import FEATURES_SCHEMA

DIM, GRID, GROUPS, IMAGES = 16, 5, 6, 40
SETTINGS = StegoSettings(
    classes=GROUPS, dim=8, points=5, batch_size=8, steps=200, head_rate=5e-3, probe_rate=0.02, histogram_every=100
)
TEACHER = "test random:0"


def feature_maps(count: int, *, crops: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(count, crops, DIM, GRID, GRID) float16 around GROUPS directions, and the group of each patch."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, GROUPS, (count, crops, GRID, GRID))
    feats = 3 * np.eye(DIM)[:GROUPS][groups] + 0.4 * rng.standard_normal((*groups.shape, DIM))
    return np.moveaxis(feats, -1, 2).astype(np.float16), groups


def write_parts(folder: str | Path, feats: Sequence[np.ndarray | None], per_part: int = 15) -> list[str]:
    """Feature parts of these images; None is an image that could not be read."""
    rows = [
        {
            "image_id": f"{i:03d}.jpg",
            "status": "missing" if each is None else "ok",
            "error": "gone" if each is None else None,
            "shape": None if each is None else each.shape,
            "features": None if each is None else each.astype("<f2").tobytes(),
        }
        for i, each in enumerate(feats)
    ]
    uris = []
    for number, start in enumerate(range(0, len(rows), per_part)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows[start : start + per_part], schema=FEATURES_SCHEMA), sink)
        uris.append(storage.join(str(folder), f"part-{number:05d}.parquet"))
        storage.write_bytes(uris[-1], sink.getvalue().to_pybytes())
    return uris


def fit(parts: list[str], out: str | Path, settings: StegoSettings = SETTINGS, **options: Any) -> StegoArtifact:
    options = {"teacher": TEACHER, "num_workers": 0, "device": "cpu", "checkpoint_every": 40} | options
    scratch = options.pop("scratch", None) or str(Path(parts[0]).parent / "scratch")
    return fit_stego(parts, str(out), settings, scratch=scratch, **options)


def weights(artifact: StegoArtifact) -> torch.Tensor:
    return torch.cat([p.flatten() for p in (*artifact.head.parameters(), *artifact.probe.parameters())])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three parts of 42 images, of which two could not be read."""
    feats, _ = feature_maps(IMAGES)
    return write_parts(tmp_path_factory.mktemp("parts"), [None, *feats[:20], None, *feats[20:]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact")


@pytest.fixture(scope="module")
def unbroken(parts: list[str], folder: Path) -> StegoArtifact:
    """The fit in this process, that the others must equal; its folder is `folder`."""
    return fit(parts, folder)


def test_the_fit_finds_the_groups_that_the_features_have(unbroken: StegoArtifact) -> None:
    feats, groups = feature_maps(30, seed=1)
    code = unbroken.head(torch.from_numpy(feats[:, 0].astype(np.float32)))
    labels = unbroken.probe.log_probs(code).argmax(1).numpy()
    counts = np.zeros((GROUPS, GROUPS), int)
    np.add.at(counts, (labels.ravel(), groups.ravel()), 1)
    assert counts.max(1).sum() / counts.sum() > 0.95
    assert len(set(counts.argmax(1))) == GROUPS


def test_the_artifact_says_what_was_fitted_and_how_it_went(unbroken: StegoArtifact, folder: Path) -> None:
    record = unbroken.record
    assert (record["teacher"], record["channels"], record["dim"], record["classes"]) == (TEACHER, DIM, 8, GROUPS)
    assert (record["images"], record["crops"], record["grid"], record["steps"]) == (IMAGES, 1, [GRID, GRID], 200)
    assert record["settings"]["terms"]["negative_weight"] == 0.63
    assert [entry["step"] for entry in record["history"]] == [1, 50, 100, 150, 200]
    assert record["history"][-1]["cluster"] < record["history"][0]["cluster"] - 0.2
    last = record["history"][-1]
    terms = PRESETS["cocostuff27_vits"]
    total = (
        terms.intra_weight * last["intra"]
        + terms.inter_weight * last["inter"]
        + terms.negative_weight * last["negative"]
    )
    assert last["correspondence"] == pytest.approx(total, rel=1e-5)
    assert last["classes_used"] == GROUPS
    assert [counts["step"] for counts in record["histograms"]] == [1, 100, 200]
    pairs = 8 * 25 * 25
    for counts in record["histograms"]:
        assert [len(counts[kind]) for kind in ("intra", "inter", "negative")] == [50] * 3
        assert [sum(counts[kind]) for kind in ("intra", "inter", "negative")] == [pairs, pairs, 5 * pairs]
        assert counts["intra"][-1] >= 8 * 25  # each point with itself
    assert sorted(path.name for path in folder.iterdir()) == ["artifact.json", "head.safetensors", "tensorboard"]


def test_tensorboard_reads_losses_and_histograms(unbroken: StegoArtifact, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    negatives = [(event.step, event.value) for event in events.Scalars("negative")]
    assert negatives == [(e["step"], pytest.approx(e["negative"], rel=1e-5)) for e in unbroken.record["history"]]
    histograms = events.Histograms("cosine/inter")
    assert [event.step for event in histograms] == [1, 100, 200]
    assert histograms[-1].histogram_value.num == 8 * 25 * 25


def test_the_artifact_reads_back_and_is_not_computed_again(
    unbroken: StegoArtifact, folder: Path, parts: list[str]
) -> None:
    seen: list[Any] = []
    again = fit(parts, folder, on_log=seen.append)
    assert seen == []
    assert torch.equal(weights(again), weights(unbroken))
    assert not again.head.training
    assert not (Path(parts[0]).parent / "scratch").is_dir() or not list((Path(parts[0]).parent / "scratch").iterdir())


def test_an_artifact_of_another_teacher_or_size_is_refused(unbroken: StegoArtifact, folder: Path) -> None:
    for wanted, message in (
        ({"teacher": "dino_vits8 random:0"}, "has teacher 'test random:0', 'dino_vits8 random:0' is needed"),
        ({"channels": 384}, "has channels 16, 384 is needed"),
        ({"classes": 27}, "has classes 6, 27 is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            load_stego(str(folder), **wanted)
    with pytest.raises(FileNotFoundError):
        load_stego(str(folder / "nothing"))


def test_a_fit_stopped_at_step_150_goes_on_to_the_same_bits(
    unbroken: StegoArtifact, parts: list[str], tmp_path: Path
) -> None:
    def stop(entry: dict[str, float]) -> None:
        if entry["step"] == 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(parts, tmp_path, on_log=stop)
    left = ["checkpoint.pt", "neighbours.npz", "progress.json", "tensorboard"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    progress = read_progress(str(tmp_path))
    assert progress is not None and (progress["step"], progress["steps"]) == (150, 200)
    with pytest.raises(ValueError, match=r"checkpoint.pt is of a fit with other settings or features; delete it"):
        fit(parts, tmp_path, replace(SETTINGS, seed=1))

    steps: list[float] = []
    resumed = fit(parts, tmp_path, on_log=lambda entry: steps.append(entry["step"]))
    assert steps == [150, 200]  # from the checkpoint of step 120
    assert torch.equal(weights(resumed), weights(unbroken))
    assert resumed.record == unbroken.record

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("intra")] == [1, 50, 100, 150, 200]


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_give_the_weights_of_one(
    ray_session: None, unbroken: StegoArtifact, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, real = tmp_path / "killed", fit_module.train_worker

    def fragile(job: Any, ranks: Ranks, device: torch.device) -> None:
        from pipeline.semantics.stego_train import Trainer

        advance = Trainer.advance

        def step(self: Any, *arguments: Any) -> Any:
            if self.step == 130 and ranks.rank == 1 and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return advance(self, *arguments)

        Trainer.advance = step  # type: ignore[method-assign]
        real(job, ranks, device)

    monkeypatch.setattr(fit_module, "train_worker", fragile)
    killed = fit(parts, tmp_path / "out", num_workers=2)
    assert marker.exists()
    assert (weights(killed) - weights(unbroken)).abs().max() < 1e-4
    assert [entry["step"] for entry in killed.record["history"]] == [1, 50, 100, 150, 200]
    for ours, alone in zip(killed.record["history"], unbroken.record["history"], strict=True):
        assert ours == pytest.approx(alone, rel=1e-3, abs=1e-5)


def test_one_worker_gives_the_bits_of_this_process(
    ray_session: None, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "watching", functools.partial(watching, every_s=0.01))
    short, seen = replace(SETTINGS, steps=20), list[Any]()
    alone, one = (fit(parts, tmp_path / str(n), short, num_workers=n, on_log=seen.append) for n in (0, 1))
    assert [entry["step"] for entry in seen[:2]] == [1, 20]
    assert seen[-1] == pytest.approx({**one.record["history"][-1], "steps": 20})  # what the worker wrote
    assert not (tmp_path / "1" / "progress.json").exists()
    assert (weights(one) - weights(alone)).abs().max() < 1e-6  # the number of threads may differ
    assert one.record["histograms"][0] == alone.record["histograms"][0]


def test_parts_and_artifact_in_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    parts = write_parts(storage.join(s3_bucket, "features"), list(feature_maps(20)[0]))
    out = storage.join(s3_bucket, "stego")
    fit(parts, out, replace(SETTINGS, steps=3), scratch=str(tmp_path))
    assert load_stego(out, teacher=TEACHER).record["images"] == 20
    assert set(storage.list_folder(out)) == {"artifact.json", "head.safetensors"}
    assert len(storage.list_folder(storage.join(out, "tensorboard"))) == 1
    assert list(tmp_path.iterdir()) == []


def test_draws_are_a_function_of_seed_and_step() -> None:
    head, neighbours = StegoHead(DIM, 4), np.arange(21 * 3, dtype=np.int32).reshape(21, 3)
    first, again = (draw_step(SETTINGS, 5, neighbours, head) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = draw_step(replace(SETTINGS, seed=1), 5, neighbours, head)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    epoch = torch.cat([draw_step(SETTINGS, step, neighbours, head).items for step in (0, 1)])
    assert len(set(epoch.tolist())) == 16  # of 21: the five left over are in other epochs
    assert (first.positives // 3 == first.items).all()
    assert first.neg_perms.shape == (5, 8)
    assert first.masks.shape == (3, 8, DIM)
    assert first.coords1.abs().max() <= 1
    chosen = {int(p) for step in range(60) for p in draw_step(SETTINGS, step, neighbours, head).positives}
    assert chosen == set(range(21 * 3))


def test_features_are_unpacked_in_the_order_of_parts_and_crops(tmp_path: Path) -> None:
    feats, _ = feature_maps(7, crops=5)
    parts = write_parts(tmp_path / "parts", [*feats[:3], None, *feats[3:]], per_part=3)
    features = survey_features(parts, max_images=None, seed=0)
    assert (features.images, features.items, features.shape) == (7, 35, (5, DIM, GRID, GRID))
    assert [rows.tolist() for rows in features.rows] == [[0, 1, 2], [1, 2], [0, 1]]
    assert features.parts == tuple(parts)
    mapped = open_features(features, tmp_path / "features.npy")
    assert (mapped == feats.reshape(35, DIM, GRID, GRID)).all()

    some = survey_features(parts, max_images=4, seed=3)
    assert some.images == 4
    assert some.digest == survey_features(parts, max_images=4, seed=3).digest != features.digest
    chosen = [feats[[0, 1, 2, None, 3, 4, 5, 6][3 * k + r]] for k, rows in enumerate(some.rows) for r in rows]
    assert (open_features(some, tmp_path / "some.npy") == np.concatenate(chosen)).all()
    assert survey_features(parts, max_images=4, seed=4).digest != some.digest


def test_parts_without_features_are_not_read_again(tmp_path: Path) -> None:
    feats, _ = feature_maps(2)
    parts = write_parts(tmp_path / "parts", [None, None, feats[0], None, None, None, None, feats[1]], per_part=2)
    features = survey_features(parts, max_images=None, seed=0)
    assert features.parts == (parts[1], parts[3])
    assert [rows.tolist() for rows in features.rows] == [[0], [1]]
    assert (open_features(features, tmp_path / "features.npy") == feats[:, 0]).all()


def test_the_number_of_threads_changes_nothing_but_rounding() -> None:
    feats = np.random.default_rng(0).standard_normal((20, 96, 28, 28)).astype(np.float16)
    neighbours = np.stack([np.roll(np.arange(20), -shift) for shift in range(1, 4)], axis=1).astype(np.int32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        trainer = Trainer(replace(SETTINGS, points=11, dim=70), 96, torch.device("cpu"))
        for _ in range(3):
            trainer.advance(feats, neighbours, Ranks())
        found.append(
            torch.cat([p.detach().flatten() for p in (*trainer.head.parameters(), *trainer.probe.parameters())])
        )
    torch.set_num_threads(before)
    assert (found[0] - found[1]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (1, {}, r"semantics.neighbours is 7, which needs at least 2 images and 8 .*of 1 image; lower it, or give"),
        (7, {}, r"semantics.neighbours is 7, .* 8 images or crops, but the features are of 7 images"),
        (9, {"batch_size": 10}, r"semantics.batch_size is 10, but the features are of 9 images"),
        (0, {}, r"the 0 feature parts hold no readable image"),
    ],
)
def test_too_few_images_are_refused_with_the_numbers(
    tmp_path: Path, images: int, options: dict[str, Any], message: str
) -> None:
    parts = write_parts(tmp_path / "parts", list(feature_maps(images)[0]))
    with pytest.raises(ValueError, match=message):
        fit_stego(parts, str(tmp_path), replace(SETTINGS, **options), teacher=TEACHER, num_workers=0, device="cpu")


def test_one_image_of_five_crops_is_refused_however_few_neighbours(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts", list(feature_maps(1, crops=5)[0]))
    with pytest.raises(ValueError, match=r"needs at least 2 images .* of 1 image of 5 crops"):
        fit(parts, tmp_path / "out", replace(SETTINGS, neighbours=2, batch_size=4))


def test_more_classes_than_different_features_are_refused(tmp_path: Path) -> None:
    constant = write_parts(tmp_path / "constant", [np.full((1, DIM, GRID, GRID), v, np.float16) for v in range(12)])
    with pytest.raises(ValueError, match=r"semantics.classes is 27, but the 12 images .* only 12 different patch"):
        fit(constant, tmp_path / "out", replace(SETTINGS, classes=27))
    done = fit(constant, tmp_path / "out", replace(SETTINGS, classes=12, steps=5))
    assert torch.isfinite(weights(done)).all()


def test_bad_parts_are_refused_by_name(tmp_path: Path) -> None:
    feats, _ = feature_maps(12)
    feats[7, 0, 3, 2, 1] = np.inf
    parts = write_parts(tmp_path / "inf", list(feats), per_part=5)
    with pytest.raises(ValueError, match=r"part-00001.parquet, 007.jpg: the features are not all finite"):
        fit(parts, tmp_path / "out", scratch=str(tmp_path / "scratch"))
    assert list((tmp_path / "scratch").iterdir()) == []
    mixed = write_parts(tmp_path / "mixed", [feats[0], feats[1][..., :4]])
    with pytest.raises(ValueError, match=r"features of unlike sizes \[\(1, 16, 5, 4\), \(1, 16, 5, 5\)\]"):
        fit(mixed, tmp_path / "out")
    (tmp_path / "cut.parquet").write_bytes(Path(parts[0]).read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut.parquet: cannot read features"):
        fit([str(tmp_path / "cut.parquet")], tmp_path / "out")


def test_a_full_disk_is_refused_before_anything_is_written(
    parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(stego_features.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"features of 40 images need 0.0 GiB in .*lower semantics.max_images"):
        fit(parts, tmp_path / "out", scratch=str(tmp_path / "scratch"))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_the_workers_cannot_do_is_refused_with_the_numbers(
    ray_session: None, parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="batch_size 8 cannot be shared equally by 3 workers"):
        fit(parts, tmp_path, num_workers=3)
    with pytest.raises(ConfigError, match="2 workers of a training of 3 CPU need 6, the Ray cluster has 4"):
        fit(parts, tmp_path, num_workers=2, cpus_per_worker=3)
    with pytest.raises(ConfigError, match="2 workers of a training of 1 GPU need 2, the Ray cluster has 0"):
        fit(parts, tmp_path, num_workers=2, device="cuda")
    with pytest.raises(ValueError, match=r"0 \(in this process\) or more, got -1"):
        fit(parts, tmp_path, num_workers=-1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": 0}, "semantics.classes must be at least 1, got 0"),
        ({"classes": 256}, "semantics.classes must be at most 255, got 256"),
        ({"batch_size": 1}, "semantics.batch_size must be at least 2, got 1"),
        ({"max_images": 1}, "semantics.max_images must be at least 2, got 1"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StegoSettings(**values)
