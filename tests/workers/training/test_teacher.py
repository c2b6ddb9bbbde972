"""What a teacher adds to the labels of a photo, and that a training with one learns it and goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from model.panoptic.network import Prediction
from model.panoptic.targets import Target
from model.ranks import ALONE, Ranks
from tests.tiny_panoptic import count_passes, scene, tiny_model, tiny_vit
from tests.two_processes import in_two_processes
from workers.training.teacher import TeacherParams, taught
from workers.training.trainer import Batch, Optimisation, PanopticTrainer

HEIGHT, WIDTH = 64, 96
PARAMS = TeacherParams(threshold=0.5, max_iou=0.5)


def masks_of(*boxes: tuple[int, int, int, int]) -> torch.Tensor:
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def target_of(*boxes: tuple[int, int, int, int]) -> Target:
    semantic = torch.ones(HEIGHT, WIDTH, dtype=torch.uint8)
    masks = masks_of(*boxes)
    semantic[masks.any(0)] = 0
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Target(corners, torch.zeros(len(boxes), dtype=torch.int64), masks, semantic)


def seen_of(scores: list[float], *boxes: tuple[int, int, int, int]) -> Prediction:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.arange(1, len(boxes) + 1)
    return Prediction(corners, torch.tensor(scores), classes, masks_of(*boxes), torch.zeros(HEIGHT, WIDTH).byte(), 9)


LABEL = (0, 0, 20, 20)
SEEN = seen_of(
    [0.9, 0.8, 0.7, 0.6, 0.4], (2, 0, 20, 20), (40, 10, 60, 30), (41, 10, 60, 30), (70, 40, 90, 60), (0, 40, 20, 60)
)


def test_what_is_sure_and_no_label_joins() -> None:
    before = target_of(LABEL)
    after, count = taught(before, SEEN, PARAMS)
    assert count == 2  # not the label again, nor one object twice, nor what is unsure
    assert after.boxes.tolist() == [[0, 0, 20, 20], [40, 10, 60, 30], [70, 40, 90, 60]]
    assert after.classes.tolist() == [0, 2, 4] and after.scores is None
    assert torch.equal(after.masks, masks_of(LABEL, (40, 10, 60, 30), (70, 40, 90, 60)))
    assert torch.equal(after.semantic == 0, after.masks.any(0))
    assert len(before.classes) == 1 and (before.semantic == 0).sum() == 400  # samples are used again


def test_the_surest_alone_where_there_are_more_than_wanted() -> None:
    after, count = taught(target_of(), SEEN, replace(PARAMS, most=2))
    assert count == 2 and after.classes.tolist() == [1, 2]
    after, count = taught(target_of(LABEL), SEEN, replace(PARAMS, most=1))  # what is a label takes nobody's place
    assert count == 1 and after.classes.tolist() == [0, 2]


def test_an_overlap_of_the_largest_allowed_joins() -> None:
    half = seen_of([0.9, 0.8], (0, 0, 20, 10), (40, 10, 60, 30))  # an IoU of 0.5 with the label, and of 0
    assert [taught(target_of(LABEL), half, replace(PARAMS, max_iou=most))[1] for most in (0.0, 0.49, 0.5)] == [1, 1, 2]
    twice = seen_of([0.9, 0.8], (0, 0, 20, 10), LABEL)
    assert [taught(target_of(), twice, replace(PARAMS, max_iou=most))[1] for most in (0.49, 0.5)] == [1, 2]


def test_soft_ones_are_wanted_as_surely_as_they_were_seen() -> None:
    soft = replace(PARAMS, soft=True)
    after, _ = taught(target_of(LABEL), SEEN, soft)
    assert after.scores is not None
    torch.testing.assert_close(after.scores, torch.tensor([1.0, 0.8, 0.6]))
    unchanged, count = taught(target_of(LABEL), seen_of([]), soft)
    assert count == 0 and unchanged.scores is not None and unchanged.scores.tolist() == [1.0]


def test_labels_that_have_scores_keep_them() -> None:
    after, _ = taught(replace(target_of(LABEL), scores=torch.tensor([0.3])), SEEN, PARAMS)
    assert after.scores is not None
    torch.testing.assert_close(after.scores, torch.tensor([0.3, 1.0, 1.0]))


def test_a_photo_in_which_nothing_is_sure_stays_as_it_is() -> None:
    before = target_of(LABEL)
    assert taught(before, SEEN, replace(PARAMS, threshold=0.95)) == (before, 0)
    assert taught(before, seen_of([]), PARAMS) == (before, 0)


@pytest.mark.parametrize("changes", [{"threshold": 1.5}, {"start": 1.0}, {"max_iou": 1.0}, {"most": 0}])
def test_values_out_of_range_are_named(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"train\.teacher\.{next(iter(changes))} must be"):
        TeacherParams(**changes)  # type: ignore[arg-type]


# --- in a training ---------------------------------------------------------------------------------------------------

TEACHER = TeacherParams(start=0.5, threshold=0.1, soft=True)
TAUGHT = Optimisation(steps=4, batch_size=2, warmup_steps=0, rate=1e-3, ema=0.5, teacher=TEACHER)


def photo(number: int) -> torch.Tensor:
    return torch.from_numpy(scene(HEIGHT, WIDTH, number)).permute(2, 0, 1).contiguous()


def trainer_of(settings: Optimisation, *, vit: bool = True, ranks: Ranks = ALONE) -> PanopticTrainer:
    torch.manual_seed(0)
    return PanopticTrainer(tiny_vit(linear_probes=True) if vit else tiny_model(), settings, device="cpu", ranks=ranks)


def advance(trainer: PanopticTrainer, steps: int) -> list[dict[str, float]]:
    """Photos of which one has a label and the other none."""
    targets = [target_of(LABEL), target_of()]
    return [
        trainer.advance(Batch([photo(2 * step), photo(2 * step + 1)], targets, ["a", "b"]))
        for step in range(trainer.step, trainer.step + steps)
    ]


def test_a_teacher_begins_in_the_middle_and_what_it_adds_is_learnt() -> None:
    with_teacher, without = advance(trainer_of(TAUGHT), 4), advance(trainer_of(replace(TAUGHT, teacher=None)), 4)
    assert [values["taught"] > 0 for values in with_teacher] == [False, False, True, True]
    assert "taught" not in without[0]
    assert [values["total"] for values in with_teacher[:2]] == [values["total"] for values in without[:2]]
    assert with_teacher[2]["total"] != without[2]["total"]
    for values in with_teacher:
        losses = [value for name, value in values.items() if name.startswith("loss_")]
        assert values["total"] == pytest.approx(sum(losses), rel=1e-5)  # `taught` is no loss


@pytest.mark.parametrize("vit", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_taught_training_goes_on_bit_for_bit(vit: bool, precision: Literal["float32", "bfloat16"]) -> None:
    settings = replace(TAUGHT, precision=precision)
    unbroken, first, second = (trainer_of(settings, vit=vit) for _ in range(3))
    assert advance(unbroken, 4)[-1]["taught"] > 0
    advance(first, 3)
    second.load_state(first.state())
    advance(second, 1)
    for ours, other in ((unbroken.model, second.model), (unbroken.best_model(), second.best_model())):
        for name, values in ours.state_dict().items():
            assert torch.equal(values, other.state_dict()[name]), name
    assert unbroken.model.training  # the teacher alone sees as in a prediction


def test_the_transformer_sees_a_photo_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_passes(monkeypatch)
    advance(trainer_of(TAUGHT), 4)
    assert passes == [2] * 4


def _train(rank: int) -> dict[str, Any]:
    trainer = trainer_of(TAUGHT, vit=False, ranks=Ranks(rank, 2))
    target = target_of(LABEL) if rank else target_of()
    values = [trainer.advance(Batch([photo(2 * step + rank)], [target], [str(rank)], rank)) for step in range(4)]
    return {"values": values, "state": trainer.best_model().state_dict()}


def test_two_processes_have_one_teacher(tmp_path: Path) -> None:
    first, second = in_two_processes(_train, tmp_path)
    assert first["values"] == second["values"]
    assert [values["taught"] > 0 for values in first["values"]] == [False, False, True, True]
    for name, values in first["state"].items():
        assert torch.equal(values, second["state"][name]), name


def test_a_teacher_is_the_averaged_model() -> None:
    with pytest.raises(ValueError, match=r"a teacher is the averaged model: set train\.ema"):
        Optimisation(teacher=TeacherParams())
