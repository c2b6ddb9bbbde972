"""What the stage of instances says when most photos have no mask, and which features and methods a backbone has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.backbone.cards import card_of
from model.backbone.names import BACKBONES
from pipeline.config import Config
from pipeline.engine.receipts import Receipt
from pipeline.stages.instances import MEND, Instances
from pipeline.stages.table import define_stages
from pipeline.stages.things import Things
from workers.maskcut import maskcut
from workers.ncut import COSINE_BINS, sample_cosines
from workers.records import READABLE, Status


def config(name: str = "patch-dct", **sections: Any) -> Config:
    base = {"source": {"uri": "/photos"}, "run": {"uri": "/run"}, "backbone": {"name": name, "weights": "random:0"}}
    return Config.model_validate(base | sections)


def receipt(ok: int, no_masks: int, graphs: tuple[int, int, int] = (0, 0, 0), at: float = 0.97) -> Receipt:
    """Of a shard whose patches all have the similarity `at`."""
    cosines = [0] * COSINE_BINS
    cosines[int((at + 1) / 2 * COSINE_BINS)] = 100
    rows = {"ok": ok, "no_masks": no_masks, "undecodable": 3}
    histograms = {"graphs": list(graphs), "cosines": cosines}
    return Receipt("instances", "f" * 12, 0, True, 1.0, rows, histograms=histograms)


def test_most_photos_without_a_mask_are_a_complaint_with_figures_and_a_remedy() -> None:
    said = Instances().complaint(config(), [receipt(1, 9, (1, 9, 0))], final=True)
    assert said is not None
    for part in ("9 of 10 readable photos have no mask", "9 are complete, 0 have no edge and 1 can be cut"):
        assert part in said
    assert "median cosine of two patches is 0.98" in said and "100 % are above maskcut.tau 0.15" in said
    assert "run.max_empty" in said


@pytest.mark.parametrize(
    ("ok", "empty", "final", "max_empty", "complains"),
    [
        (5, 5, True, 0.5, False),
        (4, 6, True, 0.5, True),
        (4, 6, True, 1.0, False),
        (0, 31, False, 0.5, False),  # too few to stop for
        (0, 32, False, 0.5, True),
        (4, 36, False, 0.5, False),  # bad, but not beyond doubt
        (0, 40, False, 1.0, False),
        (0, 0, True, 1.0, True),  # there are three, of which none can be read
        (0, 0, False, 0.5, False),
    ],
)
def test_when_it_complains(ok: int, empty: int, final: bool, max_empty: float, complains: bool) -> None:
    settings = config(run={"uri": "/run", "max_empty": max_empty})
    assert (Instances().complaint(settings, [receipt(ok, empty)], final=final) is not None) == complains


def test_photos_of_which_none_can_be_read_are_counted_by_what_became_of_them() -> None:
    rows = {"empty": 1, "too_small": 7, "undecodable": 2}
    said = Instances().complaint(config(), [Receipt("instances", "f" * 12, 0, True, 1.0, rows)], final=True)
    assert said is not None
    assert said.startswith("none of the 10 photos can be read: 7 too_small, 2 undecodable, 1 empty. Lower decode.min_s")
    assert set(MEND) == set(Status) - READABLE - {Status.NOT_SAMPLED}


def test_trees_have_no_graphs_to_tell_of() -> None:
    said = Instances().complaint(config("dinov2_vits14"), [receipt(0, 9)], final=True)
    assert said is not None and "graphs" not in said


def test_masks_of_which_none_is_good_enough_for_a_thing_are_a_complaint() -> None:
    settings = config("dinov2_vits14", things={"min_score": 0.7})
    said = Things().complaint(settings, [receipt(1, 9)], final=True)
    assert said is not None and "9 of 10 readable photos have no mask whose score" in said
    assert "things.min_score (0.7)" in said and "run.max_empty" in said
    assert Things().complaint(settings, [receipt(5, 5)], final=True) is None
    assert Things().complaint(settings, [receipt(0, 0)], final=True) is None
    assert Things().complaint(settings, [receipt(0, 90)], final=False) is None


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_a_card_and_auto_is_what_it_says(name: str) -> None:
    card, decided = card_of(name), config(name)
    assert decided.instances.method == card.masks
    assert (decided.maskcut.features, decided.maskcut.tau) == (card.cut, card.tau)
    assert decided.merge_tree.features == card.trees
    assert ("things" in define_stages(decided)) == (card.masks == "merge_tree")
    given = config(name, maskcut={"tau": 0.4, "features": "block:-1"}, instances={"method": "maskcut"})
    assert (given.maskcut.features, given.maskcut.tau, given.instances.method) == ("block:-1", 0.4, "maskcut")


def features_like_dinov2(alike: float, strong: float, seed: int = 0) -> torch.Tensor:
    """(1, N, C) of a grid of 12 x 16 with an object on it: a common direction (`alike`: how large), and a few channels
    `strong` times as noisy as the others."""
    rng = np.random.default_rng(seed)
    inside = np.zeros((12, 16), bool)
    inside[3:9, 5:11] = True
    kinds = rng.normal(size=(2, 64))
    rows = np.where(inside.reshape(-1, 1), kinds[0], kinds[1]) + 0.5 * rng.normal(size=(192, 64))
    rows[:, :3] += strong * rng.normal(size=(192, 3))
    return torch.from_numpy(rows + alike * rng.normal(size=64)).float()[None]


def test_keys_that_are_all_alike_cut_nothing_and_that_is_seen() -> None:
    keys = features_like_dinov2(alike=40, strong=8)
    assert not maskcut(keys, (12, 16), tau=0.15, max_masks=3)[0].masks.any()
    assert (sample_cosines(keys) > 0.9).all()


@pytest.mark.parametrize("name", [name for name in BACKBONES if card_of(name).cut == "tokens"])
def test_what_the_card_cuts_is_cut(name: str) -> None:
    """Tokens after the final norm have neither."""
    masks = maskcut(features_like_dinov2(alike=0, strong=1), (12, 16), tau=card_of(name).tau, max_masks=1)[0].masks
    assert 0.05 < masks.mean() < 0.95
