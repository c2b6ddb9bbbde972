"""How far masks that came after a fit lie from its centroids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.clusters import drift
from pipeline.clusters.drift import measure_drift
from pipeline.engine.done import Look
from pipeline.errors import StageFailed
from pipeline.operations.run import run as run_stages
from pipeline.operations.source import open_source
from pipeline.stages.clusters import Clusters, drift_of
from pipeline.stages.run import open_run, resolve_run
from tests.pipeline.clusters.embedded_parts import write_part, write_parts
from tests.pipeline.report.tiny_runs import config_of, make_run, report_of, run_stage, scene, squeezed

DIM, K = 16, 6
RNG = np.random.default_rng(5)
CENTROIDS = np.linalg.qr(RNG.standard_normal((DIM, K)))[0].T.astype(np.float32)
ELSEWHERE = np.linalg.qr(np.concatenate([CENTROIDS, RNG.standard_normal((DIM - K, DIM))]).T)[0].T[K:]


def masks(around: np.ndarray, count: int) -> np.ndarray:
    """Unit rows around some of the directions."""
    rows = around[RNG.integers(0, len(around), count)] + 0.1 * RNG.standard_normal((count, DIM))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_masks_of_the_same_kinds_lie_as_far_and_those_of_others_much_farther(tmp_path: Path) -> None:
    old, like, unlike = (
        write_parts(tmp_path / name, masks(around, 600), [200, 400])
        for name, around in (("old", CENTROIDS), ("like", CENTROIDS), ("unlike", ELSEWHERE))
    )
    near = measure_drift(old, like, CENTROIDS, spherical=True)
    far = measure_drift(old, unlike, CENTROIDS, spherical=True)
    assert near is not None and near.ratio == pytest.approx(1, abs=0.05)
    assert far is not None and far.ratio is not None and far.ratio > 8
    assert far.newer.mean == pytest.approx(2 * (1 - 0.1), rel=0.1)  # hardly any cosine with the nearest of six
    assert str(far).startswith("the 600 masks looked at that came since lie ")
    assert f"{far.ratio:.2f} times as far from their nearest centroids as 600 that it was made of" in str(far)


def test_the_figures_are_mean_squared_distances(tmp_path: Path) -> None:
    centroids = np.array([[1, 0], [0, 4]], np.float32)
    (old,) = write_parts(tmp_path / "old", np.array([[1, 1], [0, 5], [3, 0]]), [])  # 1, 1, 4
    (new,) = write_parts(tmp_path / "new", np.array([[1, 0], [0, 8]]), [])  # 0, 16
    found = measure_drift([old], [new], centroids, spherical=False)
    assert found is not None and found.older is not None
    assert (found.newer.mean, found.newer.masks, found.older.mean, found.ratio) == (8.0, 2, 2.0, 4.0)


def test_where_there_is_nothing_to_compare_only_the_distance_is_said(tmp_path: Path) -> None:
    some, none = write_parts(tmp_path / "parts", CENTROIDS, [K])
    alone = measure_drift([none], [some], CENTROIDS, spherical=True)
    assert alone is not None and alone.ratio is None and alone.older is None
    assert "times" not in str(alone)
    at_their_centroids = measure_drift([some], [some], np.float32(np.float16(CENTROIDS)), spherical=False)
    assert at_their_centroids is not None and at_their_centroids.ratio is None
    assert measure_drift([some], [none], CENTROIDS, spherical=True) is None
    assert measure_drift([some], [some], np.zeros((K, DIM), np.float32), spherical=True) is None  # an empty fit


def test_a_sample_of_parts_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "SAMPLED_PARTS", 2)
    old = write_parts(tmp_path / "old", masks(CENTROIDS, 40), [10, 20, 30])
    found = measure_drift(old, old[:1], CENTROIDS, spherical=True)
    assert found is not None and found.older is not None
    assert (found.older.masks, found.older.parts, found.newer.parts) == (20, 2, 1)


def test_a_part_of_another_width_is_named(tmp_path: Path) -> None:
    (old,) = write_parts(tmp_path / "old", CENTROIDS[:, :3], [])
    with pytest.raises(ValueError, match=r"part-00000.parquet: embeddings of 3 values, the centroids have 16; delete"):
        measure_drift([], [old], CENTROIDS, spherical=True)


def test_a_run_whose_source_grew_says_it_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        (photos / f"{number}.jpg").write_bytes(scene(number))
    config = config_of(photos, tmp_path / "run")
    table = make_run(config, ("instances", "clusters"))
    run_stage(table["panoptic"], config, table)
    before = open_run(str(tmp_path / "run"))
    assert Clusters().drift(before, table["clusters"], before.look.changes(table["clusters"])) == ""
    assert "Since the fit" not in report_of(tmp_path / "run").text

    (photos / "7.jpg").write_bytes(scene(7))
    grown = resolve_run(config, open_source(config, extend=True)[0])
    for name in ("instances", "panoptic"):
        run_stage(grown.stages[name], config, grown.stages)
    changes = Look(grown.stages.values()).changes(grown.stages["clusters"])
    assert (changes.parts["instances"].older, changes.parts["instances"].newer) == ([0, 1], [2])
    found = drift_of(grown, grown.stages["clusters"], changes)
    assert found is not None and found.ratio is not None

    capsys.readouterr()
    run_stages(config)
    said = squeezed(capsys.readouterr().err)
    assert (
        f"and 1 came since; the {found.newer.masks} masks looked at that came since lie {found.ratio:.2f} times" in said
    )
    assert "--refit makes it again" in said
    text = squeezed(report_of(tmp_path / "run").text)
    assert "Since the fit The clusters were fitted to 2 parts; 1 came since, and 0 are others now" in text
    assert f"{found.ratio:.2f} times as far" in text

    spoil(Path(grown.stages["instances"].part(2)))
    with pytest.raises(
        StageFailed, match=r"clusters: .*part-00002.parquet: the embedding of mask 0 of the part is NaN"
    ):
        run_stages(config)


def spoil(part: Path) -> None:
    """Make the embedding of a mask NaN, and leave what the part says of what it was made of."""
    said = pq.read_schema(part).metadata
    write_part(part, np.full((1, 384), np.nan), RNG)
    pq.write_table(pq.read_table(part).replace_schema_metadata(said), part)
