"""`u2label export webdataset`: tar shards, a sample a photo, as the library webdataset streams them.

    NAME/NAME-000000.tar    a tar a part, with KEY.jpg (or .png, ...), KEY.panoptic.png and KEY.json for every photo
    NAME.json               written last: the shards with their numbers of samples, and the categories

KEY is the photo's image_id without its ending, and has no dots, behind the first of which webdataset looks for endings.
KEY.panoptic.png has the ids, R + 256 G + 65536 B, 0 = void, and KEY.json what they are: `segments_info` as of COCO
panoptic, for things with the mask (`rle`, COCO's counts, whole or visible), and the `keys` of a manifest.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.export.extras import load_extra
from pipeline.export.folder import Folder
from pipeline.export.labels import Labelled, Labels
from pipeline.export.photos import Photo, each, photos_to_write
from pipeline.export.summary import Exported
from pipeline.sources.classes import Classes
from pipeline.stages.parts import Inputs
from pipeline.store import storage
from workers.masks import encode_rle


def export_webdataset(
    parts: Inputs,
    instances_parts: Inputs | None = None,
    *,
    output: str,
    name: str = "train",
    classes: Classes | None = None,
    photos: bool | None = None,
) -> Exported:
    """Write the labels of panoptic parts, with the photos unless `photos` is False, as tars to the folder `output`.

    The same labels give the same bytes. ConfigError: as of `Labels` and `Folder`, or webdataset is not installed.
    """
    library = load_extra("webdataset", package="webdataset", format="webdataset")
    labels = Labels(parts, instances_parts, classes=classes)
    copies = photos_to_write(labels.run, photos, usual=True)
    labels.name_files(dots=False)
    folder = Folder(output, "webdataset", name, [name, f"{name}.json"])
    shards = []
    with folder.writing():
        for number in range(len(labels.parts)):
            shard, before = f"{name}/{name}-{number:06d}.tar", labels.exported.images
            with (
                storage.open_output(folder.uri(*shard.split("/"))) as stream,
                library.TarWriter(stream, encoder=False, mtime=0) as tar,
            ):
                for sample in each(labels, number, copies, _sample):
                    tar.write(sample)
            shards.append({"url": shard, "nsamples": labels.exported.images - before})
        about = {"shards": shards, "categories": labels.classes.as_coco()}
        storage.write_bytes(folder.uri(f"{name}.json"), json.dumps(about, indent=1).encode())
        return labels.finish(folder, {"shards": f"{name}/{name}-*.tar", "categories": f"{name}.json"})


def _sample(label: Labelled, photo: Photo | None) -> dict[str, Any]:
    height, width = label.size
    segments = [
        info | ({"rle": encode_rle(label.masks[info["id"]])} if info["id"] in label.masks else {})
        for info in label.segments()
    ]
    about = {"image_id": label.image_id, "height": height, "width": width, "segments_info": segments}
    about |= {"keys": dict(label.keys)} if label.keys else {}
    sample = {"__key__": label.name, "panoptic.png": label.png, "json": json.dumps(about).encode()}
    return sample | ({} if photo is None else {photo.ending.removeprefix("."): photo.data})
