"""What the report says of fitted stuff classes: bars, lines and numbers from their artifacts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.report.charts import BOTTOM, LEFT, RIGHT, TOP
from pipeline.report.fits import read_datus, read_patches, read_refine, read_stego

FLAT = [1] * 50
PEAK = [0] * 25 + [30, 10] + [0] * 22 + [10]  # 60 % just above 0, 20 % beside it, 20 % at the very end


def stego_record(**changes: Any) -> dict[str, Any]:
    """What `pipeline.semantics.stego` writes, without what the report does not read."""
    losses = {"intra": -0.5, "inter": -0.25, "negative": 0.25, "correspondence": -0.125, "cluster": -0.75}
    terms = {"intra_shift": 0.08, "inter_shift": 0.02, "negative_shift": 0.66}
    return {
        "steps": 60,
        "images": 36,
        "settings": {"terms": terms},
        "bins": 50,
        "history": [{"step": step, **losses, "classes_used": 7} for step in (1, 50, 60)],
        "histograms": [{"step": s, "intra": FLAT, "inter": PEAK, "negative": PEAK if s > 1 else FLAT} for s in (1, 60)],
        **changes,
    }


def fit_at(folder: Path, record: Any) -> Stage:
    folder.mkdir(parents=True, exist_ok=True)
    if record is not None:
        (folder / "artifact.json").write_text(json.dumps(record))
    return Stage("semantics_fit", "fit", "f" * 12, str(folder), 1)


def test_the_histograms_of_the_last_step_are_in_percent_with_shifts_and_the_first_step_as_outline(
    tmp_path: Path,
) -> None:
    fit = read_stego(fit_at(tmp_path, stego_record()))
    assert fit is not None
    assert (fit.first_step, fit.last_step, fit.steps, fit.images, fit.shifted) == (1, 60, 60, 36, True)
    intra, _, negative = fit.histograms
    assert [chart.title.split(":")[0] for chart in fit.histograms] == ["Intra", "Inter", "Negative"]
    assert {mark.title.split(": ")[1] for mark in intra.bars} == {"2.00 %"}
    assert [mark.title for mark in negative.bars if mark.height] == [
        "0.00 to 0.04: 60.00 %",
        "0.04 to 0.08: 20.00 %",
        "0.96 to 1.00: 20.00 %",
    ]
    assert negative.bars[25].height == pytest.approx(BOTTOM - TOP)
    assert [rule.label for chart in fit.histograms for rule in chart.rules] == [
        "shift 0.08",
        "shift 0.02",
        "shift 0.66",
    ]
    assert negative.rules[0].at == pytest.approx(LEFT + 1.66 / 2 * (RIGHT - LEFT))
    assert [chart.lines[0].faint for chart in fit.histograms] == [True] * 3


def test_each_loss_has_a_line_over_the_steps(tmp_path: Path) -> None:
    fit = read_stego(fit_at(tmp_path, stego_record()))
    assert fit is not None and fit.diverged is None
    losses, probe, used = fit.history
    assert [line.name for line in losses.lines] == [
        "intra: same photo",
        "inter: neighbour",
        "negative: another photo",
        "all three, weighted",
    ]
    assert losses.lines[0].marks[1].title == "intra: same photo, step 50: -0.5"
    assert [mark.title for mark in probe.lines[0].marks] == [f"loss, step {step}: -0.75" for step in (1, 50, 60)]
    assert used.lines[0].marks[-1].title == "classes, step 60: 7"


def test_one_histogram_has_no_outline(tmp_path: Path) -> None:
    record = stego_record()
    fit = read_stego(fit_at(tmp_path, record | {"histograms": record["histograms"][:1]}))
    assert fit is not None
    assert (fit.first_step, fit.last_step) == (None, 1)
    assert not any(chart.lines for chart in fit.histograms)


def test_a_fit_that_diverged_is_said_and_drawn_as_far_as_it_went(tmp_path: Path) -> None:
    record = stego_record()
    record["history"][1]["negative"] = math.inf
    record["history"][2] = dict.fromkeys(record["history"][2], math.nan) | {"step": 60}
    fit = read_stego(fit_at(tmp_path, record))
    assert fit is not None and fit.diverged == 50
    assert [len(line.marks) for line in fit.history[0].lines] == [2, 2, 1, 2]


def test_an_artifact_without_history_shifts_or_histograms_has_no_charts(tmp_path: Path) -> None:
    fit = read_stego(fit_at(tmp_path, {"steps": 5, "images": 9}))
    assert fit is not None
    assert (fit.histograms, fit.history, fit.shifted, fit.last_step) == ([], [], False, None)


def test_segments_of_each_class_and_the_inertia(tmp_path: Path) -> None:
    record = {"sizes": [30, 0, 10], "iterations": 2, "inertia": [9.0, 5.0, 4.0]}
    fit = read_datus(fit_at(tmp_path, record))
    assert fit is not None
    assert (fit.segments, fit.iterations, fit.empty) == (40, 2, 1)
    inertia, sizes = fit.charts
    assert [mark.title for mark in inertia.lines[0].marks][-1] == "inertia, iteration 3: 4"
    assert [mark.title for mark in sizes.bars] == ["1: 30", "2: 0", "3: 10"]
    assert [tick.label for tick in sizes.x_ticks] == ["1", "2", "3"]


def test_patches_of_each_class_the_merge_and_the_inertia(tmp_path: Path) -> None:
    record = {"sizes": [300, 100], "iterations": 1, "inertia": [0.5, 0.25], "clusters": 8, "components": 64}
    fit = read_patches(fit_at(tmp_path, record))
    assert fit is not None
    assert (fit.patches, fit.clusters, fit.components, fit.iterations) == (400, 8, 64, 1)
    inertia, sizes = fit.charts
    assert [mark.title for mark in inertia.lines[0].marks][-1] == "inertia, iteration 2: 0.25"
    assert [mark.title for mark in sizes.bars] == ["1: 300", "2: 100"]


def test_the_loss_of_the_refining_network(tmp_path: Path) -> None:
    fit = read_refine(fit_at(tmp_path, {"settings": {"steps": 400}, "photos": 36, "loss": [2.0, 1.5]}))
    assert fit is not None
    assert (fit.steps, fit.photos) == (400, 36)
    assert [mark.title for mark in fit.charts[0].lines[0].marks] == ["loss, checkpoint 1: 2", "loss, checkpoint 2: 1.5"]


@pytest.mark.parametrize("read", [read_stego, read_datus, read_patches, read_refine])
def test_a_fit_that_is_not_complete_is_none(tmp_path: Path, read: Any) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    assert read(fit_at(tmp_path, None)) is None


@pytest.mark.parametrize("read", [read_stego, read_datus, read_patches, read_refine])
def test_an_artifact_of_something_else_is_refused(tmp_path: Path, read: Any) -> None:
    with pytest.raises(ConfigError, match=r"artifact\.json has no .*; delete its folder and run again"):
        read(fit_at(tmp_path, {"k": 3}))
    (tmp_path / "artifact.json").write_text('{"steps": ')
    with pytest.raises(ConfigError, match=r"artifact\.json is not what u2label run writes"):
        read(fit_at(tmp_path, None))


def test_bins_cover_all_cosines(tmp_path: Path) -> None:
    fit = read_stego(fit_at(tmp_path, stego_record()))
    assert fit is not None
    bars = fit.histograms[0].bars
    assert len(bars) == 50
    assert np.allclose(np.diff([mark.x for mark in bars]), (RIGHT - LEFT) / 50)
