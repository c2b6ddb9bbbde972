"""Human labels to score against: a folder with one PNG of class ids an image.

A label belongs to the image whose path it has, but for the ending (`a/b.png` to `a/b.jpg`), or else to the image of
the same name in any folder, if there is only one such label. Pixel values are class ids; a palette PNG is read as its
indices, never as colours. What a value means is a `ClassTable`; several values of one name are one class, which is
also how COCO-Stuff's 182 fine labels become 27.
"""

from __future__ import annotations

import json
import posixpath
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.sources.names import comparable
from pipeline.store import storage
from workers.decode import BAD_DATA
from workers.masks import open_png

IGNORED = -1  # class of a pixel that is not scored
_UNKNOWN = -2
_VALUES = 256  # of an 8-bit pixel
_GREY_STEP = {2: 85, 4: 17}  # what Pillow multiplies greys of so few bits with, to span 0..255

COCO_STUFF_27 = "coco-stuff-27"
# Pixel values of COCO-Stuff's `stuffthingmaps` (label id - 1) by supercategory, in the order of IIC, PiCIE and STEGO.
# Stuff is grouped as in Caesar et al. (arXiv 1612.03716); food and furniture are both things and stuff.
COCO_STUFF_GROUPS: dict[str, tuple[int, ...]] = {
    "electronic": tuple(range(71, 77)),
    "appliance": tuple(range(77, 83)),
    "food": tuple(range(51, 61)),
    "furniture": tuple(range(61, 71)),
    "indoor": tuple(range(83, 91)),
    "kitchen": tuple(range(43, 51)),
    "accessory": tuple(range(25, 33)),
    "animal": tuple(range(15, 25)),
    "outdoor": tuple(range(9, 15)),
    "person": (0,),
    "sports": tuple(range(33, 43)),
    "vehicle": tuple(range(1, 9)),
    "ceiling": (101, 102),
    "floor": (100, *range(113, 118)),
    "food-stuff": (120, 121, 152, 169),
    "furniture-stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw-material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": tuple(range(170, 177)),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}


@dataclass(frozen=True, slots=True)
class ClassTable:
    """What pixel values mean: `lookup` (256,) int16 holds a class index into `names`, or `IGNORED`.

    `named` is False when nobody named the classes, so that every value but the ignored ones is taken for a class.
    """

    names: tuple[str, ...]
    lookup: NDArray[np.int16]
    ignore: tuple[int, ...]
    named: bool


def class_table(names: Sequence[str] | Mapping[int, str] | None, ignore: Collection[int] = (255,)) -> ClassTable:
    """The classes of names by value (a sequence starts at 0), or of all values when there are none.

    Equal names are one class; an ignored value is none, whether it has a name or not. ConfigError for values outside
    0..255 and when no class is left.
    """
    if names is None:
        table = {value: str(value) for value in range(_VALUES)}
    else:
        table = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    if bad := sorted(value for value in {*table, *ignore} if not 0 <= value < _VALUES):
        raise ConfigError(f"--names and --ignore: pixel values lie in 0..255, got {bad[:5]}")
    table = {value: name for value, name in table.items() if value not in ignore}
    if not table:
        raise ConfigError(f"--ignore {sorted(ignore)} leaves no class of --names; ignore fewer values")
    unique = tuple(dict.fromkeys(table.values()))
    lookup = np.full(_VALUES, _UNKNOWN, np.int16)
    lookup[list(table)] = [unique.index(name) for name in table.values()]
    lookup[list(ignore)] = IGNORED
    return ClassTable(unique, lookup, tuple(sorted(ignore)), names is not None)


def read_names(spec: str) -> Sequence[str] | dict[int, str]:
    """Class names as the command line takes them: `coco-stuff-27`, a comma-separated list that starts at value 0, or a
    YAML or JSON file with such a list or a mapping {value: name}. ConfigError names the file and what is wrong."""
    if spec == COCO_STUFF_27:
        return {value: name for name, values in COCO_STUFF_GROUPS.items() for value in values}
    if not spec.lower().endswith((".yaml", ".yml", ".json")):
        return [name.strip() for name in spec.split(",")]
    shown = storage.redact(spec)
    try:
        text = storage.read_bytes(spec).decode()
        data = json.loads(text) if spec.lower().endswith(".json") else yaml.safe_load(text)
        if isinstance(data, dict):
            return {int(value): str(name) for value, name in data.items()}
    except storage.store_errors(spec) as error:
        raise ConfigError(f"--names: cannot read {shown!r}: {error}") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"--names: {shown} is not a list of names or a mapping of value to name: {error}") from error
    if not isinstance(data, list) or not data:
        raise ConfigError(f"--names: {shown} must hold a list of names or a mapping of value to name, got {data!r:.60}")
    return [str(name) for name in data]


class LabelFolder:
    """The labels below a folder (local or `s3://`), each of which belongs to at most one image.

    Memory: the paths. ConfigError when there is no such folder or no PNG in it.
    """

    def __init__(self, uri: str, table: ClassTable) -> None:
        self.uri = uri
        self.table = table
        self._paths = _list_labels(uri)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for stem in self._paths:  # in NFC, as `claim` asks
            self._by_name[posixpath.basename(stem)].append(stem)
        self._image_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def claim(self, image_id: str) -> str | None:
        """The label of an image (its path below the folder); None when it has none.

        ConfigError when several labels or several images would do.
        """
        stem = comparable(image_id)
        if stem not in self._paths:
            named = self._by_name.get(posixpath.basename(stem), [])
            if len(named) > 1:
                found = ", ".join(self._paths[s] for s in named[:3])
                raise ConfigError(
                    f"image {image_id!r} could have any of {len(named)} labels of its name ({found}): arrange "
                    f"{storage.redact(self.uri)} in the folders of the images"
                )
            if not named:
                return None
            stem = named[0]
        path = self._paths[stem]
        if (other := self._image_of.setdefault(path, image_id)) != image_id:
            raise ConfigError(
                f"the label {path!r} fits both images {other!r} and {image_id!r}: arrange "
                f"{storage.redact(self.uri)} in the folders of the images"
            )
        return path

    def unclaimed(self) -> list[str]:
        """The labels that no image has claimed, sorted."""
        return sorted(path for path in self._paths.values() if path not in self._image_of)

    def read(self, path: str) -> NDArray[np.int16]:
        """(h, w) class indices into `table.names`, or `IGNORED`. ConfigError names the file and the value."""
        uri = storage.join(self.uri, path)
        try:
            values = decode_label(storage.read_bytes(uri))
        except storage.store_errors(uri) as error:
            raise ConfigError(f"label {storage.redact(uri)}: cannot be read: {error}") from error
        except ValueError as error:
            raise ConfigError(f"label {storage.redact(uri)}: {error}") from error
        classes: NDArray[np.int16] = self.table.lookup[values]
        if (classes == _UNKNOWN).any():
            value = int(values[classes == _UNKNOWN][0])
            raise ConfigError(
                f"label {storage.redact(uri)}: the pixel value {value} is neither one of the {len(self.table.names)} "
                f"classes nor ignored: give it a name with --names, or add it to --ignore {list(self.table.ignore)}"
            )
        return classes


def open_labels(
    uri: str, *, names: Sequence[str] | Mapping[int, str] | None = None, ignore: Collection[int] = (255,)
) -> LabelFolder:
    """The labels below a folder; see `class_table` and `LabelFolder` for the arguments and errors."""
    return LabelFolder(uri, class_table(names, ignore))


def decode_label(data: bytes) -> NDArray[np.uint8]:
    """Bytes of a PNG of one channel (grey, palette or 16 bit) -> (h, w) uint8 pixel values as they are stored.

    ValueError when the picture is no PNG, has colours instead of ids, or a value above 255.
    """
    try:
        with open_png(data) as image:
            mode, values = image.mode, np.asarray(image)
    except (*BAD_DATA, Image.DecompressionBombError) as error:
        raise ValueError(f"is not a readable PNG ({error})") from error
    if values.ndim != 2:
        raise ValueError(f"is a picture of colours ({mode}); a label has one channel whose values are class ids")
    if values.size and values.max() >= _VALUES:
        raise ValueError(f"the pixel value {int(values.max())} is above 255; renumber the classes")
    depth, color_type = data[24], data[25]  # of the PNG's header
    step = _GREY_STEP.get(depth, 1) if color_type == 0 else 1
    return (values // step).astype(np.uint8)


def _list_labels(uri: str) -> dict[str, str]:
    """What images are compared by -> path, of every PNG below the folder."""
    try:
        files = list(storage.walk(uri))
    except storage.store_errors(uri) as error:
        raise ConfigError(
            f"labels: cannot list {storage.redact(uri)!r}: {error}; give a folder of PNG files"
        ) from error
    paths = (file.path for file in files if file.path.lower().endswith(".png"))
    labels = {comparable(path): path for path in paths}
    if not labels:
        raise ConfigError(f"labels: no PNG below {storage.redact(uri)!r}; give a folder of PNG files of class ids")
    return labels
