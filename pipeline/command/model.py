"""The commands of the panoptic model and of what it learns from: train it, go on by itself, predict, score panoptic
labels and masks."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipeline.command.common import (
    Address,
    AsJson,
    ConfigPath,
    Overrides,
    RunOrConfig,
    answer,
    load,
    stop_on_sigterm,
    user_errors,
)
from pipeline.command.names import WithNames, names_of_run
from pipeline.errors import ConfigError


def add_to(app: typer.Typer, evaluate_app: typer.Typer) -> None:
    """Add the commands to the program's."""
    app.command()(train)
    app.command("self-train")(self_train)
    app.command()(predict)
    evaluate_app.command("panoptic")(evaluate_panoptic)
    evaluate_app.command("masks")(evaluate_masks)


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """Train the panoptic model on the labels of the run, or on human ones. Continues after any interruption."""
    with user_errors(as_json), stop_on_sigterm():
        overrides = [*(overrides or ()), "train.names=true"] if with_names else overrides
        _run_model(config, overrides, address, as_json, rounds=False)


def self_train(
    config: ConfigPath, overrides: Overrides = None, address: Address = None, as_json: AsJson = False
) -> None:
    """Rounds of self-training: sure predictions join the labels, and the model is trained on. Continues likewise."""
    with user_errors(as_json), stop_on_sigterm():
        _run_model(config, overrides, address, as_json, rounds=True)


def _run_model(config: str, overrides: list[str] | None, address: str | None, as_json: bool, *, rounds: bool) -> None:
    from pipeline.operations.run import run
    from pipeline.operations.status import print_status, status_of
    from pipeline.stages.table import define_stages

    loaded = load(config, overrides)
    defined = define_stages(loaded)
    if rounds:
        chosen = [name for name, stage in defined.items() if stage.round or stage.name in ("train", "predictions")]
        if not loaded.self_training.rounds:
            raise ConfigError("self_training.rounds is 0: set how many rounds to train, such as 2")
    else:
        chosen = [name for name in defined if name == "train"]
        if not chosen:
            raise ConfigError("train.steps is 0: set how long to train, such as 90000")
    status = status_of(run(loaded, stages=tuple(chosen), address=address).run)
    answer(status, as_json, lambda: print_status(status))


def predict(
    inputs: Annotated[
        list[str], typer.Option("--input", help="Photo, folder, glob, tar or Parquet, local or s3://; repeat for more.")
    ],
    weights: Annotated[str, typer.Option(help="Checkpoint folder, or .pth or .pkl of detectron2 or U2Seg.")],
    output: Annotated[str, typer.Option(help="Folder for overlays and COCO panoptic files.")],
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Photos held at a time.")] = 1,
    short: Annotated[
        int | None, typer.Option(min=32, help="Short side in pixels; by default that of the training, or 800.")
    ] = None,
    max_side: Annotated[
        int | None, typer.Option(min=32, help="Largest long side in pixels; by default that of the training, or 1333.")
    ] = None,
    score: Annotated[float | None, typer.Option(help="Least score of an instance; 0.5 by default.")] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Compute in bfloat16.")] = False,
    backbone_weights: Annotated[
        str | None, typer.Option(help="Of the frozen transformer of a model that has one: a file, official or index.")
    ] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Read a public bucket without credentials.")] = False,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """Panoptic predictions of photos: overlays with cluster ids, and a COCO panoptic JSON with its PNGs."""
    with user_errors(as_json), stop_on_sigterm():
        from pipeline.predict import run
        from pipeline.stages.named import names_of_checkpoint

        table = sys.stderr if as_json else sys.stdout
        run.print_header(table)
        summary = run.predict_photos(
            weights,
            inputs,
            output,
            device=device,
            batch_size=batch_size,
            short=short,
            max_side=max_side,
            score=score,
            amp=amp,
            backbone_weights=backbone_weights,
            anonymous=anonymous,
            classes=names_of_checkpoint(weights) if with_names else None,
            on_photo=lambda result: run.print_photo(result, table),
        )
        answer(summary, as_json, lambda: run.print_summary(summary))
    if summary.failed:
        raise typer.Exit(1)


def evaluate_panoptic(
    predictions: Annotated[
        str, typer.Argument(metavar="PREDICTIONS", help="Run folder or config, folder of parts, or COCO panoptic JSON.")
    ],
    truth: Annotated[str, typer.Argument(metavar="TRUTH", help="COCO panoptic JSON, or labels as PREDICTIONS.")],
    output: Annotated[str | None, typer.Option(help="Folder for the result; by default evaluation in the run.")] = None,
    stage: Annotated[
        str, typer.Option(help="Of a run: panoptic, the labels, or predictions, what the model sees.")
    ] = "panoptic",
    prediction_pngs: Annotated[str | None, typer.Option(help="PNGs of a JSON of predictions.")] = None,
    truth_pngs: Annotated[str | None, typer.Option(help="PNGs of the truth; by default beside its JSON.")] = None,
    instances: Annotated[str | None, typer.Option(help="COCO instances JSON of the truth, for AP.")] = None,
    mode: Annotated[
        str, typer.Option(help="Clusters to classes: hungarian (one to one), vote (as published) or identity.")
    ] = "hungarian",
    leftover: Annotated[str, typer.Option(help="Clusters without a class: error, or argmax.")] = "error",
    void: Annotated[
        list[str] | None,
        typer.Option(
            help="A category of the truth (name or id) or a value of its PNGs that is not scored, beside 0; repeat for "
            "more, or none. By default what is called void, unlabeled, ignore, and 255 or white without a segment."
        ),
    ] = None,
    supercategories: Annotated[bool, typer.Option("--supercategories", help="Score stuff by supercategory.")] = False,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """Panoptic quality, AP, AR and mIoU against human labels, with the mapping of all and of the other half."""
    with user_errors(as_json):
        from pipeline.evaluate.score import evaluate_run, print_scores
        from pipeline.stages.parts import find_parts
        from pipeline.store import storage

        labels = predictions if predictions.lower().endswith(".json") else find_parts(predictions, stage)
        if output is None:
            output = storage.join(_run_of(labels, stage), "evaluation")
        found = evaluate_run(
            labels,
            truth,
            output=output,
            prediction_pngs=prediction_pngs,
            truth_pngs=truth_pngs,
            instances=instances,
            mode=mode,  # type: ignore[arg-type]
            leftover=leftover,  # type: ignore[arg-type]
            stuff_by_supercategory=supercategories,
            void=void,
            names=names_of_run(predictions, wanted=with_names),
        )
        answer(found, as_json, lambda: print_scores(found), files=found["files"])


def evaluate_masks(
    run: RunOrConfig,
    truth: Annotated[str, typer.Argument(metavar="TRUTH", help="COCO instances JSON, or COCO panoptic JSON.")],
    stage: Annotated[
        str, typer.Option(help="instances, or one of panoptic labels, such as panoptic or predictions.")
    ] = "instances",
    truth_pngs: Annotated[
        str | None, typer.Option(help="PNGs of a panoptic truth; by default beside its JSON.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the result; by default evaluation in the run.")] = None,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """Masks against human ones with the classes ignored: AP and AR by size, purity of the clusters, masks of stuff."""
    with user_errors(as_json):
        from pipeline.evaluate import mask_scores as evaluation

        found = evaluation.evaluate_masks(
            run, truth, stage=stage, truth_pngs=truth_pngs, output=output, named=with_names
        )
        answer(found, as_json, lambda: evaluation.print_scores(found), files=found["files"])


def _run_of(labels: str | list[str], stage: str) -> str:
    """The run whose parts these are, `<run>/<stage>/<fingerprint>/part-00000.parquet`."""
    names = [] if isinstance(labels, str) else labels[0].rsplit("/", 3)
    if len(names) != 4 or names[1] != stage:
        raise ConfigError("--output: name a folder for the result, as the predictions are no run")
    return names[0]
