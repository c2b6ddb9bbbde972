"""What is not taken is counted, with a reason that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.sources import left_out
from pipeline.sources.index import build_index
from pipeline.sources.left_out import Ignored
from pipeline.sources.scan import scan
from tests.pipeline.sources.image_sources import put
from workers import formats


def test_photos_in_formats_that_are_missing_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readable = formats.IMAGE_EXTENSIONS - formats.HEIC - formats.AVIF
    for module in ("pipeline.sources.scan", "pipeline.sources.left_out", "workers.formats"):
        monkeypatch.setattr(f"{module}.IMAGE_EXTENSIONS", readable)
    files = dict.fromkeys(("a.jpg", "b.HEIC", "c.heic", "d.avif", "e.dng", "f.txt", ".g"), b"x")
    put(str(tmp_path / "photos"), files)
    index = build_index(str(tmp_path / "index"), str(tmp_path / "photos"))
    assert index.images == 1
    assert index.ignored.reasons() == {
        ".avif (this Pillow cannot read AVIF: pip install -U pillow)": 1,
        ".dng (photos ending in .dng are not read; convert them)": 1,
        ".heic (HEIC needs pillow-heif: pip install 'u2label[heic]')": 2,
        ".txt": 1,
        "hidden": 1,
    }
    put(str(tmp_path / "heic"), {"a.heic": b"x"})
    with pytest.raises(ValueError, match=r"no image in .*1 \.heic \(HEIC needs pillow-heif: pip install"):
        list(scan(str(tmp_path / "heic")))
    monkeypatch.setattr(left_out, "IMAGE_EXTENSIONS", readable | formats.HEIC)
    assert ".heic (could not be read when the source was listed: run with --reindex)" in index.ignored.reasons()


def test_counts_are_added_up_and_kept() -> None:
    ignored = Ignored({".txt": 1}, hidden=1, not_chosen=2)
    ignored.add(Ignored({".txt": 2, ".md": 1}, special=3, label_maps=4))
    ignored.count_own("run/")
    assert ignored == Ignored({".txt": 3, ".md": 1}, 1, 3, 2, 0, 4, {"run/": 1})
    assert Ignored(**ignored.as_json()) == ignored
    assert Ignored({".txt": 1}).as_json() == {"extensions": {".txt": 1}, "hidden": 0, "special": 0}
    assert str(ignored) == (
        "1 .md, 3 .txt, 1 hidden, 3 links or devices, 4 label maps beside photos (source.label_maps: true takes them), "
        "2 not chosen by source.include and source.exclude, 1 in run/ (of a run, an export or a COCO panoptic JSON)"
    )
