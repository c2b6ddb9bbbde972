"""Of nested masks the best that do not overlap become things, with their new embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from workers.masks import encode_rle, mask_box
from workers.records import TARGETS_SCHEMA, instances_schema
from workers.things import ThingParams, choose_things, embeddings_of, score_of_two, with_categories, with_embeddings

SIZE = (20, 30)


def box(y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def row(name: str, masks: list[np.ndarray], scores: list[float]) -> dict[str, Any]:
    return {
        "image_id": name,
        "height": SIZE[0],
        "width": SIZE[1],
        "status": "ok" if masks else "no_masks",
        "error": None,
        "rle": [encode_rle(mask) for mask in masks],
        "bbox": [mask_box(mask) for mask in masks],
        "area": [int(mask.sum()) for mask in masks],
        "score": scores,
        "embedding": [np.full(4, number, np.float16) for number in range(len(masks))],
        "level": [0] * len(masks),
        "parent": [-1] * len(masks),
    }


def part(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=instances_schema(4, nested=True))


WHOLE, LEFT, RIGHT, CORNER = box(0, 0, 20, 30), box(2, 2, 18, 12), box(2, 18, 18, 28), box(2, 2, 8, 6)


@pytest.mark.parametrize(
    ("scores", "params", "chosen"),
    [
        ([0.1, 0.9, 0.8, 0.7], ThingParams(0.2, 0.3, 9), [1, 2]),  # a part of a thing is not another
        ([0.95, 0.9, 0.8, 0.7], ThingParams(0.2, 0.3, 9), [0]),  # of the whole and its parts the whole is best
        ([0.1, 0.9, 0.8, 0.95], ThingParams(0.2, 0.3, 9), [3, 2]),
        ([0.1, 0.9, 0.8, 0.7], ThingParams(0.85, 0.3, 9), [1]),
        ([0.1, 0.9, 0.8, 0.7], ThingParams(0.2, 0.3, 1), [1]),
        ([0.1, 0.9, 0.8, 0.7], ThingParams(0.0, 1.0, 9), [1, 2, 3, 0]),
        ([0.5, 0.5, 0.5, 0.5], ThingParams(0.5, 0.3, 9), [0]),  # equal scores: the first
    ],
)
def test_the_choice(scores: list[float], params: ThingParams, chosen: list[int]) -> None:
    things = choose_things(part(row("a", [WHOLE, LEFT, RIGHT, CORNER], scores)), params)
    assert things.schema.equals(instances_schema(4))
    (found,) = things.to_pylist()
    assert [int(vector[0]) for vector in found["embedding"]] == chosen
    assert found["score"] == pytest.approx([scores[i] for i in chosen])


def test_a_mask_that_holds_a_surer_one_stays_where_all_may_overlap() -> None:
    """25 pixels of which 7 are another's: 7 / 25 * 25 / 7 is more than 1."""
    masks = [box(0, 0, 1, 7), box(0, 0, 1, 25)]
    (found,) = choose_things(part(row("a", masks, [0.9, 0.8])), ThingParams(0.2, 1.0, 9)).to_pylist()
    assert found["area"] == [7, 25]


def test_photos_without_masks_stay_and_rows_keep_their_order() -> None:
    bad = {**row("bad", [], []), "height": None, "width": None, "status": "undecodable", "error": "broken"}
    things = choose_things(part(bad, row("none", [], []), row("a", [LEFT], [0.9])), ThingParams(0.5, 0.3, 9))
    assert things["image_id"].to_pylist() == ["bad", "none", "a"]
    assert things["status"].to_pylist() == ["undecodable", "no_masks", "ok"]
    assert [len(masks) for masks in things["rle"].to_pylist()] == [0, 0, 1]


def test_new_embeddings_take_the_place_of_the_old() -> None:
    table = choose_things(
        part(row("a", [LEFT, RIGHT], [0.9, 0.8]), row("b", [], []), row("c", [LEFT], [0.7])), ThingParams(0, 0.3, 9)
    )
    assert embeddings_of(table).shape == (3, 4)
    changed = with_embeddings(table, np.arange(6, dtype=np.float32).reshape(3, 2) / 8)
    assert changed.schema.equals(instances_schema(2))
    assert changed["embedding"].to_pylist() == [[[0, 0.125], [0.25, 0.375]], [], [[0.5, 0.625]]]
    empty = with_embeddings(choose_things(part(row("b", [], [])), ThingParams(0, 0.3, 9)), np.zeros((0, 2), np.float32))
    assert empty["embedding"].to_pylist() == [[]]


def test_the_score_that_leaves_two_a_photo() -> None:
    many = [box(0, x, 5, x + 1) for x in range(8)]
    parts = [part(row("a", many, [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])), part(row("b", [], []))]
    assert score_of_two(parts) == pytest.approx(0.5)
    assert score_of_two(parts[1:]) == 0
    assert score_of_two([part(row("a", many[:1], [0.5]))]) == 0


def test_categories_take_the_place_of_embeddings() -> None:
    table = part(row("a", [WHOLE, LEFT], [0.9, 0.8]), row("b", [], []), row("c", [RIGHT], [0.7]))
    found = with_categories(choose_things(table, ThingParams(0.0, 1.0, 9)), np.array([3, 1, 2]))
    assert found.schema.equals(TARGETS_SCHEMA)
    assert found["category"].to_pylist() == [[3, 1], [], [2]]
    assert found["score"].to_pylist()[0] == pytest.approx([0.9, 0.8])
