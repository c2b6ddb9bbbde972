"""The commands that write labels in the formats of other programs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.command.common import AsJson, RunOrConfig, answer, user_errors
from pipeline.command.names import WithNames, classes_of_run

if TYPE_CHECKING:
    from pipeline.export.summary import Exported

OutputFolder = Annotated[str, typer.Option("--output", help="Folder for the files, new or of an earlier export.")]
Name = Annotated[str, typer.Option(help="Of the set: a part of the files' names.")]
WholeMasks = Annotated[bool, typer.Option(help="Whole masks of the instances, or what is visible.")]
CopyPhotos = Annotated[bool, typer.Option("--photos/--no-photos", help="Write the photos, too, upright.")]
CopyIfNoFiles = Annotated[
    bool | None,
    typer.Option(
        "--photos/--no-photos",
        help="Write the photos, too, upright; by default those that are no files of their own, but in tars or Parquet.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program's."""
    export_app = typer.Typer(help="Labels in the formats of other programs.", no_args_is_help=True)
    for command in (coco, yolo, hf, webdataset, labelstudio, cityscapes):
        export_app.command()(command)
    app.add_typer(export_app, name="export")


def coco(
    run: RunOrConfig,
    output: OutputFolder,
    name: Name = "train",
    whole_masks: WholeMasks = True,
    photos: CopyIfNoFiles = None,
    shards: Annotated[int, typer.Option(min=1, help="JSON files of each kind.")] = 1,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """COCO panoptic, instances and stuff files, as detectron2, Mask2Former and U2Seg read them."""
    from pipeline.export.coco import export_coco

    write = partial(export_coco, output=output, name=name, photos=photos, shards=shards)
    _export(write, run, whole_masks, with_names, as_json)


def yolo(
    run: RunOrConfig,
    output: OutputFolder,
    name: Name = "train",
    whole_masks: WholeMasks = True,
    photos: CopyPhotos = True,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """Things as Ultralytics reads them: photos, a text file of polygons for each, and a YAML file."""
    from pipeline.export.yolo import export_yolo

    write = partial(export_yolo, output=output, name=name, photos=photos)
    _export(write, run, whole_masks, with_names, as_json)


def hf(
    run: RunOrConfig,
    output: OutputFolder,
    name: Name = "train",
    whole_masks: WholeMasks = True,
    photos: CopyPhotos = True,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """A data set of Hugging Face datasets: Parquet with photos, id maps and segments, and its card."""
    from pipeline.export.hf import export_hf

    write = partial(export_hf, output=output, name=name, photos=photos)
    _export(write, run, whole_masks, with_names, as_json)


def webdataset(
    run: RunOrConfig,
    output: OutputFolder,
    name: Name = "train",
    whole_masks: WholeMasks = True,
    photos: CopyPhotos = True,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """Tar shards for webdataset: a photo, its id map and its segments a sample."""
    from pipeline.export.webdataset import export_webdataset

    write = partial(export_webdataset, output=output, name=name, photos=photos)
    _export(write, run, whole_masks, with_names, as_json)


def labelstudio(
    run: RunOrConfig,
    output: OutputFolder,
    name: Name = "train",
    whole_masks: WholeMasks = True,
    photos: CopyIfNoFiles = None,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """Tasks of Label Studio with the labels as predictions; photos stay where they are."""
    from pipeline.export.labelstudio import export_labelstudio

    write = partial(export_labelstudio, output=output, name=name, photos=photos)
    _export(write, run, whole_masks, with_names, as_json)


def cityscapes(
    run: RunOrConfig,
    output: OutputFolder,
    name: Name = "train",
    photos: CopyPhotos = True,
    with_names: WithNames = False,
    as_json: AsJson = False,
) -> None:
    """gtFine and leftImg8bit as Cityscapes has them, and the classes for its scripts."""
    from pipeline.export.cityscapes import export_cityscapes

    write = partial(export_cityscapes, output=output, name=name, photos=photos)
    _export(write, run, None, with_names, as_json)


def _export(
    write: Callable[..., Exported], run: str, whole_masks: bool | None, with_names: bool, as_json: bool
) -> None:
    """Write the labels of a run and say what was written; `whole_masks` is None for a format that has none."""
    with user_errors(as_json):
        from pipeline.export.summary import print_export

        masks = () if whole_masks is None else (run if whole_masks else None,)
        exported = write(run, *masks, classes=classes_of_run(run, wanted=with_names))
        answer(exported, as_json, lambda: print_export(exported))
