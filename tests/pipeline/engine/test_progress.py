"""What is said while a fit runs: the step, the loss, and the time that is left."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pipeline.engine import log, progress
from pipeline.engine.progress import FitProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the module sees, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_tell_step_loss_and_time_to_go(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with FitProgress("semantics_fit", 500) as fit:
        for step, at in ((1, 1002.0), (50, 1008.0), (100, 1052.0), (150, 1055.0), (200, 1072.0), (500, 1200.0)):
            clock[0] = at
            fit.update(step, 1 / step)
    assert capsys.readouterr().err.splitlines() == [
        "semantics_fit: step 100/500, loss 0.01, 52 s, 202 s to go",  # 99 steps took 50 s
        "semantics_fit: step 200/500, loss 0.005, 72 s, 106 s to go",
    ]


def test_the_rate_of_a_fit_that_goes_on_is_that_of_its_own_steps(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with FitProgress("refine_fit", 1000) as fit:
        for step, at in ((700, 1020.0), (300, 1040.0), (400, 1060.0)):  # workers died, and went on from a checkpoint
            clock[0] = at
            fit.update(step, 0.5)
    assert capsys.readouterr().err.splitlines() == [
        "refine_fit: step 700/1000, loss 0.5, 20 s",
        "refine_fit: step 300/1000, loss 0.5, 40 s",
        "refine_fit: step 400/1000, loss 0.5, 60 s, 120 s to go",
    ]


def test_on_a_terminal_the_bar_moves_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=screen, force_terminal=True, width=120))
    with FitProgress("semantics_fit", 50) as fit:
        fit.update(20, 0.5)
        fit.update(50, 0.25)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).split("\r")[-1]
    assert "50/50 steps, loss 0.25" in last
