"""Panoptic parts as labels: how they are found, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.sources.coco import PanopticSegment
from pipeline.stages.parts import PanopticParts, common_categories, find_parts
from tests.pipeline.label_files import categories, random_rows, random_run, unreadable_row, write_part
from tests.pipeline.report.tiny_runs import config_of, plan_run


def test_labels_of_all_parts_and_no_names_for_what_could_not_be_read(tmp_path: Path) -> None:
    panoptic, _ = random_run(tmp_path, 7)
    labels = PanopticParts(find_parts(panoptic))
    assert labels.names == [f"photo-{i:03d}.jpg" for i in range(7)]
    assert [category.name for category in labels.categories.values()][3:5] == ["thing 4", "stuff 1"]
    for name in reversed(labels.names):
        image = labels.read(name)
        assert set(np.unique(image.ids)) - {0} == {s.id for s in image.segments}
        assert all((s.score is None) == (s.category > 4) for s in image.segments)


def test_a_segment_keeps_category_and_score(tmp_path: Path) -> None:
    row, _ = random_rows(np.random.default_rng(3), "a.jpg", 4, 3)
    labels = PanopticParts([write_part(tmp_path / "p.parquet", [row], categories(4, 3))])
    expected = tuple(PanopticSegment(s["id"], s["category"], False, s["score"]) for s in row["segments"])
    assert labels.read("a.jpg").segments == expected


def test_parts_are_found_in_a_folder_in_the_order_of_their_shards(tmp_path: Path) -> None:
    for name in ("part-00010.parquet", "part-00002.parquet", "part-100000.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    found = [Path(part).name for part in find_parts(str(tmp_path))]
    assert found == ["part-00002.parquet", "part-00010.parquet", "part-100000.parquet"]
    assert find_parts(str(tmp_path / "part-00002.parquet")) == [str(tmp_path / "part-00002.parquet")]


def test_where_nothing_is_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        find_parts(str(tmp_path))
    with pytest.raises(ConfigError, match="no panoptic part was given"):
        find_parts([])
    with pytest.raises(ConfigError, match=r"cannot read '.*gone.parquet' as a part"):
        PanopticParts([str(tmp_path / "gone.parquet")])
    (tmp_path / "text.parquet").write_text("not Parquet at all")
    with pytest.raises(ConfigError, match=r"cannot read '.*text.parquet' as a part"):
        PanopticParts([str(tmp_path / "text.parquet")])


@pytest.mark.parametrize("stage", ["predictions", "clusters", "nonsense"])
def test_a_stage_that_a_run_does_not_have_in_parts_is_an_error(tmp_path: Path, stage: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"photo")
    plan_run(config_of(tmp_path / "photos", tmp_path / "run"))
    with pytest.raises(ConfigError, match=rf"has no stage '{stage}' with a part a shard; it has instances, panoptic"):
        find_parts(str(tmp_path / "run"), stage)


def test_categories_must_be_there_and_the_same(tmp_path: Path) -> None:
    row = unreadable_row("a.jpg")
    none = write_part(tmp_path / "none.parquet", [row], None)
    with pytest.raises(ConfigError, match=r"none.parquet has no list of categories"):
        common_categories([none])
    empty = write_part(tmp_path / "empty.parquet", [row], [])
    with pytest.raises(ConfigError, match=r"empty.parquet: the list of categories is empty"):
        common_categories([empty])
    parts = [write_part(tmp_path / f"{k}.parquet", [row], categories(k, 1)) for k in (2, 3)]
    with pytest.raises(ConfigError, match=r"2.parquet and .*3.parquet have different categories"):
        common_categories(parts)


def test_an_image_that_comes_twice_and_a_category_that_is_not_listed(tmp_path: Path) -> None:
    row, _ = random_rows(np.random.default_rng(3), "a.jpg", 4, 3)
    twice = write_part(tmp_path / "twice.parquet", [row, row], categories(4, 3))
    with pytest.raises(ConfigError, match=r"twice.parquet: the image 'a.jpg' is in .* twice"):
        PanopticParts([twice])
    few = write_part(tmp_path / "few.parquet", [row], categories(1, 1))
    with pytest.raises(ConfigError, match=r"few.parquet, image 'a.jpg': .* segments of the categories"):
        PanopticParts([few]).read("a.jpg")
