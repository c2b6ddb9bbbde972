"""A source that grows under a run: what is new is done, what is there stays, and kills change nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.operations.run import run as run_stages
from tests.integration.conftest import Start, finish, rows, write_config
from tests.integration.test_interruptions import kill_driver, parts, wait_until

FIRST, LATER, A_SHARD = 10, 8, 2


def labels(run: Path) -> dict[str, dict[str, Any]]:
    """Rows by name; there are none twice."""
    found = {row["image_id"]: row for row in rows(run, "panoptic")}
    assert len(found) == len(rows(run, "panoptic"))
    return found


@pytest.mark.slow
def test_a_run_that_is_extended_and_killed_twice_is_the_run_over_all_photos_with_the_same_fit(
    scenes: Path, tmp_path: Path, start_u2label: Start, ray_address: str
) -> None:
    photos, whole = tmp_path / "photos", tmp_path / "whole"
    photos.mkdir()
    whole.mkdir()
    names = sorted(path.name for path in scenes.iterdir())[: FIRST + LATER]
    for name in names[LATER:]:  # those that come later sort before them
        shutil.copy(scenes / name, photos)
    config, run = write_config(photos, tmp_path, shard_size=A_SHARD), tmp_path / "run"
    first = run_stages(load_config(str(config)))
    before, fit = labels(run), first.stages["clusters"].folder
    old = parts(run, "*")

    for name in names[:LATER]:
        shutil.copy(scenes / name, photos)
    command = ("run", str(config), "--address", ray_address)
    extending = start_u2label(*command, "--extend")
    wait_until(lambda: len(parts(run, "instances")) > FIRST // A_SHARD, extending)
    kill_driver(extending)
    again = start_u2label(*command)
    wait_until(lambda: len(parts(run, "panoptic")) > FIRST // A_SHARD, again)
    kill_driver(again)
    said = finish(start_u2label(*command), 0)
    assert "clusters: kept, though of the 5 parts that it was made of 0 are others now, and 4 came since" in said
    assert "masks looked at that came since lie" in said and "times as far from their nearest centroids" in said
    assert "since it was listed" not in said
    assert old.items() <= parts(run, "*").items()

    all_of_them = load_config(str(write_config(photos, whole, shard_size=A_SHARD)))
    instances = run_stages(all_of_them, stages=["instances"]).stages
    shutil.copytree(fit, instances["clusters"].folder, ignore=shutil.ignore_patterns("inputs.json"))
    run_stages(all_of_them)
    grown = labels(run)
    assert grown == labels(whole / "run")
    assert len(grown) == len(names)
    assert {name: grown[name] for name in before} == before

    refitted = run_stages(load_config(str(config)), refit=True)
    assert refitted.computed == {"instances": 0, "clusters": 1, "panoptic": (FIRST + LATER) // A_SHARD}
