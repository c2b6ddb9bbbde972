"""The panoptic model of a run as the report shows it: how it was trained, and what it sees beside its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.engine.stage import Stage
from pipeline.report import charts, rows
from pipeline.report.fits import lines, read_record
from pipeline.report.pictures import Drawer, Picture
from pipeline.stages.base import Run, round_of, stage_of_round

PICTURES = 12
PARTS = {"RPN": "loss_rpn", "boxes": ("loss_cls", "loss_box"), "masks": "loss_mask", "semantic": "loss_sem"}


@dataclass(frozen=True, slots=True)
class Training:
    """A finished training. `number` is its round of self-training, 0 for the first; `images_per_s` of its end."""

    number: int
    steps: int
    images: int
    loss: float
    images_per_s: float
    charts: list[charts.Chart]


@dataclass(frozen=True, slots=True)
class Sight:
    """A photo whose labels, and what the model sees, are data URIs."""

    labels: Picture
    seen: Picture


@dataclass(frozen=True, slots=True)
class Model:
    """`number` is the round of the predictions that are shown; `categories` are the names of theirs."""

    trainings: list[Training]
    number: int
    sights: list[Sight]
    categories: Mapping[int, str]


def describe_model(run: Run, places: Sequence[tuple[int, int]], photos: Sequence[Picture]) -> Model | None:
    """The section of a run that trains a model; None for one that does not. `photos` are those drawn at `places`.

    ConfigError when an artifact is not what `u2label run` writes.
    """
    trained = [stage for name, stage in run.stages.items() if run.definitions[name].name == "train"]
    if not trained:
        return None
    finished = [training for stage in trained if (training := _read_training(stage)) is not None]
    number, stage = _predictions(run)
    if stage is None:
        return Model(finished, number, [], {})
    done = run.done[stage.name]
    labelled = dict(zip(places, photos, strict=True))
    shown = [place for place in places if place[0] in done and labelled[place].error is None]
    shown = shown[:: max(1, -(-len(shown) // PICTURES))]
    seen, _ = Drawer(run.index, run.things, stage, done, run.limits).draw(shown, [])
    sights = [Sight(labelled[place], picture) for place, picture in zip(shown, seen, strict=True)]
    return Model(finished, number, sights, rows.category_names(stage, min(done)))


def _predictions(run: Run) -> tuple[int, Stage | None]:
    """The last round with predictions, and their stage."""
    rounds = [each.round for name, each in run.definitions.items() if each.name == "predictions" and run.done[name]]
    number = max(rounds, default=0)
    return number, run.stages[stage_of_round("predictions", number)] if rounds else None


def _read_training(stage: Stage) -> Training | None:
    record = read_record(stage, "settings", "images", "history")
    if record is None or not record["history"]:
        return None
    history = record["history"]
    steps = [int(entry["step"]) for entry in history]
    parts = {
        part: [sum(value for key, value in entry.items() if key.startswith(keys)) for entry in history]
        for part, keys in PARTS.items()
    }
    drawn = [
        *lines("Loss", steps, {"": [entry["total"] for entry in history]}, "step", "loss"),
        *lines("Loss by head", steps, parts, "step", "loss"),
    ]
    if "taught" in history[0]:
        drawn += lines("Taught", steps, {"": [entry["taught"] for entry in history]}, "step", "instances a photo")
    last = history[-1]
    return Training(round_of(stage.name), steps[-1], int(record["images"]), last["total"], last["images_per_s"], drawn)
