"""The embeddings of the masks in a part."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.store import storage
from workers.kmeans import embedding_rows


def read_embeddings(uri: str) -> np.ndarray:
    """(N, D) float32: the masks' embeddings of an instances part; only that column is read.

    ValueError names the part when it cannot be read, has no such column, or holds a value that is not finite.
    """
    return read_photos(uri)[0]


def read_photos(uri: str) -> tuple[np.ndarray, np.ndarray]:
    """As `read_embeddings`, and (P,) int64 how many of them each photo of the part has."""
    try:
        column = _read_column(uri)
        rows = embedding_rows(column)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{storage.redact(uri)}: cannot read embeddings: {error}; delete the part and run again"
        ) from error
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{storage.redact(uri)}: the embedding of mask {int(np.argmin(finite))} of the part is NaN or infinite; "
            "delete the part and run the instances stage again"
        )
    return rows, pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


def _read_column(uri: str) -> pa.ChunkedArray:
    with storage.open_input(uri, block_size=0) as stream, pq.ParquetFile(stream) as file:
        return file.read(columns=["embedding"])["embedding"]
