"""What an export wrote, counted and told."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.engine.log import stdout_console

REMARKS = {  # fields that are told where they are not 0
    "unreadable": "images that could not be read, left out",
    "lost": "images whose photo is gone, or is not the one that was labelled, left out",
    "hidden": "hidden instances, left out",
    "stuff_left_out": "segments of stuff, left out: the format has no place for them",
    "not_jpg": "images do not end in .jpg, where detectron2's own loaders look for them; register.py does not mind",
    "in_subfolders": "images lie in subfolders, where detectron2's load_sem_seg does not look; register.py does",
    "dotted": "images have names with dots, at the first of which panopticapi's converter to detections cuts them off; "
    "--photos exports copies without",
    "unchecked": "photos could not be looked at for a rotation in their EXIF data",
}
TURNED = "photos have a rotation in their EXIF data"


@dataclass(slots=True)
class Exported:
    """What was written, and what was not.

    files: what lies where, by what it is for. unreadable: rows without a label. hidden: instances without a visible
    pixel, which have no category. renamed: images whose files are not called as they are, with some of them in
    `examples`. photos: copies that were written. turned: photos with a rotation in their EXIF data. lost: images
    without the photo that was labelled. unchecked: photos that could not be looked at.
    """

    files: dict[str, str] = field(default_factory=dict)
    images: int = 0
    unreadable: int = 0
    segments: int = 0
    instances: int = 0
    hidden: int = 0
    stuff_left_out: int = 0
    whole_masks: bool = False
    not_jpg: int = 0
    in_subfolders: int = 0
    dotted: int = 0
    photos: int = 0
    turned: int = 0
    lost: int = 0
    unchecked: int = 0
    renamed: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)


def print_export(exported: Exported) -> None:
    """What was written, and what other readers will not find."""
    from rich.table import Table

    console = stdout_console()
    table = Table("what", "path")
    for role, uri in exported.files.items():
        table.add_row(role, uri)
    console.print(table)
    masks = "whole" if exported.whole_masks else "visible"
    console.print(
        f"{exported.images} images, {exported.segments} segments, {exported.instances} instances as {masks} masks; "
        f"{exported.categories['things']} things, {exported.categories['stuff']} stuff"
    )
    for remark in remarks(exported):
        console.print(remark, soft_wrap=True, highlight=False, markup=False)


def remarks(exported: Exported) -> list[str]:
    """What a user should know of, a sentence each."""
    found = [f"{count} {remark}" for name, remark in REMARKS.items() if (count := getattr(exported, name))]
    if exported.turned:
        what = "their copies are upright" if exported.photos else "labels are of the upright photo: let readers turn it"
        found.append(f"{exported.turned} {TURNED}; {what}")
    if exported.renamed:
        some = ", ".join(f"{image_id!r} has {name + '.*'!r}" for image_id, name in exported.examples.items())
        found.append(f"{exported.renamed} images have files of another name: {some}")
    return found
