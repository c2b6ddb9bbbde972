"""The same messages for people and for machines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime

import pytest

from pipeline.engine import log
from pipeline.engine.log import say
from pipeline.engine.progress import FitProgress, StageProgress
from pipeline.engine.receipts import Receipt

GOOD = Receipt("instances", "abc", 3, True, 1.5, {"ok": 2}, instances=4, host="node-1")
BAD = Receipt("instances", "abc", 4, False, 0.5, error="Traceback ...\nValueError: planted", host="node-2")


@pytest.fixture(autouse=True)
def lines_for_people_again() -> Iterator[None]:
    yield
    log.write_for_people()


def test_people_see_messages_but_not_each_shard(capsys: pytest.CaptureFixture[str]) -> None:
    say("index: [bold]s3://bucket/" + "x" * 200, stage="instances")  # no markup, and one line whatever its length
    with StageProgress("instances", 2) as progress:
        progress.add(GOOD)
        progress.add(BAD)
    printed = capsys.readouterr()
    assert printed.out == ""
    first, *rest = printed.err.splitlines()
    assert first == "index: [bold]s3://bucket/" + "x" * 200
    assert all("shards" in line for line in rest)
    assert "1 failed" in rest[-1]


def test_machines_see_every_shard_as_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    log.write_json_lines()
    say("index: 10 images")
    with StageProgress("instances", 2, line_every_s=1e9) as progress:
        progress.add(GOOD)
        progress.add(BAD)
    index, done, failed, summary = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (index["level"], index["message"]) == ("info", "index: 10 images")
    assert datetime.fromisoformat(index["time"]).utcoffset() is not None
    assert {**done, "time": ""} == {
        "time": "",
        "level": "info",
        "stage": "instances",
        "shard": 3,
        "message": "shard done",
        "host": "node-1",
        "seconds": 1.5,
        "rows": {"ok": 2},
        "instances": 4,
    }
    assert (failed["level"], failed["shard"]) == ("error", 4)
    assert failed["message"] == "shard failed: ValueError: planted"
    assert (summary["stage"], "shard" in summary) == ("instances", False)


def test_a_fit_tells_step_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    log.write_json_lines()
    with FitProgress("train", 100, line_every_s=0.0) as progress:
        progress.update(10, 0.25)
    (entry,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (entry["stage"], entry["step"], entry["loss"]) == ("train", 10, 0.25)


def test_there_is_no_bar_among_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "console", log.Console(force_terminal=True))
    assert log.shows_bars()
    log.write_json_lines()
    assert not log.shows_bars()


def test_other_programs_logs_are_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger().handlers)
    log.write_json_lines()
    assert logging.getLogger().handlers == before
