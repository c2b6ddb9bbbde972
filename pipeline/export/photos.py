"""The photos of a run's labels: where they lie, whether they are turned, and copies that every reader sees upright."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from PIL import Image

from pipeline.engine.shards import ahead
from pipeline.errors import ConfigError
from pipeline.export.labels import WRITERS, Labelled, Labels
from pipeline.sources.fetch import Fetcher
from pipeline.stages.base import Run
from pipeline.store import storage
from workers import jpeg_end
from workers.decode import BAD_DATA, DecodeError, DecodeLimits, decode_image, open_photo, orientation
from workers.records import ImageRecord, Status

T = TypeVar("T")

HEAD = 128 << 10  # bytes in which a JPEG's EXIF data lies
JPEG = (".jpg", ".jpeg", ".jfif")
ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
QUALITY = 95  # of a JPEG that had to be turned
IN_FILES = ("tar", "parquet")  # sources whose photos are no files of their own


class Photo(NamedTuple):
    """The bytes of an image file with the ending of its format, its (height, width) upright, and whether it had to be
    turned: then it is encoded anew, and all others are as they were."""

    data: bytes
    ending: str
    size: tuple[int, int]
    turned: bool


class Photos:
    """The photos of a run. Safe in threads."""

    def __init__(self, run: Run) -> None:
        self._fetcher = run.index.fetcher()
        self._limits = run.limits
        self.are_files = run.index.format not in IN_FILES
        self.root = run.index.source

    def of(self, label: Labelled) -> Photo | None:
        """The photo of a label, upright; None when it is gone or has not the label's size any more.

        ConfigError when the store fails, and not this one photo.
        """
        assert label.record is not None  # of every image of a run
        try:
            photo = photo_file(self._fetch(label.record), self._limits)
        except (DecodeError, FileNotFoundError):
            return None
        return photo if photo.size == label.size else None

    def orientation(self, record: ImageRecord) -> int | None:
        """How EXIF data says that it is to be turned, 1..8, from its head where that will do; None when it cannot be
        looked at."""
        head = record.length > HEAD and record.image_id.lower().endswith(JPEG)
        errors: tuple[type[Exception], ...] = (*BAD_DATA, *storage.store_errors(record.uri))
        try:
            data = self._fetcher.fetch_head(record, HEAD) if head else self._fetcher.fetch(record)
            with open_photo(data) as image:
                return orientation(image)
        except errors:
            return None

    def _fetch(self, record: ImageRecord) -> bytes:
        """FileNotFoundError when this one photo is not there."""
        try:
            return self._fetcher.fetch(record)
        except storage.store_errors(record.uri) as error:
            try:
                Fetcher.fetch_status(record, error)
            except storage.store_errors(record.uri) as fault:
                raise ConfigError(
                    f"cannot read {storage.redact(record.uri)}: {storage.redact(str(fault))}; export again when the "
                    "store answers"
                ) from error
            raise FileNotFoundError(record.uri) from error


def each(
    labels: Labels, number: int, copies: Photos | None, write: Callable[[Labelled, Photo | None], T]
) -> Iterator[T]:
    """`write(label, photo)` of the labels of a part, in threads; results in order. Every label is counted, and one of
    which the photo is wanted and is not there is left out."""

    def call(label: Labelled) -> tuple[Labelled, Photo | None, T] | None:
        photo = None if copies is None else copies.of(label)
        return None if copies is not None and photo is None else (label, photo, write(label, photo))

    for done in ahead(call, labels.read(number), depth=WRITERS):
        if done is None:
            labels.exported.lost += 1
        else:
            label, photo, result = done
            labels.count(label, photo=photo is not None, turned=photo is not None and photo.turned)
            yield result


def photos_to_write(run: Run | None, wanted: bool | None, *, usual: bool | None = None) -> Photos | None:
    """The photos of a run where copies of them are wanted, or `usual`; where that is open, too, those that are no files
    of their own, but in tars or Parquet. ConfigError when nothing says where they lie."""
    if wanted is None:
        wanted = usual if usual is not None else run is not None and run.index.format in IN_FILES
    if not wanted:
        return None
    if run is None:
        raise ConfigError("--photos: parts alone do not say where their photos lie; give the run, or --no-photos")
    return Photos(run)


def photo_file(data: bytes, limits: DecodeLimits) -> Photo:
    """The file as it is, or encoded anew where it must be turned, its format is one that few readers know, or it is a
    JPEG that lacks its end, which many readers refuse.

    DecodeError when it is no photo.
    """
    try:
        with open_photo(data) as image:
            turn, ending, (width, height) = orientation(image), ENDINGS.get(image.format or ""), image.size
            whole = ending != ".jpg" or _is_whole(data, image)
    except (*BAD_DATA, Image.DecompressionBombError) as error:
        raise DecodeError(Status.UNDECODABLE, str(error)) from error
    if turn == 1 and ending is not None and whole:
        return Photo(data, ending, (height, width), False)
    pixels = decode_image(data, limits)
    stream = io.BytesIO()
    if ending == ".jpg":
        Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY, subsampling=0)
    else:
        ending = ".png"
        Image.fromarray(pixels).save(stream, "PNG")
    height, width = pixels.shape[:2]
    return Photo(stream.getvalue(), ending, (height, width), turn != 1)


def _is_whole(data: bytes, image: Image.Image) -> bool:
    """Whether a JPEG can be decoded to its end. That is seen from the end mark behind the last scan, or tried."""
    if data.rfind(jpeg_end.END) > data.rfind(bytes((0xFF, jpeg_end.SCAN))):
        return True
    try:
        image.load()
    except OSError:
        return False
    return True
