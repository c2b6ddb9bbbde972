"""The records that flow between stages, and the Arrow schema of every table.

One row per image in every part, always: a bad image is a row whose `status` is not `ok`. Sizes are (height, width),
boxes are xyxy in pixels (x1 and y1 exclusive), masks are COCO RLE counts at the size of the upright original image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1


class Status(StrEnum):
    """What became of one image. `error` says why in words when the image is at fault: the last seven."""

    OK = "ok"
    NO_MASKS = "no_masks"  # readable, but no instance was found
    NOT_SAMPLED = "not_sampled"  # left out on purpose and never looked at: the stage works on a sample
    MISSING = "missing"  # the source listed it, and it could not be fetched
    EMPTY = "empty"  # zero bytes
    UNDECODABLE = "undecodable"  # not an image, truncated or corrupt
    TOO_LARGE = "too_large"  # more pixels than decode.max_pixels; never decoded
    TOO_SMALL = "too_small"  # a side below decode.min_side
    CRASHED = "crashed"  # it killed the worker that looked at it, again and again
    CHANGED = "changed"  # two stages saw different photos under its name


READABLE = frozenset({Status.OK, Status.NO_MASKS})


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """Where the encoded bytes of one image lie.

    `image_id` is its path inside the source (a tar member: the tar's path, a slash, the member's name).
    `offset` and `length` are bytes in `uri`; in a Parquet source `offset` is the row number and `length` is -1
    (`PARQUET_ROW`), of a sparse member of a tar `offset` is that of its header and `length` is -2 (`SPARSE_MEMBER`),
    and a manifest's photos have the length 0. `keys`: the values of a manifest's key columns, while it is listed.
    `version` is what the store told of the file when it was listed, empty where it told nothing; `GONE` of a photo that
    the source does not have any more.
    """

    image_id: str
    uri: str
    offset: int
    length: int
    keys: tuple[Any, ...] = ()
    version: str = field(default="", compare=False)


GONE = "gone"
PARQUET_ROW, SPARSE_MEMBER = -1, -2


INDEX_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("version", pa.string()),
    ]
)


def instances_schema(embedding_dim: int, *, nested: bool = False) -> pa.Schema:
    """Schema of an instances part. The list columns of a row are parallel: entry i of each is instance i.

    `rle`: COCO compressed RLE counts; `bbox`: xyxy; `area`: pixels; `score`: IoU of the mask before and after the CRF,
    of `nested` ones the objectness; `embedding`: (embedding_dim,) float16, unit norm before rounding. With `nested`,
    `level`: how many masks hold it, one in the other; `parent`: number in the row of the smallest that does, -1 for
    none.
    """
    nesting = ("level", "parent") if nested else ()
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("height", pa.int32()),
            pa.field("width", pa.int32()),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
            pa.field("rle", pa.list_(pa.string()), nullable=False),
            pa.field("bbox", pa.list_(pa.list_(pa.float32(), 4)), nullable=False),
            pa.field("area", pa.list_(pa.int64()), nullable=False),
            pa.field("score", pa.list_(pa.float32()), nullable=False),
            pa.field("embedding", pa.list_(pa.list_(pa.float16(), embedding_dim)), nullable=False),
            *(pa.field(name, pa.list_(pa.int32()), nullable=False) for name in nesting),
        ]
    )


FEATURES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("shape", pa.list_(pa.int32(), 4)),  # crops, C, h, w
        pa.field("features", pa.large_binary()),  # float16, little-endian, in that order; null unless ok
    ]
)


def segments_schema(embedding_dim: int) -> pa.Schema:
    """Schema of a segments part.

    `segments`: PNG of the (h, w) patches, entry i of `embedding` for segment i; 8 bits with 255 for noise, or 16 bits
    with 65535 where a photo has more than 255 segments. Null for a photo that could not be read.
    `embedding`: (embedding_dim,) float16, unit norm before rounding. A photo of noise alone has the status `no_masks`.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("height", pa.int32()),
            pa.field("width", pa.int32()),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
            pa.field("segments", pa.large_binary()),
            pa.field("embedding", pa.list_(pa.list_(pa.float16(), embedding_dim)), nullable=False),
        ]
    )


def patches_schema(dim: int) -> pa.Schema:
    """Schema of a patches part: of a sampled photo some patch features, and differences that are nuisance, float16.

    `embedding`: features of patches; `places`: the middle of each as (y, x), shares of height and width; `across`:
    differences of neighbours; `views`: of a view and the whole photo.
    """
    vectors = pa.list_(pa.list_(pa.float16(), dim))
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
            *(pa.field(name, vectors, nullable=False) for name in ("embedding", "across", "views")),
            pa.field("places", pa.list_(pa.list_(pa.float32(), 2)), nullable=False),
        ]
    )


SEMANTICS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("labels", pa.large_binary()),
    ]
)

SEGMENT_TYPE = pa.struct(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("category", pa.int32(), nullable=False),
        pa.field("is_thing", pa.bool_(), nullable=False),
        pa.field("area", pa.int64(), nullable=False),
        pa.field("bbox", pa.list_(pa.float32(), 4), nullable=False),
        pa.field("score", pa.float32()),
    ]
)

PANOPTIC_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("panoptic", pa.large_binary()),  # PNG, id = R + 256 G + 65536 B as in COCO panoptic, 0 = void
        pa.field("segments", pa.list_(SEGMENT_TYPE), nullable=False),
        pa.field("hidden_instances", pa.int32(), nullable=False),  # instances with no visible pixel left
    ]
)


# Beside the columns of a panoptic part: `labels` is that of a semantics part (PNG of uint8, stuff 0..S-1; 255 is where
# the model sees things), and the list columns are parallel, entry i of each is detection i, the surest first. `rle`:
# COCO counts of the mask, which may be empty; `bbox`: the box that the model predicts, not the one around the mask;
# `area`: pixels of the mask; `category`: 1..K.
PREDICTIONS_SCHEMA = pa.schema(
    [
        *PANOPTIC_SCHEMA,
        pa.field("labels", pa.large_binary()),
        pa.field("rle", pa.list_(pa.string()), nullable=False),
        pa.field("bbox", pa.list_(pa.list_(pa.float32(), 4)), nullable=False),
        pa.field("area", pa.list_(pa.int64()), nullable=False),
        pa.field("score", pa.list_(pa.float32()), nullable=False),
        pa.field("category", pa.list_(pa.int32()), nullable=False),
    ]
)

# Of the masks that the panoptic model learns, nested ones too: those of an instances part with `category`, 1..K, in
# place of the embedding, the surest first.
TARGETS_SCHEMA = pa.schema(
    [
        *(field for field in instances_schema(1) if field.name != "embedding"),
        pa.field("category", pa.list_(pa.int32()), nullable=False),
    ]
)

# Names that a column of some part or of the index has, or a field of COCO's images; a key column of a manifest must
# have another.
PART_COLUMNS = frozenset({"id", "file_name"}) | frozenset(
    name
    for schema in (
        INDEX_SCHEMA,
        instances_schema(1, nested=True),
        FEATURES_SCHEMA,
        segments_schema(1),
        patches_schema(1),
        PREDICTIONS_SCHEMA,
    )
    for name in schema.names
)


def with_columns(table: pa.Table, others: pa.Table) -> pa.Table:
    """The table with the columns of another of as many rows behind its own."""
    for described, column in zip(others.schema, others.columns, strict=True):
        table = table.append_column(described, column)
    return table


def with_metadata(table: pa.Table, metadata: Mapping[str, str]) -> pa.Table:
    """The table with `metadata` as the file's key-value metadata (keys get the prefix `u2label.`)."""
    entries = {f"u2label.{key}".encode(): value.encode() for key, value in metadata.items()}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **entries})
