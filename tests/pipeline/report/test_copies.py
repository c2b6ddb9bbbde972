"""The report's part about masks that are copies of each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.report import copies
from pipeline.report.copies import describe_copies
from pipeline.stages.run import open_run
from pipeline.stages.things import EmbeddingFit
from tests.pipeline.clusters.embedded_parts import write_part
from tests.pipeline.report.tiny_runs import config_of, make_run, plan_run, report_of, run_stage, scene, squeezed


def photos_with_copies(folder: Path) -> Path:
    """Five scenes; the first also saved again, resized, and as it is."""
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(scene(number))
    with Image.open(folder / "0.jpg") as photo:
        photo.save(folder / "again.jpg", quality=95)
        photo.resize((192, 144), Image.Resampling.BICUBIC).save(folder / "large.png")
    (folder / "same.jpg").write_bytes(scene(0))
    return folder


def test_copies_are_counted_and_shown(tmp_path: Path) -> None:
    config = config_of(photos_with_copies(tmp_path / "photos"), tmp_path / "run")
    make_run(config)
    found = describe_copies(open_run(str(tmp_path / "run")))
    assert found is not None
    assert (found.cosine, found.weighed, found.photos_read, found.parts_read, found.parts) == (0.97, False, 8, 3, 3)
    assert found.largest[0].photos == 4
    shown = {crop.image_id for crop in found.largest[0].crops}
    assert shown == {"0.jpg", "again.jpg", "large.png", "same.jpg"}
    assert all(crop.error is None for crop in found.largest[0].crops)
    page = report_of(tmp_path / "run")
    text = squeezed(page.text)
    assert f"{found.copied} of {found.masks} masks have copies" in text
    assert f"{found.photos} of 8 photos hold one" in text
    assert "With clusters.dedup: 0.97 a group counts as one" in text
    assert f"{found.largest[0].masks} masks of 4 photos" in text
    assert page.values("img", "alt").count("large.png") >= 3  # photo, labels and the cut-out


def test_of_a_large_run_some_parts_are_compared_and_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(config_of(photos_with_copies(tmp_path / "photos"), tmp_path / "run"))
    monkeypatch.setattr(copies, "READ_PARTS", 1)
    assert "1 of 3 parts, spread evenly, were compared" in squeezed(report_of(tmp_path / "run").text)


def test_the_chosen_masks_of_merge_trees_are_compared_and_drawn(tmp_path: Path) -> None:
    things = {"components": 5, "min_score": 0.0}
    source = photos_with_copies(tmp_path / "photos")
    config = config_of(source, tmp_path / "run", instances={"method": "merge_tree"}, things=things)
    table = plan_run(config)
    run_stage(table["instances"], config, table)
    EmbeddingFit().fit(open_run(str(tmp_path / "run")), table["embedding_fit"])
    run_stage(table["things"], config, table)
    found = describe_copies(open_run(str(tmp_path / "run")))
    assert found is not None and found.cosine == 0.95 and found.copied >= 4
    assert all(crop.error is None for group in found.largest for crop in group.crops)
    page = report_of(tmp_path / "run")
    assert "Copies" in page.text and len(page.values("img", "src")) > 16


def test_before_there_are_masks_nothing_is_said_and_a_broken_part_is_named(tmp_path: Path) -> None:
    config = config_of(photos_with_copies(tmp_path / "photos"), tmp_path / "run")
    table = make_run(config, ("instances",))
    write_part(Path(table["instances"].part(1)), np.full((3, 384), np.nan), np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"part-00001.parquet: the embedding of mask 0 of the part is NaN"):
        describe_copies(open_run(str(tmp_path / "run")))
    for shard in range(3):
        Path(table["instances"].part(shard)).unlink()
    assert describe_copies(open_run(str(tmp_path / "run"), need=None)) is None
