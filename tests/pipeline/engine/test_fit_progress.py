"""The step of a fit, told by whoever trains and read by whoever looks."""

from __future__ import annotations

import threading
from pathlib import Path

from pipeline.engine.fit_progress import Entry, read_progress, watching, write_progress


def test_the_entry_written_last_is_read(tmp_path: Path) -> None:
    assert read_progress(str(tmp_path / "nothing")) is None
    for step in (1, 50):
        write_progress(str(tmp_path / "fit"), 300, {"step": step, "loss": 0.5})
    assert read_progress(str(tmp_path / "fit")) == {"step": 50, "loss": 0.5, "steps": 300}
    assert [path.name for path in (tmp_path / "fit").iterdir()] == ["progress.json"]


def test_a_folder_that_cannot_be_written_stops_no_fit(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    write_progress(str(tmp_path / "file" / "fit"), 300, {"step": 1})
    assert (tmp_path / "file").read_text() == "in the way"


def test_each_entry_of_another_process_is_seen_once(tmp_path: Path) -> None:
    seen: list[Entry] = []
    new = threading.Event()

    def note(entry: Entry) -> None:
        seen.append(entry)
        new.set()

    with watching(str(tmp_path), note, every_s=0.01):
        for step in (1, 50):
            write_progress(str(tmp_path), 300, {"step": step})
            assert new.wait(10)
            new.clear()
        assert not new.wait(0.1)
    assert [entry["step"] for entry in seen] == [1, 50]
    write_progress(str(tmp_path), 300, {"step": 100})
    assert not new.wait(0.1)  # nobody watches any more


def test_without_a_listener_nothing_watches(tmp_path: Path) -> None:
    before = threading.active_count()
    with watching(str(tmp_path), None):
        assert threading.active_count() == before
