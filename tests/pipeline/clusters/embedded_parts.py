"""Instances parts of given embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workers.records import instances_schema


def write_part(path: Path, embeddings: np.ndarray, rng: np.random.Generator) -> str:
    """An instances part with these (N, D) embeddings spread over images of 0 to 4 masks."""
    counts = []
    while sum(counts) < len(embeddings):
        counts.append(min(int(rng.integers(0, 5)), len(embeddings) - sum(counts)))
    images = np.split(embeddings.astype(np.float16), np.cumsum(counts)[:-1]) if counts else []
    rows = [
        {
            "image_id": f"{path.stem}/{i}",
            "height": 8,
            "width": 8,
            "status": "ok" if len(image) else "no_masks",
            "error": None,
            "rle": ["08"] * len(image),
            "bbox": [[0.0, 0.0, 8.0, 8.0]] * len(image),
            "area": [64] * len(image),
            "score": [1.0] * len(image),
            "embedding": list(image),
        }
        for i, image in enumerate(images)
    ]
    pq.write_table(pa.Table.from_pylist(rows, instances_schema(embeddings.shape[1])), path)
    return str(path)


def write_parts(folder: Path, x_ND: np.ndarray, cuts: list[int]) -> list[str]:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    return [write_part(folder / f"part-{i:05d}.parquet", part, rng) for i, part in enumerate(np.split(x_ND, cuts))]
