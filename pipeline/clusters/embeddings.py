"""The embeddings of the masks in a part."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq

from pipeline.store import storage
from workers.kmeans import embedding_rows


def read_embeddings(uri: str) -> np.ndarray:
    """(N, D) float32: the masks' embeddings of an instances part; only that column is read.

    ValueError names the part when it cannot be read, has no such column, or holds a value that is not finite.
    """
    try:
        with storage.open_input(uri, block_size=0) as stream, pq.ParquetFile(stream) as file:
            rows = embedding_rows(file.read(columns=["embedding"])["embedding"])
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
    return rows
