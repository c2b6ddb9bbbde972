"""Somebody's own photos in the demo: which features they are labelled with, and settings that a small folder can bear.

With weights they are labelled as configs/photos.yaml says; without, as the scenes are. Nothing is downloaded that was
not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from model.backbone.packaged import PACKAGED
from model.backbone.weights import NAMED, resolve_weights
from pipeline.config import Config, load_config
from pipeline.engine.cluster import connect
from pipeline.engine.log import say
from pipeline.engine.shards import read_part
from pipeline.errors import ConfigError
from pipeline.operations.preflight import check_all
from pipeline.operations.run import run
from pipeline.operations.weights.files import fetch, files_of
from pipeline.report.write import write_report
from pipeline.semantics.patches import count_different
from pipeline.sources.fetch import Fetcher
from pipeline.sources.index import scan
from pipeline.stages.base import Run, thing_stage
from pipeline.stages.table import define_stages
from pipeline.store.storage import is_remote, redact
from pipeline.store.weights import local_weights
from workers.decode import DecodeError, DecodeLimits, decode_image
from workers.records import READABLE

THINGS_A_CLASS = 4  # on average, at least
STUFF_A_PHOTO = 4  # classes
OPENED = 20  # photos, one of which has to be readable
ALWAYS = ("source.format=auto", "run.max_empty=1", "train.steps=0")  # a model of its own takes longer
WITHOUT = (
    "the photos are labelled with patch-dct, which sees colours and textures alone. For DINOv2 ViT-S/14 give --weights "
    "(make demo: WEIGHTS=): official, which downloads 88 MB; index, which takes them out of a package where a package "
    "index is all that can be reached; or the path of the file"
)


@dataclass(frozen=True, slots=True)
class OwnPhotos:
    """Photos that can be labelled: the configuration, as a file and what overrides it, and what its features are
    called."""

    path: Path
    overrides: tuple[str, ...]
    features: str

    def config(self, *more: str) -> Config:
        return load_config(str(self.path), [*self.overrides, *more])


@dataclass(frozen=True, slots=True)
class Found:
    """What a first look at the photos has found: how many can be read, and how many things there are on them."""

    photos: int
    things: int


def prepare(folder: Path, run_folder: Path, *, config: Path, fallback: Path, weights: str | None) -> OwnPhotos:
    """Look for what can go wrong before any photo is labelled, and fetch weights that are asked for.

    `weights` for the backbone of `config`: official, index or a path; None takes one of the first two if it is in the
    cache, else `fallback`, a configuration without weights. ConfigError for a folder without a readable image, weights
    that cannot be had or do not fit, a run folder that cannot be written.
    """
    if not folder.is_dir():
        raise ConfigError(f"--photos: no folder {str(folder)!r}; give a folder of images")
    common = (f"source.uri={folder.absolute()}", f"run.uri={run_folder.absolute()}", *ALWAYS)
    wanted = load_config(str(config), common)
    _require_a_photo(wanted)
    name = wanted.backbone.name
    weights = weights or next((file.weights for file in files_of(name).files if file.present), None)
    if weights is None:
        say(WITHOUT)
        photos = OwnPhotos(fallback, (*common, "maskcut.image_size=480"), "patch-dct")
    else:
        weights = _fetched(name, weights)
        photos = OwnPhotos(config, (*common, f"backbone.weights={weights}"), _called(name, weights))
    check_all(photos.config())
    return photos


def label(photos: OwnPhotos) -> str:
    """Label the photos, as they are in the folder now; the path of the report."""
    config = photos.config()
    with connect(config.workers, None):
        first = run(config, stages=_until(config, thing_stage(config)), reindex=True).run
        settings = settings_for(config, _look(first))
        config = photos.config(*settings)
        if config.semantics.method == "kmeans":
            patches = run(config, stages=("patches",)).stages["patches"].parts()
            classes = max(1, count_different(patches, config.semantics.classes))
            config = photos.config(*settings, f"semantics.classes={classes}")
        run(config)
    return write_report(config.run.uri, None)


def settings_for(config: Config, found: Found) -> list[str]:
    """What of the configuration these photos cannot give, as overrides: things and stuff classes, and for a few photos
    STEGO, which learns from a batch of different ones."""
    semantics = config.semantics
    settings = [
        f"clusters.k={max(1, min(config.clusters.k, found.things // THINGS_A_CLASS))}",
        f"semantics.classes={max(1, min(semantics.classes, STUFF_A_PHOTO * found.photos))}",
    ]
    if semantics.method == "stego" and found.photos < max(semantics.batch_size, semantics.neighbours + 1):
        settings.append("semantics.method=kmeans")
    return settings


def _fetched(name: str, weights: str) -> str:
    """Weights as `backbone.weights` takes them in any folder, fetched where they have a word of their own."""
    if weights in NAMED:
        fetch(name, weights)
        return weights
    return weights if is_remote(weights) else str(Path(weights).expanduser().absolute())


def _called(name: str, weights: str) -> str:
    """What features are to be called: those out of a package are never the official ones, by whatever path."""
    try:
        identity = resolve_weights(name, local_weights(weights)).identity
    except (OSError, ValueError) as error:
        raise ConfigError(f"--weights: {error}") from error
    if name in PACKAGED and identity == f"sha256:{PACKAGED[name].sha256}":
        return PACKAGED[name].called
    return f"official {name}" if weights == "official" else f"{name}, weights {redact(weights)}"


def _require_a_photo(config: Config) -> None:
    """ConfigError when there is no image, or none of the first can be decoded."""
    decode, fetcher, said = config.decode, Fetcher(config.source.image_column), ""
    limits = DecodeLimits(decode.max_pixels, decode.min_side)
    try:
        for record in islice(scan(config.source.uri), OPENED):
            try:
                decode_image(fetcher.fetch(record), limits)
                return
            except (DecodeError, OSError) as error:
                said = said or f"{record.image_id}: {error}"
    except ValueError as error:  # no image, or a tar that is broken
        raise ConfigError(f"--photos: {str(error).removeprefix('source.uri: ')}") from error
    raise ConfigError(f"--photos: none of the first images in {config.source.uri} can be read; {said}")


def _until(config: Config, name: str) -> list[str]:
    """Stages in their order, up to that one."""
    names = list(define_stages(config))
    return names[: names.index(name) + 1]


def _look(run: Run) -> Found:
    photos = things = 0
    for shard in range(run.things.shards):
        part = read_part(run.things, shard, ["status", "area"])
        photos += sum(status in READABLE for status in part["status"].to_pylist())
        things += len(part["area"].combine_chunks().flatten())
    say(f"{things} things on {photos} photos")
    return Found(photos, things)
