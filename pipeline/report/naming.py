"""The page on which a person names the classes of a run: `clusters.html`, beside the report.

It has scripts of its own and fetches nothing; what is typed stays in the browser until the person saves it as
`names.yaml`, for `u2label name`. Pictures share a budget, so that the page of some hundred classes can be mailed.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import __version__
from pipeline.clusters.artifact import CENTROIDS
from pipeline.clusters.names import NAMES, Entry, Names
from pipeline.errors import ConfigError
from pipeline.report.clusters import ClusterFit
from pipeline.report.members import Sampled, sample_members
from pipeline.report.pictures import Crop, Drawer
from pipeline.report.rows import Member
from pipeline.stages.base import Run
from pipeline.stages.named import fits_of, names_of
from pipeline.store import storage
from workers import overlay

SCRIPTS = [Path(__file__).parent / "templates" / name for name in ("names.js", "clusters.js")]
MERGED = "classes.npy"  # of DatUS², where several clusters are a class
EACH = 3  # pictures of each of the three kinds
NEAREST = 4
BUDGET = 9_000_000  # bytes of pictures, or 12 MB in base64
LEAST_BYTES, MOST_BYTES = 900, 6000  # of a picture
SIDES = ((4200, 144), (2600, 112), (1500, 96), (0, 80))  # pixels of its longer side, by the bytes that it may have


@dataclass(frozen=True, slots=True)
class Near:
    """Another class, and the cosine of the two centroids."""

    category: int
    name: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Row:
    """A class of the page. `size` is how many instances k-means counted, and of stuff the photos of the sample that
    show it; `share` of the pixels of the sample. `rows` are the titles and pictures of each kind. `entry` is what was
    said of it before, as JSON."""

    category: int
    name: str
    is_thing: bool
    color: str
    size: int
    share: float
    rows: list[tuple[str, list[Crop]]]
    nearest: list[Near]
    entry: str


@dataclass(frozen=True, slots=True)
class NamingPage:
    """All that the template shows. `note` says that names of another fit are stored, which the page leaves alone."""

    version: str
    name: str
    fits: str  # as JSON
    classes: str  # likewise: how many
    things: list[Row]
    stuff: list[Row]
    empty: int
    sampled: Sampled
    note: str | None
    script_digests: list[str]  # SHA-256 in base64: no other script runs


def describe_naming(run: Run) -> NamingPage | None:
    """What the page of a run shows; None before it has clusters and panoptic parts. Fetches up to nine photos a class.

    The classes without an instance are left out. ConfigError when an artifact is not what `u2label run` writes.
    """
    if not (run.fitted and run.done["panoptic"]):
        return None
    fits, classes = fits_of(run)
    sampled = sample_members(run, EACH)
    names, note = _stored(run)
    rows = _rows(run, sampled, names)
    return NamingPage(
        version=__version__,
        name=storage.redact(run.uri).rstrip("/").rsplit("/", 1)[-1],
        fits=json.dumps(fits.model_dump()),
        classes=json.dumps(classes.model_dump()),
        things=[row for row in rows if row.is_thing],
        stuff=[row for row in rows if not row.is_thing],
        empty=classes.total - len(rows),
        sampled=sampled,
        note=note,
        script_digests=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts()],
    )


def scripts() -> list[str]:
    """Those of the page, as they stand in it."""
    return [file.read_text(encoding="utf-8").removesuffix("\n") for file in SCRIPTS]


def given_names(run: Run) -> dict[int, str]:
    """By category, the names that are stored with the run: of a class that is merged, that of the whole. Empty where
    there are none of this run's fits."""
    names, _ = _stored(run)
    return {} if names is None else {member: c.name for c in names.new_categories for member in c.members}


def _stored(run: Run) -> tuple[Names | None, str | None]:
    """The names that the page begins with, or why it does not begin with those that are stored."""
    if not storage.exists(storage.join(run.uri, NAMES)):
        return None, None
    try:
        return names_of(run), None
    except ConfigError as error:
        return None, str(error)


def _rows(run: Run, sampled: Sampled, names: Names | None) -> list[Row]:
    """Things before stuff, the largest first: of most instances, or of most pixels."""
    _, classes = fits_of(run)
    sizes = np.concatenate([[0], ClusterFit.read(run).sizes, sampled.photos[classes.things + 1 :]])
    shown = [category for category in range(1, classes.total + 1) if sizes[category] > 0]
    order = np.where(np.arange(len(sizes)) > classes.things, sampled.shares, sizes)
    shown.sort(key=lambda category: (category > classes.things, -order[category], category))
    nearest = _nearest(_thing_centroids(run), shown, 0) | _nearest(_stuff_centroids(run), shown, classes.things)
    crops = _draw(run, sampled, len(shown))
    said = {} if names is None else {number: _json(entry) for number, entry in names.names.items()}
    return [
        Row(
            category=category,
            name=classes.default_name(category),
            is_thing=category <= classes.things,
            color=overlay.css(overlay.category_color(category)),
            size=int(sizes[category]),
            share=float(sampled.shares[category]),
            rows=_titled(sampled, category, category <= classes.things, crops),
            nearest=[Near(other, classes.default_name(other), cosine) for other, cosine in nearest.get(category, [])],
            entry=said.get(category, "{}"),
        )
        for category in shown
    ]


def _json(entry: Entry) -> str:
    return json.dumps(entry.model_dump(exclude_defaults=True))


def _titled(sampled: Sampled, category: int, is_thing: bool, crops: dict[Member, Crop]) -> list[tuple[str, list[Crop]]]:
    examples = sampled.examples.get(category)
    if examples is None:
        return []
    titles = ("most typical", "least typical", "at random") if is_thing else ("largest", "smallest", "at random")
    kinds = (examples.typical, examples.least, examples.random)
    return [(title, [crops[m] for m in members]) for title, members in zip(titles, kinds, strict=True) if members]


def _draw(run: Run, sampled: Sampled, classes: int) -> dict[Member, Crop]:
    wanted = [member for examples in sampled.examples.values() for member in examples.all]
    side, most = room(classes)
    drawer = Drawer(
        run.index, run.things, run.stages["panoptic"], run.done["panoptic"], run.limits, crop_side=side, crop_bytes=most
    )
    return drawer.draw([], wanted)[1]


def room(classes: int) -> tuple[int, int]:
    """Of a picture on a page of so many classes: pixels of its longer side, and bytes."""
    most = min(MOST_BYTES, max(LEAST_BYTES, BUDGET // (3 * EACH * max(1, classes))))
    return next(side for least, side in SIDES if most >= least), most


def _nearest(centroids_CD: np.ndarray | None, shown: list[int], first: int) -> dict[int, list[tuple[int, float]]]:
    """By category, the nearest others of those that are shown; row r of the centroids is category `first` + 1 + r."""
    if centroids_CD is None:
        return {}
    kept = [category for category in shown if first < category <= first + len(centroids_CD)]
    rows_CD = centroids_CD[[category - first - 1 for category in kept]].astype(np.float64)
    rows_CD /= np.maximum(np.linalg.norm(rows_CD, axis=1, keepdims=True), 1e-12)
    cosines = rows_CD @ rows_CD.T
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : min(NEAREST, len(kept) - 1)]
    return {
        category: [(kept[other], float(cosines[place, other])) for other in order[place]]
        for place, category in enumerate(kept)
    }


def _thing_centroids(run: Run) -> np.ndarray:
    return ClusterFit.read(run).centroids_KD


def _stuff_centroids(run: Run) -> np.ndarray | None:
    """(S, D) directions of the stuff classes, the mean of those of a class; None where the run labels no stuff."""
    method = run.config.semantics.method
    if method == "none":
        return None
    centroids, classes = _STUFF_FITS[method](run.stages["semantics_fit"].folder)
    units = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    sums = np.zeros((run.config.num_stuff, units.shape[1]))
    np.add.at(sums, classes, units)
    return sums


def _read(folder: str, name: str) -> bytes:
    return storage.read_bytes(storage.join(folder, name))


def _patch_fit(folder: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(io.BytesIO(_read(folder, "codebook.npz")), allow_pickle=False) as saved:
        return saved["centroids"], saved["classes"]


def _datus_fit(folder: str) -> tuple[np.ndarray, np.ndarray]:
    centroids = np.load(io.BytesIO(_read(folder, CENTROIDS)))
    if not storage.exists(storage.join(folder, MERGED)):  # as published: a cluster a class
        return centroids, np.arange(len(centroids))
    return centroids, np.load(io.BytesIO(_read(folder, MERGED)))


def _stego_fit(folder: str) -> tuple[np.ndarray, np.ndarray]:
    from safetensors.numpy import load

    saved = load(_read(folder, "head.safetensors"))
    probe = saved["probe.clusters"]
    return probe, saved.get("probe.classes", np.arange(len(probe)))


_STUFF_FITS = {"kmeans": _patch_fit, "datus": _datus_fit, "stego": _stego_fit}
