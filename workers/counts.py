"""What a table of photos holds, counted: rows by status, masks, and pixels by what they became. A worker says it of the
part that it has written, and a part says it of itself where no word of its worker has come down."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from workers.records import READABLE

COLUMNS = ["status", "area", "height", "width", "segments"]  # that are counted, of those that a part has


class Counts(TypedDict):
    """As the fields of a receipt."""

    rows: dict[str, int]
    instances: int
    pixels: dict[str, int]


def count(table: pa.Table) -> Counts:
    """The counts of a part of any stage, from its COLUMNS."""
    masks = pc.list_value_length(table["area"]) if "area" in table.column_names else pa.array([0])
    return {
        "rows": dict(Counter(table["status"].to_pylist())),
        "instances": pc.sum(masks).as_py() or 0,
        "pixels": _pixels(table) if _has_labels(table.schema) else {},
    }


def _has_labels(schema: pa.Schema) -> bool:
    return "segments" in schema.names and pa.types.is_list(schema.field("segments").type)


def _pixels(table: pa.Table) -> dict[str, int]:
    """Of things, of stuff, and void, in the photos that have labels."""
    found: dict[str, int] = {"thing": 0, "stuff": 0, "void": 0}
    rows: list[dict[str, Any]] = table.select(["status", "height", "width", "segments"]).to_pylist()
    for row in rows:
        if row["status"] in READABLE:
            found["void"] += row["height"] * row["width"]
            for segment in row["segments"]:
                found["thing" if segment["is_thing"] else "stuff"] += segment["area"]
                found["void"] -= segment["area"]
    return found
